"""`cola-server`: reads the settings, then serves. It listens before torch is imported."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cola_common.errors import ColaError
from cola_server.config import ServerConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Flag = typer.Option


@app.command()
def serve(
    model: Annotated[list[str] | None, Flag("--model", help="NAME=PATH: folder, hub id or GGUF file.")] = None,
    data_dir: Annotated[Path | None, Flag(help="Database, uploads and checkpoints.")] = None,
    listen: Annotated[str | None, Flag(help="HOST:PORT; port 0 takes a free one. [default: 127.0.0.1:50051]")] = None,
    config: Annotated[Path | None, Flag(help="TOML file with these settings.")] = None,
    dtype: Annotated[str | None, Flag(help="fp32 or bf16, of the base model.")] = None,
    device: Annotated[str | None, Flag(help="auto, cpu or cuda.")] = None,
    task: Annotated[str | None, Flag(help="auto, causal-lm or sequence-classification.")] = None,
    gradient_checkpointing: Annotated[bool | None, Flag(help="Recompute activations in the backward pass.")] = None,
    threads: Annotated[int | None, Flag(help="Threads of the numerics.")] = None,
    split_jobs: Annotated[
        int | None, Flag(help="Workers that each job is dealt out to. [default: the fastest]")
    ] = None,
    cohort_tokens: Annotated[int | None, Flag(help="Tokens that share a pass. [default: 512; on CUDA 2048]")] = None,
    memory_bytes: Annotated[int | None, Flag(help="For training. [default: 80 % of what models leave free]")] = None,
    max_running_jobs: Annotated[int | None, Flag(help="A tenant's jobs that train at once. [default: 8]")] = None,
    snapshot_steps: Annotated[int | None, Flag(help="Steps between snapshots at most; 0: none. [default: 50]")] = None,
    snapshot_seconds: Annotated[float | None, Flag(help="Work between snapshots at most. [default: 60]")] = None,
    snapshot_ratio: Annotated[float | None, Flag(help="Snapshots' part of a job's bytes. [default: 0.1]")] = None,
    lease_seconds: Annotated[float | None, Flag(help="Silence after which a worker is lost. [default: 10]")] = None,
    window_bytes: Annotated[int | None, Flag(help="Capture bytes under way to a worker.")] = None,
    buffer_bytes: Annotated[int | None, Flag(help="Capture bytes that batches may reserve for a worker.")] = None,
    database_url: Annotated[str | None, Flag(help="SQLAlchemy URL. [default: SQLite in the data folder]")] = None,
    tls_cert: Annotated[Path | None, Flag(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, Flag(help="PEM private key.")] = None,
    token_file: Annotated[Path | None, Flag(help="TOML with the tokens of clients and workers.")] = None,
    insecure: Annotated[bool | None, Flag("--insecure", help="Listen off loopback without TLS and tokens.")] = None,
    log_format: Annotated[str | None, Flag(help="text or json.")] = None,
) -> None:
    """Serve fine-tuning jobs on frozen base models."""
    given: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("model", "config")}
    flags = {key: value for key, value in given.items() if value is not None}
    if model:
        flags["models"] = model
    try:
        settings = ServerConfig.read(config, flags)
        from cola_server.app import run  # only now: it brings grpc

        asyncio.run(run(settings))
    except ColaError as error:
        typer.echo(f"cola-server: {error}", err=True)
        sys.exit(2)


def main() -> None:
    """The console script."""
    app()
