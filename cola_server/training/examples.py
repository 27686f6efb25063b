"""A dataset's examples, in a file without a name: a job that trains on a million of them takes no more memory than one
that trains on ten, and jobs that wait in line take none for them.

Each example is 32-bit numbers: how many ids, what the labels are, ids, labels. Behind the last is where each begins.
"""

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from cola_server.jobs.artefacts import storing

AS_IDS, OF_TOKENS = -1, -2
"""What the labels are, where they are no class: the ids themselves, or one a token."""


@dataclass(frozen=True)
class Example:
    """Token ids, without padding; labels are one a token (`NO_TARGET` for no target), or the example's class."""

    ids: Sequence[int]
    labels: Sequence[int] | int


class Stored(Sequence[Example]):
    """Read where it lies; any thread may. The file goes with this object, and with the process."""

    def __init__(self, examples: Iterable[Example], folder: Path | None) -> None:
        """Writes them into a file in `folder`, the system's where None. Raises: `ColaError(STORAGE_FULL)`."""
        self.tokens = 0
        """Of all examples."""
        with storing("tmp"):
            starts = array("q", [0])
            with tempfile.TemporaryFile(dir=folder) as file:
                for example in examples:
                    packed = _packed(example)
                    file.write(packed)
                    self.tokens += len(example.ids)
                    starts.append(starts[-1] + packed.itemsize * len(packed))
                file.write(starts)
                file.flush()
                self._descriptor = os.dup(file.fileno())  # without the buffer
        weakref.finalize(self, os.close, self._descriptor)
        self._starts_at = starts[-1]
        self._count = len(starts) - 1

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        start, stop = self._read("q", self._starts_at + 8 * place, 16)
        return _unpacked(self._read("i", start, stop - start))

    def _read(self, kind: str, offset: int, size: int) -> "array[int]":
        return array(kind, os.pread(self._descriptor, size, offset))


def _packed(example: Example) -> "array[int]":
    if isinstance(example.labels, int):
        return array("i", [len(example.ids), example.labels, *example.ids])
    if example.labels == example.ids:
        return array("i", [len(example.ids), AS_IDS, *example.ids])
    return array("i", [len(example.ids), OF_TOKENS, *example.ids, *example.labels])


def _unpacked(packed: "array[int]") -> Example:
    count, labels, *_ = packed
    ids = packed[2 : 2 + count]
    if labels >= 0:
        return Example(ids, labels)
    return Example(ids, ids if labels == AS_IDS else packed[2 + count :])
