"""What a job's shards ask of their owners: for placement, as the data promises it; for a step, as it was."""

from array import array
from collections.abc import Iterable, Mapping

from cola_common.adapters import build
from cola_common.jobs import WirePlan
from cola_common.messages import Calls
from cola_common.tensor import nbytes
from cola_server.fleet import Load, ShardLoad, carried
from cola_server.model import Site
from cola_server.training.prepared import Prepared
from cola_server.training.traffic import gradient_bytes, rows_of, sent_rows

# A worker's speed is that of thin products (rank 8), which wait for memory: work is told in their FLOPs. What else
# takes as long was measured on an x86-64 core for adapters of rank 4 to 64, matrices and perceptrons, 64 to 2,048
# wide, 32 to 1,024 rows: the sum is right within a factor of 2.5 for each, where FLOPs alone are wrong by 100.
DENSE = 0.29
"""A FLOP of a product that does not wait: for rank 8 and the values that it reads the sum is one for each FLOP."""
VALUE = 23.0
"""A value of x or g: checked, decoded, read by the products."""
PARAMETER_BYTE = 29.0
"""Of fp32 parameters, in each step: the optimizer, the delta and its digest."""
CALL = 3e6
"""A product of one site's call, or a gradient that comes in its place, however small."""


class Loads:
    """For one job, under a wire plan."""

    def __init__(self, prepared: Prepared, plan: WirePlan) -> None:
        self._sites = prepared.sites
        self._plan = plan
        self._interval = prepared.spec.hyperparameters.adaptation_interval
        self._a_row, self._a_call, self._a_step = array("d"), array("d"), array("d")
        for site in self._sites:
            adapter = build(site.family, site.d_in, site.d_out)
            made = rows_of(site, plan.rows) == "exact"  # its gradient, where the rows are
            self._a_row.append(0.0 if made else DENSE * adapter.cost(1).vjp_flops + VALUE * (site.d_in + site.d_out))
            self._a_call.append(CALL + (VALUE * adapter.cost(0).parameter_bytes / 4 if made else 0.0))
            self._a_step.append(PARAMETER_BYTE * adapter.cost(0).parameter_bytes)
        tokens, examples = prepared.mean_batch
        self.shards = [self._shard(s, sent_rows(s, plan, tokens=tokens, examples=examples)) for s in self._sites]
        """What a mean batch asks for."""
        self.whole = sum(carried(self.shards, dict.fromkeys(range(len(self.shards)), "")).values(), Load())
        """Of all shards together."""

    def work(self, owners: Mapping[int, str], calls: Iterable[Calls]) -> dict[str, float]:
        """What a step with all these calls asked of each worker, in FLOPs."""
        work = dict.fromkeys(owners.values(), 0.0)
        for call in calls:
            work[owners[call.index]] += self._captured(call.index, call.rows, call.calls)
        for index, stepped in enumerate(self._a_step):
            work[owners[index]] += stepped
        return work

    def _captured(self, index: int, rows: int, calls: int) -> float:
        return self._a_row[index] * rows + self._a_call[index] * calls

    def _shard(self, site: Site, rows: int) -> ShardLoad:
        """`rows` of each call."""
        parameter_bytes = build(site.family, site.d_in, site.d_out).cost(0).parameter_bytes
        values = self._plan.values
        if rows_of(site, self._plan.rows) == "exact":
            g_bytes, x_bytes = gradient_bytes(site, values), 0
        else:
            g_bytes, x_bytes = nbytes(values, (rows, site.d_out)), nbytes(values, (rows, site.d_in))
        return ShardLoad(
            site.index,
            site.group,
            Load(
                parameter_bytes=parameter_bytes,
                work=self._captured(site.index, rows * site.calls, site.calls)
                + self._a_step[site.index] / self._interval,
                nbytes=site.calls * g_bytes + gradient_bytes(site, self._plan.deltas) / self._interval,
            ),
            x_bytes=site.calls * x_bytes,
        )
