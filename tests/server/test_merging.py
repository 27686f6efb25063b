"""Merging: the weights that it makes, and that nothing of them stays."""

from pathlib import Path

import pytest
import torch

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_server.model import BaseModel, JobAdapter, JobBatch, Merging, evaluate, probe
from cola_server.model.base import Seat
from tests.support.models import VOCABULARY, base_of, load_tiny, tiny

SPECS: dict[str, AdapterSpec] = {
    "lora": LoraAdapter(r=3, lora_alpha=6.0),
    "linear": LinearAdapter(scale=0.5),
}


def adapted(base: BaseModel, spec: AdapterSpec, spread: float = 0.1, seed: int = 0) -> JobAdapter:
    labels = 3 if base.head_name else None
    fresh = JobAdapter.initial(probe(base, spec, labels=labels, fold="unmerged"), 0, base.device)
    generator = torch.Generator().manual_seed(seed)
    state = [{n: spread * torch.randn(p.shape, generator=generator) for n, p in s.items()} for s in fresh.state()]
    return JobAdapter(fresh.sites, state, base.device)


def losses(base: BaseModel, adapter: JobAdapter, *, merged: bool) -> float:
    ids = torch.randint(5, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    labels = ids if base.head_name is None else torch.tensor([0, 1, 2])
    batch = JobBatch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, adapter=adapter, merged=merged)
    ((loss, _),) = evaluate(base, [batch])
    return loss


def dense(adapter: JobAdapter, index: int) -> torch.Tensor:
    """s·ΔW, O×D, in fp64."""
    shard: Parameters = {name: p.double() for name, p in adapter.parameters[index].items()}
    return 2.0 * shard["B"] @ shard["A"] if "A" in shard else 0.5 * shard["W"]


@pytest.mark.parametrize("family", list(SPECS))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_pristine_one_plus_the_adapter_in_fp32(
    kind: str, family: str, dtype: torch.dtype
) -> None:
    base = base_of(tiny(kind).to(dtype), head_name="classifier" if kind == "bert" else None)
    pristine = {name: p.clone() for name, p in base.module.named_parameters()}
    adapter = adapted(base, SPECS[family])
    merging = Merging(base, adapter)
    merging.merge()
    for site in adapter.sites:
        weight = base.module.get_submodule(site.name).weight
        if site.kind == "head":
            assert torch.equal(weight, pristine[f"{site.name}.weight"])
            continue
        delta = dense(adapter, site.index)
        wanted = pristine[f"{site.name}.weight"].double() + (delta.T if site.kind == "conv1d" else delta)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)
    merging.restore()
    merging.restore()
    assert [name for name, _ in base.module.named_parameters()] == list(pristine)
    for name, p in base.module.named_parameters():
        assert p.dtype == pristine[name].dtype
        assert torch.equal(p, pristine[name])
        assert not p.requires_grad


@pytest.mark.parametrize("family", list(SPECS))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "twice"])
def test_merged_and_unmerged_compute_the_same(kind: str, family: str) -> None:
    base = base_of(tiny(kind), head_name="classifier" if kind == "bert" else None)
    adapter = adapted(base, SPECS[family])
    plain = losses(base, adapter, merged=False)
    merging = Merging(base, adapter)
    merging.merge()
    assert losses(base, adapter, merged=True) == pytest.approx(plain, rel=1e-5)
    merging.restore()
    assert losses(base, adapter, merged=False) == plain


