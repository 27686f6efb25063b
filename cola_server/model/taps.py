"""Taps: what is put on the cohort's sites while one step runs, and taken off after it.

At a site with output h = module(x), for the rows of each job:

    ĥ = h + s·f_w(x)      the backward pass runs through the adapter too, by its `pull`;
    ĥ = h                 if the job is merged: its adapter already is in the module's weight;
    ĥ = f_w(x)            at a classification head, which is the job's own;
    ĥ = h + 1/K Σ_j s_j·f_j(x)   over all K members of the job's collaboration, those that lack the site add nothing.

The gradient of a job's loss in its own w is the VJP of s·f_w at x with g; in a collaboration with g / K.
Neighbours in the cohort whose adapters are alike and whose rows are as many are computed by one batched product.

Nothing but ĥ's gradient g = ∂L/∂ĥ is needed of the backward pass: parameters, the base's and the adapters', require
no gradient. Captures are taken in the backward pass, where also under gradient checkpointing each call is seen once.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import nn

from cola_common.adapters import Adapter, Parameters
from cola_common.adapters.stacked import LoraStack, Stack, alike, stack
from cola_common.errors import ColaError, Reason
from cola_common.messages import Calls
from cola_server.model.adapted import JobAdapter, Mean
from cola_server.model.site import Site

BATCHED = ("cuda",)
"""Devices on which the gradients of alike neighbours are made in one product. On a CPU that is no faster (0.38 ms for
eight jobs of 64 rows at a site of 576×576, 0.35 ms one by one), and a job's last bits would depend on its neighbours.
"""


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
    gradient: Callable[[], tuple[Parameters, float]]
    """The job's own VJP of these rows, on `BATCHED` devices made with those of neighbours that are alike; and seconds,
    the job's part of what that took.
    """


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


@dataclass(frozen=True)
class _Piece:
    """An adapter at a site."""

    site: Site
    adapter: Adapter
    parameters: Parameters


@dataclass
class _Tapped:
    """A module that is a site of at least one job."""

    site: Site
    """One of theirs: all agree on how the module sees rows."""
    pieces: dict[int, _Piece] = field(default_factory=dict)
    """The members' own."""
    means: dict[str, list[_Piece]] = field(default_factory=dict)
    """What each collaboration adds here."""
    runs: list["_Run"] = field(default_factory=list)
    """All members in their order."""
    calls: int = 0
    """That the backward pass has met so far."""


@dataclass(frozen=True)
class _Run:
    """Members next to each other that are treated alike at a site."""

    start: int
    stop: int
    """Along the first dimension of what the site sees."""
    numbers: Sequence[int]
    """Of the members."""
    pieces: Sequence[_Piece]
    """None: nothing is added to these rows."""
    stack: Stack | None = None
    """Of the pieces, a job's rows each; None: all rows go through every piece."""
    share: float = 1.0
    """Of each piece: 1/K in a collaboration."""


