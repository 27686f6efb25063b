"""Adapter folders against the real PEFT, both ways, and what is refused at the door."""

import json
import pickle  # noqa: TID251 - to make what must be refused
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from cola_common.adapters import Parameters, build
from cola_common.adapters.peft_format import Shard, Task, export, load
from cola_common.errors import ColaError, Reason
from cola_common.families import Family, Head, Linear, Lora, Mlp

# peft 0.21 still reads the property's old name, which transformers 5.23 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Tiny:
    """A random base model of two layers, and what is adapted in it."""

    model: Any
    config: Any
    fields: dict[str, int]
    targets: tuple[str, ...]
    head: str | None = None


TINY = {
    "llama": Tiny(transformers.LlamaForCausalLM, transformers.LlamaConfig, LLAMA, ("q_proj", "v_proj", "down_proj")),
    "gpt2": Tiny(transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2, ("c_attn", "c_fc", "mlp.c_proj")),
    "bert": Tiny(
        transformers.BertForSequenceClassification,
        transformers.BertConfig,
        BERT,
        ("query", "value", "output.dense"),
        head="classifier",
    ),
    "llama-classifier": Tiny(
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig,
        LLAMA,
        ("q_proj", "up_proj"),
        head="score",
    ),
    "roberta": Tiny(
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig,
        BERT,
        ("query",),
        head="classifier.out_proj",
    ),
}

every_model = pytest.mark.parametrize("name", TINY)


