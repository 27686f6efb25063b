"""What each tenant may have at once, and its part of the model's time."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quota:
    """Of one tenant."""

    max_running: int = 8
    """Jobs that train at once; the others wait in line."""
    max_queued: int = 100
    """Jobs that have not ended, running ones included; no more are taken."""
    weight: float = 1.0
    """Its part of the model's time, against the weights of those who use it too."""


@dataclass(frozen=True)
class Quotas:
    """Of all tenants."""

    default: Quota = Quota()
    named: Mapping[str, Quota] = field(default_factory=dict)

    def of(self, tenant: str) -> Quota:
        """A tenant that nobody named, such as one whose token was taken away while its jobs go on, has the default."""
        return self.named.get(tenant, self.default)
