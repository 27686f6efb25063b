"""Taps: what is put on the cohort's sites while one step runs, and taken off after it.

At a site with output h = module(x), for the rows of each job:

    ĥ = h + s·f_w(x)      the backward pass runs through the adapter too, by its `pull`;
    ĥ = h                 if the job is merged: its adapter already is in the module's weight;
    ĥ = f_w(x)            at a classification head, which is the job's own;
    ĥ = h + 1/K Σ_j s_j·f_j(x)   over all K members of the job's collaboration, those that lack the site add nothing.

The gradient of a job's loss in its own w is the VJP of s·f_w at x with g; in a collaboration with g / K.

Nothing but ĥ's gradient g = ∂L/∂ĥ is needed of the backward pass: parameters, the base's and the adapters', require
no gradient. Captures are taken in the backward pass, where also under gradient checkpointing each call is seen once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from cola_common.errors import ColaError, Reason
from cola_common.messages import Calls
from cola_server.model.cohort import Captured, Gradient, Member
from cola_server.model.runs import Piece, Run, pieces_of, runs_of
from cola_server.model.site import Site


@dataclass
class _Tapped:
    """A module that is a site of at least one job."""

    site: Site
    """One of theirs: all agree on how the module sees rows."""
    pieces: dict[int, Piece] = field(default_factory=dict)
    """The members' own."""
    means: dict[str, list[Piece]] = field(default_factory=dict)
    """What each collaboration adds here."""
    runs: list[Run] = field(default_factory=list)
    """All members in their order."""
    calls: int = 0
    """That the backward pass has met so far."""


class Taps:
    """Context manager; `length` is the cohort's padded T. With `capture` the backward pass must run inside of it."""

    def __init__(self, module: nn.Module, cohort: Sequence[Member], length: int, *, capture: bool) -> None:
        self._module = module
        self.cohort = tuple(cohort)
        self._length = length
        self._tapped: dict[str, _Tapped] = {}
        for number, member in enumerate(cohort):
            for piece in pieces_of(member.adapter):
                self._tap(piece.site).pieces[number] = piece
        for mean in {member.mean.group: member.mean for member in cohort if member.mean is not None}.values():
            for adapter in mean.adapters:
                for piece in pieces_of(adapter):
                    assert not piece.adapter.replaces, "the mean of heads is no head"
                    self._tap(piece.site).means.setdefault(mean.group, []).append(piece)
        self._alone = len(cohort) == 1 and cohort[0].mean is None
        if not self._alone:
            for tapped in self._tapped.values():
                tapped.runs = runs_of(self.cohort, tapped.pieces, tapped.means, self._sizes(tapped))
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
            run.forward(x, h, out)
        return out

    def pulled(self, tapped: _Tapped, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor | None:
        """What the adapters add to the gradient in x; None where no member has one here."""
        if self._alone:
            return self._pull(tapped.pieces[0], x, g)
        if not any(run.pieces for run in tapped.runs):
            return None
        out = torch.empty_like(x)
        for run in tapped.runs:
            run.pull(x, g, out)
        return out

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

    def _output(self, piece: Piece, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        if piece.adapter.replaces:
            return piece.adapter.forward(piece.parameters, x)
        if self.cohort[0].merged:
            return h.view_as(h)
        return piece.adapter.forward(piece.parameters, x).add_(h)

    def _pull(self, piece: Piece, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor | None:
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
        gradients: dict[int, Gradient] = {}
        for run in tapped.runs:
            gradients |= run.gradients(x, g)
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
            gradient = gradients.get(number) or partial(piece.gradient, xs[number], g_of_member, rows)
            member.sink.capture(Captured(piece.site, call, xs[number], g_of_member, rows, gradient))

    def _check_shared(self, number: int, site: Site, call: int, x: torch.Tensor) -> None:
        """As x is sent once for a group and call: the sites of a group must meet the same one."""
        if self._inputs.setdefault((number, site.group, call), x.data_ptr()) != x.data_ptr():
            problem = "it does not share its input as the probe found"
            raise ColaError(Reason.UNKNOWN_LAYOUT, site=site.name, problem=problem)


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
