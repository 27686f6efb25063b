"""Adapter folders out and in: `lora` as PEFT writes and loads it, other families in ColA's own layout.

PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with `base_model.model.<site>.lora_A.weight`
(r×in) and `.lora_B.weight` (out×r), also where the site is a GPT-2 `Conv1D`; a classification head is one of
`modules_to_save`, `base_model.model.<head>.weight` and `.bias`. Neither PEFT nor transformers is imported here.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from cola_common.adapters import cola_format
from cola_common.adapters import folder as files
from cola_common.adapters.base import Parameters
from cola_common.adapters.shard import Imported, Shard, Task
from cola_common.errors import ColaError, Reason
from cola_common.families import Head, Lora

__all__ = ["CONFIG", "WEIGHTS", "Imported", "Shard", "Task", "export", "load"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class _LoraConfig(BaseModel):
    """The fields of PEFT's LoraConfig that say what the adapter computes. All others are in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
})  # fmt: skip
"""Fields that may say anything: what they tell of is in the weights file's keys, or belongs to starting or to dropout.
Every other field must be empty, so that a variant of LoRA that came after this was written is refused, not misread."""

_INITS_BESIDE_BASE = frozenset({"gaussian", "eva", "orthogonal"})
"""Named ways to start that leave the base weights alone. PiSSA, OLoRA, CorDA and LoftQ take the adapter's start out of
them, so that what they saved fits a changed base model only."""


def export(
    folder: Path,
    shards: Sequence[Shard],
    *,
    base_model: str,
    task: Task,
    head_name: str | None,
    fan_in_fan_out: bool,
) -> None:
    """Writes an adapter into `folder`, which is made if it is not there. The same shards give the same bytes.

    `shards` are those of one job: all of one family but for the head, whose site is `head_name`. `fan_in_fan_out` says
    that the sites are `Conv1D`, which PEFT wants to know. With `lora`, `peft.PeftModel.from_pretrained` loads it.
    """
    adapters = [shard for shard in shards if not isinstance(shard.family, Head)]
    heads = [shard for shard in shards if isinstance(shard.family, Head)]
    assert [shard.site for shard in heads] == ([] if head_name is None else [head_name])
    assert len({shard.family for shard in adapters}) == 1
    head = heads[0] if heads else None
    folder.mkdir(parents=True, exist_ok=True)
    family = adapters[0].family
    if not isinstance(family, Lora):
        cola_format.write(folder, adapters, head, base_model=base_model, task=task)
        return
    alpha = family.scale * family.r
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(task, head_name),
        "base_model_name_or_path": base_model,
        "r": family.r,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # PEFT says int, and takes both
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        # Full paths: PEFT matches by suffix, so that exactly these modules match.
        "target_modules": [shard.site for shard in adapters],
        "modules_to_save": None if head is None else [head.site],
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    tensors: dict[str, torch.Tensor] = {}
    for shard in adapters:
        tensors[f"{_PREFIX}{shard.site}.lora_A.weight"] = shard.parameters["A"]
        tensors[f"{_PREFIX}{shard.site}.lora_B.weight"] = shard.parameters["B"]
    if head is not None:
        tensors[f"{_PREFIX}{head.site}.weight"] = head.parameters["W"]
        if "b" in head.parameters:
            tensors[f"{_PREFIX}{head.site}.bias"] = head.parameters["b"]
    files.write_config(folder / CONFIG, config)
    files.write_tensors(folder / WEIGHTS, tensors)


def load(folder: Path, *, source: str | None = None) -> Imported:
    """Reads what `export` or PEFT wrote. `source` names the adapter in errors; the folder's name if not given.

    Of PEFT's folders: LoRA on linear modules, one rank and alpha for all, no bias, at most one module saved in full,
    which becomes the head. Dropout is ignored.

    Raises: `ColaError(INVALID_ADAPTER)` that says what cannot be continued from; `ColaError(UNSAFE_FORMAT)` for pickled
    weights; `ColaError(FILE_TOO_LARGE)`.
    """
    source = folder.name if source is None else source
    if (folder / cola_format.CONFIG).exists():
        return cola_format.read(folder, source)
    if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists():
        raise ColaError(Reason.UNSAFE_FORMAT, file="adapter_model.bin", format="pickle")
    config = files.read_config(folder / CONFIG, _LoraConfig, source)
    for field, value in (config.model_extra or {}).items():
        if value and field not in _WITHOUT_EFFECT:
            raise files.refused(source, f"{CONFIG}: {field} is set; only plain LoRA of one rank is understood")

    init = config.init_lora_weights
    if isinstance(init, str) and init not in _INITS_BESIDE_BASE:
        raise files.refused(source, f"{CONFIG}: init_lora_weights={init!r} changes the base model")

    shards: dict[str, Parameters] = {}
    saved: dict[str, Parameters] = {}
    for key, tensor in files.read_tensors(folder / WEIGHTS, source).items():
        if not key.startswith(_PREFIX):
            raise files.refused(source, f"{WEIGHTS}: {key} does not start with {_PREFIX}")
        path = key.removeprefix(_PREFIX)
        if path.endswith(".lora_A.weight"):
            shards.setdefault(path.removesuffix(".lora_A.weight"), {})["A"] = tensor
        elif path.endswith(".lora_B.weight"):
            shards.setdefault(path.removesuffix(".lora_B.weight"), {})["B"] = tensor
        elif _saved_in_full(path, config):
            module, _, name = path.rpartition(".")
            saved.setdefault(module, {})["W" if name == "weight" else "b"] = tensor
        else:
            raise files.refused(source, f"{WEIGHTS}: {key} is no part of a LoRA adapter on linear modules")
    if not shards:
        raise files.refused(source, f"{WEIGHTS} holds no site")
    return Imported(
        Lora(r=config.r, scale=config.scale),
        {site: _checked_lora(site, shards[site], config.r, source) for site in shards},
        _checked_head(saved, source),
    )


def _task_type(task: Task, head_name: str | None) -> str | None:
    if task == "causal-lm":
        return "CAUSAL_LM"
    # PEFT's SEQ_CLS wants all of a module `classifier` or `score`, whatever modules_to_save says. For a head elsewhere
    # (RoBERTa's classifier.out_proj) that is too much; without a task it takes our word.
    return "SEQ_CLS" if head_name is not None and head_name.rpartition(".")[2] in ("classifier", "score") else None


def _saved_in_full(path: str, config: _LoraConfig) -> bool:
    """Whether the key's module is one of `modules_to_save`, which PEFT matches by its last letters."""
    module, _, name = path.rpartition(".")
    return name in ("weight", "bias") and module.endswith(tuple(config.modules_to_save or ()))


def _checked_lora(site: str, parameters: Parameters, r: int, source: str) -> Parameters:
    if parameters.keys() != {"A", "B"}:
        raise files.refused(source, f"site {site} has only one of lora_A and lora_B")
    A, B = parameters["A"], parameters["B"]
    if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == r:
        raise files.refused(source, f"site {site} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} for r={r}")
    return {"A": A, "B": B}


def _checked_head(saved: dict[str, Parameters], source: str) -> Shard | None:
    if not saved:
        return None
    if len(saved) > 1:
        raise files.refused(source, f"more than one module is saved in full: {', '.join(sorted(saved))}")
    [(site, found)] = saved.items()
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    matrix = shapes.get("W", ())
    if len(matrix) != 2 or shapes.get("b", matrix[:1]) != matrix[:1]:
        raise files.refused(source, f"{site} is saved in full and is no linear module")
    return Shard(site, Head(bias="b" in found), {name: found[name] for name in ("W", "b") if name in found})