def test_a_young_adapter_does_not_round_away_in_a_bf16_base(tmp_path: Path) -> None:
    """A ΔW of a thousandth of W₀: bf16 has no room for it beside W₀, and the merged pass still must see it."""
    base = load_tiny("llama", tmp_path, dtype="bf16")
    adapter = adapted(base, LinearAdapter(target_modules=("q_proj", "down_proj")), spread=1.5e-4)
    merging = Merging(base, adapter)
    merging.merge()
    try:
        for site in adapter.sites:
            module = base.module.get_submodule(site.name)
            pristine = tiny("llama").get_submodule(site.name).weight.detach().bfloat16().float()
            got = module.weight - pristine
            wanted = adapter.parameters[site.index]["W"]
            assert float((got - wanted).norm() / wanted.norm()) < 1e-3
            rounded = (pristine + wanted).bfloat16().float() - pristine
            assert float((rounded - wanted).norm() / wanted.norm()) > 0.5, "the test does not see the trap"
            x = torch.randn(2, 3, site.d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
            assert module(x).dtype == torch.bfloat16
            assert torch.equal(module(x), torch.nn.functional.linear(x.float(), module.weight).bfloat16())
    finally:
        merging.restore()


def test_what_cannot_be_merged_is_refused_and_leaves_the_base_as_it_was() -> None:
    base = base_of(tiny("llama"))
    adapter = adapted(base, MlpAdapter(hidden_sizes=(4,)))
    with pytest.raises(ColaError) as refused:
        Merging(base, adapter).merge()
    assert refused.value.reason == Reason.NOT_MERGEABLE
    for (name, p), (_, wanted) in zip(base.module.named_parameters(), tiny("llama").named_parameters(), strict=True):
        assert torch.equal(p, wanted), name


# --- jobs that take turns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jobs_that_take_turns_see_their_own_weights_and_the_base_gets_its_own_back(
    kind: str, dtype: torch.dtype
) -> None:
    """Two merged ones, of which one is folded in between, and an unmerged one."""
    base = base_of(tiny(kind).to(dtype), head_name="classifier" if kind == "bert" else None)
    pristine = {name: p.clone() for name, p in base.module.named_parameters()}
    adapters = [adapted(base, SPECS["lora"], seed=1), adapted(base, SPECS["linear"], seed=2)]
    alone = []
    for adapter in adapters:
        merging = Merging(base, adapter)
        merging.merge()
        alone.append(losses(base, adapter, merged=True))
        merging.restore()
    plain = adapted(base, SPECS["lora"], seed=3)
    unmerged = losses(base, plain, merged=False)
    assert len({*alone, unmerged}) == 3

    one = Merging(base, adapters[0])
    base.seat.take(one)
    two = Merging(base, adapters[1])  # a job that begins while another one's weights are in the base
    for _ in range(2):
        base.seat.take(one)
        assert losses(base, adapters[0], merged=True) == alone[0]
        base.seat.take(two)
        assert losses(base, adapters[1], merged=True) == alone[1]
        base.seat.take(None)
        assert losses(base, plain, merged=False) == unmerged
        base.seat.take(two)
        base.seat.take(two)
        assert losses(base, adapters[1], merged=True) == alone[1]

    for shard in adapters[0].parameters:
        for p in shard.values():
            p.mul_(1.5)
    base.seat.refresh(one)  # while the other one holds the seat
    assert losses(base, adapters[1], merged=True) == alone[1]
    base.seat.take(one)
    folded = losses(base, adapters[0], merged=True)
    assert folded != alone[0]
    for shard in adapters[0].parameters:
        for p in shard.values():
            p.div_(1.5)
    base.seat.refresh(one)  # while it holds the seat itself
    assert losses(base, adapters[0], merged=True) != folded

    base.seat.leave(two)  # it does not hold the seat
    base.seat.take(None)
    assert losses(base, plain, merged=False) == unmerged
    base.seat.take(one)
    base.seat.leave(None)
    base.seat.leave(one)
    base.seat.leave(one)
    for name, p in base.module.named_parameters():
        assert p.dtype == pristine[name].dtype
        assert torch.equal(p, pristine[name]), name


def test_one_that_cannot_be_merged_leaves_the_seat_free_and_the_base_as_it_was() -> None:
    base = base_of(tiny("llama"))
    good = Merging(base, adapted(base, SPECS["lora"]))
    bad = Merging(base, adapted(base, MlpAdapter(hidden_sizes=(4,))))
    base.seat.take(good)
    with pytest.raises(ColaError) as refused:
        base.seat.take(bad)
    assert refused.value.reason == Reason.NOT_MERGEABLE
    for (name, p), (_, wanted) in zip(base.module.named_parameters(), tiny("llama").named_parameters(), strict=True):
        assert torch.equal(p, wanted), name
    base.seat.take(good)
    base.seat.take(None)
    for (name, p), (_, wanted) in zip(base.module.named_parameters(), tiny("llama").named_parameters(), strict=True):
        assert torch.equal(p, wanted), name


def test_a_seat_merges_no_more_than_it_must() -> None:
    """A lone job keeps the base's weights from one batch to the next, as it did before there were others."""

    class Counted:
        def __init__(self) -> None:
            self.said: list[str] = []

        def merge(self) -> None:
            self.said.append("merge")

        def restore(self) -> None:
            self.said.append("restore")

    seat, one, two = Seat(), Counted(), Counted()
    for _ in range(3):
        seat.take(one)
    seat.refresh(one)
    assert one.said == ["merge", "merge"]
    seat.refresh(two)
    assert two.said == []
    seat.take(two)
    assert (one.said, two.said) == (["merge", "merge", "restore"], ["merge"])
    seat.take(None)
    seat.take(None)
    assert two.said == ["merge", "restore"]
