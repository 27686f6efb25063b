"""One test for each trap that an implementation of the method can fall into and that could come back."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from cola_common import schedules
from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter, WirePlan
from cola_common.messages import OptimizerPlan
from cola_server.model import BaseModel, Captured, JobAdapter, JobBatch, Merging, Sink, Site, probe, train
from tests.support.in_process import ALL, Batch, InProcess
from tests.support.models import VOCABULARY, base_of, load_tiny, tiny
from tests.support.oracle import wrap
from tests.support.wires import wire

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
PLAN = OptimizerPlan(
    optimizer="sgd",
    learning_rate=1.0,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    max_grad_norm=0.0,
    lr_scheduler_type="constant",
    warmup_steps=0,
    total_steps=1,
)


def batch(seed: int = 0, examples: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (examples, 16), generator=generator)
    return Batch(ids, torch.ones_like(ids), ids.clone())


def of_size(sites: tuple[Site, ...], spread: float) -> JobAdapter:
    """An adapter whose parameters are random with standard deviation `spread`."""
    adapter = JobAdapter.initial(sites, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    state = [{n: spread * torch.randn(p.shape, generator=generator) for n, p in s.items()} for s in adapter.state()]
    return JobAdapter(sites, state, torch.device("cpu"))


def gradient(
    base: BaseModel, adapter: JobAdapter, folder: Path, batches: list[Batch], travels: WirePlan = ALL
) -> Parameters:
    """The gradient that a worker steps by: with plain SGD at rate 1 it is what the step takes away."""
    before = adapter.state()
    with InProcess(base, adapter.sites, adapter, PLAN, folder, travels=travels) as job:
        job.step(batches)
    return {
        f"{site.name}.{name}": old[name] - new[name]
        for site, old, new in zip(adapter.sites, before, adapter.state(), strict=True)
        for name in old
    }


def true_gradient(adapter: JobAdapter, batches: list[Batch]) -> Parameters:
    """By autograd, in fp64."""
    module = tiny("llama").double()
    start = {
        s.name: {n: p.double() for n, p in of.items()} for s, of in zip(adapter.sites, adapter.state(), strict=True)
    }
    found = wrap(module, {site.name: site.family for site in adapter.sites}, start)
    for one in batches:
        (
            module(input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.labels).loss / len(batches)
        ).backward()
    return {
        f"{site}.{name}": p.grad for site, of_site in found.items() for name, p in of_site.items() if p.grad is not None
    }


def error(got: Parameters, wanted: Parameters) -> float:
    """Relative, over all parameters together."""
    assert got.keys() == wanted.keys()
    apart = math.fsum(float((got[name] - wanted[name]).norm()) ** 2 for name in wanted)
    return math.sqrt(apart / math.fsum(float(wanted[name].norm()) ** 2 for name in wanted))


def cosine(got: Parameters, wanted: Parameters) -> float:
    flat = [torch.cat([values[name].double().flatten() for name in wanted]) for values in (got, wanted)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


@pytest.mark.parametrize(
    "spec",
    [
        LoraAdapter(r=4, target_modules=TARGETS),
        LinearAdapter(target_modules=TARGETS),
        MlpAdapter(hidden_sizes=(6,), target_modules=TARGETS),
    ],
    ids=lambda spec: spec.type,
)
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3])
def test_the_gradient_keeps_its_digits_however_large_the_adapter_s_output(
    spec: AdapterSpec, spread: float, tmp_path: Path
) -> None:
    """Trap 1: the regression form of the gradient loses three to five digits as the output grows; the VJP none."""
    base = base_of(tiny("llama"))
    adapter = of_size(probe(base, spec, labels=None, fold="unmerged"), spread)
    wanted = true_gradient(adapter, [batch()])
    # A step at rate 1 is read off the parameters' difference, which has their own rounding too.
    assert error(gradient(base, adapter, tmp_path, [batch()]), wanted) < 2e-5


def test_bf16_on_the_wire_leaves_the_gradient_its_direction(tmp_path: Path) -> None:
    """Trap 1 in bf16: shipped as a regression target, output minus gradient, the gradient would round away."""
    base = base_of(tiny("llama"))
    adapter = of_size(probe(base, LoraAdapter(r=4, target_modules=TARGETS), labels=None, fold="unmerged"), 0.3)
    wanted = true_gradient(adapter, [batch()])
    assert cosine(gradient(base, adapter, tmp_path, [batch()], wire(values="bf16")), wanted) > 0.9999


def test_the_backward_pass_runs_through_the_adapters(tmp_path: Path) -> None:
    """Trap 2: with the adapters' outputs detached, every site but the last gets a wrong gradient."""
    base = base_of(tiny("llama"))
    spec = LinearAdapter(scale=2.0, target_modules=TARGETS)
    adapter = of_size(probe(base, spec, labels=None, fold="unmerged"), 0.2)
    wanted = true_gradient(adapter, [batch()])
    detached = _detached_gradient(adapter, batch())
    last = f"{adapter.sites[-1].name}."
    for name in wanted:
        if not name.startswith(last):
            assert error({name: detached[name]}, {name: wanted[name]}) > 1e-2, "the test does not see the trap"
    assert error(gradient(base, adapter, tmp_path, [batch()]), wanted) < 2e-5