class Taps:
    """Context manager; `length` is the cohort's padded T. With `capture` the backward pass must run inside of it."""

    def __init__(self, module: nn.Module, cohort: Sequence[Member], length: int, *, capture: bool) -> None:
        self._module = module
        self.cohort = tuple(cohort)
        self._length = length
        self._tapped: dict[str, _Tapped] = {}
        for number, member in enumerate(cohort):
            for piece in _pieces(member.adapter):
                self._tap(piece.site).pieces[number] = piece
        for mean in {member.mean.group: member.mean for member in cohort if member.mean is not None}.values():
            for adapter in mean.adapters:
                for piece in _pieces(adapter):
                    assert not piece.adapter.replaces, "the mean of heads is no head"
                    self._tap(piece.site).means.setdefault(mean.group, []).append(piece)
        self._alone = len(cohort) == 1 and cohort[0].mean is None
        if not self._alone:
            for tapped in self._tapped.values():
                tapped.runs = self._runs(tapped)
        # The graph starts where this enters it, at the first site: nothing below is differentiated.
        self._root = torch.zeros((), requires_grad=capture)
        self._inputs: dict[tuple[int, int, int], int] = {}
        self._muted: set[int] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, tapped in self._tapped.items():
            module = self._module.get_submodule(name)
            self._hooks.append(module.register_forward_hook(self._hook(tapped)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def calls(self, number: int) -> tuple[Calls, ...]:
        """The shards of a member that the backward pass has met, in site order."""
        member = self.cohort[number]
        return tuple(
            Calls(
                index=site.index,
                calls=count,
                rows=count * site.rows(tokens=member.tokens, examples=member.examples),
            )
            for site in member.adapter.sites
            if (count := self._tapped[site.name].calls)
        )

    def mute(self, number: int) -> None:
        """A member's captures are not wanted: its loss takes no part in the backward pass."""
        self._muted.add(number)

    def _tap(self, site: Site) -> _Tapped:
        return self._tapped.setdefault(site.name, _Tapped(site))

    # --- forward ----------------------------------------------------------------------------------------------------

    def _hook(self, tapped: _Tapped) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], h: torch.Tensor) -> torch.Tensor:
            x = args[0]
            self._check(tapped, x)
            adapted: torch.Tensor = _Tap.apply(self._root, h, x, self, tapped)  # type: ignore[no-untyped-call]
            return adapted

        return hook

    def _check(self, tapped: _Tapped, x: torch.Tensor) -> None:
        """A site may see rows in no other layout than in the probe: the slices would be other jobs' rows."""
        site = tapped.site
        examples = sum(member.examples for member in self.cohort)
        wanted = {
            "tokens": (examples, self._length),
            "flat": (examples * self._length,),
            "examples": (examples,),
        }[site.layout]
        if tuple(x.shape[:-1]) != wanted:
            problem = f"shape {tuple(x.shape)} where the probe found {site.layout}"
            raise ColaError(Reason.UNKNOWN_LAYOUT, site=site.name, problem=problem)

    def adapted(self, tapped: _Tapped, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """ĥ of all members."""
        if self._alone:
            return self._output(tapped.pieces[0], x, h)
        # A head's labels are its job's: the widest of them makes the width of all.
        widths = [p.site.d_out if p.adapter.replaces else h.shape[-1] for p in tapped.pieces.values()]
        width = max(widths, default=h.shape[-1])
        out = h.new_zeros(*h.shape[:-1], width) if width > h.shape[-1] else torch.empty_like(h)
        for run in tapped.runs:
            self._run_forward(run, x[run.start : run.stop], h[run.start : run.stop], out[run.start : run.stop])
        return out

    def pulled(self, tapped: _Tapped, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor | None:
        """What the adapters add to the gradient in x; None where no member has one here."""
        if self._alone:
            return self._pull(tapped.pieces[0], x, g)
        if not any(run.pieces for run in tapped.runs):
            return None
        out = torch.empty_like(x)
        for run in tapped.runs:
            self._run_pull(run, x[run.start : run.stop], g[run.start : run.stop], out[run.start : run.stop])
        return out

    def _runs(self, tapped: _Tapped) -> list[_Run]:
        starts = [0, *accumulate(self._sizes(tapped))]
        runs: list[_Run] = []
        for key, members in groupby(range(len(self.cohort)), lambda number: self._kind(tapped, number)):
            numbers = list(members)
            start, stop = starts[numbers[0]], starts[numbers[-1] + 1]
            pieces = [tapped.pieces[number] for number in numbers if number in tapped.pieces]
            mean = self.cohort[numbers[0]].mean
            if mean is not None:
                runs.append(_Run(start, stop, numbers, tapped.means.get(mean.group, []), share=mean.share))
            elif key is None:
                runs.append(_Run(start, stop, numbers, []))
            elif len(pieces) > 1:
                stacked = stack([piece.adapter for piece in pieces], [piece.parameters for piece in pieces])
                runs.append(_Run(start, stop, numbers, pieces, stacked))
            else:
                runs.append(_Run(start, stop, numbers, pieces))
        return runs

    def _kind(self, tapped: _Tapped, number: int) -> Hashable | None:
        """Neighbours of one kind make a run; None: nothing is added to their rows."""
        member, piece = self.cohort[number], tapped.pieces.get(number)
        if member.mean is not None:
            return "mean", member.mean.group
        if piece is None or (member.merged and not piece.adapter.replaces):
            return None
        kind = alike(piece.adapter)
        return ("alone", number) if kind is None else ("stack", kind, member.examples)

    def _run_forward(self, run: _Run, x: torch.Tensor, h: torch.Tensor, out: torch.Tensor) -> None:
        if run.stack is not None:
            count = len(run.pieces)
            run.stack.add(_by_job(h, count), _by_job(x, count), _by_job(out, count))
        elif len(run.pieces) == 1 and run.pieces[0].adapter.replaces:
            output = run.pieces[0].adapter.forward(run.pieces[0].parameters, x)
            out[..., : output.shape[-1]] = output
        else:
            out[..., : h.shape[-1]] = h
            for piece in run.pieces:
                out.add_(piece.adapter.forward(piece.parameters, x), alpha=run.share)

    def _run_pull(self, run: _Run, x: torch.Tensor, g: torch.Tensor, out: torch.Tensor) -> None:
        if run.stack is not None:
            count = len(run.pieces)
            run.stack.pull(_by_job(x, count), _by_job(g, count), _by_job(out, count))
            return
        out.zero_()
        for piece in run.pieces:
            out.add_(piece.adapter.pull(piece.parameters, x, g[..., : piece.site.d_out]), alpha=run.share)

    def passed(self, tapped: _Tapped, h_shape: torch.Size, g: torch.Tensor) -> torch.Tensor:
        """The gradient in h: g, but where a head took the module's place, whose h has no part in the loss."""
        replaced = [number for number, piece in tapped.pieces.items() if piece.adapter.replaces]
        if not replaced:
            return g
        gradient = g.new_zeros(h_shape)
        parts, gs = (value.split_with_sizes(self._sizes(tapped)) for value in (gradient, g))
        for number, part in enumerate(parts):
            if number not in replaced:
                part.copy_(gs[number][..., : h_shape[-1]])
        return gradient

    def _output(self, piece: _Piece, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        if piece.adapter.replaces:
            return piece.adapter.forward(piece.parameters, x)
        if self.cohort[0].merged:
            return h.view_as(h)
        return piece.adapter.forward(piece.parameters, x).add_(h)

    def _pull(self, piece: _Piece, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor | None:
        if self.cohort[0].merged and not piece.adapter.replaces:
            return None  # the module's own backward pass goes through the merged weight
        return piece.adapter.pull(piece.parameters, x, g[..., : piece.site.d_out])

    def _sizes(self, tapped: _Tapped) -> list[int]:
        """Lengths of the members' parts along the first dimension of what the site sees."""
        flat = tapped.site.layout == "flat"
        return [member.examples * (self._length if flat else 1) for member in self.cohort]

    # --- backward ---------------------------------------------------------------------------------------------------

    def captured(self, tapped: _Tapped, x: torch.Tensor, g: torch.Tensor) -> None:
        """The backward pass is at a call of the site: hands each member its part."""
        call = tapped.calls
        tapped.calls += 1
        sizes = self._sizes(tapped)
        xs, gs = (torch.split(value, sizes) if len(sizes) > 1 else (value,) for value in (x, g))
        gradients = self._stacked(tapped, x, g)
        for number, piece in tapped.pieces.items():
            if number in self._muted:
                continue
            member = self.cohort[number]
            assert member.sink is not None, "a captured batch has somewhere to go"
            self._check_shared(number, piece.site, call, x)
            rows = None if piece.site.layout == "examples" else member.rows
            g_of_member = gs[number][..., : piece.site.d_out]
            if member.mean is not None:
                g_of_member = g_of_member * member.mean.share
            gradient = gradients.get(number) or partial(_vjp, piece, xs[number], g_of_member, rows)
            member.sink.capture(Captured(piece.site, call, xs[number], g_of_member, rows, gradient))

    def _stacked(
        self, tapped: _Tapped, x: torch.Tensor, g: torch.Tensor
    ) -> dict[int, Callable[[], tuple[Parameters, float]]]:
        """By member, for those whose VJPs are made together. Rows of padding are in them, with a g of zero."""
        gradients: dict[int, Callable[[], tuple[Parameters, float]]] = {}
        for run in tapped.runs:
            if isinstance(run.stack, LoraStack) and x.device.type in BATCHED:
                together = _Together(run, x, g)
                gradients |= {number: partial(together.of, place) for place, number in enumerate(run.numbers)}
        return gradients

    def _check_shared(self, number: int, site: Site, call: int, x: torch.Tensor) -> None:
        """As x is sent once for a group and call: the sites of a group must meet the same one."""
        if self._inputs.setdefault((number, site.group, call), x.data_ptr()) != x.data_ptr():
            problem = "it does not share its input as the probe found"
            raise ColaError(Reason.UNKNOWN_LAYOUT, site=site.name, problem=problem)


def _pieces(adapter: JobAdapter) -> list[_Piece]:
    of_sites = zip(adapter.sites, adapter.adapters, adapter.parameters, strict=True)
    return [_Piece(site, form, parameters) for site, form, parameters in of_sites]


def _vjp(piece: _Piece, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor | None) -> tuple[Parameters, float]:
    began = time.perf_counter()
    x_ND, g_NO = (value.detach().reshape(-1, value.shape[-1]) for value in (x, g))
    if rows is not None:
        x_ND, g_NO = x_ND.index_select(0, rows), g_NO.index_select(0, rows)
    return piece.adapter.vjp(piece.parameters, x_ND, g_NO), time.perf_counter() - began


class _Together:
    """The VJPs of a run's pieces at one call, made when the first of them is asked for."""

    def __init__(self, run: _Run, x: torch.Tensor, g: torch.Tensor) -> None:
        self._run = run
        self._x, self._g = x[run.start : run.stop].detach(), g[run.start : run.stop].detach()
        self._made: list[Parameters] = []
        self._seconds = 0.0

    def of(self, place: int) -> tuple[Parameters, float]:
        """Of the run's member at that place."""
        if not self._made:
            assert isinstance(self._run.stack, LoraStack)
            began, count = time.perf_counter(), len(self._run.pieces)
            self._made = self._run.stack.vjp(_by_job(self._x, count), _by_job(self._g, count))
            self._seconds = (time.perf_counter() - began) / count
        return self._made[place], self._seconds


def _by_job(values: torch.Tensor, count: int) -> torch.Tensor:
    """(J·B, …, width) as (J, rows, width)."""
    return values.reshape(count, -1, values.shape[-1])


class _Tap(torch.autograd.Function):
    """ĥ from h and x for all members, as one node of the graph. Its backward pass tells `taps` of (x, g) and goes on
    through the module (by h) and through the adapters (by x).
    """

    @staticmethod
    def forward(
        ctx: Any, root: torch.Tensor, h: torch.Tensor, x: torch.Tensor, taps: Taps, tapped: _Tapped
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.h_shape = h.shape
        ctx.taps = taps
        ctx.tapped = tapped
        return taps.adapted(tapped, x, h)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[None, torch.Tensor | None, torch.Tensor | None, None, None]:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        taps, tapped = ctx.taps, ctx.tapped
        taps.captured(tapped, x, g)
        _, of_h, of_x, *_ = ctx.needs_input_grad
        return (
            None,
            taps.passed(tapped, ctx.h_shape, g) if of_h else None,
            taps.pulled(tapped, x, g) if of_x else None,
            None,
            None,
        )
