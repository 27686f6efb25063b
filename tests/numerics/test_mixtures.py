"""Equality with ordinary back-propagation where a model or a cohort is out of the ordinary."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.adapters import Parameters
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_common.messages import OptimizerPlan
from cola_server.model import BaseModel, Captured, JobAdapter, JobBatch, Site, evaluate, probe, train
from tests.support.in_process import Batch, InProcess, called
from tests.support.models import VOCABULARY, base_of, load_tiny, tiny
from tests.support.oracle import back_propagate

PLAN = OptimizerPlan(
    optimizer="sgd",
    learning_rate=0.05,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    lr_scheduler_type="constant",
    warmup_steps=0,
    total_steps=6,
)
FAMILIES: dict[str, Callable[[tuple[str, ...] | str], AdapterSpec]] = {
    "lora": lambda targets: LoraAdapter(r=4, lora_alpha=6.0, target_modules=targets),
    "linear": lambda targets: LinearAdapter(scale=0.7, target_modules=targets),
    "mlp": lambda targets: MlpAdapter(hidden_sizes=(5,), scale=1.3, target_modules=targets),
}


class Kept:
    """A sink that keeps copies."""

    def __init__(self) -> None:
        self.captures: list[tuple[str, int, torch.Tensor, torch.Tensor]] = []

    def capture(self, captured: Captured) -> None:
        flat_x, flat_g = (values.reshape(-1, values.shape[-1]) for values in (captured.x, captured.g))
        if captured.rows is not None:
            flat_x, flat_g = flat_x[captured.rows], flat_g[captured.rows]
        self.captures.append((captured.site.name, captured.call, flat_x.clone(), flat_g.clone()))

    def finish(self) -> None:
        pass


def ragged(seed: int, *, examples: int = 3, classes: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (examples, 16), generator=generator)
    mask = (torch.arange(16) < torch.randint(4, 17, (examples, 1), generator=generator)).long()
    ids = ids * mask
    if classes is not None:
        return Batch(ids, mask, torch.randint(0, classes, (examples,), generator=generator))
    return Batch(ids, mask, ids.masked_fill(mask == 0, -100))


def stirred(sites: tuple[Site, ...], seed: int = 0) -> JobAdapter:
    """An adapter some way into its training: no parameter is zero."""
    adapter = JobAdapter.initial(sites, seed, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for shard in adapter.parameters:
        for parameter in shard.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return JobAdapter(sites, adapter.state(), torch.device("cpu"))


def by_site(adapter: JobAdapter) -> dict[str, Parameters]:
    return {site.name: shard for site, shard in zip(adapter.sites, adapter.state(), strict=True)}


def close(run: dict[str, Parameters], wanted: dict[str, Parameters], tolerance: float = 1e-5) -> None:
    for site, parameters in wanted.items():
        for name, value in parameters.items():
            assert float((run[site][name] - value).norm()) <= tolerance * float(value.norm()), (site, name)


@pytest.mark.parametrize("fold", ["unmerged", "merged"])
@pytest.mark.parametrize("family", ["lora", "linear"])
def test_a_module_called_twice_is_captured_twice_and_trains_as_by_back_propagation(
    family: str, fold: str, tmp_path: Path
) -> None:
    base = base_of(tiny("twice"))
    sites = probe(base, FAMILIES[family](("gate_proj", "down_proj", "q_proj")), labels=None, fold=fold)
    assert {site.name.rpartition(".")[2]: site.calls for site in sites} == {"gate_proj": 2, "down_proj": 2, "q_proj": 1}
    adapter = stirred(sites)
    start = by_site(adapter)
    steps = [[ragged(seed)] for seed in range(PLAN.total_steps)]
    with InProcess(base, sites, adapter, PLAN, tmp_path, fold=fold) as job:
        for batches in steps:
            (result,) = job.step(batches)
            for site in sites:
                assert called(result)[site.index].calls == site.calls
                assert called(result)[site.index].rows == site.calls * result.tokens
    wanted = back_propagate(tiny("twice"), {s.name: s.family for s in sites}, start, PLAN, steps, peft=False)
    close(by_site(adapter), wanted.parameters)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_gradient_checkpointing_changes_neither_captures_nor_their_number(kind: str, tmp_path: Path) -> None:
    plain = load_tiny(kind, tmp_path / "plain")
    checkpointed = load_tiny(kind, tmp_path / "checkpointed", gradient_checkpointing=True)
    labels = 3 if kind == "bert" else None
    batch = ragged(1, classes=labels)
    runs = []
    for base in (plain, checkpointed):
        sites = probe(base, FAMILIES["lora"]("all-linear"), labels=labels, fold="unmerged")
        sink = Kept()
        (result,) = train(base, [_job_batch(batch, stirred(sites), sink)])
        assert sorted((name, call) for name, call, _, _ in sink.captures) == sorted((s.name, 0) for s in sites)
        assert [calls.calls for calls in result.calls] == [1] * len(sites)
        runs.append((result.loss, {name: (x, g) for name, _, x, g in sink.captures}))
    assert checkpointed.module.is_activation_checkpointing
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for name, (x, g) in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name][0], x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(runs[1][1][name][1], g, rtol=1e-4, atol=1e-7)


def test_a_job_in_a_cohort_gets_what_it_gets_alone() -> None:
    """Families, ranks, sites, batch sizes and targets differ from job to job, and one has no targets."""
    base = base_of(tiny("llama"))
    specs = [
        LoraAdapter(r=2, target_modules=("q_proj", "v_proj")),
        LinearAdapter(target_modules=("v_proj", "down_proj")),
        MlpAdapter(hidden_sizes=(4,), target_modules="all-linear"),
        LoraAdapter(r=5, target_modules=("lm_head",)),
    ]
    batches = [ragged(seed, examples=1 + seed) for seed in range(len(specs))]
    batches[2] = replace(batches[2], labels=torch.full_like(batches[2].labels, -100))
    _check_cohort(base, specs, batches, [None] * len(specs))


@pytest.mark.parametrize("kind", ["bert", "gpt2-classifier"])
def test_jobs_with_heads_of_different_widths_share_a_batch(kind: str) -> None:
    base = base_of(tiny(kind), head_name="classifier" if kind == "bert" else "score")
    targets = ("query", "pooler.dense") if kind == "bert" else ("c_attn",)
    labels = [2, 5, 3]
    specs = [LoraAdapter(r=2, target_modules=targets) for _ in labels]
    _check_cohort(base, specs, [ragged(n, examples=n, classes=n) for n in labels], labels)


def test_jobs_of_a_model_with_flattened_rows_share_a_batch() -> None:
    base = base_of(tiny("opt"))
    specs = [LoraAdapter(r=2, target_modules=("fc1", "fc2")), LinearAdapter(target_modules=("fc2", "q_proj"))]
    _check_cohort(base, specs, [ragged(1, examples=2), ragged(2, examples=3)], [None, None])


def test_the_loss_of_a_batch_without_targets_is_zero_and_so_is_every_gradient() -> None:
    base = base_of(tiny("llama"))
    sites = probe(base, LoraAdapter(r=2), labels=None, fold="unmerged")
    batch = ragged(0)
    sink = Kept()
    empty = replace(batch, labels=torch.full_like(batch.labels, -100))
    (result,) = train(base, [_job_batch(empty, stirred(sites), sink)])
    assert (result.loss, result.target_tokens) == (0.0, 0)
    assert len(sink.captures) == len(sites)
    assert all(not g.any() for _, _, _, g in sink.captures)


def _check_cohort(base: BaseModel, specs: list[AdapterSpec], batches: list[Batch], labels: list[int | None]) -> None:
    adapters = [
        stirred(probe(base, spec, labels=count, fold="unmerged"), seed)
        for seed, (spec, count) in enumerate(zip(specs, labels, strict=True))
    ]
    sinks = [Kept() for _ in specs]
    together = train(base, [_job_batch(*of_job) for of_job in zip(batches, adapters, sinks, strict=True)])
    sums = evaluate(base, [_job_batch(*of_job, None) for of_job in zip(batches, adapters, strict=True)])
    for batch, adapter, sink, result, (loss_sum, targets) in zip(batches, adapters, sinks, together, sums, strict=True):
        alone = Kept()
        (wanted,) = train(base, [_job_batch(batch, adapter, alone)])
        assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert replace(result, loss=wanted.loss) == wanted
        assert targets == wanted.target_tokens
        assert loss_sum == pytest.approx(wanted.loss * targets, rel=1e-5)
        assert [c[:2] for c in sink.captures] == [c[:2] for c in alone.captures]
        for (name, _, x, g), (_, _, wanted_x, wanted_g) in zip(sink.captures, alone.captures, strict=True):
            torch.testing.assert_close(x, wanted_x, rtol=1e-5, atol=1e-6, msg=name)
            assert float((g - wanted_g).norm()) <= 1e-5 * float(wanted_g.norm()), name


def _job_batch(batch: Batch, adapter: JobAdapter, sink: Kept | None) -> JobBatch:
    return JobBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        adapter=adapter,
        sink=sink,
    )
