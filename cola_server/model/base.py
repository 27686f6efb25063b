"""A frozen base model with all that is known about it."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal-lm", "sequence-classification"]


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
    gradient_checkpointing: bool