def make(name: str) -> Any:
    """The same weights at each call."""
    tiny = TINY[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny.model(tiny.config(**tiny.fields, num_labels=3)).eval()


def widths(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, torch.nn.Linear) else (rows, columns)  # Conv1D is in×out


def trained(family: Family, site: str, d_in: int, d_out: int) -> Shard:
    """A shard whose parameters are all different from zero."""
    source = torch.Generator().manual_seed(sum(site.encode()))
    shapes = build(family, d_in, d_out).shapes()
    return Shard(site, family, {name: 0.3 * torch.randn(shape, generator=source) for name, shape in shapes.items()})


def shards_for(name: str, model: Any, family: Family) -> list[Shard]:
    tiny = TINY[name]
    shards = [
        trained(family, path, *widths(module))
        for path, module in model.named_modules()
        if any(path.endswith(f".{suffix}") for suffix in tiny.targets)
    ]
    if tiny.head is not None:
        module = model.get_submodule(tiny.head)
        shards.append(trained(Head(bias=module.bias is not None), tiny.head, *widths(module)))
    return shards


def adapt(model: Any, shards: list[Shard]) -> None:
    """The model with the adapters' own forward at its sites: what a job trains."""

    def hook(shard: Shard) -> Callable[..., torch.Tensor]:
        def run(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            adapter = build(shard.family, *widths(module))
            added = adapter.forward(shard.parameters, inputs[0])
            return added if adapter.replaces else output + added

        return run

    for shard in shards:
        model.get_submodule(shard.site).register_forward_hook(hook(shard))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 26).view(2, 12)
    out: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out


def write(folder: Path, name: str, shards: list[Shard]) -> None:
    head = TINY[name].head
    task: Task = "causal-lm" if head is None else "sequence-classification"
    export(folder, shards, base_model="tiny", task=task, head_name=head, fan_in_fan_out=name == "gpt2")


def assert_same(found: Parameters, wanted: Parameters) -> None:
    assert list(found) == list(wanted)
    for parameter, value in wanted.items():
        assert found[parameter].dtype == torch.float32
        assert torch.equal(found[parameter], value)


# --- out ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(("r", "scale"), [(1, 1.0), (4, 2.0), (3, 16 / 3), (8, 0.1)])
def test_peft_loads_what_is_exported_and_computes_the_same(name: str, r: int, scale: float, tmp_path: Path) -> None:
    own = make(name)
    shards = shards_for(name, own, Lora(r=r, scale=scale))
    plain = logits(own)
    adapt(own, shards)
    write(tmp_path, name, shards)
    loaded = peft.PeftModel.from_pretrained(make(name), tmp_path)
    adapted = {path.removeprefix("base_model.model.") for path, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == {shard.site for shard in shards if isinstance(shard.family, Lora)}
    torch.testing.assert_close(logits(loaded), logits(own), rtol=1e-5, atol=1e-5)
    assert (logits(own) - plain).abs().max() > 1e-2


def test_only_the_sites_of_the_adapter_match_in_peft(tmp_path: Path) -> None:
    # Layer 1's q_proj alone: neither layer 0's nor, by suffix, anything else.
    model = make("llama")
    [*_, shard] = [s for s in shards_for("llama", model, Lora(r=2, scale=1.0)) if s.site.endswith("q_proj")]
    write(tmp_path, "llama", [shard])
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert [path for path, module in loaded.named_modules() if isinstance(module, LoraLayer)] == [
        f"base_model.model.{shard.site}"
    ]


@every_model
@pytest.mark.parametrize("family", [Lora(4, 2.0), Linear(0.5), Mlp((6, 5), 1.5)], ids=str)
def test_what_is_exported_is_loaded_again_bit_for_bit(name: str, family: Family, tmp_path: Path) -> None:
    shards = shards_for(name, make(name), family)
    write(tmp_path / "not" / "yet", name, shards)
    imported = load(tmp_path / "not" / "yet")
    assert imported.family == family
    found = [Shard(site, family, parameters) for site, parameters in imported.shards.items()]
    found += [] if imported.head is None else [imported.head]
    assert {s.site: s.family for s in found} == {s.site: s.family for s in shards}
    for shard in shards:
        assert_same(next(s.parameters for s in found if s.site == shard.site), shard.parameters)


@pytest.mark.parametrize("family", [Lora(4, 2.0), Linear(0.5), Mlp((6,), 1.5)], ids=str)
def test_the_same_adapter_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    shards = shards_for("bert", make("bert"), family)
    views = [
        Shard(s.site, s.family, {k: torch.stack([v, v])[1].requires_grad_() for k, v in reversed(s.parameters.items())})
        for s in shards
    ]
    write(tmp_path / "a", "bert", shards)
    write(tmp_path / "b", "bert", views)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_exported_weights_are_fp32_and_named_as_documented(tmp_path: Path) -> None:
    write(tmp_path, "bert", shards_for("bert", make("bert"), Mlp((6,), 1.0)))
    tensors = load_file(tmp_path / "cola_adapter.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    site = "bert.encoder.layer.0.attention.self.query"
    assert {key for key in tensors if key.startswith(f"{site}.")} == {f"{site}.{p}" for p in ("W0", "b0", "W1", "b1")}
    assert {key for key in tensors if key.startswith("classifier.")} == {"classifier.W", "classifier.b"}
    assert json.loads((tmp_path / "cola_adapter.json").read_text()) == {
        "format": "cola-adapter",
        "version": 1,
        "base_model": "tiny",
        "task": "sequence-classification",
        "family": {"type": "mlp", "scale": 1.0, "hidden_sizes": [6]},
        "head": {"site": "classifier", "bias": True},
    }


# --- in -------------------------------------------------------------------------------------------------------------


def save_by_peft(folder: Path, name: str, **config: Any) -> peft.PeftModel:
    """An adapter that PEFT made and saved, every parameter different from zero."""
    tiny = TINY[name]
    task = "CAUSAL_LM" if tiny.head is None else "SEQ_CLS"
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(tiny.targets), "task_type": task, **config}
    model = peft.get_peft_model(make(name), peft.LoraConfig(fan_in_fan_out=name == "gpt2", **settings)).eval()
    source = torch.Generator().manual_seed(1)
    for path, value in model.named_parameters():
        if value.requires_grad:
            value.data = 0.3 * torch.randn(value.shape, generator=source, dtype=value.dtype) + ("magnitude" in path)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama-classifier"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian", "lora_dropout": 0.1}])
