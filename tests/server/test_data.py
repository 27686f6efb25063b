"""A job's data: what its examples are, which batch takes which, and the tensors that they make."""

import itertools
import json
import math

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.jobs import Hyperparameters
from cola_server.training import data
from cola_server.training.data import NO_TARGET, Batches, Dataset, Example, collate, read, total_batches, total_steps
from tests.support.tokenizers import bytes_tokenizer

TOKENIZER = bytes_tokenizer()
CAUSAL, CLASSIFY = "causal-lm", "sequence-classification"


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="train"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(line) for line in lines))
        return path

    return write


def plain(example):
    return list(example.ids), example.labels if isinstance(example.labels, int) else list(example.labels)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [2, 5, 11, 12, 1000])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, bytes_tokenizer(begin=True), bytes_tokenizer(end=True)])
def test_a_text_is_what_the_tokenizer_makes_of_it_and_all_of_it_is_learnt(write, tokenizer, max_length):
    texts = ["hello world", "é", "<|im_start|>x", "a" * 50]
    dataset = read(write(*({"text": text} for text in texts)), CAUSAL, tokenizer, max_length)
    for text, example in zip(texts, dataset.examples, strict=True):
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert plain(example) == (ids, ids)
    assert (dataset.task, dataset.label_names) == (CAUSAL, None)


def test_what_is_not_learnt_has_no_target(write):
    (example,) = read(write({"prompt": "ac", "completion": "d"}), CAUSAL, TOKENIZER, 100).examples
    ids = [*TOKENIZER("acd")["input_ids"], TOKENIZER.eos_token_id]
    assert plain(example) == (ids, [NO_TARGET, NO_TARGET, *ids[2:]])


def test_a_conversation_is_read(write):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "cd"}]
    (example,) = read(write({"messages": messages}), CAUSAL, TOKENIZER, 1000).examples
    assert list(example.ids) == TOKENIZER.apply_chat_template(messages, return_dict=True)["input_ids"]
    targets = [label for label in example.labels if label != NO_TARGET]
    assert TOKENIZER.decode(targets) == "cd<|im_end|>"


def test_an_example_cut_before_its_targets_stays(write):
    (example,) = read(write({"prompt": "a" * 50, "completion": "b"}), CAUSAL, TOKENIZER, 10).examples
    assert plain(example) == (TOKENIZER("a" * 10)["input_ids"], [NO_TARGET] * 10)


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [([3, 10, -1, 3], ("-1", "3", "10"), [1, 2, 0, 1]), (["no", "yes", "maybe"], ("maybe", "no", "yes"), [1, 2, 0])],
)
def test_classes_are_labels_in_order(write, labels, names, classes):
    path = write(*({"text": "hello", "label": label} for label in labels))
    dataset = read(path, CLASSIFY, TOKENIZER, 3)
    assert dataset.label_names == names
    assert [example.labels for example in dataset.examples] == classes
    assert all(list(e.ids) == TOKENIZER("hello", truncation=True, max_length=3)["input_ids"] for e in dataset.examples)


def test_a_validation_file_has_the_training_files_classes(write):
    training = read(write(*({"text": "a", "label": n} for n in "cab")), CLASSIFY, TOKENIZER, 8)
    path = write({"text": "a", "label": "c"}, {"text": "a", "label": "b"}, name="valid")
    validation = read(path, CLASSIFY, TOKENIZER, 8, training.label_names)
    assert validation.label_names == training.label_names == ("a", "b", "c")
    assert [example.labels for example in validation.examples] == [2, 1]
    path = write({"text": "a", "label": "c"}, {"text": "a", "label": "d"}, name="valid")
    with pytest.raises(ColaError) as error:
        read(path, CLASSIFY, TOKENIZER, 8, training.label_names)
    assert error.value.reason == Reason.INVALID_DATASET
    assert (error.value.details["file"], error.value.details["line"]) == ("valid", "2")


@pytest.mark.parametrize(
    ("task", "lines", "line"),
    [
        (CAUSAL, [{"text": "a"}, {"text": ""}], 2),
        (CAUSAL, [{"text": "a", "label": 1}], 1),
        (CLASSIFY, [{"text": "a"}], 1),
        (CAUSAL, [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], 1),
        (CAUSAL, [], 1),
    ],
    ids=["empty text", "labels for a causal model", "no labels for a classifier", "no chat template", "empty file"],
)
def test_a_wrong_line_is_told(write, task, lines, line):
    with pytest.raises(ColaError) as error:
        read(write(*lines), task, bytes_tokenizer(None), 8)
    assert error.value.reason == Reason.INVALID_DATASET
    assert (error.value.details["file"], error.value.details["line"]) == ("train", str(line))


def test_examples_take_eight_bytes_a_token_and_no_more(write):
    (text,) = read(write({"text": "a" * 1000}), CAUSAL, TOKENIZER, 2000).examples
    assert text.labels is text.ids
    assert memoryview(text.ids).nbytes == 4 * 1000


