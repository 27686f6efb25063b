"""The server's copy of a job's adapter: read by the forward pass, moved by folds. It has no optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from cola_common.adapters import Parameters, build
from cola_common.errors import ColaError, Reason
from cola_common.messages import EncodedTensor
from cola_common.tensor import decode_parameter, digest, encoded_shape, is_finite
from cola_server.model.site import Site


class JobAdapter:
    """One shard a site. `versions[i]` counts the steps folded into shard i; `digests[i]` chains them, as its owner
    does, from the digest of the parameters that this copy started with.
    """

    def __init__(
        self, sites: Sequence[Site], parameters: Sequence[Parameters], device: torch.device, *, version: int = 0
    ) -> None:
        """`parameters` are fp32 and copied; they are at `version`."""
        self.sites = tuple(sites)
        self.adapters = tuple(build(site.family, site.d_in, site.d_out) for site in sites)
        for adapter, shard in zip(self.adapters, parameters, strict=True):
            assert {name: tuple(p.shape) for name, p in shard.items()} == adapter.shapes()
        self.parameters: tuple[Parameters, ...] = tuple(
            {name: shard[name].detach().to(device, torch.float32, copy=True) for name in adapter.shapes()}
            for adapter, shard in zip(self.adapters, parameters, strict=True)  # a file has its parameters by name
        )
        self.versions = [version] * len(self.sites)
        self.digests = [digest.state(shard) for shard in parameters]

    @classmethod
    def initial(
        cls,
        sites: Sequence[Site],
        seed: int,
        device: torch.device,
        init: Mapping[str, Parameters] | None = None,
        *,
        source: str = "the adapter",
    ) -> Self:
        """A job's start: fresh parameters, a function of (seed, site) alone; or those of `init`, by site.

        A head that `init` lacks starts fresh.
        Raises: `ColaError(INVALID_ADAPTER)`, which calls `init` by the name `source`, unless its sites and shapes are
        those of the job.
        """
        given = init or {}
        odd = sorted(given.keys() - {site.name for site in sites})
        if init is not None:
            odd += [site.name for site in sites if site.kind != "head" and site.name not in init]
        if odd:
            raise ColaError(Reason.INVALID_ADAPTER, source=source, problem=f"only one of the two has {odd[0]}")
        parameters = []
        for site in sites:
            adapter = build(site.family, site.d_in, site.d_out)
            shard = given[site.name] if site.name in given else adapter.initial(seed, site.name)
            if {name: tuple(p.shape) for name, p in shard.items()} != adapter.shapes():
                raise ColaError(Reason.INVALID_ADAPTER, source=source, problem=f"its shapes differ at {site.name}")
            parameters.append({name: shard[name] for name in adapter.shapes()})
        return cls(sites, parameters, device)

    def fold(self, index: int, names: Sequence[str], tensors: Sequence[EncodedTensor]) -> None:
        """Adds one step's delta to shard `index`: version s becomes s+1.

        The same fp32 addition as the owner's, so that both hold the same bits. A delta that is refused changes nothing.
        Raises: `ColaError` DELTA_MISMATCH, CHECKSUM_MISMATCH, NON_FINITE_DELTA.
        """
        shapes = self.adapters[index].shapes()
        step = self.versions[index]
        wanted = [encoded_shape(shape, t.codec) for shape, t in zip(shapes.values(), tensors, strict=False)]
        if list(names) != list(shapes) or [t.shape for t in tensors] != wanted:
            problem = f"it has other names or shapes than {self.sites[index].name}"
            raise ColaError(Reason.DELTA_MISMATCH, step=step, problem=problem)
        deltas = [decode_parameter(tensor, shape) for shape, tensor in zip(shapes.values(), tensors, strict=True)]
        if not all(is_finite(delta) for delta in deltas):
            raise ColaError(Reason.NON_FINITE_DELTA, site=self.sites[index].name, step=step)
        for name, delta in zip(names, deltas, strict=True):
            parameter = self.parameters[index][name]
            parameter.add_(delta.to(parameter.device))
        self.digests[index] = digest.chain(self.digests[index], names, tensors)
        self.versions[index] += 1

    def digest(self, indices: Sequence[int]) -> str:
        """What the owner of these shards must say its digest is."""
        return digest.combine([self.digests[index] for index in sorted(indices)])

    def state(self) -> list[Parameters]:
        """Copies of all parameters: fp32, on the CPU, in site order."""
        return [{name: p.to("cpu", copy=True) for name, p in shard.items()} for shard in self.parameters]


@dataclass(frozen=True)
class Mean:
    """What all members of a collaboration add to the base, each with the same share."""

    group: str
    """Who has one name has the same adapters."""
    adapters: tuple[JobAdapter, ...]
    """Of all members in their order, those that have ended included. None has a head."""

    @property
    def share(self) -> float:
        """1/K."""
        return 1 / len(self.adapters)
