"""What a user asks for, and what the planner makes of the part that is left open to it."""

import difflib
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from cola_common.errors import ColaError, Reason
from cola_common.jobs.record import Record


class _Adapter(Record):
    target_modules: tuple[str, ...] | str = "all-linear"
    """Suffixes of module paths; or one regular expression that the whole path must match; or `"all-linear"`."""
    init_from: str | None = None
    """A checkpoint's id or the id of an uploaded adapter to continue from."""

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value or (not isinstance(value, str) and not all(value)):
            raise ValueError("name at least one module")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value


class LoraAdapter(_Adapter):
    """The paper's Low Rank; scale s = lora_alpha / r."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)


class LinearAdapter(_Adapter):
    """A full matrix a site."""

    type: Literal["linear"] = "linear"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class MlpAdapter(_Adapter):
    """A perceptron with ReLU a site."""

    type: Literal["mlp"] = "mlp"
    hidden_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(128,), min_length=1)
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)


AdapterSpec = Annotated[LoraAdapter | LinearAdapter | MlpAdapter, Field(discriminator="type")]


class Hyperparameters(Record):
    """How a job trains. `"auto"` is accepted for any field and means its default."""

    n_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; given, it takes the place of n_epochs and the data repeats as often as it needs to."""
    batch_size: int = Field(default=4, ge=1)
    max_length: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Global norm to clip at; 0: no clipping."""
    adaptation_interval: int = Field(default=1, ge=1)
    shuffle: bool = True

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v != "auto"} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ValueError("momentum and nesterov belong to optimizer='sgd'")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


Rows = Literal["all", "exact", "sketch"]
Codec = Literal["fp32", "bf16", "fp16", "int8", "int4"]


class Wire(Record):
    """What travels. `"auto"` leaves a choice to the server's planner, which keeps within `max_error`; what is named
    holds whatever it loses. `wire="auto"` is short for all of it left open.
    """

    rows: Literal[Rows, "auto"] = "auto"
    """`all` rows of x and g; `exact`, the gradient that a worker would make of them; `sketch`, fewer rows that make
    nearly the same gradient.
    """
    values: Literal[Codec, "auto"] = "auto"
    """The codec of what rows leaves."""
    deltas: Literal[Codec, "auto"] = "auto"
    """The codec of deltas; what it loses is carried to the next one."""
    sketch_rows: int = Field(default=64, ge=1)
    """Of a call, at most; for `sketch`."""
    max_error: float = Field(default=0.0, ge=0, le=1)
    """Of a step's gradient, relative to its norm, that what the planner chooses may make. 0: nothing may be lost."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value


class WirePlan(Record):
    """What the planner has chosen for a job, or what the job had named."""

    rows: Rows
    values: Codec
    deltas: Codec
    sketch_rows: int
    max_error: float
    """As in `Wire`: where a sketch would be further off than that, all rows are sent. 0: it is sent however far off."""
    error: float
    """Relative, of a step's gradient, that is expected of this; see `docs/wire.md`."""
    reason: str


class Method(Record):
    """How the loss is made."""

    type: Literal["supervised"] = "supervised"


class Collaboration(Record):
    """A group of jobs: the forward pass of each sees the base and the mean of all adapters; each fits its own rows."""

    group: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """The first job of that name makes the group, the others join it; it is free again once all of them have ended."""
    size: int = Field(ge=2, le=1024)
    """Members; none starts before all are there."""


class JobSpec(Record):
    """Everything a job is, from its user's side."""

    model: str
    training_file: str
    joint_files: tuple[str, ...] = ()
    """Further files: their rows follow those of the training file, as if all were in one."""
    validation_file: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    suffix: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    method: Method = Method()
    adapter: AdapterSpec = LoraAdapter()
    hyperparameters: Hyperparameters = Hyperparameters()
    fold: Literal["unmerged", "merged"] = "unmerged"
    wire: Wire = Wire()
    collaboration: Collaboration | None = None

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """The spec from plain fields.

        Raises: `ColaError(INVALID_JOB)` that names the first wrong field and the nearest right ones.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _invalid(error, cls) from None

    @model_validator(mode="after")
    def _mergeable(self) -> Self:
        if self.fold == "merged" and self.adapter.type == "mlp":
            raise ColaError(Reason.NOT_MERGEABLE, family=self.adapter.type)
        return self

    @model_validator(mode="after")
    def _unmerged_with_others(self) -> Self:
        if self.fold == "merged" and self.collaboration is not None:
            problem = "the weights that a group's jobs share hold no one's adapter; use 'unmerged'"
            raise ColaError(Reason.INVALID_JOB, param="fold", problem=problem)
        return self


def _invalid(error: ValidationError, model: type[BaseModel]) -> ColaError:
    first = error.errors(include_url=False, include_context=True)[0]
    path = [str(part) for part in first["loc"]]
    problem = first["msg"]
    if first["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=3) or known
        problem = f"no such field; there is {', '.join(near)}"
    elif first["type"] in ("literal_error", "union_tag_invalid"):
        given = first["input"].get("type") if isinstance(first["input"], dict) else first["input"]
        problem = f"{problem}, not {given!r}"
    elif first["type"] not in ("missing",):
        problem = f"{problem} (got {first['input']!r})"
    return ColaError(Reason.INVALID_JOB, param=".".join(path) or "job", problem=problem)


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "hyperparameters": Hyperparameters,
        "wire": Wire,
        "method": Method,
        "collaboration": Collaboration,
        "lora": LoraAdapter,
        "linear": LinearAdapter,
        "mlp": MlpAdapter,
    }
    return sorted((nested[path[-1]] if path and path[-1] in nested else model).model_fields)
