"""Training files: JSON Lines of one format throughout, read line by line in bounded memory, checked without a model.

    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, …]}     causal LM
    {"prompt": text, "completion": text}                                              causal LM
    {"text": text}                                                                    causal LM
    {"text": text, "label": integer or text}                                          sequence classification

Blank lines are passed over. Everything else that is wrong is told with its line's number.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cola_common.errors import ColaError, Reason

MAX_LINE_BYTES = 4 << 20
"""A line is in memory as a whole, and again as JSON. Four million characters are over ten times what the longest
contexts take."""

MAX_DEPTH = 16
"""The formats nest three deep; the parser recurses, and must not be led beyond its stack."""

MAX_LABELS = 1000
"""More is a column of the wrong kind, and a head of that size would be trained in full."""

MAX_MESSAGES = 256
"""A conversation's mask renders the template once for each turn of the assistant."""

ROLES = ("system", "user", "assistant")

STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Possessive, and with its end left open, so that no line takes more than linear time."""

NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, an assistant's among them but not first; the loss is on the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """The loss is on the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """The loss is on every token."""

    text: str


@dataclass(frozen=True)
class Labelled:
    """A text to classify."""

    text: str
    label: int | str


Record = Conversation | Completion | Text | Labelled


@dataclass(frozen=True)
class Survey:
    """What a training file holds."""

    examples: int
    labels: tuple[int | str, ...] | None
    """Its labels in order, where it has any."""


class _WrongLineError(Exception):
    """What is wrong with a line, on its way to who knows its number."""


def survey(path: Path, name: str, task: str | None = None, labels: Collection[int | str] | None = None) -> Survey:
    """Checks a whole file; `name` is what errors call it.

    `task` is "causal-lm" or "sequence-classification" if the file must fit one; `labels` are those that may occur, if
    not any may.

    Raises: `ColaError(INVALID_DATASET)` with the first wrong line.
    """
    examples = 0
    found: set[int | str] = set()
    for line, record in parse(path, name, task):
        examples += 1
        if isinstance(record, Labelled):
            found.add(record.label)
            if labels is not None and record.label not in labels:
                _refuse(name, line, f"label {_short(record.label)} is not in the training file")
            if len(found) > MAX_LABELS:
                _refuse(name, line, f"more than {MAX_LABELS} different labels")
    return Survey(examples, in_order(found) if found else None)


def survey_all(files: Iterable[tuple[Path, str]], task: str) -> Survey:
    """Checks files that are one dataset, as `survey` does each of them; formats may differ from file to file.

    Raises: `ColaError(INVALID_DATASET)`.
    """
    examples = 0
    found: set[int | str] = set()
    for path, name in files:
        one = survey(path, name, task)
        examples += one.examples
        found.update(one.labels or ())
        if len({type(label) for label in found}) > 1:
            _refuse(name, 1, "labels are integers in one file and texts in another")
        if len(found) > MAX_LABELS:
            _refuse(name, 1, f"more than {MAX_LABELS} different labels in all files together")
    return Survey(examples, in_order(found) if found else None)


def in_order(labels: Collection[int | str]) -> tuple[int | str, ...]:
    """Labels of one dataset in the order that numbers their classes: integers by value, texts by code points."""
    return tuple(sorted(labels))  # all of one type


def parse(path: Path, name: str, task: str | None = None) -> Iterator[tuple[int, Record]]:
    """The records of a file with their lines' numbers; arguments and errors as those of `survey`."""
    first: Record | None = None
    for line, raw in _lines(path, name):
        try:
            record = _record(_value(raw))
        except _WrongLineError as error:
            _refuse(name, line, str(error))
        if first is None:
            first = record
            if task is not None and isinstance(record, Labelled) != (task == "sequence-classification"):
                wanted = (
                    "text and label"
                    if task == "sequence-classification"
                    else "messages, prompt and completion, or text"
                )
                _refuse(name, line, f"a model for {task} takes lines with {wanted}")
        if type(record) is not type(first):
            _refuse(name, line, "another format than the lines before; a file has one throughout")
        if isinstance(record, Labelled) and isinstance(first, Labelled) and type(record.label) is not type(first.label):
            _refuse(name, line, "labels are either all integers or all texts")
        yield line, record
    if first is None:
        _refuse(name, 1, "the file is empty")


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        line = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            if len(raw) > MAX_LINE_BYTES:
                _refuse(name, line, f"longer than {MAX_LINE_BYTES} bytes")
            if raw.strip():
                yield line, raw


def _value(raw: bytes) -> object:
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _WrongLineError("starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _WrongLineError(f"not UTF-8: byte {raw[error.start]:#04x} at {error.start + 1}") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise _WrongLineError(f"nested deeper than {MAX_DEPTH}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _WrongLineError(f"not JSON: {error.msg} at {error.pos + 1}") from None
    except ValueError:
        raise _WrongLineError("a number with too many digits") from None


def _depth(raw: bytes) -> int:
    """How deep brackets nest outside of strings."""
    depth = deepest = 0
    for byte in STRING.sub(b"", raw).translate(None, delete=NO_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _record(value: object) -> Record:
    if not isinstance(value, dict):
        raise _WrongLineError("not a JSON object")
    match sorted(value):
        case ["messages"]:
            return Conversation(_messages(value["messages"]))
        case ["completion", "prompt"]:
            completion = _text(value["completion"], "completion", empty=False)
            return Completion(_text(value["prompt"], "prompt"), completion)
        case ["text"]:
            return Text(_text(value["text"], "text", empty=False))
        case ["label", "text"]:
            return Labelled(_text(value["text"], "text", empty=False), _label(value["label"]))
        case keys:
            found = ", ".join(_short(key) for key in keys[:8]) or "none"
            raise _WrongLineError(f"the keys are messages; prompt and completion; text; or text and label, not {found}")


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _WrongLineError("messages must be a list of at least one")
    if len(value) > MAX_MESSAGES:
        raise _WrongLineError(f"more than {MAX_MESSAGES} messages; split the conversation")
    messages = []
    for number, item in enumerate(value, start=1):
        if not isinstance(item, dict) or sorted(item) != ["content", "role"]:
            raise _WrongLineError(f"message {number} must have the keys role and content, and no others")
        if item["role"] not in ROLES:
            raise _WrongLineError(
                f"message {number}: the role is one of {', '.join(ROLES)}, not {_short(item['role'])}"
            )
        spoken = item["role"] == "assistant"
        content = _text(item["content"], f"message {number}: content", empty=not spoken)
        messages.append(Message(item["role"], content))
    if messages[0].role == "assistant":
        raise _WrongLineError("the first message cannot be the assistant's: it answers nothing")
    if all(message.role != "assistant" for message in messages):
        raise _WrongLineError("no message of the assistant: there is nothing to learn")
    return tuple(messages)


def _text(value: object, what: str, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise _WrongLineError(f"{what} must be text, not {_short(value)}")
    if not empty and not value.strip():
        raise _WrongLineError(f"{what} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _WrongLineError(f"{what} has half of a surrogate pair, which is no character") from None
    return value


def _label(value: object) -> int | str:
    if isinstance(value, str):
        return _text(value, "label", empty=False)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _WrongLineError(f"label must be an integer or text, not {_short(value)}")


def _short(value: object) -> str:
    """A value for an error's text: a user sees which, not all of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _refuse(name: str, line: int, problem: str) -> NoReturn:
    raise ColaError(Reason.INVALID_DATASET, file=name, line=line, problem=problem)
