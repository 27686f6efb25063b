"""Placement as a pure function: which worker owns which shard.

A batch is done when the slowest owner is done with its part, so a placement's price is the longest of its owners'
seconds, and a fixed part for each owner more than one. Sites that share an input stay together, so x travels once. To
find the cheapest placement is scheduling on unrelated machines with memory bounds: few placements are all tried; of
many, the largest groups go first, each to where it would be done soonest (LPT; Graham 1969), and then groups move and
swap as long as that helps.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

STATE_COPIES = 5  # fp32 parameters, gradient, Adam's two moments, and what a codec of deltas has not let through
MOVED_COPIES = 2  # of the parameters, where a shard changes its owner: the moments; parameters are sent in any case
PART_SECONDS = 0.02
"""What each owner more than one costs a batch: its messages, and that the last of several is waited for."""
STAY = 1.25
"""A job that has its state somewhere stays there unless it would be done so much sooner elsewhere: what is known of
workers is noisy."""
FEW = 1000  # placements, to be all tried
SHORTLIST = 8  # of the fastest workers that a job may be split over; further ones only where memory asks for them


@dataclass(frozen=True, slots=True)
class Load:
    """What a batch asks of a worker. What a step asks for is spread over its batches."""

    parameter_bytes: int = 0
    """fp32, once; the memory for state is `STATE_COPIES` times that."""
    work: float = 0.0
    """FLOPs as a worker's speed is measured in."""
    nbytes: float = 0.0
    """On the wire, both ways."""

    def __add__(self, other: "Load") -> "Load":
        return Load(self.parameter_bytes + other.parameter_bytes, self.work + other.work, self.nbytes + other.nbytes)

    def __sub__(self, other: "Load") -> "Load":
        return Load(self.parameter_bytes - other.parameter_bytes, self.work - other.work, self.nbytes - other.nbytes)


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """What placement must know of a shard: its number, its input group, what it asks for without the group's x, and
    the bytes of that x.
    """

    index: int
    group: int
    load: Load
    x_bytes: float = 0.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """A worker that may own shards."""

    worker: str
    memory_bytes: int
    speed: float
    """FLOP/s."""
    rate: float
    """Bytes/s on the way to it."""
    window_bytes: int = 0
    """Captures that it may have to hold at most."""
    load: Load = field(default_factory=Load)
    """What other jobs ask of it."""
    owned: frozenset[int] = field(default_factory=frozenset)
    """Numbers of the job's shards whose state it has."""
    codecs: frozenset[str] = field(default_factory=frozenset)
    reductions: frozenset[str] = field(default_factory=frozenset)
    """What of a wire plan it knows."""

    def seconds(self, total: Load) -> float:
        """Until it is done with so much: this job's batch, and one of every other job's that it has shards of."""
        return total.work / max(self.speed, 1e-9) + total.nbytes / max(self.rate, 1e-9)

    def holds(self, total: Load) -> bool:
        """Whether it has the memory for so much, other jobs included."""
        return total.parameter_bytes * STATE_COPIES + min(self.window_bytes, total.nbytes) <= self.memory_bytes


@dataclass(frozen=True)
class _Group:
    """Shards that stay together."""

    shards: tuple[int, ...]
    load: Load


_Parts = dict[Candidate, list[_Group]]


def place(
    shards: Sequence[ShardLoad],
    candidates: Sequence[Candidate],
    parts: int | None = None,
    *,
    batches: int = 0,
    restart: float = 0.0,
    most: float = math.inf,
) -> Mapping[int, str] | None:
    """Shard number -> worker, or None where the candidates cannot carry the job, or are fewer than `parts`: so many
    owners are asked for where there are so many groups, and no more unless memory does. None: as many as are fastest.

    Where candidates own state, the job stays with it unless that pays: what a batch gains, but no more than `most`
    seconds, over the `batches` that are left, must exceed the way of the state and `restart` seconds. The same fleet,
    in whatever order, always gives the same answer.
    """
    groups = _grouped(shards)
    whole = sum((group.load for group in groups), Load())
    ranked = sorted(candidates, key=lambda c: (c.seconds(c.load + whole), c.worker))
    least = parts or 1
    if len(ranked) < least:
        return None
    best = _cheapest(groups, ranked, least, parts or len(ranked))
    stay = _staying(groups, ranked, least)
    if best is None or stay is None:
        return _owners(best or stay or {}) or None
    now, then = _price(stay), _price(best)
    gain = min(now - then, most)
    pays = now > then * STAY and gain * batches > restart + _way(best) - _way(stay)
    return _owners(best if pays else stay)


