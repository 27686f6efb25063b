"""The server's settings: one TOML file, then `COLA_SERVER_…` in the environment, then flags. The later wins."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cola_common.errors import ColaError, Reason
from cola_common.jobs import DEFAULT_TENANT
from cola_common.rpc.addresses import is_loopback
from cola_common.rpc.limits import CHUNK_BYTES
from cola_server.tenants import Quota, Quotas


class ServerConfig(BaseSettings):
    """All settings of `cola-server`."""

    model_config = SettingsConfigDict(env_prefix="COLA_SERVER_", extra="forbid", frozen=True)

    models: Annotated[dict[str, str], NoDecode] = Field(min_length=1)
    """Name -> folder, hub id or GGUF file of a base model. In the environment: NAME=PATH, separated by commas."""
    data_dir: Path
    """Database, uploads and checkpoints."""
    listen: str = "127.0.0.1:50051"
    dtype: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    task: Literal["auto", "causal-lm", "sequence-classification"] = "auto"
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the numerics; torch's own choice where not given."""
    split_jobs: int | None = Field(default=None, ge=1)
    """Workers that each job's shards are dealt out to; more only where memory asks for them. As many as make its steps
    shortest where not given.
    """
    cohort_tokens: int | None = Field(default=None, ge=1)
    """Padded tokens that share a pass through the model; a larger batch has a pass of its own. What suits the
    device where not given.
    """
    memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """For training: passes and what jobs keep, on the model's device. Four fifths of what loaded models leave free
    where not given.
    """
    max_running_jobs: int = Field(default=8, ge=1)
    """Jobs of a tenant that train at once; its others wait in line."""
    snapshot_steps: int = Field(default=50, ge=0)
    """A job's snapshot is due after so many steps; 0 takes none but for planned moves."""
    snapshot_seconds: float = Field(default=60.0, gt=0)
    """… or after so much work."""
    snapshot_ratio: float = Field(default=0.1, ge=0)
    """… or as soon as snapshots stay below this part of the job's bytes."""
    lease_seconds: float = Field(default=10.0, ge=1.0)
    """Silence after which a worker is lost."""
    window_bytes: int = Field(default=256 << 20, ge=CHUNK_BYTES)
    """Capture bytes that may be on their way to a worker or not yet accumulated by it."""
    buffer_bytes: int = Field(default=4 << 30, ge=1 << 20)
    """Capture bytes that batches may reserve for a worker: the largest batch that a job may have."""
    database_url: str | None = None
    """SQLAlchemy URL; a SQLite file in the data folder where not given."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    """TOML; see `Tokens`."""
    insecure: bool = False
    """Listen off loopback without TLS and tokens."""
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="before")
    @classmethod
    def _models(cls, values: Any) -> Any:
        models = values.get("models") if isinstance(values, dict) else None
        if isinstance(models, str):
            models = models.split(",")
        if isinstance(models, list | tuple):
            pairs = [str(item).partition("=") for item in models]
            bad = next((name for name, _, path in pairs if not name or not path), None)
            if bad is not None:
                raise ValueError(f"{bad or 'a model'!r} is not NAME=PATH")
            values = {**values, "models": {name: path for name, _, path in pairs}}
        return values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def read(cls, file: Path | None, flags: dict[str, Any]) -> "ServerConfig":
        """The settings from a file, the environment, and the flags that were given.

        Raises: `ColaError` (INVALID_CONFIG, INSECURE_LISTEN).
        """
        try:
            config = _with_file(cls, file)(**flags)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            setting = ".".join(map(str, first["loc"])) or "settings"
            raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem=first["msg"]) from None
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ColaError(Reason.INVALID_CONFIG, setting="--config", problem=error) from None
        config.check_listen()
        return config

    def check_listen(self) -> None:
        """Raises: `ColaError(INSECURE_LISTEN)` off loopback without TLS and tokens, unless that was asked for."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ColaError(Reason.INVALID_CONFIG, setting="tls_cert", problem="give certificate and key together")
        secured = self.tls_cert is not None and self.token_file is not None
        if not (is_loopback(self.listen) or secured or self.insecure):
            raise ColaError(Reason.INSECURE_LISTEN, address=self.listen)

    def tokens(self) -> "Tokens | None":
        """The tokens of the token file. Raises: `ColaError(INVALID_CONFIG)`."""
        if self.token_file is None:
            return None
        try:
            return Tokens.model_validate(tomllib.loads(self.token_file.read_text()))
        except (OSError, ValueError) as error:
            raise ColaError(
                Reason.INVALID_CONFIG, setting="token_file", problem=f"{self.token_file}: {error}"
            ) from None

    def quotas(self, tokens: "Tokens | None") -> Quotas:
        """What each tenant may have."""
        clients = tokens.clients if tokens is not None else {}
        return Quotas(
            Quota(max_running=self.max_running_jobs),
            {
                name: Quota(tenant.max_running or self.max_running_jobs, tenant.max_queued, tenant.weight)
                for name, tenant in clients.items()
            },
        )


Token = Annotated[str, StringConstraints(min_length=16)]
TenantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,32}$")]


class Tenant(BaseModel):
    """A table `[tenants.NAME]` of the token file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    token: Token
    weight: float = Field(default=Quota.weight, ge=1e-3, le=1e3)
    max_running: int | None = Field(default=None, ge=1)
    """As the server's `max_running_jobs` where not given."""
    max_queued: int = Field(default=Quota.max_queued, ge=1)


class Tokens(BaseModel):
    """The token file. A token that was taken out of it is good for nothing once the server has started again."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    client: Token | None = None
    """Of the tenant `default`, the operator: short for a table `[tenants.default]`."""
    worker: Token
    tenants: dict[TenantName, Tenant] = {}

    @property
    def clients(self) -> dict[str, Tenant]:
        """All tenants by name."""
        default = {} if self.client is None else {DEFAULT_TENANT: Tenant(token=self.client)}
        return {**default, **self.tenants}

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.client is not None and DEFAULT_TENANT in self.tenants:
            raise ValueError(f"give client or [tenants.{DEFAULT_TENANT}], not both")
        if not self.clients:
            raise ValueError("give client, or a table [tenants.NAME] with a token")
        held = [("the worker", self.worker), *((name, tenant.token) for name, tenant in self.clients.items())]
        owners: dict[str, str] = {}
        for name, token in held:
            if (other := owners.setdefault(token, name)) != name:
                raise ValueError(f"{other} and {name} have the same token")
        return self


def _with_file(cls: type[ServerConfig], file: Path | None) -> type[ServerConfig]:
    if file is None:
        return cls
    file.read_bytes()  # a file that was named must be there: the settings source passes over missing ones

    class FromFile(cls):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(toml_file=file)

    return FromFile
