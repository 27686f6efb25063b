"""The probe: which modules a job adapts, and what it finds out about them."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from cola_common.errors import ColaError, Reason
from cola_common.families import Head, Linear, Lora, Mlp
from cola_common.jobs import LinearAdapter, LoraAdapter, MlpAdapter
from cola_server.model import BaseModel, Site, probe
from tests.support.models import base_of, tiny

HEADS = {"bert": "classifier", "gpt2-classifier": "score"}


def base(kind: str) -> BaseModel:
    return base_of(tiny(kind), head_name=HEADS.get(kind))


def sites(kind: str, targets: tuple[str, ...] | str, *, r: int = 2, fold: str = "unmerged") -> tuple[Site, ...]:
    return probe(base(kind), LoraAdapter(r=r, target_modules=targets), labels=5 if kind in HEADS else None, fold=fold)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("layers.1.mlp.up_proj",)),
        ("llama", r"model\.layers\.\d+\.self_attn\.[qk]_proj"),
        ("llama", "all-linear"),
        ("gpt2", ("c_attn", "c_proj")),
        ("gpt2", "all-linear"),
        ("opt", "all-linear"),
        ("bert", ("query", "dense")),
        ("bert", "all-linear"),
        ("gpt2-classifier", "all-linear"),
    ],
)
def test_targets_match_the_modules_that_peft_matches(kind: str, targets: tuple[str, ...] | str) -> None:
    config = LoraConfig(
        r=2,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if kind in HEADS else "CAUSAL_LM",
        fan_in_fan_out="gpt2" in kind,
    )
    adapted = get_peft_model(tiny(kind), config).base_model.model
    wanted = [name for name, part in adapted.named_modules() if isinstance(part, LoraLayer)]
    assert [site.name for site in sites(kind, targets) if site.kind != "head"] == wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert", "gpt2-classifier", "twice"])
def test_a_site_s_widths_and_layout_are_those_of_its_inputs_and_outputs(kind: str) -> None:
    """Against a pass of other proportions than the probe's."""
    model = base(kind)
    found = {site.name: site for site in sites(kind, "all-linear")}
    examples, tokens = 4, 7
    calls: dict[str, int] = dict.fromkeys(found, 0)

    def check(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            site = found[name]
            leading = {"tokens": (examples, tokens), "flat": (examples * tokens,), "examples": (examples,)}[site.layout]
            assert args[0].shape == (*leading, site.d_in)
            assert output.shape[:-1] == leading
            assert site.kind == "head" or output.shape[-1] == site.d_out
            calls[name] += 1

        return hook

    for name in found:
        model.module.get_submodule(name).register_forward_hook(check(name))
    ids = torch.arange(examples * tokens).view(examples, tokens)
    model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert calls == {name: site.calls for name, site in found.items()}
    assert [site.index for site in found.values()] == list(range(len(found)))


def test_sites_that_get_the_same_input_are_one_group() -> None:
    groups: dict[int, set[str]] = {}
    for site in sites("llama", "all-linear"):
        groups.setdefault(site.group, set()).add(re.sub(r"model\.layers\.(\d)\.\w+\.", r"\1.", site.name))
    assert list(groups) == list(range(8))
    assert list(groups.values())[:4] == [
        {"0.q_proj", "0.k_proj", "0.v_proj"},
        {"0.o_proj"},
        {"0.gate_proj", "0.up_proj"},
        {"0.down_proj"},
    ]


def test_sites_called_twice_share_an_input_only_if_they_do_at_every_call() -> None:
    found = {site.name.rpartition(".")[2]: site for site in sites("twice", ("gate_proj", "up_proj", "down_proj"))}
    assert found["gate_proj"].calls == 2
    assert found["gate_proj"].group == found["up_proj"].group != found["down_proj"].group


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("opt", {"q_proj": "tokens", "fc1": "flat", "fc2": "flat"}),
        ("bert", {"query": "tokens", "pooler.dense": "examples"}),
    ],
)
def test_layouts_are_told_apart(kind: str, layouts: dict[str, str]) -> None:
    for site in sites(kind, tuple(layouts)):
        if site.kind != "head":
            assert site.layout == next(layout for name, layout in layouts.items() if site.name.endswith(name))


