"""What a job takes: against the parts that it is made of, as they are when it runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.jobs import JobSpec
from cola_common.messages import OptimizerPlan, ShardPlan
from cola_server.jobs import Artefacts
from cola_server.model import BaseModel, JobAdapter, JobBatch, Site, train
from cola_server.training.captures import CapturePacker
from cola_server.training.catalogue import Catalogue
from cola_server.training.estimate import Bounds, Room, heaviest_plan, sizes
from cola_server.training.numerics import Numerics
from cola_server.training.observed import Observed
from cola_server.training.traffic import capture_bytes, delta_bytes
from cola_worker.shard import Shard
from tests.support.models import load_tiny

FILE = "file-0123456789abcdef01234567"
BATCH, LENGTH = 3, 32
ROWS = BATCH * LENGTH
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4},
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp", "hidden_sizes": (8, 8)},
}
WINDOW, BUFFER = 1 << 20, 4 << 20


@pytest.fixture(scope="module", params=["llama", "opt", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def numerics() -> Iterator[Numerics]:
    numerics = Numerics()
    yield numerics
    numerics.close()


class Server:
    """A catalogue on one model, with one uploaded file."""

    def __init__(self, base: BaseModel, numerics: Numerics, folder: Path, job_bytes: int = 1 << 40) -> None:
        self.artefacts = Artefacts(folder / "data")
        self.observed = Observed()
        self.room = Room(job_bytes, 64, {base.name: 1000}, torch.device("cpu"))
        self.catalogue = Catalogue(
            {base.name: base},
            numerics,
            self.artefacts,
            buffer_bytes=BUFFER,
            window_bytes=WINDOW,
            room=self.room,
            observed=self.observed,
        )
        self.base = base
        self.labels = ["0", "1"] if base.head_name is not None else []

    def spec(self, adapter: str = "lora", rows: list[str] | None = None, **fields: Any) -> JobSpec:
        lines = [{"text": text, **({"label": i % 2} if self.labels else {})} for i, text in enumerate(rows or ["w1"])]
        (self.artefacts.tmp.parent / "files" / FILE).write_text("\n".join(map(json.dumps, lines)))
        hyperparameters = {"batch_size": BATCH, "max_length": LENGTH, **fields.pop("hyperparameters", {})}
        return JobSpec.parse(
            {
                "model": self.base.name,
                "training_file": FILE,
                "adapter": ADAPTERS[adapter],
                "hyperparameters": hyperparameters,
                **fields,
            }
        )

    def sites(self, spec: JobSpec) -> tuple[Site, ...]:
        return self.catalogue.sites(spec, len(self.labels) or None)


@pytest.fixture
def server(base: BaseModel, numerics: Numerics, tmp_path: Path) -> Iterator[Server]:
    server = Server(base, numerics, tmp_path)
    yield server
    server.artefacts.close()


def of(spec: JobSpec, sites: tuple[Site, ...], room: Room) -> Any:
    return sizes(spec, sites, room, heaviest_plan(spec, sites), Bounds(BUFFER, WINDOW))


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}]
)
@pytest.mark.parametrize("deltas", ["fp32", "int8"])
@pytest.mark.parametrize("family", list(ADAPTERS))
def test_parameters_and_state_are_those_of_server_and_worker(
    server: Server, family: str, deltas: str, optimizer: dict[str, Any]
) -> None:
    spec = server.spec(family, hyperparameters=optimizer, wire={"deltas": deltas})
    sites = server.sites(spec)
    found = of(spec, sites, server.room)
    adapter = JobAdapter.initial(sites, 0, torch.device("cpu"))
    held = sum(p.nbytes for shard in adapter.parameters for p in shard.values())
    assert found.adapter == held
    h = spec.hyperparameters
    plan = OptimizerPlan(h.optimizer, 1e-3, h.momentum, False, 0.0, 0.0, "constant", 0, 1)
    kept = 0
    for site, parameters in zip(sites, adapter.state(), strict=True):
        shard = Shard(
            ShardPlan(site.index, site.name, site.family, site.d_in, site.d_out, site.group), parameters, plan, deltas
        )
        shard.step({name: torch.ones_like(p) for name, p in shard.parameters.items()}, 1e-3)
        state = shard.optimizer_state().items()
        kept += sum(p.nbytes for p in shard.parameters.values())
        kept += sum(value.nbytes for name, value in state if not name.endswith(".step"))  # one number each
    assert found.snapshot == kept


@pytest.mark.parametrize(
    "wire", [{}, {"rows": "all"}, {"rows": "all", "values": "bf16"}, {"rows": "all", "values": "fp16"}], ids=str
)
@pytest.mark.parametrize("family", ["lora", "mlp"])
def test_captures_are_what_a_full_batch_sends(server: Server, family: str, wire: dict[str, Any]) -> None:
    spec = server.spec(family, wire=wire)
    sites = server.sites(spec)
    adapter = JobAdapter.initial(sites, 0, torch.device("cpu"))
    packer = CapturePacker(
        job="job",
        epoch=1,
        batch=0,
        step=0,
        seed=0,
        sites=sites,
        wires={"only": heaviest_plan(spec, sites)},
        owners={site.index: "only" for site in sites},
        emit=lambda _worker, _frame: None,
    )
    ids = torch.randint(8, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(BATCH, dtype=torch.long) if server.labels else ids
    train(
        server.base,
        [
            JobBatch(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                labels=labels,
                adapter=adapter,
                sink=packer,
                job="job",
            )
        ],
    )
    assert of(spec, sites, server.room).captures == packer.sent["only"]


def test_what_admission_counts_is_what_the_job_keeps_and_its_pass_beyond_the_room_for_that(server: Server) -> None:
    spec = server.spec()
    sites = server.sites(spec)
    found = of(spec, sites, server.room)
    beyond = (ROWS - server.room.cohort_tokens) * 1000
    assert found.server == found.adapter + found.captures + 2 * found.snapshot + beyond
    assert found.passing == ROWS * 1000
    roomy = Room(server.room.job_bytes, ROWS, server.room.token_bytes, server.room.device)
    assert of(spec, sites, roomy).server == found.server - beyond
    on_gpu = Room(server.room.job_bytes, ROWS, server.room.token_bytes, torch.device("cuda"))
    assert of(spec, sites, on_gpu).server == found.adapter  # captures and snapshots are in host memory


def test_batches_of_an_interval_may_all_be_on_their_way_as_far_as_the_buffer_allows(server: Server) -> None:
    def captures(interval: int) -> int:
        spec = server.spec(hyperparameters={"adaptation_interval": interval})
        return int(of(spec, server.sites(spec), server.room).captures)

    assert captures(3) == 3 * captures(1)
    assert captures(10_000) == BUFFER


def test_a_merged_job_keeps_the_weights_that_it_is_merged_into(server: Server) -> None:
    merged, plain = (server.spec(fold=fold, adapter="lora") for fold in ("merged", "unmerged"))
    if server.base.head_name is None:
        targets = {"target_modules": ("q_proj", "v_proj")}
        merged, plain = (
            spec.model_copy(update={"adapter": spec.adapter.model_copy(update=targets)}) for spec in (merged, plain)
        )
    sites = server.sites(plain)
    weights = sum(
        server.base.module.get_submodule(site.name).weight.numel() * 4 for site in sites if site.kind != "head"
    )
    more = of(merged, sites, server.room).adapter - of(plain, sites, server.room).adapter
    assert more == weights


def test_a_job_that_can_never_fit_is_refused_with_both_numbers_and_can_be_estimated(
    base: BaseModel, numerics: Numerics, tmp_path: Path
) -> None:
    first = Server(base, numerics, tmp_path / "first")
    spec = first.spec()
    need = first.catalogue.need(spec, first.sites(spec))
    first.artefacts.close()
    for job_bytes, fits in ((need, True), (need - 1, False)):
        server = Server(base, numerics, tmp_path / str(fits), job_bytes)
        spec = server.spec()
        estimate = server.catalogue.estimate(spec, 1, server.labels)
        assert (estimate.server_bytes, estimate.server_limit_bytes) == (need, job_bytes)
        if fits:
            server.catalogue.check(spec)
        else:
            with pytest.raises(ColaError) as refused:
                server.catalogue.check(spec)
            assert refused.value.reason == Reason.JOB_TOO_LARGE
            assert str(need) in refused.value.message and str(job_bytes) in refused.value.message
        server.artefacts.close()


def test_steps_bytes_and_time_follow_the_data(server: Server) -> None:
    rows = [" ".join(["w1"] * 20)] * 7  # three batches, of 3, 3 and 1; padded to 32
    spec = server.spec(rows=rows, hyperparameters={"n_epochs": 2, "adaptation_interval": 2})
    sites = server.sites(spec)
    tokens = len(server.base.tokenizer(rows[0])["input_ids"])
    found = server.catalogue.estimate(spec, len(rows), server.labels)
    assert (found.examples, found.total_steps) == (7, 3)
    assert (found.wire_plan.rows, found.wire_plan.values, found.wire_plan.deltas) == ("exact", "fp32", "fp32")
    batch = capture_bytes(sites, found.wire_plan, tokens=BATCH * tokens, examples=BATCH)
    assert found.sent_bytes == batch * 6 // 3
    assert found.trainable_parameters * 4 == found.received_bytes
    assert found.seconds is None
    server.observed.passed(server.base.name, tokens=100, seconds=1.0)
    assert server.catalogue.estimate(spec, len(rows), server.labels).seconds is None
    server.observed.waited(seconds=1.0)
    passing = 6 * BATCH * 32 / 100
    assert server.catalogue.estimate(spec, len(rows), server.labels).seconds == pytest.approx(passing + 3 * 1.0)
    server.observed.link(rate := (found.sent_bytes + found.received_bytes) / 2.5)
    assert server.catalogue.estimate(spec, len(rows), server.labels).seconds == pytest.approx(passing + 3 * 2.5)
    server.observed.link(rate * 100)
    assert server.catalogue.estimate(spec, len(rows), server.labels).seconds == pytest.approx(passing + 3 * 1.0)


@pytest.mark.parametrize("family", list(ADAPTERS))
def test_an_estimate_tells_what_would_travel_over_the_link_that_the_last_jobs_have_found(
    server: Server, family: str
) -> None:
    spec = server.spec(family, rows=["w1 w2"] * 9, wire={"max_error": 0.2})
    unknown = server.catalogue.estimate(spec, 9, server.labels)
    assert unknown.wire_plan.error == 0.0
    server.observed.passed(server.base.name, tokens=100, seconds=0.01)
    server.observed.link(1e12)
    fast = server.catalogue.estimate(spec, 9, server.labels)
    assert fast.wire_plan.error == 0.0
    server.observed.link(1e3)
    slow = server.catalogue.estimate(spec, 9, server.labels)
    assert 0.0 < slow.wire_plan.error <= 0.2
    assert slow.sent_bytes + slow.received_bytes < fast.sent_bytes + fast.received_bytes
    sites = server.sites(spec)
    assert slow.received_bytes == delta_bytes(sites, slow.wire_plan.deltas)


@pytest.mark.parametrize(("family", "rows"), [("linear", "exact"), ("mlp", "exact"), ("mlp", "sketch")])
def test_a_reduction_that_is_not_valid_for_the_adapter_is_refused_before_there_is_a_job(
    server: Server, family: str, rows: str
) -> None:
    spec = server.spec(family, wire={"rows": rows})
    calls = [lambda: server.catalogue.check(spec), lambda: server.catalogue.estimate(spec, 1, server.labels)]
    for call in calls:
        with pytest.raises(ColaError) as refused:
            call()
        assert refused.value.reason == Reason.INVALID_JOB
        assert refused.value.details["param"] == "wire.rows"


@pytest.mark.parametrize("tight", ["buffer", "window"])
def test_a_batch_that_fits_as_a_gradient_is_refused_as_rows(server: Server, tight: str) -> None:
    plain, thin = (server.spec(wire={"rows": rows, "values": "fp32"}) for rows in ("all", "exact"))
    sites = [site for site in server.sites(plain) if site.kind != "head"]
    batch = capture_bytes(sites, heaviest_plan(plain, sites), tokens=ROWS, examples=BATCH)
    largest = 4 * ROWS * max(max(site.d_in, site.d_out) for site in sites)
    bounds, limit = {
        "buffer": (Bounds(batch - 1, batch), batch - 1),
        "window": (Bounds(batch, largest - 1), largest - 1),
    }[tight]
    problem = bounds.problem(plain, sites, heaviest_plan(plain, sites))
    assert problem is not None and problem.reason == Reason.BATCH_TOO_LARGE
    assert problem.details["limit"] == str(limit)
    assert bounds.problem(thin, sites, heaviest_plan(thin, sites)) is None
    assert Bounds(batch, largest).problem(plain, sites, heaviest_plan(plain, sites)) is None


def test_averages_follow_what_is_observed_and_models_differ() -> None:
    observed = Observed()
    observed.waited(1.0)
    observed.passed("slow", 10, 10.0)
    observed.passed("fast", 10, 1.0)
    assert observed.seconds("slow", 5, 2, 0) == pytest.approx(7.0)
    assert observed.seconds("fast", 5, 2, 2000) == pytest.approx(2.5)
    observed.link(1000.0)
    assert observed.seconds("fast", 5, 2, 2000) == pytest.approx(4.5)
    assert observed.seconds("unseen", 5, 1, 0) is None
    for _ in range(200):
        observed.passed("slow", 10, 20.0)
    assert observed.seconds("slow", 1, 0, 0) == pytest.approx(2.0, rel=1e-3)
