"""Held-out loss of the base model and of base model plus adapter, by transformers and PEFT alone.

Nothing of the server takes part, so the number is a check on the server's own validation loss: a row at a time, no
padding, no batching, and the adapter loaded as any user of PEFT would.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Loss:
    """Mean over the target tokens, in nats."""

    mean: float
    targets: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)


def evaluate(model: str, adapter: Path | None, rows: Path, max_length: int) -> Loss:
    """The loss over JSONL rows of `{"text": …}`, cut at `max_length` tokens; every token but the first is a target.

    `model` is a folder or a hub id. Weights are fp32, on the CPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        module = PeftModel.from_pretrained(module, str(adapter))
    module.eval()
    total, targets = 0.0, 0
    with torch.inference_mode():
        for text in _texts(rows):
            ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
            logits = module(input_ids=ids).logits[0, :-1].float()
            total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            targets += ids.shape[1] - 1
    return Loss(total / targets, targets)


def _texts(rows: Path) -> Iterator[str]:
    with rows.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