def test_what_peft_saved_is_loaded_and_computes_the_same(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    saved = save_by_peft(tmp_path, name, **config)
    imported = load(tmp_path)
    assert imported.family == Lora(r=4, scale=3.0 if config.get("use_rslora") else 1.5)
    shards = [Shard(site, imported.family, parameters) for site, parameters in imported.shards.items()]
    head = TINY[name].head
    if head is not None:
        assert imported.head is not None
        assert imported.head.site == head
        shards.append(imported.head)
    own = make(name)
    adapt(own, shards)
    torch.testing.assert_close(logits(own), logits(saved), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    shards = shards_for("llama", make("llama"), Lora(2, 1.0))
    write(tmp_path, "llama", shards)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    for shard in shards:
        narrow = {name: value.to(dtype).float() for name, value in shard.parameters.items()}
        assert_same(load(tmp_path).shards[shard.site], narrow)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["lm_head", "norm"]}, "more than one module"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "more than one module"),
        ({"modules_to_save": ["model.norm"]}, "no linear module"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        pytest.param(
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens",
            marks=pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
        ),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
    ids=str,
)
def test_what_peft_can_save_but_no_job_can_go_on_from_is_refused(
    config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    save_by_peft(tmp_path, "llama", **config)
    with pytest.raises(ColaError, match=f"file-7 cannot be continued from: .*{problem}") as caught:
        load(tmp_path, source="file-7")
    assert caught.value.reason == Reason.INVALID_ADAPTER


def test_other_methods_of_peft_are_refused(tmp_path: Path) -> None:
    peft.get_peft_model(make("llama"), peft.VeraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(ColaError, match="LORA") as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.INVALID_ADAPTER


CONFIGS: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"peft_type": "\xff"}',
    "a list": b"[]",
    "deeply nested": b"[" * 500_000,
    "r is a truth value": b'{"peft_type": "LORA", "r": true, "lora_alpha": 1}',
    "r is text": b'{"peft_type": "LORA", "r": "4", "lora_alpha": 1}',
    "r is zero": b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}',
    "alpha is zero": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 0}',
    "alpha is infinite": b'{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
    "alpha is NaN": b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "alpha is endless": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + b"0" * 4000 + b"}",
    "r differs from the weights": b'{"peft_type": "LORA", "r": 3, "lora_alpha": 1}',
    "biases in the adapter": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "lora_bias": true}',
    "a variant from the future": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "use_new_lora": true}',
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_broken_peft_configurations_are_refused(content: bytes | None, tmp_path: Path) -> None:
    write(tmp_path, "llama", shards_for("llama", make("llama"), Lora(2, 1.0)))
    config = tmp_path / "adapter_config.json"
    config.unlink() if content is None else config.write_bytes(content)
    with pytest.raises(ColaError) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.INVALID_ADAPTER