# --- batches --------------------------------------------------------------------------------------------------------


def examples(count):
    return Dataset([Example([number], [number]) for number in range(count)], CAUSAL, None)


SIZES = [(1, 1), (1, 4), (4, 4), (5, 4), (12, 4), (13, 1), (101, 8)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_each_epoch_takes_every_example_once_in_full_batches_but_the_last(count, batch_size, shuffle):
    batches = Batches(examples(count), batch_size, 7, shuffle)
    assert batches.per_epoch == math.ceil(count / batch_size)
    for epoch in range(3):
        taken = [batches.indices(epoch * batches.per_epoch + place) for place in range(batches.per_epoch)]
        assert sorted(itertools.chain(*taken)) == list(range(count))
        assert all(len(batch) == batch_size for batch in taken[:-1])
        assert 1 <= len(taken[-1]) <= batch_size
        if not shuffle:
            assert list(itertools.chain(*taken)) == list(range(count))


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    count, size, numbers = 23, 4, [17, 0, 5, 11, 0, 17, 6, 1]
    batches = Batches(examples(count), size, 3, True)
    for number in numbers:
        assert batches.indices(number) == Batches(examples(count), size, 3, True).indices(number)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = set()
    for seed in (0, 1, 2**63 - 1):
        batches = Batches(examples(100), 100, seed, True)
        orders |= {tuple(batches.indices(epoch)) for epoch in range(4)}
    assert len(orders) == 12
    assert tuple(range(100)) not in orders


def test_an_order_stays_the_same_for_good():
    """A job that goes on after an upgrade must meet the data that it would have met."""
    assert Batches(examples(10), 10, 0, True).indices(0) == [3, 1, 6, 5, 7, 9, 4, 0, 8, 2]


def test_orders_do_not_touch_the_global_generator():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    Batches(examples(10), 2, 0, True).indices(50)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("interval", [1, 2, 3, 8])
@pytest.mark.parametrize("max_steps", [None, 1, 5])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(("count", "batch_size"), SIZES)
def test_intervals_run_on_across_epochs_and_the_last_may_be_short(count, batch_size, epochs, max_steps, interval):
    hyperparameters = Hyperparameters(
        n_epochs=epochs, max_steps=max_steps, batch_size=batch_size, adaptation_interval=interval
    )
    steps = batches = waiting = 0
    for _ in itertools.count() if max_steps else range(epochs):
        for _ in range(0, count, batch_size):
            batches, waiting = batches + 1, waiting + 1
            if waiting == interval:
                steps, waiting = steps + 1, 0
            if steps == max_steps:
                break
        if steps == max_steps:
            break
    steps += waiting > 0
    assert total_steps(count, hyperparameters) == steps
    assert total_batches(count, hyperparameters) == batches


# --- collate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1], [16], [17], [3, 16, 1], [31, 33, 48], [48, 2]])
def test_a_batch_is_padded_on_the_right_to_a_multiple_of_16(lengths):
    pad = 9
    batch = [Example([pad, *range(size - 1)], [NO_TARGET, *range(size - 1)]) for size in lengths]
    ids, mask, labels = collate(batch, pad)
    length = next(multiple for multiple in range(16, 1000, 16) if multiple >= max(lengths))
    for tensor in (ids, mask, labels):
        assert tensor.shape == (len(lengths), length)
        assert tensor.dtype == torch.int64
    for row, (example, size) in enumerate(zip(batch, lengths, strict=True)):
        assert ids[row].tolist() == [*example.ids, *[pad] * (length - size)]
        assert mask[row].tolist() == [1] * size + [0] * (length - size)  # by place: the padding's id is in the text too
        assert labels[row].tolist() == [*example.labels, *[NO_TARGET] * (length - size)]


@pytest.mark.parametrize(("longest", "positions", "length"), [(3, 10, 10), (10, 10, 10), (3, 16, 16), (17, 20, 20)])
def test_padding_ends_where_the_models_positions_do(longest, positions, length):
    example = Example([1] * longest, [1] * longest)
    assert collate([example], 0, positions)[0].shape == (1, length)


def test_classes_are_one_an_example():
    ids, mask, labels = collate([Example([1, 2], 2), Example([1], 0)], 0)
    assert labels.tolist() == [2, 0]
    assert labels.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 16)


def test_what_is_read_can_be_collated(write):
    dataset = read(
        write({"prompt": "a", "completion": "cd"}, {"prompt": "x" * 20, "completion": "y"}), CAUSAL, TOKENIZER, 64
    )
    ids, mask, labels = data.collate(dataset.examples, TOKENIZER.pad_token_id)
    assert ids.shape == (2, 32)
    assert mask.sum(1).tolist() == [4, 22]
    assert (labels != NO_TARGET).sum(1).tolist() == [3, 2]
    assert TOKENIZER.decode(ids[1, : mask[1].sum()]) == "x" * 20 + "y<|im_end|>"