@pytest.mark.parametrize("kind", list(HEADS))
def test_the_head_is_the_last_site_whatever_the_targets(kind: str) -> None:
    *others, head = sites(kind, "all-linear")
    assert head.name == HEADS[kind]
    assert head.kind == "head"
    assert head.d_out == 5
    assert head.family == Head(bias=kind == "bert")
    assert all(site.kind != "head" for site in others)
    with pytest.raises(ColaError, match=HEADS[kind]):
        sites(kind, (HEADS[kind],))


def test_every_site_has_the_spec_s_family() -> None:
    model = base("llama")
    for spec, family in [
        (LoraAdapter(r=4, lora_alpha=6.0), Lora(r=4, scale=1.5)),
        (LinearAdapter(scale=0.5), Linear(scale=0.5)),
        (MlpAdapter(hidden_sizes=(3, 4), scale=2.0), Mlp(hidden_sizes=(3, 4), scale=2.0)),
    ]:
        assert {site.family for site in probe(model, spec, labels=None, fold="unmerged")} == {family}


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("q_porj", "q_proj"), ("dwn_proj", "down_proj"), ("embed_tokens", "lm_head"), ("zzz", "down_proj")],
)
def test_an_unknown_target_is_refused_with_the_nearest_names(target: str, nearest: str) -> None:
    with pytest.raises(ColaError) as refused:
        sites("llama", ("q_proj", target))
    assert refused.value.reason == Reason.UNKNOWN_TARGET
    assert refused.value.details["target"] == target
    assert nearest in refused.value.details["nearest"]


def test_a_pattern_must_match_the_whole_path() -> None:
    with pytest.raises(ColaError) as refused:
        sites("llama", "q_proj")
    assert refused.value.reason == Reason.UNKNOWN_TARGET


def test_a_rank_above_a_site_s_widths_is_refused() -> None:
    assert sites("llama", ("k_proj",), r=16)
    with pytest.raises(ColaError) as refused:
        sites("llama", ("q_proj", "k_proj"), r=17)
    assert refused.value.reason == Reason.RANK_TOO_LARGE
    assert "k_proj" in refused.value.details["site"]


def test_a_tied_weight_is_adapted_but_not_merged() -> None:
    (site,) = sites("llama", ("lm_head",))
    assert site.tied == "model.embed_tokens"
    with pytest.raises(ColaError) as refused:
        sites("llama", ("lm_head",), fold="merged")
    assert refused.value.reason == Reason.TIED_WEIGHTS


class _Odd(nn.Module):
    """Calls its inner linear layer in a way that no layout describes."""

    def __init__(self, inner: nn.Linear, how: str) -> None:
        super().__init__()
        self.inner = inner
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "transposed":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "never":
            return nn.functional.linear(x, self.inner.weight)
        if self.how == "by keyword":
            return self.inner(input=x)
        return self.inner(x[:1]).expand(x.shape[0], -1, -1)


@pytest.mark.parametrize("how", ["transposed", "never", "by keyword", "one of all"])
def test_a_layout_that_is_not_known_is_refused_by_name(how: str) -> None:
    model = base("llama")
    attention = model.module.model.layers[0].self_attn
    attention.q_proj = _Odd(attention.q_proj, how)
    with pytest.raises(ColaError) as refused:
        probe(model, LoraAdapter(r=2, target_modules=("inner",)), labels=None, fold="unmerged")
    assert refused.value.reason == Reason.UNKNOWN_LAYOUT
    assert refused.value.details["site"] == "model.layers.0.self_attn.q_proj.inner"


def test_the_probe_leaves_no_hook_behind() -> None:
    model = base("llama")
    probe(model, LoraAdapter(r=2), labels=None, fold="unmerged")
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.module.modules())
