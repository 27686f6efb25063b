"""Numbers as people read them: bytes, seconds, counts, times."""

from datetime import UTC, datetime


def bytes_text(number: float) -> str:
    """`"512 B"`, `"1.5 MB"`; a thousand to the next unit."""
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def count_text(number: float) -> str:
    """`"950"`, `"52.1k"`, `"135M"`."""
    return _scaled(number, ("", "k", "M", "B", "T")).replace(" ", "")


def times_text(whole: float, part: float) -> str:
    """How many times a part goes into a whole: `"1.25×"`, `"12.3×"`, `"384×"`; empty where one of them is nothing."""
    if not whole or not part:
        return ""
    times = whole / part
    digits = 2 if times < 9.995 else 1 if times < 99.95 else 0
    return f"{times:.{digits}f}×"


def seconds_text(seconds: float) -> str:
    """A short time, such as a step's: `"640 µs"`, `"84 ms"`, `"2.41 s"`."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def duration_text(seconds: float) -> str:
    """A time that someone waits: `"0:07"`, `"12:30"`, `"2:05:00"`."""
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def day_text(unix_seconds: float) -> str:
    """A time of these days, in this machine's zone: `"23 Nov 20:19"`."""
    return f"{datetime.fromtimestamp(unix_seconds, tz=UTC).astimezone():%d %b %H:%M}"


def time_text(unix_seconds: float) -> str:
    """A time in this machine's zone: `"2026-11-23 20:19"`."""
    return f"{datetime.fromtimestamp(unix_seconds, tz=UTC).astimezone():%Y-%m-%d %H:%M}"


def clock_text(unix_seconds: float) -> str:
    """The time of day alone: `"20:19:33"`."""
    return f"{datetime.fromtimestamp(unix_seconds, tz=UTC).astimezone():%H:%M:%S}"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    if number < 999.5:
        return f"{number:.0f} {units[0]}"
    for unit in units[1:]:
        number /= 1000
        if number < 999.5 or unit == units[-1]:
            break
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {unit}"
