"""What a job's captures and deltas weigh on the wire, by what its wire plan makes of them."""

from collections.abc import Sequence
from functools import lru_cache

from cola_common.adapters import build
from cola_common.jobs import Rows, WirePlan
from cola_common.tensor import encoded_shape, nbytes
from cola_server.model import Site
from cola_server.reduce import exact, sketch

_VALID = {"exact": exact.valid_for, "sketch": sketch.valid_for}


def refusal(site: Site, rows: str) -> str | None:
    """Why a site's rows cannot be reduced so; None: they can."""
    return None if rows == "all" else _VALID[rows](build(site.family, site.d_in, site.d_out))


@lru_cache(maxsize=1 << 16)
def rows_of(site: Site, rows: Rows) -> Rows:
    """What becomes of a site's rows in a job that reduces to `rows`: a head among its sites sends all of its few."""
    return rows if refusal(site, rows) is None else "all"


def capture_bytes(sites: Sequence[Site], plan: WirePlan, *, tokens: int, examples: int, bound: bool = False) -> int:
    """What the captures of a batch weigh: x once for a group and call, g for every site and call, or what takes their
    place. `bound`: the most that it may come to, where a sketch can turn out to be no good.
    """
    seen: set[int] = set()
    total = 0
    for site in sites:
        how = rows_of(site, plan.rows)
        if how == "exact":
            total += site.calls * gradient_bytes(site, plan.values)
            continue
        rows = sent_rows(site, plan, tokens=tokens, examples=examples, bound=bound)
        total += site.calls * nbytes(plan.values, (rows, site.d_out))
        if site.group not in seen:
            seen.add(site.group)
            total += site.calls * nbytes(plan.values, (rows, site.d_in))
    return total


def sent_rows(site: Site, plan: WirePlan, *, tokens: int, examples: int, bound: bool = False) -> int:
    """Rows of x and g that are sent of one call; none, where a gradient is sent in their place."""
    rows, how = site.rows(tokens=tokens, examples=examples), rows_of(site, plan.rows)
    if how == "exact":
        return 0
    return rows if how == "all" or (bound and plan.max_error > 0) else min(rows, plan.sketch_rows)


@lru_cache(maxsize=1 << 16)
def gradient_bytes(site: Site, codec: str) -> int:
    """What has the shapes of a site's parameters weighs: a gradient or a delta."""
    shapes = build(site.family, site.d_in, site.d_out).shapes().values()
    return sum(nbytes(codec, encoded_shape(shape, codec)) for shape in shapes)


def delta_bytes(sites: Sequence[Site], codec: str) -> int:
    """What comes back for a step."""
    return sum(gradient_bytes(site, codec) for site in sites)
