"""One step: what it returns, whom it blames, and that it leaves the base model as it found it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from cola_common.errors import ColaError, Reason
from cola_common.jobs import LoraAdapter
from cola_server.model import BaseModel, BatchResult, Captured, JobAdapter, JobBatch, evaluate, probe, train
from tests.support.models import VOCABULARY, base_of, tiny


class Sink:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def capture(self, captured: Captured) -> None:
        self.seen.append((captured.site.name, captured.call))

    def finish(self) -> None:
        pass


def job(base: BaseModel, *targets: str, seed: int = 0, name: str = "ftjob-1") -> JobBatch:
    labels = None if base.head_name is None else 3
    sites = probe(base, LoraAdapter(r=2, target_modules=targets), labels=labels, fold="unmerged")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (3, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return JobBatch(
        input_ids=ids,
        attention_mask=mask,
        labels=ids.masked_fill(mask == 0, -100) if labels is None else torch.tensor([0, 2, 1]),
        adapter=JobAdapter.initial(sites, 0, base.device),
        sink=Sink(),
        job=name,
        step=4,
    )


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_the_loss_is_the_model_s_own_mean_and_nothing_stays_behind(kind: str) -> None:
    base = base_of(tiny(kind), head_name="classifier" if kind == "bert" else None)
    batch = job(base, "query" if kind == "bert" else "c_attn" if kind == "gpt2" else "q_proj")
    if kind == "bert":  # the job's head takes the place of the model's own
        own = batch.adapter.parameters[-1]
        base.module.classifier.weight.copy_(own["W"])
        base.module.classifier.bias.copy_(own["b"])
    before = {name: p.clone() for name, p in base.module.named_parameters()}
    (result,) = train(base, [batch])
    wanted = tiny(kind) if kind != "bert" else base.module
    loss = wanted(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.tokens == 16 + 9 + 16
    assert result.target_tokens == (3 if kind == "bert" else 15 + 8 + 15)
    ((loss_sum, targets),) = evaluate(base, [batch])
    assert (loss_sum / targets, targets) == (pytest.approx(loss.item(), rel=1e-6), result.target_tokens)
    assert hooks(base.module) == 0
    for name, p in base.module.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
def test_rows_are_announced_as_they_are_captured(kind: str) -> None:
    base = base_of(tiny(kind), head_name="classifier" if kind == "bert" else None)
    batch = job(base, *{"llama": ["down_proj"], "opt": ["fc1", "q_proj"], "bert": ["key", "pooler.dense"]}[kind])
    (result,) = train(base, [batch])
    for site, calls in zip(batch.adapter.sites, result.calls, strict=True):
        assert (calls.index, calls.calls) == (site.index, 1)
        assert calls.rows == (3 if site.layout == "examples" else 16 + 9 + 16)


def test_captures_come_last_site_first() -> None:
    base = base_of(tiny("llama"))
    batch = job(base, "down_proj", "o_proj")
    train(base, [batch])
    assert isinstance(batch.sink, Sink)
    assert [name for name, _ in batch.sink.seen] == [site.name for site in reversed(batch.adapter.sites)]


def test_nothing_below_the_first_site_is_differentiated() -> None:
    base = base_of(tiny("llama"))
    batch = job(base, "layers.1.mlp.up_proj")
    grads: list[bool] = []
    for layer in base.module.model.layers:
        layer.register_forward_hook(lambda _m, _a, output: grads.append(output.requires_grad))
    train(base, [batch])
    assert grads == [False, True]


@pytest.mark.parametrize("blamed", [0, 1])
def test_a_loss_that_is_not_finite_is_blamed_on_its_job_alone_and_nothing_of_it_is_captured(blamed: int) -> None:
    base = base_of(tiny("llama"))
    cohort = [job(base, "q_proj", name=f"ftjob-{number}") for number in range(2)]
    cohort[blamed].adapter.parameters[0]["B"].fill_(float("nan"))
    results = train(base, cohort)
    error, other = results[blamed], results[1 - blamed]
    assert isinstance(error, ColaError)
    assert error.reason == Reason.NON_FINITE_LOSS
    assert error.details == {"job": f"ftjob-{blamed}", "step": "4"}
    assert isinstance(other, BatchResult)
    alone = replace(cohort[1 - blamed], sink=Sink())
    assert train(base, [alone]) == [replace(other, loss=pytest.approx(other.loss, rel=1e-6))]
    seen = [batch.sink.seen for batch in (cohort[blamed], cohort[1 - blamed], alone) if isinstance(batch.sink, Sink)]
    assert seen[0] == []
    assert seen[1] == seen[2] != []
    assert hooks(base.module) == 0


def test_a_sink_s_error_is_its_job_s_alone() -> None:
    class Full(Sink):
        def finish(self) -> None:
            raise ColaError(Reason.NON_FINITE_CAPTURE, tensor="g", site="q_proj", step=4, job="ftjob-1")

    base = base_of(tiny("llama"))
    full, other = train(base, [replace(job(base, "q_proj"), sink=Full()), job(base, "q_proj", name="ftjob-2")])
    assert isinstance(full, ColaError)
    assert full.reason == Reason.NON_FINITE_CAPTURE
    assert isinstance(other, BatchResult)
    assert hooks(base.module) == 0


def test_a_site_that_sees_other_rows_than_in_the_probe_is_refused_by_name() -> None:
    base = base_of(tiny("llama"))
    batch = job(base, "down_proj")
    mlp = base.module.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x.flatten(0, 1)).view_as(x)
    with pytest.raises(ColaError) as refused:
        train(base, [batch])
    assert refused.value.reason == Reason.UNKNOWN_LAYOUT
    assert refused.value.details["site"] == "model.layers.1.mlp.down_proj"


def test_sites_that_no_longer_share_their_input_are_refused_by_name() -> None:
    base = base_of(tiny("llama"))
    batch = job(base, "gate_proj", "up_proj")
    mlp = base.module.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x + 0.0))
    with pytest.raises(ColaError) as refused:
        train(base, [batch])
    assert refused.value.reason == Reason.UNKNOWN_LAYOUT
    assert refused.value.details["site"].startswith("model.layers.0.mlp.")


def test_a_site_that_is_not_called_is_not_announced() -> None:
    base = base_of(tiny("llama"))
    batch = job(base, "down_proj", "o_proj")
    mlp = base.module.model.layers[0].mlp
    mlp.forward = torch.zeros_like
    (result,) = train(base, [batch])
    skipped = next(site.index for site in batch.adapter.sites if site.name == "model.layers.0.mlp.down_proj")
    assert [calls.index for calls in result.calls] == [s.index for s in batch.adapter.sites if s.index != skipped]
