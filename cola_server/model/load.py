"""Loading a base model and freezing it. Only safetensors and GGUF are read; code that comes with a model never runs."""

from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)

from cola_common.errors import ColaError, Reason
from cola_server.model.base import BaseModel, Task

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = ("score", "classifier")  # what transformers calls a classification head, and PEFT takes for one


def load(
    name: str,
    path: str,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    task: Task | Literal["auto"] = "auto",
    gradient_checkpointing: bool = False,
) -> BaseModel:
    """The model at `path`: a folder, a hub id, a `.gguf` file, or a folder that holds one.

    `task="auto"` reads the task off the architecture that the model's config names.
    Raises: `ColaError(INVALID_CONFIG)` where it cannot be read, lacks weights, or has no head that can be found.
    """
    setting = f"model {name}"
    folder, gguf_file = _locate(path)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    weights: dict[str, Any] = dict(source)
    if gguf_file:
        # Without dequantize=True the module holds GGUF's own linear layers, which cannot be merged or saved.
        weights["quantization_config"] = GgufConfig(gguf_file=gguf_file, dequantize=True)
    else:
        weights["use_safetensors"] = True
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **source)
        known_task = _task(config.architectures or []) if task == "auto" else task
        auto = AutoModelForCausalLM if known_task == "causal-lm" else AutoModelForSequenceClassification
        loaded: Any = auto.from_pretrained(
            folder, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True, **weights
        )
        module, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem=f"{path} cannot be loaded: {error}") from error

    head_name = _head(module, setting) if known_task == "sequence-classification" else None
    # A job brings its own head; anything else that the files lack would be random, and other in the next process.
    missing = sorted(k for k in info["missing_keys"] if head_name is None or not k.startswith(f"{head_name}."))
    if missing:
        raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem=f"{path} has no weights for {missing[0]}")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem="its tokenizer has no token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    module.config.pad_token_id = tokenizer.pad_token_id  # decoders with a head look for their last token with it
    _freeze(module, gradient_checkpointing)
    digest = _digest(module, head_name)
    module.to(place)
    return BaseModel(
        name=name,
        path=path,
        module=module,
        tokenizer=tokenizer,
        task=known_task,
        device=place,
        dtype=DTYPES[dtype],
        head_name=head_name,
        parameters=sum(p.numel() for p in module.parameters()),
        digest=digest,
        gradient_checkpointing=gradient_checkpointing,
    )


def _locate(path: str) -> tuple[str, str | None]:
    """(folder or hub id, name of the GGUF file in it, if it is one)."""
    place = Path(path)
    if place.is_file() and place.suffix == ".gguf":
        return str(place.parent), place.name
    if place.is_dir() and not any(place.glob("*.safetensors")):
        files = sorted(place.glob("*.gguf"))
        if len(files) == 1:
            return path, files[0].name
    return path, None


def _task(architectures: list[str]) -> Task:
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    # An encoder's own file names the bare encoder (`BertModel`): classifying is what is left to do with it.
    return "causal-lm" if causal or not architectures else "sequence-classification"


def _head(module: PreTrainedModel, setting: str) -> str:
    """The path of the head: a `score` or `classifier`, or the last linear layer inside of one."""
    for name in HEADS:
        found: list[str] = [
            path
            for path, part in module.named_modules()
            if isinstance(part, nn.Linear) and (path == name or path.startswith(f"{name}."))
        ]
        if found:
            return found[-1]
    problem = f"{type(module).__name__} has no classification head called {' or '.join(HEADS)}"
    raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem=problem)


def _digest(module: PreTrainedModel, head_name: str | None) -> str:
    """Of names, dtypes, shapes and bytes of the weights and the buffers that are saved with them. A head is left out: a
    job brings its own, and where the files have none this process made it up.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        if head_name is None or not name.startswith(f"{head_name}."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _freeze(module: PreTrainedModel, gradient_checkpointing: bool) -> None:
    module.requires_grad_(False)
    module.config.use_cache = False
    module.eval()  # type: ignore[no-untyped-call]
    if gradient_checkpointing:
        # transformers checkpoints in train mode only; with all dropouts at zero it computes what eval mode does.
        _zero_dropouts(module)
        module.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, for the reentrant kind of checkpoint; this kind
        # does not need it, and all below the first site would be differentiated for nothing.
        module.disable_input_require_grads()  # type: ignore[no-untyped-call]
        module.train()


def _zero_dropouts(module: PreTrainedModel) -> None:
    """Dropout is a module in some models, a number that the forward pass reads in others (OPT's layerdrop too)."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for holder in (part, getattr(part, "config", None)):
            for key, value in vars(holder).items() if holder is not None else ():
                if "drop" in key and isinstance(value, float):
                    setattr(holder, key, 0.0)
