"""A collaboration: every member's forward pass sees the mean of all adapters, and each fits its own rows. Against
autograd, which knows nothing of shares in captures: the loss of each member, differentiated in its own parameters.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_common.messages import OptimizerPlan
from cola_server.model import Captured, JobAdapter, JobBatch, Mean, evaluate, probe, train
from tests.numerics.test_mixtures import PLAN, by_site, close, ragged, stirred
from tests.support.group_oracle import Oracle
from tests.support.in_process import Batch, InProcess, dealt
from tests.support.models import base_of, tiny

STEPS = 4
SGD = replace(PLAN, momentum=0.9, total_steps=STEPS)
ADAMW = replace(PLAN, optimizer="adamw", learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.05, total_steps=STEPS)
SPECS: dict[str, list[AdapterSpec]] = {
    "families, ranks and sites differ": [
        LoraAdapter(r=2, lora_alpha=3.0, target_modules=("q_proj", "v_proj")),
        LinearAdapter(scale=0.7, target_modules=("v_proj", "down_proj")),
        MlpAdapter(hidden_sizes=(5,), scale=1.3, target_modules=("gate_proj", "o_proj")),
        LoraAdapter(r=5, target_modules=("v_proj", "up_proj")),
    ],
    "alike": [LoraAdapter(r=3, target_modules=("q_proj", "v_proj")) for _ in range(2)],
}
FLATTENED = [LoraAdapter(r=2, target_modules=("fc1", "q_proj")), LinearAdapter(target_modules=("fc2",))]


@pytest.mark.parametrize("plan", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("specs", list(SPECS))
def test_members_train_as_autograd_has_it_and_one_that_has_ended_stays_in_the_mean(
    specs: str, interval: int, plan: OptimizerPlan, tmp_path: Path
) -> None:
    base = base_of(tiny("llama"))
    adapters = [
        stirred(probe(base, spec, labels=None, fold="unmerged"), seed) for seed, spec in enumerate(SPECS[specs])
    ]
    count = len(adapters)
    oracle = Oracle(tiny("llama"), adapters, [plan] * count)
    mean = Mean("g", tuple(adapters))
    members = []
    for number, adapter in enumerate(adapters):
        owners = dealt(adapter.sites, ["a", "b"])
        folder = tmp_path / str(number)
        members.append(InProcess(base, adapter.sites, adapter, plan, folder, owners=owners, mean=mean))
    for step in range(STEPS):
        going_on = [number for number in range(count) if number < count - 1 or step < 2]  # the last one ends early
        batches = {
            member: [ragged(100 * member + interval * step + i, examples=2 + member) for i in range(interval)]
            for member in going_on
        }
        wanted = oracle.step(batches)
        for member, of_member in batches.items():
            results = members[member].pass_through(of_member)
            assert [result.loss for result in results] == pytest.approx(wanted[member], rel=1e-5)
        for member in going_on:
            members[member].fold()
    for number, adapter in enumerate(adapters):
        close(by_site(adapter), oracle.parameters(number), 1e-5 if plan is SGD else 1e-4)


@pytest.mark.parametrize(
    ("kind", "specs"),
    [("llama", SPECS["families, ranks and sites differ"]), ("llama", SPECS["alike"]), ("opt", FLATTENED)],
    ids=["llama", "alike", "flattened"],
)
def test_who_shares_the_pass_changes_nothing(kind: str, specs: list[AdapterSpec]) -> None:
    """Members together, apart, or beside strangers, before and behind them: the same captures."""
    base = base_of(tiny(kind))
    adapters = [stirred(probe(base, spec, labels=None, fold="unmerged"), seed) for seed, spec in enumerate(specs)]
    mean = Mean("g", tuple(adapters))
    batches = [ragged(seed, examples=2 + seed % 2) for seed in range(len(specs))]
    other = Mean("other", (stirred(adapters[0].sites, 20), stirred(adapters[1].sites, 21)))
    strangers = [
        _job_batch(ragged(30), other.adapters[0], other),
        _job_batch(ragged(31), stirred(adapters[1].sites, 22), None),
    ]
    together = [_job_batch(batch, adapter, mean) for batch, adapter in zip(batches, adapters, strict=True)]
    results = train(base, [strangers[0], *together, strangers[1]])[1:-1]
    sums = evaluate(base, [*together, *strangers])[: len(together)]
    for job, result, (total, targets) in zip(together, results, sums, strict=True):
        alone = replace(job, sink=Kept())
        (wanted,) = train(base, [alone])
        assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert result.calls == wanted.calls
        assert total == pytest.approx(wanted.loss * targets, rel=1e-5)
        assert job.sink.captures.keys() == alone.sink.captures.keys() == {site.name for site in job.adapter.sites}
        for site, (x, g) in job.sink.captures.items():
            wanted_x, wanted_g = alone.sink.captures[site]
            assert float((x - wanted_x).norm()) <= 1e-5 * float(wanted_x.norm()), site
            assert float((g - wanted_g).norm()) <= 1e-5 * float(wanted_g.norm()), site


class Kept:
    """A sink that keeps copies."""

    def __init__(self) -> None:
        self.captures: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def capture(self, captured: Captured) -> None:
        self.captures[captured.site.name] = (captured.x.clone(), captured.g.clone())

    def finish(self) -> None:
        pass


def _job_batch(batch: Batch, adapter: JobAdapter, mean: Mean | None) -> JobBatch:
    return JobBatch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        adapter=adapter,
        mean=mean,
        sink=Kept(),
    )
