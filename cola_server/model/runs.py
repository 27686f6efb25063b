"""Runs: members of a cohort next to each other that are treated alike at one site, and what adapters do to their rows.

Neighbours whose adapters are alike and whose rows are as many are computed by one batched product.
"""

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby

import torch

from cola_common.adapters import Adapter, Parameters
from cola_common.adapters.stacked import LoraStack, Stack, alike, stack
from cola_server.model.adapted import JobAdapter
from cola_server.model.cohort import Gradient, Member
from cola_server.model.site import Site

BATCHED = ("cuda",)
"""Devices on which the gradients of alike neighbours are made in one product. On a CPU that is no faster (0.38 ms for
eight jobs of 64 rows at a site of 576×576, 0.35 ms one by one), and a job's last bits would depend on its neighbours.
"""


@dataclass(frozen=True)
class Piece:
    """An adapter at a site."""

    site: Site
    adapter: Adapter
    parameters: Parameters

    def gradient(self, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor | None) -> tuple[Parameters, float]:
        """The VJP of one job's part of a call, of these of its rows or of all, and its seconds."""
        began = time.perf_counter()
        x_ND, g_NO = (value.detach().reshape(-1, value.shape[-1]) for value in (x, g))
        if rows is not None:
            x_ND, g_NO = x_ND.index_select(0, rows), g_NO.index_select(0, rows)
        return self.adapter.vjp(self.parameters, x_ND, g_NO), time.perf_counter() - began


def pieces_of(adapter: JobAdapter) -> list[Piece]:
    """One for each site."""
    of_sites = zip(adapter.sites, adapter.adapters, adapter.parameters, strict=True)
    return [Piece(site, form, parameters) for site, form, parameters in of_sites]


@dataclass(frozen=True)
class Run:
    """x, h, g and out are those of the whole cohort: (…, width), of which a run takes its own part."""

    start: int
    stop: int
    """Along the first dimension of what the site sees."""
    numbers: Sequence[int]
    """Of the members."""
    pieces: Sequence[Piece]
    """None: nothing is added to these rows."""
    stack: Stack | None = None
    """Of the pieces, a job's rows each; None: all rows go through every piece."""
    share: float = 1.0
    """Of each piece: 1/K in a collaboration."""

    def forward(self, x: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> None:
        """Makes its part of `out` ĥ. `out` may be wider than h, by a head of another job."""
        x, h, out = (value[self.start : self.stop] for value in (x, h, out))
        if self.stack is not None:
            self.stack.add(self._by_job(h), self._by_job(x), self._by_job(out))
        elif len(self.pieces) == 1 and self.pieces[0].adapter.replaces:
            output = self.pieces[0].adapter.forward(self.pieces[0].parameters, x)
            out[..., : output.shape[-1]] = output
        else:
            out[..., : h.shape[-1]] = h
            for piece in self.pieces:
                out.add_(piece.adapter.forward(piece.parameters, x), alpha=self.share)

    def pull(self, x: torch.Tensor, g: torch.Tensor, out: torch.Tensor) -> None:
        """Makes its part of `out` what the pieces add to the gradient in x."""
        x, g, out = (value[self.start : self.stop] for value in (x, g, out))
        if self.stack is not None:
            self.stack.pull(self._by_job(x), self._by_job(g), self._by_job(out))
            return
        out.zero_()
        for piece in self.pieces:
            out.add_(piece.adapter.pull(piece.parameters, x, g[..., : piece.site.d_out]), alpha=self.share)

    def gradients(self, x: torch.Tensor, g: torch.Tensor) -> dict[int, Gradient]:
        """By member, where they are made together; else none. Rows of padding are in them, with a g of zero."""
        if not isinstance(self.stack, LoraStack) or x.device.type not in BATCHED:
            return {}
        x, g = (self._by_job(value[self.start : self.stop].detach()) for value in (x, g))
        together = _Together(self.stack, x, g)
        return {number: partial(together.of, place) for place, number in enumerate(self.numbers)}

    def _by_job(self, values: torch.Tensor) -> torch.Tensor:
        """(J·B, …, width) as (J, rows, width)."""
        return values.reshape(len(self.pieces), -1, values.shape[-1])


def runs_of(
    cohort: Sequence[Member],
    pieces: Mapping[int, Piece],
    means: Mapping[str, Sequence[Piece]],
    sizes: Sequence[int],
) -> list[Run]:
    """All members in their order at one site: `pieces` by member, `means` by collaboration, `sizes` of their parts
    along the first dimension of what the site sees.
    """
    starts = [0, *accumulate(sizes)]
    runs: list[Run] = []
    for key, members in groupby(range(len(cohort)), lambda number: _kind(cohort[number], number, pieces.get(number))):
        numbers = list(members)
        start, stop = starts[numbers[0]], starts[numbers[-1] + 1]
        theirs = [pieces[number] for number in numbers if number in pieces]
        mean = cohort[numbers[0]].mean
        if mean is not None:
            runs.append(Run(start, stop, numbers, means.get(mean.group, []), share=mean.share))
        elif key is None:
            runs.append(Run(start, stop, numbers, []))
        elif len(theirs) > 1:
            stacked = stack([piece.adapter for piece in theirs], [piece.parameters for piece in theirs])
            runs.append(Run(start, stop, numbers, theirs, stacked))
        else:
            runs.append(Run(start, stop, numbers, theirs))
    return runs


def _kind(member: Member, number: int, piece: Piece | None) -> Hashable | None:
    """Neighbours of one kind make a run; None: nothing is added to their rows."""
    if member.mean is not None:
        return "mean", member.mean.group
    if piece is None or (member.merged and not piece.adapter.replaces):
        return None
    kind = alike(piece.adapter)
    return ("alone", number) if kind is None else ("stack", kind, member.examples)


class _Together:
    """The VJPs of a stack at one call, made when the first of them is asked for."""

    def __init__(self, stacked: LoraStack, x_JND: torch.Tensor, g_JNO: torch.Tensor) -> None:
        self._stack = stacked
        self._x_JND, self._g_JNO = x_JND, g_JNO
        self._made: list[Parameters] = []
        self._seconds = 0.0

    def of(self, place: int) -> tuple[Parameters, float]:
        """Of the job at that place."""
        if not self._made:
            began = time.perf_counter()
            self._made = self._stack.vjp(self._x_JND, self._g_JNO)
            self._seconds = (time.perf_counter() - began) / len(self._made)
        return self._made[place], self._seconds