def _detached_forward(wrapped: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return wrapped.inner(x) + wrapped.family.scale * (x.detach() @ wrapped.own["W"].T)


def _detached_gradient(adapter: JobAdapter, one: Batch) -> Parameters:
    module = tiny("llama")
    start = {site.name: parameters for site, parameters in zip(adapter.sites, adapter.state(), strict=True)}
    found = wrap(module, {site.name: site.family for site in adapter.sites}, start)
    for site in adapter.sites:
        wrapped = module.get_submodule(site.name)
        wrapped.forward = partial(_detached_forward, wrapped)
    module(input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.labels).loss.backward()
    return {
        f"{site}.{name}": p.grad for site, of_site in found.items() for name, p in of_site.items() if p.grad is not None
    }


@pytest.mark.parametrize("alpha", [0.5, 4.0, 32.0])
def test_the_scale_is_in_the_gradient(alpha: float, tmp_path: Path) -> None:
    """Trap 3: left out of the fit, the gradient is off by 1/s."""
    base = base_of(tiny("llama"))
    spec = LoraAdapter(r=4, lora_alpha=alpha, target_modules=TARGETS)
    adapter = of_size(probe(base, spec, labels=None, fold="unmerged"), 0.05)
    wanted = true_gradient(adapter, [batch()])
    assert error(gradient(base, adapter, tmp_path, [batch()]), wanted) < 2e-5


@pytest.mark.parametrize("interval", [1, 2, 8])
def test_an_interval_s_gradient_is_a_mean_and_not_a_sum(interval: int, tmp_path: Path) -> None:
    """Trap 4, one half: the step would grow with the interval."""
    base = base_of(tiny("llama"))
    adapter = of_size(probe(base, LoraAdapter(r=4, target_modules=TARGETS), labels=None, fold="unmerged"), 0.05)
    batches = [batch(seed, examples=1 + seed % 3) for seed in range(interval)]
    wanted = true_gradient(adapter, batches)
    assert error(gradient(base, adapter, tmp_path, batches), wanted) < 2e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedule_counts_steps_and_not_batches(schedule: str, tmp_path: Path) -> None:
    """Trap 4, the other half: after the same steps the rate is the same whatever the interval; here, of one batch
    over and over at a gradient that hardly changes, the way gone says what the rates were."""
    plan = replace(PLAN, learning_rate=1e-4, lr_scheduler_type=schedule, warmup_steps=2, total_steps=6)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=plan.learning_rate)
    scheduler = get_scheduler(schedule, optimizer, plan.warmup_steps, plan.total_steps)
    rates = []
    for _ in range(plan.total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [schedules.learning_rate(plan, step) for step in range(plan.total_steps)] == pytest.approx(rates)
    base = base_of(tiny("llama"))
    for interval in (1, 4):
        sites = probe(base, LinearAdapter(target_modules=("down_proj",)), labels=None, fold="unmerged")
        adapter = JobAdapter.initial(sites, 0, torch.device("cpu"))
        way: list[float] = []
        with InProcess(base, sites, adapter, plan, tmp_path / str(interval)) as job:
            for _ in range(plan.total_steps):
                before = adapter.state()[0]["W"]
                job.step([batch()] * interval)
                way.append(float((adapter.state()[0]["W"] - before).norm()))
        assert [w / way[3] for w in way] == pytest.approx([r / rates[3] for r in rates], rel=0.02, abs=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_over_and_over_drifts_by_nothing(kind: str, dtype: str, tmp_path: Path) -> None:
    """Trap 5: by += and −= a bf16 weight drifts by a percent in 2,000 cycles."""
    base = load_tiny(kind, tmp_path, dtype=dtype)
    pristine = {name: p.clone() for name, p in base.module.named_parameters()}
    spec = LinearAdapter(scale=0.3, target_modules=("down_proj",) if kind == "llama" else ("c_attn",))
    adapter = of_size(probe(base, spec, labels=None, fold="merged"), 0.1)
    merging = Merging(base, adapter)
    weight = f"{adapter.sites[0].name}.weight"
    merging.merge()
    once = base.module.get_parameter(weight).clone()
    for _ in range(200):
        merging.merge()
        merging.restore()
    merging.merge()
    assert torch.equal(base.module.get_parameter(weight), once)
    merging.restore()
    for name, p in base.module.named_parameters():
        assert p.dtype == pristine[name].dtype
        assert torch.equal(p, pristine[name]), name


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    """Traps 6 and 8: only linear layers are sites; an embedding is none."""
    for target in ("wte", "ln_1", "h"):
        with pytest.raises(ColaError) as refused:
            probe(base_of(tiny("gpt2")), LoraAdapter(r=2, target_modules=(target,)), labels=None, fold="unmerged")
        assert refused.value.reason == Reason.UNKNOWN_TARGET
        assert target in refused.value.message


def test_a_job_s_gradient_does_not_shrink_with_its_share_of_the_batch() -> None:
    """Trap 10: as a mean over the mixed batch, it would be a tenth here."""

    class Sum:
        def __init__(self) -> None:
            self.squares = 0.0

        def capture(self, captured: Captured) -> None:
            self.squares += float(captured.g.square().sum())

        def finish(self) -> None:
            pass

    base = base_of(tiny("llama"))
    sites = probe(base, LoraAdapter(r=2, target_modules=TARGETS), labels=None, fold="unmerged")
    adapter = of_size(sites, 0.1)
    alone, together = Sum(), Sum()
    small, large = batch(0, examples=1), batch(1, examples=9)
    train(base, [_job(small, adapter, alone)])
    train(base, [_job(small, adapter, together), _job(large, adapter, Sum())])
    assert together.squares == pytest.approx(alone.squares, rel=1e-4)


def _job(one: Batch, adapter: JobAdapter, sink: Sink) -> JobBatch:
    return JobBatch(
        input_ids=one.input_ids, attention_mask=one.attention_mask, labels=one.labels, adapter=adapter, sink=sink
    )
