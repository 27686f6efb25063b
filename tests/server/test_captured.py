"""`Captured.gradient`: whoever shares a job's pass, and however products are batched, it is the job's own."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from cola_common.adapters import Parameters, build
from cola_common.errors import ColaError, Reason
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_server.model import BaseModel, BatchResult, Captured, JobAdapter, JobBatch, Mean, Merging, probe, runs, train
from tests.support.models import VOCABULARY, base_of, tiny

CPU = torch.device("cpu")
LENGTH = 16
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "opt": ("q_proj", "fc1"),
    "bert": ("query", "pooler.dense"),
    "twice": ("gate_proj", "up_proj", "q_proj"),
}
Key = tuple[str, int]  # of a site, and a call


class Sink:
    """Keeps each capture's gradient, as asked for while the backward pass runs, and one made of its rows."""

    def __init__(self) -> None:
        self.gradients: dict[Key, Parameters] = {}
        self.of_rows: dict[Key, Parameters] = {}
        self.adapter: JobAdapter | None = None

    def capture(self, captured: Captured) -> None:
        assert self.adapter is not None
        key, site = (captured.site.name, captured.call), captured.site
        gradient, seconds = captured.gradient()
        assert seconds >= 0.0
        self.gradients[key] = {name: value.clone() for name, value in gradient.items()}
        x_ND, g_NO = (value.detach().reshape(-1, value.shape[-1]) for value in (captured.x, captured.g))
        if captured.rows is not None:
            x_ND, g_NO = x_ND[captured.rows], g_NO[captured.rows]
        parameters = self.adapter.parameters[site.index]
        self.of_rows[key] = build(site.family, site.d_in, site.d_out).vjp(parameters, x_ND, g_NO)

    def finish(self) -> None:
        pass


def job(
    base: BaseModel, spec: AdapterSpec, seed: int, *, lengths: Sequence[int] = (16, 9, 4), **fields: object
) -> JobBatch:
    """With an adapter some way into its training, and examples of these lengths."""
    labels = None if base.head_name is None else 3
    sites = probe(base, spec, labels=labels, fold="unmerged")
    generator = torch.Generator().manual_seed(seed)
    adapter = JobAdapter.initial(sites, seed, CPU)
    for shard in adapter.parameters:
        for parameter in shard.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    ids = torch.randint(5, VOCABULARY, (len(lengths), LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()
    ids = ids * mask
    targets = ids.masked_fill(mask == 0, -100) if labels is None else torch.arange(len(lengths)) % labels
    sink = Sink()
    sink.adapter = adapter
    plain = JobBatch(
        input_ids=ids, attention_mask=mask, labels=targets, adapter=adapter, sink=sink, job=f"ftjob-{seed}"
    )
    return replace(plain, **fields)


def sink_of(batch: JobBatch) -> Sink:
    assert isinstance(batch.sink, Sink)
    return batch.sink


def alone(base: BaseModel, batch: JobBatch) -> Sink:
    sink = Sink()
    sink.adapter = batch.adapter
    (result,) = train(base, [replace(batch, sink=sink)])
    assert isinstance(result, BatchResult)
    return sink


def assert_same(found: dict[Key, Parameters], wanted: dict[Key, Parameters], tolerance: float) -> None:
    assert found.keys() == wanted.keys() and found
    for key, gradient in wanted.items():
        assert list(found[key]) == list(gradient)
        for name, value in gradient.items():
            assert found[key][name].shape == value.shape
            size = float(torch.linalg.vector_norm(value))
            assert size > 0, (key, name)
            assert float(torch.linalg.vector_norm(found[key][name] - value)) <= tolerance * size, (key, name)


@pytest.fixture(autouse=True, params=[(), ("cpu",)], ids=["one by one", "together"])
def batched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator neighbours' products are made together; here so, too."""
    monkeypatch.setattr(runs, "BATCHED", request.param)


def base(kind: str) -> BaseModel:
    return base_of(tiny(kind), head_name="classifier" if kind == "bert" else None)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 5, 1)], ids=str)
@pytest.mark.parametrize("kind", list(TARGETS))
def test_neighbours_gradients_are_those_of_each_alone_whatever_their_ranks_and_padding(
    kind: str, ranks: Sequence[int]
) -> None:
    model = base(kind)
    lengths = [(16, 9, 4), (5, 16, 16), (7, 7, 1)]
    cohort = [
        job(model, LoraAdapter(r=r, lora_alpha=3.0 + i, target_modules=TARGETS[kind]), i, lengths=lengths[i])
        for i, r in enumerate(ranks)
    ]
    results = train(model, cohort)
    for batch, result in zip(cohort, results, strict=True):
        assert isinstance(result, BatchResult)
        sink = sink_of(batch)
        assert_same(sink.gradients, sink.of_rows, 1e-5)
        assert_same(sink.gradients, alone(model, batch).gradients, 1e-4)


