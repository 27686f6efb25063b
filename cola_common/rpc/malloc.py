"""glibc's malloc, tuned for streams of large buffers."""

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

# By default each large buffer is mapped when it is taken and unmapped when it is freed, so that every page of it faults
# again: streams of 1 MiB messages were 3.5 times slower, and decoding tensors of 16 MiB took more time than all else.
# With these, buffers of any size come from the heap, and the heap keeps what it was given until 512 MiB of it lie free.
# One heap for all threads: a thread's own would be given back piece by piece, whatever the trim threshold.
_SETTINGS = {
    _M_MMAP_MAX: 0,
    _M_ARENA_MAX: 1,
    _M_TRIM_THRESHOLD: 512 << 20,
    _M_TOP_PAD: 16 << 20,
}


def tune() -> bool:
    """Tunes malloc for this process; to be called once, when it starts. False where the C library is not glibc."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
