"""JSON and safetensors files of an adapter folder: written for all to read, read as if a stranger wrote them.

Nothing is ever unpickled, and every size is known before memory is taken.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cola_common.errors import ColaError, Reason
from cola_common.tensor import is_finite

MAX_CONFIG_BYTES = 1 << 20
"""A configuration that lists every site of the largest models by its full path is below 100 KiB."""

MAX_WEIGHTS_BYTES = 16 << 30
"""Full fp32 matrices for all linears of a 4B model. Read, it takes up to twice this in memory: bf16 becomes fp32."""

_DTYPES = frozenset({"F32", "F16", "BF16"})

Model = TypeVar("Model", bound=BaseModel)


def write_config(path: Path, config: Mapping[str, object]) -> None:
    """Equal configurations give equal bytes."""
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(path: Path, model: type[Model], source: str) -> Model:
    """The file as `model` validates it. Raises: `ColaError(INVALID_ADAPTER)`; `source` names the adapter in it."""
    _check_file(path, MAX_CONFIG_BYTES, source)
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refused(source, f"{path.name}: {where + ': ' if where else ''}{first['msg']}") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """fp32. Equal tensors give equal bytes, in whatever order they come."""
    plain = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})  # the mark that transformers and PEFT look for


def read_tensors(path: Path, source: str) -> dict[str, torch.Tensor]:
    """All tensors of the file, as fp32. Raises: `ColaError(INVALID_ADAPTER)`; `source` names the adapter in it."""
    _check_file(path, MAX_WEIGHTS_BYTES, source)
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise refused(source, f"{key} is {dtype}; only {', '.join(sorted(_DTYPES))} can be trained on")
                tensors[key] = file.get_tensor(key).to(torch.float32)
                if not is_finite(tensors[key]):
                    raise refused(source, f"{key} holds values that are not finite")
    except SafetensorError as error:
        raise refused(source, f"{path.name} is no safetensors file: {error}") from None
    return tensors


def refused(source: str, problem: str) -> ColaError:
    """The error that says why the adapter `source` cannot be used."""
    return ColaError(Reason.INVALID_ADAPTER, source=source, problem=problem)


def _check_file(path: Path, limit: int, source: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise refused(source, f"there is no file {path.name}")
    if path.stat().st_size > limit:
        raise ColaError(Reason.FILE_TOO_LARGE, file=path.name, limit=limit)
