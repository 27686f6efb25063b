"""The folder of an adapter that PEFT has no form for: `linear` and `mlp`. See docs/adapter_format.md.

`cola_adapter.json` says what the adapter is, `cola_adapter.safetensors` holds fp32 tensors under `<site>.<parameter>`:
`W` of a linear adapter; `W0`, `b0`, `W1`, `b1`, … of a perceptron; `W` and `b` of a classification head. Every matrix
is out×in, as in `torch.nn.Linear`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cola_common.adapters import folder as files
from cola_common.adapters.base import Parameters
from cola_common.adapters.registry import build
from cola_common.adapters.shard import Imported, Shard, Task
from cola_common.families import Family, Head, Linear, Mlp

CONFIG = "cola_adapter.json"
WEIGHTS = "cola_adapter.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Linear(_Part):
    type: Literal["linear"]
    scale: float = Field(gt=0, allow_inf_nan=False)


class _Mlp(_Part):
    type: Literal["mlp"]
    scale: float = Field(gt=0, allow_inf_nan=False)
    hidden_sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)


class _Head(_Part):
    site: str
    bias: bool


class _Config(_Part):
    format: Literal["cola-adapter"]
    version: Literal[1]
    base_model: str
    task: Task
    family: Annotated[_Linear | _Mlp, Field(discriminator="type")]
    head: _Head | None


def write(folder: Path, shards: Sequence[Shard], head: Shard | None, *, base_model: str, task: Task) -> None:
    """Writes both files. `shards` are the sites', all of one family."""
    family = shards[0].family
    assert isinstance(family, Linear | Mlp)
    config = {
        "format": "cola-adapter",
        "version": 1,
        "base_model": base_model,
        "task": task,
        "family": {"type": type(family).__name__.lower(), **asdict(family)},
        "head": None if head is None else {"site": head.site, "bias": "b" in head.parameters},
    }
    files.write_config(folder / CONFIG, config)
    everything = [*shards, *([] if head is None else [head])]
    files.write_tensors(
        folder / WEIGHTS,
        {f"{shard.site}.{name}": tensor for shard in everything for name, tensor in shard.parameters.items()},
    )


def read(folder: Path, source: str) -> Imported:
    """Raises: `ColaError(INVALID_ADAPTER)` that names what is wrong; `source` names the adapter in it."""
    config = files.read_config(folder / CONFIG, _Config, source)
    shards: dict[str, Parameters] = {}
    for key, tensor in files.read_tensors(folder / WEIGHTS, source).items():
        site, _, name = key.rpartition(".")
        if not site:
            raise files.refused(source, f"{WEIGHTS}: {key} names no site")
        shards.setdefault(site, {})[name] = tensor
    head = None
    if config.head is not None:
        head_family = Head(bias=config.head.bias)
        parameters = shards.pop(config.head.site, {})
        head = Shard(config.head.site, head_family, _checked(config.head.site, head_family, parameters, source))
    if not shards:
        raise files.refused(source, f"{WEIGHTS} holds no site")
    family: Linear | Mlp
    if isinstance(config.family, _Linear):
        family = Linear(scale=config.family.scale)
    else:
        family = Mlp(hidden_sizes=tuple(config.family.hidden_sizes), scale=config.family.scale)
    return Imported(family, {site: _checked(site, family, shards[site], source) for site in shards}, head)


def _checked(site: str, family: Family, parameters: Parameters, source: str) -> Parameters:
    """The parameters in the family's order, if they are what it has at a site of these widths."""
    first, last = ("W0", f"W{len(family.hidden_sizes)}") if isinstance(family, Mlp) else ("W", "W")
    if {first, last} - parameters.keys() or parameters[first].dim() != 2 or parameters[last].dim() != 2:
        raise files.refused(source, f"site {site} lacks {first} or {last}")
    shapes = build(family, d_in=parameters[first].shape[1], d_out=parameters[last].shape[0]).shapes()
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if found != shapes:
        raise files.refused(source, f"site {site} holds {found}, not {shapes}")
    return {name: parameters[name] for name in shapes}
