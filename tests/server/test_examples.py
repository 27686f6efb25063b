"""Examples on the disk: they come back as they were, take no memory, and leave nothing behind."""

import gc
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_common.errors import ColaError, Reason
from cola_server.training import examples as module
from cola_server.training.examples import Example, Stored

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
LABELLED = st.builds(Example, IDS, st.integers(0, 999))
CAUSAL = IDS.flatmap(
    lambda ids: st.builds(
        Example,
        st.just(ids),
        st.just(ids) | st.lists(st.integers(-100, 2**31 - 1), min_size=len(ids), max_size=len(ids)),
    )
)


def plain(example):
    return list(example.ids), example.labels if isinstance(example.labels, int) else list(example.labels)


@given(st.lists(LABELLED) | st.lists(CAUSAL), st.slices(9))
def test_what_was_stored_is_read(examples, part):
    stored = Stored(iter(examples), None)
    assert len(stored) == len(examples)
    assert [plain(example) for example in stored] == [plain(example) for example in examples]
    assert [plain(example) for example in stored[part]] == [plain(example) for example in examples[part]]
    for place in range(len(examples)):
        assert plain(stored[place]) == plain(examples[place])
    for beyond in (len(examples), -1):
        with pytest.raises(IndexError):
            stored[beyond]


def test_memory_does_not_grow_with_the_examples(tmp_path):
    def kept(count):
        tracemalloc.start()
        stored = Stored((Example(list(range(100)), 1) for _ in range(count)), tmp_path)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(stored) == count
        return size

    kept(1)
    assert kept(5000) < kept(5) + 2000


def test_the_file_has_no_name_and_goes_with_the_object(tmp_path):
    def open_here():
        links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(tmp_path)) for link in links if link.is_symlink())

    stored = Stored([Example([1], [1])], tmp_path)
    assert (open_here(), list(tmp_path.iterdir())) == (1, [])
    del stored
    gc.collect()
    assert open_here() == 0


def test_a_full_disk_is_told_as_such(monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(ColaError) as caught:
        Stored([Example([1], [1])], None)
    assert caught.value.reason is Reason.STORAGE_FULL


def test_what_is_wrong_with_a_line_is_told_through_the_writing():
    def lines():
        yield Example([1], [1])
        raise ColaError(Reason.INVALID_DATASET, file="f", line=2, problem="p")

    with pytest.raises(ColaError, match="line 2"):
        Stored(lines(), None)
