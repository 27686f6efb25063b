"""A job's data: examples as token ids and labels, the order in which batches take them, and their tensors.

Legend: B examples of a batch, T its padded length.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Hyperparameters
from cola_server.jobs import jsonl
from cola_server.training import masks
from cola_server.training.examples import Example, Stored

NO_TARGET = -100
"""The label of a token that is no target, as transformers and torch have it."""

PAD_MULTIPLE = 16
"""A batch's padded length is a multiple of this, so that few lengths occur and jobs share cohorts, and depends on the
batch alone, so that a job's bits do not depend on its neighbours."""


@dataclass(frozen=True)
class Dataset:
    """The examples of a file. For classification, `label_names[i]` is the name of class i."""

    examples: Stored
    task: str
    label_names: tuple[str, ...] | None


def read(
    path: Path,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_names: Sequence[str] | None = None,
    joint: Sequence[Path] = (),
    folder: Path | None = None,
) -> Dataset:
    """The examples of a JSONL file (formats: `cola_server.jobs.jsonl`), then those of the `joint` files, each cut to
    `max_length` tokens.

    `task` is "causal-lm" or "sequence-classification". A validation file takes the training file's `label_names`;
    without them the classes are the files' own labels, in order. The examples are kept in a file in `folder`.

    Raises: `ColaError(INVALID_DATASET)` with the first wrong line; `ColaError(STORAGE_FULL)`.
    """
    if task == "sequence-classification" and label_names is None:
        survey = jsonl.survey_all([(each, each.name) for each in (path, *joint)], task)
        label_names = tuple(str(label) for label in survey.labels or ())
    examples = Stored(read_one_by_one((path, *joint), task, tokenizer, max_length, label_names or ()), folder)
    names = tuple(label_names) if label_names is not None and task == "sequence-classification" else None
    return Dataset(examples, task, names)


def read_one_by_one(
    paths: Sequence[Path],
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_names: Sequence[str],
) -> Iterator[Example]:
    """The examples of files, as they are read; arguments and errors as those of `read`."""
    classes = {name: number for number, name in enumerate(label_names)}
    for path in paths:
        for line, record in jsonl.parse(path, path.name, task):
            try:
                yield _example(record, tokenizer, max_length, classes)
            except masks.UnmaskableError as error:
                raise ColaError(Reason.INVALID_DATASET, file=path.name, line=line, problem=error) from None


def _example(
    record: jsonl.Record, tokenizer: PreTrainedTokenizerBase, max_length: int, classes: dict[str, int]
) -> Example:
    ids, mask = _tokens(record, tokenizer, max_length)
    if not ids:
        raise masks.UnmaskableError("the tokenizer makes no tokens of it")
    packed = array("i", ids)  # a list of Python's integers takes nine times the memory
    if isinstance(record, jsonl.Labelled):
        if str(record.label) not in classes:
            raise masks.UnmaskableError(f"label {record.label!r} is not in the training file")
        return Example(packed, classes[str(record.label)])
    if all(mask):
        return Example(packed, packed)
    return Example(packed, array("i", (id if target else NO_TARGET for id, target in zip(ids, mask, strict=True))))


def _tokens(record: jsonl.Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[bool]]:
    """Token ids, and whether each is a target."""
    if isinstance(record, jsonl.Conversation):
        return masks.conversation(tokenizer, record.messages, max_length)
    if isinstance(record, jsonl.Completion):
        return masks.completion(tokenizer, record.prompt, record.completion, max_length)
    ids: list[int] = tokenizer(record.text, truncation=True, max_length=max_length)["input_ids"]
    return ids, [True] * len(ids)


class Batches:
    """Which examples make which batch: a function of the seed and the batch's number alone.

    Batches count on across epochs of the data; an epoch's last batch may be short. Shuffled, each epoch has an order
    of its own; else all have the file's.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, shuffle: bool) -> None:
        self._examples = len(dataset.examples)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._latest = (-1, torch.empty(0))  # a job that waits in line needs none

    @property
    def per_epoch(self) -> int:
        """Batches that an epoch of the data takes."""
        return math.ceil(self._examples / self._batch_size)

    def indices(self, number: int) -> list[int]:
        """The examples of batch `number`, 0 for the first, by their place in the file."""
        epoch, place = divmod(number, self.per_epoch)
        if self._latest[0] != epoch:
            self._latest = (epoch, self._order(epoch))
        return self._latest[1][place * self._batch_size : (place + 1) * self._batch_size].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._examples, dtype=torch.int32)
        seed = hashlib.sha256(f"order of epoch {epoch}, seed {self._seed}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big", signed=True))
        return torch.randperm(self._examples, generator=generator).to(torch.int32)


def total_batches(examples: int, hyperparameters: Hyperparameters) -> int:
    """Batches of the whole job."""
    if hyperparameters.max_steps is not None:
        return hyperparameters.max_steps * hyperparameters.adaptation_interval
    return hyperparameters.n_epochs * math.ceil(examples / hyperparameters.batch_size)


def total_steps(examples: int, hyperparameters: Hyperparameters) -> int:
    """Optimizer steps of the whole job. Intervals run on across epochs; only the last may be short, and is stepped."""
    return math.ceil(total_batches(examples, hyperparameters) / hyperparameters.adaptation_interval)


def padded_length(examples: Sequence[Example], max_positions: int | None = None) -> int:
    """T of a batch of these: a function of its own rows alone."""
    longest = max(len(example.ids) for example in examples)
    length = math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE
    return length if max_positions is None else min(length, max(longest, max_positions))


def collate(
    examples: Sequence[Example], pad_id: int, max_positions: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch's tensors, all int64: ids B×T, padded on the right; attention mask B×T, 0 at padding, whatever its id
    is elsewhere; labels, B×T with `NO_TARGET` at padding, or B classes.

    T is `padded_length`: a multiple of `PAD_MULTIPLE`, or `max_positions` where the model has no more.
    """
    length = padded_length(examples, max_positions)
    ids_BT = torch.full((len(examples), length), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, NO_TARGET)
    classes = []
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids_BT[row, :size] = torch.tensor(example.ids)
        mask_BT[row, :size] = 1
        if isinstance(example.labels, int):
            classes.append(example.labels)
        else:
            labels_BT[row, :size] = torch.tensor(example.labels)
    return ids_BT, mask_BT, torch.tensor(classes) if classes else labels_BT