def carried(shards: Sequence[ShardLoad], owners: Mapping[int, str]) -> Mapping[str, Load]:
    """What the job asks of each of its owners."""
    loads: dict[str, Load] = {}
    for group in _grouped(shards):
        owner = owners[group.shards[0]]
        loads[owner] = loads.get(owner, Load()) + group.load
    return loads


# --- the cheapest ---------------------------------------------------------------------------------------------------


def _cheapest(groups: Sequence[_Group], ranked: Sequence[Candidate], parts: int, most: int) -> _Parts | None:
    """Of all placements, where they are few; else of the whole job on each worker, and of the job split over the
    fastest 2, 3, …. One of more than `most` owners only where there is no other.
    """

    def price(split: _Parts) -> tuple[int, float]:
        return max(0, len(split) - most), _price(split)

    if len(ranked) ** len(groups) <= FEW:
        return min(_all(groups, ranked, parts), key=price, default=None)
    found: list[_Parts] = []
    able = next((c for c in ranked if c.holds(_total(c, groups))), None)
    if able is not None and min(parts, len(groups)) <= 1:
        found.append({able: list(groups)})
    for count in _counts(len(ranked)):
        if count > SHORTLIST and found:
            break
        split = _spread(groups, ranked[:count], parts) if count >= parts else None
        if split is not None:
            found.append(split)
    return min(found, key=price, default=None)


def _all(groups: Sequence[_Group], workers: Sequence[Candidate], parts: int) -> Iterator[_Parts]:
    for owners in itertools.product(workers, repeat=len(groups)):
        split: _Parts = {}
        for owner, group in zip(owners, groups, strict=True):
            split.setdefault(owner, []).append(group)
        if len(split) >= min(parts, len(groups)) and all(c.holds(_total(c, own)) for c, own in split.items()):
            yield split


def _counts(workers: int) -> Iterator[int]:
    """2, 3, … and, beyond the shortlist, twice as many each time."""
    count = 2
    while count < workers:
        yield count
        count += 1 if count < SHORTLIST else count
    if workers > 1:
        yield workers


def _spread(groups: Sequence[_Group], workers: Sequence[Candidate], parts: int) -> _Parts | None:
    """The job split over some of these."""

    def longest(group: _Group) -> float:
        return min(c.seconds(group.load) for c in workers)

    def choosy(group: _Group) -> float:
        """How much depends on who gets it."""
        return max(c.seconds(group.load) for c in workers)

    def largest(group: _Group) -> float:
        return group.load.parameter_bytes

    found: list[_Parts] = []
    for size in (longest, choosy, largest):  # each order leads elsewhere; the last one packs where others find no room
        split = _filled({}, sorted(groups, key=size, reverse=True), workers)
        if split is not None and _dealt(split, workers, parts):
            _improve(split, workers, parts)
            found.append({worker: own for worker, own in split.items() if own})
    return min(found, key=_price, default=None)


def _filled(parts: _Parts, groups: Sequence[_Group], workers: Sequence[Candidate]) -> _Parts | None:
    """`parts` and the groups, each in turn where it is done soonest; None where one finds no room."""
    filled = {c: list(parts.get(c, [])) for c in workers}
    totals = {c: _total(c, own) for c, own in filled.items()}
    for group in groups:
        after = [(c, totals[c] + group.load) for c in workers]
        able = [(c.seconds(total), at, c, total) for at, (c, total) in enumerate(after) if c.holds(total)]
        if not able:
            return None
        *_, soonest, totals[soonest] = min(able)
        filled[soonest].append(group)
    return {c: own for c, own in filled.items() if own}