SITE = "base_model.model.model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "no site"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4)}, "only one"),
        ({f"{SITE}.lora_B.weight": torch.ones(4, 2)}, "only one"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4), f"{SITE}.lora_B.weight": torch.ones(4, 3)}, "for r=2"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4, 1), f"{SITE}.lora_B.weight": torch.ones(4, 2)}, "for r=2"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4), f"{SITE}.lora_B.weight": torch.tensor(1.0)}, "for r=2"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4, dtype=torch.int64)}, "I64"),
        ({f"{SITE}.lora_A.weight": torch.ones(2, 4).to(torch.float8_e4m3fn)}, "F8_E4M3"),
        ({f"{SITE}.lora_A.weight": torch.full((2, 4), torch.nan)}, "not finite"),
        ({"model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4)}, "does not start with"),
        ({f"{SITE}.weight": torch.ones(2, 4)}, "no part of"),
        ({f"{SITE}.lora_embedding_A": torch.ones(2, 4)}, "no part of"),
    ],
    ids=str,
)
def test_weights_that_are_no_lora_are_refused(tensors: dict[str, torch.Tensor], problem: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1}')
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ColaError, match=problem) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.INVALID_ADAPTER


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", pickle.dumps({"a": 1})], ids=repr
)
@pytest.mark.parametrize("family", [Lora(2, 1.0), Linear(1.0)], ids=str)
def test_weights_that_are_no_safetensors_are_refused(content: bytes, family: Family, tmp_path: Path) -> None:
    write(tmp_path, "llama", shards_for("llama", make("llama"), family))
    [weights] = tmp_path.glob("*.safetensors")
    whole = weights.read_bytes()
    for broken in (content, whole[:-1], whole + b"\0"):
        weights.write_bytes(broken)
        with pytest.raises(ColaError, match="safetensors") as caught:
            load(tmp_path)
        assert caught.value.reason == Reason.INVALID_ADAPTER


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "opened",)

    write(tmp_path, "llama", shards_for("llama", make("llama"), Lora(2, 1.0)))
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ColaError) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.UNSAFE_FORMAT
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_over_the_limit_are_refused_before_they_are_read(file: str, tmp_path: Path) -> None:
    write(tmp_path, "llama", shards_for("llama", make("llama"), Lora(2, 1.0)))
    with (tmp_path / file).open("r+b") as sparse:
        sparse.truncate((16 << 30) + 1)
    with pytest.raises(ColaError, match=file) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.FILE_TOO_LARGE


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_are_not_followed(file: str, tmp_path: Path) -> None:
    write(tmp_path / "a", "llama", shards_for("llama", make("llama"), Lora(2, 1.0)))
    (tmp_path / "a" / file).rename(tmp_path / file)
    (tmp_path / "a" / file).symlink_to(tmp_path / file)
    with pytest.raises(ColaError, match=f"no file {file}") as caught:
        load(tmp_path / "a")
    assert caught.value.reason == Reason.INVALID_ADAPTER


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "other"},
        {"version": 2},
        {"version": "1"},
        {"unknown": 1},
        {"task": "vision"},
        {"family": {"type": "lora", "r": 2, "scale": 1.0}},
        {"family": {"type": "mlp", "scale": 1.0, "hidden_sizes": []}},
        {"family": {"type": "mlp", "scale": 1.0, "hidden_sizes": [5]}},
        {"family": {"type": "mlp", "scale": 1.0, "hidden_sizes": [6, 6]}},
        {"family": {"type": "mlp", "scale": -1.0, "hidden_sizes": [6]}},
        {"family": {"type": "linear", "scale": 1.0}},
        {"head": None},
        {"head": {"site": "classifier", "bias": False}},
        {"head": {"site": "score", "bias": True}},
    ],
    ids=str,
)
def test_colas_own_folders_are_refused_when_their_parts_disagree(fields: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, "bert", shards_for("bert", make("bert"), Mlp((6,), 1.0)))
    load(tmp_path)
    change(tmp_path / "cola_adapter.json", **fields)
    with pytest.raises(ColaError) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.INVALID_ADAPTER


@pytest.mark.parametrize(
    "change_of",
    [
        lambda tensors: {},
        lambda tensors: {**tensors, "W": torch.ones(2, 2)},
        lambda tensors: {**tensors, "a.b.W": torch.ones(2)},
        lambda tensors: {**tensors, "a.b.W": torch.ones(2, 2), "a.b.V": torch.ones(2, 2)},
        lambda tensors: {**tensors, "a.b.V": torch.ones(2, 2)},
    ],
    ids=["none", "no site", "a vector", "one too many", "another name"],
)
def test_colas_own_weights_are_refused_when_they_are_no_linear_adapter(change_of: Any, tmp_path: Path) -> None:
    write(tmp_path, "llama", shards_for("llama", make("llama"), Linear(1.0)))
    path = tmp_path / "cola_adapter.safetensors"
    save_file(change_of(load_file(path)), path)
    with pytest.raises(ColaError) as caught:
        load(tmp_path)
    assert caught.value.reason == Reason.INVALID_ADAPTER


def test_the_format_needs_neither_peft_nor_transformers() -> None:
    code = "import sys, cola_common.adapters.peft_format; print({'peft', 'transformers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
