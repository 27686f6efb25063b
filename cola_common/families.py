"""Adapter families as plain data: what a shard is, apart from its parameters. Free of torch.

`cola_common.adapters.build` turns one of these into the adapter that computes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """s·B A x with A r×d_in and B d_out×r; s = lora_alpha / r."""

    r: int
    scale: float


@dataclass(frozen=True)
class Linear:
    """s·W x with W d_out×d_in, no bias."""

    scale: float


@dataclass(frozen=True)
class Mlp:
    """s·f(x), f a perceptron with ReLU and the given hidden sizes, biases throughout."""

    hidden_sizes: tuple[int, ...]
    scale: float


@dataclass(frozen=True)
class Head:
    """A classification head, W x + b: it takes the place of the module's output instead of adding to it."""

    bias: bool


Family = Lora | Linear | Mlp | Head