def _dealt(split: _Parts, workers: Sequence[Candidate], parts: int) -> bool:
    """Gives workers that have nothing a group until there are `parts` owners. Returns: whether that went."""
    wanted = min(parts, sum(map(len, split.values())))
    while len(split) < wanted:
        moves = [
            (c.seconds(c.load + group.load), at, owner, c)
            for owner, own in split.items()
            if len(own) > 1
            for at, group in enumerate(own)
            for c in workers
            if c not in split and c.holds(c.load + group.load)
        ]
        if not moves:
            return False
        _, at, owner, to = min(moves, key=lambda move: move[0])
        split[to] = [split[owner].pop(at)]
    return True


def _improve(split: _Parts, workers: Sequence[Candidate], parts: int) -> None:
    """Moves or swaps groups of the owner that is done last for as long as that, and who it is done with, are done
    sooner. It ends: each time the owners' seconds, largest first, become less in the order of dictionaries.
    """
    totals = {c: _total(c, split.get(c, [])) for c in workers}

    def options(last: Candidate) -> Iterator[tuple[float, Candidate, _Group, _Group | None]]:
        kept = sum(map(bool, split.values())) <= parts  # every owner there is must stay one
        mine = _kinds(split[last])
        for c in workers:
            theirs = _kinds(split.get(c, [])) if c is not last else []
            for group in mine if c is not last else []:
                for back in [None, *theirs]:
                    emptied = len(split[last]) == 1 and back is None
                    if emptied and theirs and kept:
                        continue
                    returned = back.load if back else Load()
                    left, right = totals[last] - group.load + returned, totals[c] - returned + group.load
                    if c.holds(right) and last.holds(left):
                        yield max(0.0 if emptied else last.seconds(left), c.seconds(right)), c, group, back

    while True:
        last = max((c for c in workers if split.get(c)), key=lambda c: c.seconds(totals[c]))
        best = min(options(last), key=lambda option: option[0], default=None)
        if best is None or best[0] >= last.seconds(totals[last]) * (1 - 1e-9):
            return
        _, to, group, back = best
        split[last].remove(group)
        split.setdefault(to, []).append(group)
        if back is not None:
            split[to].remove(back)
            split[last].append(back)
        totals[last], totals[to] = _total(last, split[last]), _total(to, split[to])


def _kinds(groups: Sequence[_Group]) -> list[_Group]:
    """One group of each kind: a model's layers are alike."""
    return list({group.load: group for group in groups}.values())


# --- staying --------------------------------------------------------------------------------------------------------


def _staying(groups: Sequence[_Group], ranked: Sequence[Candidate], parts: int) -> _Parts | None:
    """Every group with who has its state, and those that nobody has where they are done soonest: with one of these
    owners, if so many are enough.
    """
    kept: _Parts = {}
    rest = []
    for group in groups:
        owner = next((c for c in ranked if c.owned.issuperset(group.shards)), None)
        if owner is None:
            rest.append(group)
        else:
            kept.setdefault(owner, []).append(group)
    if not kept or not all(c.holds(_total(c, own)) for c, own in kept.items()):
        return None
    among = list(kept) if len(kept) >= parts else ranked
    found = _filled(kept, rest, among) or _filled(kept, rest, ranked)
    return found if found is not None and _dealt(found, ranked, parts) else None


def _way(parts: _Parts) -> float:
    """Seconds until the state of shards that come to other owners is there."""
    return sum(
        MOVED_COPIES * group.load.parameter_bytes / max(c.rate, 1e-9)
        for c, own in parts.items()
        for group in own
        if not c.owned.issuperset(group.shards)
    )


# --- sums -----------------------------------------------------------------------------------------------------------


def _grouped(shards: Sequence[ShardLoad]) -> list[_Group]:
    members: dict[int, list[ShardLoad]] = {}
    for shard in shards:
        members.setdefault(shard.group, []).append(shard)
    return [
        _Group(tuple(s.index for s in own), sum((s.load for s in own), Load(nbytes=max(s.x_bytes for s in own))))
        for own in members.values()
    ]


def _total(worker: Candidate, groups: Sequence[_Group]) -> Load:
    return sum((group.load for group in groups), worker.load)


def _price(parts: _Parts) -> float:
    return max(c.seconds(_total(c, own)) for c, own in parts.items()) + PART_SECONDS * (len(parts) - 1)


def _owners(parts: _Parts) -> Mapping[int, str]:
    return {index: c.worker for c, own in parts.items() for group in own for index in group.shards}
