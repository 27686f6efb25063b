"""Training files: what is right is read, what is wrong is told with its line, and nothing takes much memory or time."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.errors import ColaError, Reason
from cola_server.jobs import jsonl

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
PAIR = {"prompt": "2+2?", "completion": " 4"}
TEXT = {"text": "Two and two is four."}
LABELLED = {"text": "Good.", "label": "positive"}


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_bytes(
            b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
        )
        return path

    return write


def refused(path, task=None, labels=None):
    with pytest.raises(ColaError) as error:
        jsonl.survey(path, "mine.jsonl", task, labels)
    assert error.value.reason == Reason.INVALID_DATASET
    assert error.value.details["file"] == "mine.jsonl"
    return int(error.value.details["line"]), error.value.details["problem"]


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (CHAT, jsonl.Conversation((jsonl.Message("user", "2+2?"), jsonl.Message("assistant", "4")))),
        (PAIR, jsonl.Completion("2+2?", " 4")),
        ({"prompt": "", "completion": "x"}, jsonl.Completion("", "x")),
        (TEXT, jsonl.Text("Two and two is four.")),
        (LABELLED, jsonl.Labelled("Good.", "positive")),
        ({"label": 3, "text": "x"}, jsonl.Labelled("x", 3)),
    ],
)
def test_each_format_is_read(write, line, record):
    path = write(line, line)
    assert list(jsonl.parse(path, "f")) == [(1, record), (2, record)]
    assert jsonl.survey(path, "f").examples == 2


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_through_unchanged(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "data.jsonl"
    for ascii_only in (False, True):
        lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
        path.write_bytes("\n".join(lines).encode())
        assert [record.text for _, record in jsonl.parse(path, "f")] == texts


def test_blank_lines_are_passed_over_and_counted(write):
    path = write(b"\n", TEXT, b"\r\n", b"  \n", TEXT, b"\n")
    assert [line for line, _ in jsonl.parse(path, "f")] == [2, 5]


def test_the_last_line_needs_no_end_and_lines_may_end_as_on_windows(write):
    assert jsonl.survey(write(b'{"text": "a"}\r\n{"text": "b"}'), "f").examples == 2


WRONG = {
    "not JSON": (b'{"text": "a"\n', "not JSON"),
    "two values": (b'{"text": "a"} {"text": "b"}\n', "not JSON"),
    "trailing comma": (b'{"text": "a",}\n', "not JSON"),
    "single quotes": (b"{'text': 'a'}\n", "not JSON"),
    "bad UTF-8": (b'{"text": "\xff\xfe"}\n', "not UTF-8"),
    "Latin-1": ('{"text": "caf\u00e9"}\n'.encode("latin-1"), "not UTF-8"),
    "UTF-8 of a surrogate": (b'{"text": "\xed\xa0\x80"}\n', "not UTF-8"),
    "half surrogate escaped": (b'{"text": "\\ud800"}\n', "surrogate"),
    "NUL bytes": (b"\x00" * 20 + b"\n", "not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}\n', "byte order mark"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "byte order mark"),
    "list": ([TEXT], "not a JSON object"),
    "number": (5, "not a JSON object"),
    "null": (None, "not a JSON object"),
    "huge number": (b'{"text": "a", "label": ' + b"9" * 5000 + b"}\n", "digits"),
    "deep lists": (b"[" * 100_000 + b"]" * 100_000 + b"\n", "nested deeper"),
    "deep lists without end": (b"[" * 1_000_000 + b"\n", "nested deeper"),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n", "nested deeper"),
    "no keys": ({}, "not none"),
    "unknown key": ({"input": "a"}, "'input'"),
    "one key too many": ({"text": "a", "id": 1}, "'id'"),
    "half a pair": ({"prompt": "a"}, "'prompt'"),
    "long key": ({"k" * 10_000: 1}, "kkk"),
    "text no text": ({"text": 5}, "text must be text, not 5"),
    "text null": ({"text": None}, "text must be text"),
    "text empty": ({"text": ""}, "text is empty"),
    "text blank": ({"text": " \n"}, "text is empty"),
    "completion empty": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "label list": ({"text": "a", "label": [1]}, "label must be"),
    "label true": ({"text": "a", "label": True}, "label must be"),
    "label fraction": ({"text": "a", "label": 0.5}, "label must be"),
    "label NaN": (b'{"text": "a", "label": NaN}\n', "label must be"),
    "label empty": ({"text": "a", "label": ""}, "label is empty"),
    "messages no list": ({"messages": "hi"}, "list"),
    "messages none": ({"messages": []}, "list"),
    "message no object": ({"messages": ["hi"]}, "message 1"),
    "message without role": ({"messages": [{"content": "hi"}]}, "message 1"),
    "message with more": (
        {"messages": [*CHAT["messages"], {"role": "user", "content": "a", "name": "b"}]}, "message 3",
    ),
    "unknown role": ({"messages": [{"role": "robot", "content": "hi"}]}, "'robot'"),
    "role no text": ({"messages": [{"role": ["user"], "content": "hi"}]}, "['user']"),
    "content no text": ({"messages": [{"role": "user", "content": None}]}, "message 1: content"),
    "assistant says nothing": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty",
    ),
    "assistant first": ({"messages": CHAT["messages"][::-1]}, "first message"),
    "assistant absent": ({"messages": CHAT["messages"][:1]}, "nothing to learn"),
    "too many messages": ({"messages": CHAT["messages"] * 1000}, "more than"),
}  # fmt: skip


@pytest.mark.parametrize("before", [0, 1, 7], ids=["on line 1", "on line 2", "on line 8"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_with_its_line(write, wrong, before):
    bad, problem = WRONG[wrong]
    started = time.perf_counter()
    line, told = refused(write(*[TEXT] * before, bad))
    assert line == before + 1
    assert problem in told
    assert len(told) < 300
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\n"])
def test_an_empty_file_is_refused(write, content):
    assert refused(write(content)) == (1, "the file is empty")


@pytest.mark.parametrize("other", [CHAT, PAIR, LABELLED])
def test_a_file_has_one_format(write, other):
    assert refused(write(TEXT, TEXT, other))[0] == 3


def test_labels_are_of_one_type(write):
    assert refused(write({"text": "a", "label": 1}, {"text": "a", "label": "1"}))[0] == 2


@pytest.mark.parametrize("line", [CHAT, PAIR, TEXT, LABELLED])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_file_must_fit_the_models_task(write, task, line):
    if (line is LABELLED) == (task == "sequence-classification"):
        assert jsonl.survey(write(line), "f", task).examples == 1
    else:
        line, problem = refused(write(line), task)
        assert line == 1
        assert task in problem


@pytest.mark.parametrize(
    ("labels", "in_order"),
    [([10, 2, 2, -1], (-1, 2, 10)), (["b", "a", "b", "B"], ("B", "a", "b")), (["10", "2"], ("10", "2"))],
)
def test_labels_come_in_order(write, labels, in_order):
    assert jsonl.survey(write(*[{"text": "a", "label": label} for label in labels]), "f").labels == in_order


def test_labels_outside_the_given_are_refused(write):
    path = write(*[{"text": "a", "label": label} for label in (0, 1, 2)])
    assert jsonl.survey(path, "f", labels=(0, 1, 2)).examples == 3
    assert refused(path, labels=(0, 1))[0] == 3


def test_too_many_labels_are_refused(write):
    lines = [{"text": "a", "label": label} for label in range(jsonl.MAX_LABELS + 5)]
    assert refused(write(*lines))[0] == jsonl.MAX_LABELS + 1


def test_depth_is_counted_outside_of_strings_only(write):
    brackets = "[{" * 500 + '\\"' + "}]" * 300
    assert jsonl.survey(write({"text": brackets}), "f").examples == 1


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "' + b'\\"' * 2_000_000,
        b'"' + b"\\" * 3_999_990,
        b"[" * 20 + b'"' * 3_999_000,
        b"[]" * 1_900_000,
        b"[" * 20 + b'"' + b'\\"[' * 1_300_000,
    ],
    ids=["escapes", "backslashes", "quotes", "brackets", "escapes in brackets"],
)
def test_no_line_takes_more_than_linear_time(write, line):
    started = time.perf_counter()
    refused(write(line + b"\n"))
    assert time.perf_counter() - started < 5


def test_a_line_of_100_mb_is_never_in_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n')
    program = f"""
import resource
from pathlib import Path
from cola_common.errors import ColaError
from cola_server.jobs import jsonl
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    jsonl.survey(Path({str(path)!r}), "f")
except ColaError as error:
    print(error.details["line"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line, kilobytes = map(int, done.stdout.split())
    assert line == 2
    assert kilobytes < 32 * 1024
