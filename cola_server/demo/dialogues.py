"""Questions and answers from the English part of chatterbot-corpus (BSD), read from the installed package.

The corpus repeats itself: 2,026 dialogues open with 898 different exchanges, and one question or one answer occurs in
several of them. An evaluation on rows whose question or answer was trained on would flatter the adapter, so the
training rows that share either with the evaluation rows are dropped.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cola_server.demo.carriers import carrier_folder

REQUIREMENT = "chatterbot-corpus==1.3.3"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Split:
    """Question-answer pairs; no question and no answer is on both sides."""

    train: tuple[Pair, ...]
    evaluation: tuple[Pair, ...]


def read_dialogues() -> list[Pair]:
    """The first exchange of every dialogue, each different one once, in the corpus' order.

    Raises: `ColaError(INVALID_CONFIG)` where the corpus is not installed.
    """
    folder = carrier_folder("chatterbot_corpus", REQUIREMENT) / "data" / "english"
    pairs: dict[Pair, None] = {}
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) > 1:
                pairs[(str(turns[0]).strip(), str(turns[1]).strip())] = None
    return list(pairs)


def split_dialogues(pairs: Sequence[Pair], evaluation_rows: int = 60) -> Split:
    """A split that depends on the pairs alone, not on their order: the pairs with the smallest hashes are held out."""
    shuffled = sorted(pairs, key=lambda pair: hashlib.sha256("\n".join(pair).encode()).digest())
    evaluation = shuffled[:evaluation_rows]
    questions = {question for question, _ in evaluation}
    answers = {answer for _, answer in evaluation}
    train = [pair for pair in shuffled[evaluation_rows:] if pair[0] not in questions and pair[1] not in answers]
    return Split(tuple(train), tuple(evaluation))


def write_rows(path: Path, pairs: Sequence[Pair]) -> None:
    """JSONL of `{"text": …}`, a dialogue a line. Every token is a target."""
    lines = (json.dumps({"text": f"User: {question}\nAssistant: {answer}"}) for question, answer in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
