"""A frozen base model with all that is known about it."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal-lm", "sequence-classification"]


class Occupant(Protocol):
    """A merged adapter that can take a base's place."""

    def merge(self) -> None: ...
    def restore(self) -> None: ...


class Seat:
    """Whose merged weights the base holds now, if anyone's: many jobs share the base, and each takes it before it
    computes. For the numerics thread.
    """

    def __init__(self) -> None:
        self._occupant: Occupant | None = None

    def take(self, occupant: Occupant | None) -> None:
        """Makes the base hold this one's weights, or its own. Raises: as `Occupant.merge`, its own in it then."""
        if occupant is not self._occupant:
            self.leave(self._occupant)
            if occupant is not None:
                occupant.merge()
                self._occupant = occupant

    def refresh(self, occupant: Occupant) -> None:
        """The occupant's adapter has changed; where another one holds the seat, it is merged when it takes it again."""
        if occupant is self._occupant:
            occupant.merge()

    def leave(self, occupant: Occupant | None) -> None:
        """Gives the base its own weights back, if it holds this one's."""
        if occupant is not None and occupant is self._occupant:
            self._occupant = None
            occupant.restore()


@dataclass(frozen=True)
class BaseModel:
    """Many jobs share one of these. One thread at a time may compute with it: its hooks and weights belong to one
    cohort at a time.
    """

    name: str
    path: str
    """Where it was loaded from: a folder, a hub id or a GGUF file."""
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    device: torch.device
    dtype: torch.dtype
    head_name: str | None
    """Path of the classification head, in whose place each job puts its own; None for `causal-lm`."""
    parameters: int
    digest: str
    """xxh3-128, hex, of all weights but those of the head: two models of one digest compute the same."""
    gradient_checkpointing: bool
    seat: Seat = field(default_factory=Seat)
