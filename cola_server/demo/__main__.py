"""`python -m cola_server.demo prepare|evaluate`: each prints one JSON object on its standard output."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cola_common.errors import ColaError
from cola_server.demo.dialogues import read_dialogues, split_dialogues, write_rows

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The torch side of `cola demo`.")


@app.command(name="prepare")
def prepare_command(
    folder: Annotated[Path, typer.Option(help="Where train.jsonl and evaluation.jsonl go.")],
    cache: Annotated[Path, typer.Option(help="Where the converted SmolLM2 is kept.")],
    model: Annotated[str | None, typer.Option(help="A folder or hub id to use instead of SmolLM2.")] = None,
) -> None:
    """Write the data; convert SmolLM2 unless another model is named."""
    split = split_dialogues(read_dialogues())
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = folder / "train.jsonl", folder / "evaluation.jsonl"
    write_rows(train, split.train)
    write_rows(evaluation, split.evaluation)
    if model is None:
        from cola_server.demo.smollm2 import converted  # torch and transformers take seconds

        model = str(converted(cache))
    _answer(
        model=model,
        train=str(train),
        train_rows=len(split.train),
        evaluation=str(evaluation),
        evaluation_rows=len(split.evaluation),
    )


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[str, typer.Option(help="A folder or hub id.")],
    adapter: Annotated[Path, typer.Option(help="A folder in PEFT's format.")],
    rows: Annotated[Path, typer.Option(help="JSONL of texts.")],
    max_length: Annotated[int, typer.Option(help="Tokens at which a text is cut.")],
) -> None:
    """Print the loss and perplexity of the rows before and after."""
    from cola_server.demo.evaluation import evaluate

    before = evaluate(model, None, rows, max_length)
    after = evaluate(model, adapter, rows, max_length)
    _answer(
        before={**asdict(before), "perplexity": before.perplexity},
        after={**asdict(after), "perplexity": after.perplexity},
    )


def _answer(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")


def main() -> None:
    """Exit status 1 and one line on standard error for a `ColaError`."""
    try:
        app()
    except ColaError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
