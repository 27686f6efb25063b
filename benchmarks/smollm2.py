"""SmolLM2-135M as the benchmarks train it: where it is kept, its sites, and rows of text that fill a batch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

CACHE = Path.home() / ".cache" / "cola"
Cache = Annotated[Path, typer.Option(help="Where the converted model is kept.")]
"""The option of a benchmark's `main`; its default is `CACHE`."""

LENGTH, RANK = 64, 8
SITES = {
    "q, v": ("q_proj", "v_proj"),
    "seven": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
LORA = {"type": "lora", "r": RANK, "lora_alpha": 2 * RANK}


def lora(sites: str) -> dict[str, Any]:
    """The adapter of a job."""
    return {**LORA, "target_modules": SITES[sites]}


def filling_rows(count: int, mark: str = "") -> bytes:
    """A file of so many texts of more than `LENGTH` tokens: batches of them have no padding. Another mark makes another
    file.
    """
    text = " ".join(["The quick brown fox jumps over the lazy dog and runs away."] * 12)
    return "\n".join(json.dumps({"text": f"{mark} {i} {text}"}) for i in range(count)).encode()