def test_a_cohort_of_many_kinds_gives_each_its_own_gradient() -> None:
    """Stacks of loras, of linears, and who fits into neither: other examples, an mlp, other sites."""
    model = base("llama")
    specs: list[tuple[AdapterSpec, Sequence[int]]] = [
        (LoraAdapter(r=2, target_modules=("q_proj",)), (16, 9)),
        (LoraAdapter(r=4, target_modules=("q_proj", "v_proj")), (3, 16)),
        (LinearAdapter(scale=0.5, target_modules=("q_proj",)), (16, 2)),
        (LinearAdapter(scale=0.1, target_modules=("q_proj",)), (8, 8)),
        (MlpAdapter(hidden_sizes=(4,), target_modules=("q_proj",)), (16, 5)),
        (LoraAdapter(r=4, target_modules=("down_proj",)), (16, 5)),
        (LoraAdapter(r=4, target_modules=("q_proj",)), (16, 5, 7)),
        (LoraAdapter(r=4, target_modules=("q_proj",)), (9, 5, 7)),
    ]
    cohort = [job(model, spec, i, lengths=lengths) for i, (spec, lengths) in enumerate(specs)]
    train(model, cohort)
    for batch in cohort:
        assert_same(sink_of(batch).gradients, sink_of(batch).of_rows, 1e-5)
        assert_same(sink_of(batch).gradients, alone(model, batch).gradients, 1e-4)


@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
@pytest.mark.parametrize("muted", [0, 1, 2])
def test_a_neighbour_whose_loss_is_not_finite_has_no_gradient_and_no_part_in_the_others(kind: str, muted: int) -> None:
    model = base(kind)
    cohort = [job(model, LoraAdapter(r=2 + i, target_modules=TARGETS[kind]), i) for i in range(3)]
    wanted = [alone(model, batch) for batch in cohort]
    for shard in cohort[muted].adapter.parameters[:1]:
        shard["B"].fill_(float("nan"))
    results = train(model, cohort)
    error = results[muted]
    assert isinstance(error, ColaError) and error.reason == Reason.NON_FINITE_LOSS
    assert sink_of(cohort[muted]).gradients == {}
    for number in {0, 1, 2} - {muted}:
        assert isinstance(results[number], BatchResult)
        sink = sink_of(cohort[number])
        assert_same(sink.gradients, sink.of_rows, 1e-5)
        assert_same(sink.gradients, wanted[number].gradients, 1e-4)


def test_in_a_collaboration_it_is_the_gradient_of_a_members_part_of_the_mean() -> None:
    model = base("llama")
    spec = LoraAdapter(r=3, target_modules=TARGETS["llama"])
    members = [job(model, spec, i) for i in range(2)]
    mean = Mean("ftjob-0", tuple(batch.adapter for batch in members))
    cohort = [*(replace(batch, mean=mean) for batch in members), job(model, spec, 5)]
    train(model, cohort)
    for batch in cohort:
        assert_same(sink_of(batch).gradients, sink_of(batch).of_rows, 1e-5)
    for batch in cohort[:2]:
        assert_same(sink_of(batch).gradients, alone(model, batch).gradients, 1e-4)
    # The mean of an adapter and itself is the adapter, and each of the two has half of its gradient.
    double = [replace(batch, mean=Mean("ftjob-0", (batch.adapter, batch.adapter))) for batch in members]
    whole = [alone(model, replace(batch, mean=Mean("ftjob-0", (batch.adapter,)))) for batch in members]
    for batch, one in zip(double, whole, strict=True):
        halves = {k: {n: 2 * v for n, v in shard.items()} for k, shard in alone(model, batch).gradients.items()}
        assert_same(halves, one.gradients, 1e-4)


def test_in_a_merged_job_it_is_the_same_as_unmerged() -> None:
    model = base("llama")
    batch = job(model, LoraAdapter(r=3, target_modules=("q_proj", "down_proj")), 0)
    unmerged = alone(model, batch)
    merging = Merging(model, batch.adapter)
    merging.merge()
    merged = alone(model, replace(batch, merged=True))
    merging.restore()
    assert_same(merged.gradients, merged.of_rows, 1e-5)
    assert_same(merged.gradients, unmerged.gradients, 1e-4)
