"""Which jobs share the next pass through a base model.

A job that has a batch asks for a pass and waits. As soon as the model is free, whoever's turn it is (`Shares`) takes a
seat, and others with the same base and padded length are put beside it, up to a budget in tokens. Jobs whose deltas
are on their way are not waited for: the next cohort runs meanwhile. Where there are few jobs, a cohort takes half of
them: of two that take turns, neither is to be small.

The numerics thread chooses by itself: the model would be idle while the event loop is busy with something else.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cola_server.model import BaseModel, BatchResult, JobBatch, Merging, train
from cola_server.training.numerics import Numerics
from cola_server.training.shares import Shares


@dataclass(frozen=True)
class Pass:
    """What a job got of a pass."""

    result: BatchResult
    seconds: float
    """Of the model's time, this job's part by its tokens."""


@dataclass(eq=False)
class Request:
    """A job's wish for a pass. `batch` is called on the numerics thread."""

    job: str
    tenant: str
    base: BaseModel
    length: int
    """Padded."""
    tokens: int
    """Padded: examples × length."""
    kind: str
    """Requests of one kind are neighbours in the cohort: their adapters may be computed together."""
    merging: Merging | None
    batch: Callable[[], JobBatch]
    answer: "asyncio.Future[Pass]" = field(init=False)

    @property
    def company(self) -> object:
        """Who has the same may share its pass. A merged job has its weights in the base: it is alone."""
        return self.base, self.length, self.job if self.merging is not None else None

    def __post_init__(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()


class Cohorts:
    """`train` belongs to the event loop; passes follow one another on the numerics thread while anybody waits."""

    def __init__(self, numerics: Numerics, shares: Shares, budget: int) -> None:
        """`budget`: padded tokens of a cohort; a job whose own batch is larger runs alone."""
        self._numerics = numerics
        self._shares = shares
        self._budget = budget
        self._lock = threading.Lock()  # of all that follows, and of the shares
        self._waiting: list[Request] = []
        self._last: tuple[object, dict[str, int]] = (None, {})
        """The last cohort: its company, and tokens by job. Who of it does not wait again is on its way."""
        self._going = False
        """Whether a pass runs, or is to run."""
        self._seconds_a_token = 1.0  # until a pass tells: all clocks are at 0 then, and any number weighs the seats

    async def train(self, request: Request) -> Pass:
        """Waits for the pass that takes this job along. Raises: `ColaError` where the job is at fault."""
        with self._lock:
            self._waiting.append(request)
            going, self._going = self._going, True
        if not going:
            self._numerics.post(self._pass)
        try:
            return await request.answer
        finally:
            with self._lock:
                if request in self._waiting:  # cancelled before its turn
                    self._waiting.remove(request)

    def rest(self, tenant: str) -> None:
        """The tenant has no running job any more."""
        with self._lock:
            self._shares.rest(tenant)

    def _pass(self) -> None:
        """On the numerics thread: one pass. The next one goes behind what the thread was asked to do meanwhile."""
        with self._lock:
            cohort = self._next()
        if cohort:
            began = time.perf_counter()
            results: Sequence[BatchResult | Exception]
            try:
                results = _train(cohort)
            except Exception as error:  # noqa: BLE001 - nothing is swallowed: every job of the cohort gets it
                results = [error] * len(cohort)
            self._share_out(cohort, results, time.perf_counter() - began)
        with self._lock:
            going = self._going = bool(self._waiting)
        if going:
            self._numerics.post(self._pass)

    def _next(self) -> list[Request]:
        """The cohort that should run now; its members leave the waiting."""
        tenants = self._shares.order({request.tenant for request in self._waiting})
        if not tenants:
            return []
        cohort = [next(request for request in self._waiting if request.tenant == tenants[0])]
        taken = Counter({cohort[0].tenant: cohort[0].tokens})
        others = [r for r in self._waiting if r is not cohort[0] and r.company == cohort[0].company]
        budget = self._fair_half([*cohort, *others])
        while others := [r for r in others if taken.total() + r.tokens <= budget]:
            ahead = {r.tenant: self._shares.ahead(r.tenant, taken[r.tenant] * self._seconds_a_token) for r in others}
            seat = min(others, key=lambda r: ahead[r.tenant])
            others.remove(seat)
            cohort.append(seat)
            taken[seat.tenant] += seat.tokens
        for request in cohort:
            self._waiting.remove(request)
        self._last = cohort[0].company, {request.job: request.tokens for request in cohort}
        # Neighbours that are alike are computed as one.
        return sorted(cohort, key=lambda request: request.kind)

    def _fair_half(self, waiting: Sequence[Request]) -> int:
        """The budget of a cohort out of these: where others come back soon, it leaves them as much as it takes."""
        here = {request.job: request.tokens for request in waiting}
        company, last = self._last
        away = sum(last[job] for job in last.keys() - here.keys()) if company == waiting[0].company else 0
        return min(self._budget, -(-(sum(here.values()) + away) // 2)) if away else self._budget

    def _share_out(self, cohort: Sequence[Request], results: Sequence[BatchResult | Exception], seconds: float) -> None:
        tokens = sum(request.tokens for request in cohort)
        with self._lock:
            self._seconds_a_token = seconds / tokens
            for request in cohort:
                self._shares.used(request.tenant, seconds * request.tokens / tokens)
        loop = cohort[0].answer.get_loop()
        for request, result in zip(cohort, results, strict=True):
            loop.call_soon_threadsafe(_answer, request, result, seconds * request.tokens / tokens)


def _answer(request: Request, result: BatchResult | Exception, seconds: float) -> None:
    if request.answer.done():
        return  # its job was cancelled meanwhile
    if isinstance(result, BatchResult):
        request.answer.set_result(Pass(result, seconds))
    else:
        request.answer.set_exception(result)


def _train(cohort: Sequence[Request]) -> list[BatchResult | Exception]:
    """A job whose batch cannot be made is not in the pass."""
    base = cohort[0].base
    batches: list[JobBatch] = []
    broken: dict[int, Exception] = {}
    for number, request in enumerate(cohort):
        try:
            batches.append(request.batch())
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: the job gets it, and it alone
            broken[number] = error
    base.seat.take(cohort[0].merging)
    trained = iter(train(base, batches) if batches else [])
    return [broken[number] if number in broken else next(trained) for number in range(len(cohort))]
