"""What a job adapts, as plain data: the probe writes it down once and everything else reads it."""

from dataclasses import dataclass
from typing import Literal

from cola_common.families import Family

Kind = Literal["linear", "conv1d", "head"]
Layout = Literal["tokens", "flat", "examples"]


@dataclass(frozen=True)
class Site:
    """A module of the base model that a job adapts, or the job's own classification head."""

    index: int
    """The shard's number: position among the job's sites in model order, the head last."""
    name: str
    """The module's path in the base model."""
    kind: Kind
    family: Family
    d_in: int
    d_out: int
    layout: Layout
    """How the module sees rows: `tokens` (B, T, d), `flat` (B·T, d), `examples` (B, d)."""
    calls: int
    """How often a forward pass calls the module."""
    group: int
    """Sites of one group get the very same x at each of their calls."""
    tied: str | None
    """Another module that holds the same weight, if one does."""

    def rows(self, *, tokens: int, examples: int) -> int:
        """Rows of one call in a batch of so many examples with so many tokens that are no padding."""
        return examples if self.layout == "examples" else tokens
