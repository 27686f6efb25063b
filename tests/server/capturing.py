"""Captures made by hand, and what a packer makes of them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cola_common.adapters import Parameters, build
from cola_common.families import Family, Lora
from cola_common.jobs import WirePlan
from cola_common.messages import Capture, Part
from cola_common.tensor import decode, decode_parameter
from cola_server.model import Captured, Site
from cola_server.training.captures import CapturePacker

LORA = Lora(r=2, scale=1.0)


def site(index: int, group: int, family: Family = LORA, d_in: int = 6, d_out: int = 4, **fields: Any) -> Site:
    plain = {"kind": "linear", "layout": "tokens", "calls": 1, "tied": None, **fields}
    return Site(index=index, name=f"site{index}", family=family, d_in=d_in, d_out=d_out, group=group, **plain)


def values(seed: int, width: int, examples: int = 2, tokens: int = 8) -> torch.Tensor:
    return torch.randn(examples, tokens, width, generator=torch.Generator().manual_seed(seed))


def parameters(of: Site) -> Parameters:
    """None of them zero."""
    shapes = build(of.family, of.d_in, of.d_out).shapes()
    generator = torch.Generator().manual_seed(of.index)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kept(whole: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows that are no padding."""
    flat = whole.reshape(-1, whole.shape[-1])
    return flat if rows is None else flat[rows]


def vjp(of: Site, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor | None = None) -> Parameters:
    """What a worker would make of the rows."""
    return build(of.family, of.d_in, of.d_out).vjp(parameters(of), kept(x, rows), kept(g, rows))


def captured(of: Site, call: int, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor | None = None) -> Captured:
    return Captured(of, call, x, g, rows, lambda: (vjp(of, x, g, rows), 0.25))


@dataclass
class Received:
    """What came, by worker."""

    sites: Sequence[Site]
    frames: dict[str, list[Capture]] = field(default_factory=lambda: defaultdict(list))

    def parts(self, worker: str) -> list[Part]:
        return [part for frame in self.frames[worker] for part in frame.parts]

    def tensors(self, worker: str) -> dict[Part, torch.Tensor]:
        shapes = {s.index: build(s.family, s.d_in, s.d_out).shapes() for s in self.sites}
        return {
            part: decode_parameter(tensor, shapes[part.index][part.name]) if part.kind == "w" else decode(tensor)
            for frame in self.frames[worker]
            for part, tensor in zip(frame.parts, frame.tensors, strict=True)
        }


def packer(
    sites: Sequence[Site],
    travels: WirePlan | Mapping[str, WirePlan],
    owners: Mapping[int, str] | None = None,
    *,
    seed: int = 0,
    batch: int = 7,
    emit: Callable[[str, Capture], None] | None = None,
) -> tuple[CapturePacker, Received]:
    """One worker, `w`, owns everything without `owners`."""
    owners = owners or {s.index: "w" for s in sites}
    received = Received(sites)
    wires = dict.fromkeys(owners.values(), travels) if isinstance(travels, WirePlan) else travels
    sink = CapturePacker(
        job="job",
        epoch=2,
        batch=batch,
        step=3,
        seed=seed,
        sites=sites,
        wires=wires,
        owners=owners,
        emit=emit or (lambda worker, frame: received.frames[worker].append(frame)),
    )
    return sink, received
