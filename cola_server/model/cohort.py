"""A cohort: the members that share a pass, and where what is captured of each goes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from cola_common.adapters import Parameters
from cola_server.model.adapted import JobAdapter, Mean
from cola_server.model.site import Site

Gradient = Callable[[], tuple[Parameters, float]]
"""Makes a job's VJP of its rows at one call of a site, and tells the job's part of the seconds that it took."""


@dataclass(frozen=True)
class Captured:
    """A call of a site, as one job's rows saw it. x and g belong to autograd and must not be changed."""

    site: Site
    call: int
    """Numbered as the backward pass meets them."""
    x: torch.Tensor
    """(…, d_in)"""
    g: torch.Tensor
    """(…, d_out)"""
    rows: torch.Tensor | None
    """Numbers of those that are no padding, once the leading dimensions are flattened; None: all."""
    gradient: Gradient
    """Of these rows; on devices where that is faster (`runs.BATCHED`) made with those of neighbours that are alike."""


class Sink(Protocol):
    """Where one job's captures of one batch go."""

    def capture(self, captured: Captured) -> None:
        """May run on a thread of autograd's."""

    def finish(self) -> None:
        """The pass is over. Raises: `ColaError` for what went wrong with this job's captures."""


@dataclass(frozen=True)
class Member:
    """A job in a cohort: `examples` rows of the (B, T) batch, after those of the members before it."""

    adapter: JobAdapter
    merged: bool
    examples: int
    rows: torch.Tensor | None
    """Numbers of the tokens that are no padding in the flattened examples·T, on the base's device; None: all."""
    tokens: int
    """How many those are."""
    sink: Sink | None
    """None where nothing is captured."""
    mean: Mean | None = None
    """What its rows see in the place of its own adapter alone."""
