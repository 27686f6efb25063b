"""Placement as a pure function: which worker owns which shard.

Sites that share an input stay together, so x travels once. A whole job stays on one worker unless it was asked to be
split or no worker has the memory for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STATE_COPIES = 4  # fp32 parameters, gradient, and Adam's two moments


@dataclass(frozen=True)
class ShardLoad:
    """What placement must know of a shard: its number, its input group, and its parameters' fp32 bytes."""

    index: int
    group: int
    parameter_bytes: int


@dataclass(frozen=True)
class Candidate:
    """A worker that may own shards. `load` is the parameter bytes it owns already."""

    worker: str
    memory_bytes: int
    gflops: float
    load: int = 0
    owned: frozenset[int] = field(default_factory=frozenset)
    """Numbers of the job's shards that it has on its disk at the wanted step."""


def place(shards: Sequence[ShardLoad], candidates: Sequence[Candidate], parts: int = 1) -> Mapping[int, str] | None:
    """Shard number -> worker, or None where the candidates cannot carry the job (or are fewer than `parts`).

    Order of preference for a worker: owns more of the job, would have less load for its speed, name (so that the same
    fleet always gives the same answer). `parts` > 1 deals the input groups out to that many workers in turn.
    """
    job = sum(s.parameter_bytes for s in shards)
    ranked = sorted(candidates, key=lambda c: (-len(c.owned), (c.load + job) / max(c.gflops, 1e-9), c.worker))
    groups: dict[int, list[ShardLoad]] = {}
    for shard in shards:
        groups.setdefault(shard.group, []).append(shard)
    for count in range(max(1, parts), len(ranked) + 1):
        chosen = ranked[:count]
        free = {c.worker: c.memory_bytes - c.load * STATE_COPIES for c in chosen}
        owners: dict[int, str] = {}
        for turn, members in enumerate(groups.values()):
            need = sum(s.parameter_bytes for s in members) * STATE_COPIES
            order = [chosen[(turn + i) % count] for i in range(count)]
            fit = next((c for c in order if free[c.worker] >= need), None)
            if fit is None:
                break
            free[fit.worker] -= need
            owners.update((s.index, fit.worker) for s in members)
        if len(owners) == len(shards):
            return owners
    return None


def effort(shards: Sequence[ShardLoad], candidates: Sequence[Candidate], owners: Mapping[int, str]) -> float:
    """What a placement asks of the worker that it asks most of: parameter bytes a GFLOP/s, other jobs' included."""
    loads = {c.worker: c.load for c in candidates if c.worker in owners.values()}
    for shard in shards:
        loads[owners[shard.index]] += shard.parameter_bytes
    return max(loads[c.worker] / max(c.gflops, 1e-9) for c in candidates if c.worker in loads)
