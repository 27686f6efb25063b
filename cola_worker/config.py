"""A worker's settings: one TOML file, then `COLA_WORKER_…` in the environment, then flags. The later wins."""

import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from cola_common.errors import ColaError, Reason
from cola_common.rpc.addresses import split

C = TypeVar("C", bound="WorkerConfig")


class WorkerConfig(BaseSettings):
    """All settings of `cola-worker`."""

    model_config = SettingsConfigDict(env_prefix="COLA_WORKER_", extra="forbid", frozen=True)

    server: str
    """The server's HOST:PORT."""
    data_dir: Path
    """The worker's id, and the state of its shards. No two workers may have one folder, or copies of one."""
    token_file: Path | None = None
    """A file that holds the server's token for workers, and nothing else."""
    root_certificates: Path | None = None
    """A PEM file that the server's certificate must lead to; given, the connection is TLS."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the numerics; one a core where not given."""
    insecure: bool = False
    """Plaintext to another machine."""
    log_format: Literal["text", "json"] = "text"

    @field_validator("server")
    @classmethod
    def _address(cls, value: str) -> str:
        try:
            split(value)
        except ColaError as error:
            raise ValueError(error.details["problem"]) from None
        return value

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
    def read(cls, file: Path | None, flags: dict[str, Any]) -> Self:
        """The settings from a file, the environment, and the flags that were given.

        Raises: `ColaError(INVALID_CONFIG)`.
        """
        try:
            return _with_file(cls, file)(**flags)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            setting = ".".join(map(str, first["loc"])) or "settings"
            raise ColaError(Reason.INVALID_CONFIG, setting=setting, problem=first["msg"]) from None
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ColaError(Reason.INVALID_CONFIG, setting="--config", problem=error) from None

    def token(self) -> str | None:
        """The token file's text. Raises: `ColaError(INVALID_CONFIG)`."""
        if self.token_file is None:
            return None
        try:
            text = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ColaError(Reason.INVALID_CONFIG, setting="token_file", problem=error) from None
        if not text or any(character.isspace() for character in text):
            problem = f"{self.token_file} must hold one token and nothing else"
            raise ColaError(Reason.INVALID_CONFIG, setting="token_file", problem=problem)
        return text


def _with_file(cls: type[C], file: Path | None) -> type[C]:
    if file is None:
        return cls
    file.read_bytes()  # a file that was named must be there: the settings source passes over missing ones

    class FromFile(cls):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(toml_file=file)

    return FromFile
