"""What an adapter is when it is written to a folder or read from one."""

from dataclasses import dataclass
from typing import Literal

from cola_common.adapters.base import Parameters
from cola_common.families import Family, Linear, Lora, Mlp

Task = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True)
class Shard:
    """The adapter at one site, or the job's classification head."""

    site: str
    family: Family
    parameters: Parameters


@dataclass(frozen=True)
class Imported:
    """An adapter as it was read: fp32 on the CPU, finite, and of shapes that agree with each other.

    Whether they also agree with a base model, the reader of the folder cannot know.
    """

    family: Lora | Linear | Mlp
    shards: dict[str, Parameters]
    """By site."""
    head: Shard | None
    """The classification head, if one was saved."""

    @property
    def parameters(self) -> dict[str, Parameters]:
        """All of it by site, the head with the rest."""
        return self.shards if self.head is None else {**self.shards, self.head.site: self.head.parameters}
