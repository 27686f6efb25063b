"""Loading: what comes back is frozen, whole, and told what it is for; what cannot be used is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cola_common.errors import ColaError, Reason
from cola_server.model import load
from tests.support.models import load_tiny, save_tiny, tiny

TASKS = {
    "llama": ("causal-lm", None),
    "gpt2": ("causal-lm", None),
    "opt": ("causal-lm", None),
    "bert": ("sequence-classification", "classifier"),
    "gpt2-classifier": ("sequence-classification", "score"),
}


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_folder_is_loaded_frozen_and_its_task_is_read_off_its_config(kind: str, tmp_path: Path) -> None:
    base = load_tiny(kind, tmp_path)
    assert (base.task, base.head_name) == TASKS[kind]
    assert not base.module.training
    assert not any(p.requires_grad for p in base.module.parameters())
    assert base.parameters == sum(p.numel() for p in tiny(kind).parameters())
    assert base.tokenizer.pad_token_id == base.module.config.pad_token_id == 0
    for name, parameter in tiny(kind).named_parameters():
        assert torch.equal(base.module.get_parameter(name), parameter)


def test_bf16_is_what_every_weight_is_loaded_as(tmp_path: Path) -> None:
    base = load_tiny("llama", tmp_path, dtype="bf16")
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in base.module.parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["pad_token"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    base = load("llama", str(tmp_path), device="cpu")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 1


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
def test_checkpointing_trains_without_any_dropout(kind: str, tmp_path: Path) -> None:
    base = load_tiny(kind, tmp_path, gradient_checkpointing=True)
    assert base.module.training
    assert all(part.p == 0.0 for part in base.module.modules() if isinstance(part, nn.Dropout))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        first, second = (base.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(2))
        plain = tiny(kind)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(first, second)
    torch.testing.assert_close(first, plain)


def test_under_checkpointing_nothing_below_the_first_site_is_differentiated(tmp_path: Path) -> None:
    base = load_tiny("llama", tmp_path, gradient_checkpointing=True)
    ids = torch.arange(12).view(2, 6)
    assert not base.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.requires_grad


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_digest_tells_models_apart_and_holds_for_one(kind: str, tmp_path: Path) -> None:
    first = load_tiny(kind, tmp_path / "first").digest
    assert load_tiny(kind, tmp_path / "again").digest == first
    assert load_tiny(kind, tmp_path / "again", gradient_checkpointing=True).digest == first
    assert load_tiny(kind, tmp_path / "narrow", dtype="bf16").digest != first
    save_tiny(kind, tmp_path / "other", seed=1)
    assert load(kind, str(tmp_path / "other"), device="cpu").digest != first


def test_one_bit_of_one_weight_is_another_digest(tmp_path: Path) -> None:
    first = load_tiny("llama", tmp_path).digest
    weights = load_file(tmp_path / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(torch.int32).flatten()[-1] ^= 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert load("llama", str(tmp_path), device="cpu").digest != first


@pytest.mark.parametrize("kind", ["bert", "gpt2-classifier"])
def test_a_head_that_this_process_made_up_is_not_in_the_digest(kind: str, tmp_path: Path) -> None:
    whole = load_tiny(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    headless = {name: w for name, w in weights.items() if not name.startswith(f"{whole.head_name}.")}
    assert len(headless) < len(weights)
    save_file(headless, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(kind, str(tmp_path), device="cpu").digest == whole.digest


def test_weights_that_the_files_lack_are_refused_but_for_the_head(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    headless = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    save_file(headless, tmp_path / "model.safetensors", {"format": "pt"})
    assert load("bert", str(tmp_path), device="cpu").head_name == "classifier"
    save_file(
        {name: w for name, w in headless.items() if "pooler" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ColaError) as refused:
        load("bert", str(tmp_path), device="cpu")
    assert refused.value.reason == Reason.INVALID_CONFIG
    assert "bert.pooler.dense" in refused.value.message


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ColaError) as refused:
        load("llama", str(tmp_path), device="cpu")
    assert refused.value.reason == Reason.INVALID_CONFIG


def test_a_folder_that_is_not_there_is_refused_by_the_model_s_name(tmp_path: Path) -> None:
    with pytest.raises(ColaError) as refused:
        load("mine", str(tmp_path / "nothing"), device="cpu")
    assert refused.value.reason == Reason.INVALID_CONFIG
    assert refused.value.message.startswith("model mine: ")
