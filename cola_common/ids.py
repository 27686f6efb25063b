"""Ids: a prefix that tells the kind, and 96 random bits."""

import re
import secrets
from typing import Literal

Prefix = Literal["file", "ftjob", "ftckpt", "ftevent", "wkr", "boot", "sess"]
PATTERN = re.compile(r"[a-z]+-[0-9a-f]{24}")


def new(prefix: Prefix) -> str:
    """A fresh id such as `ftjob-0f3c…`; 96 bits make a clash of two ids out of the question."""
    return f"{prefix}-{secrets.token_hex(12)}"


def valid(prefix: Prefix, text: str) -> bool:
    """Whether `text` is an id of that kind. Ids name files, so everything from outside is checked with this."""
    return text.startswith(f"{prefix}-") and PATTERN.fullmatch(text) is not None
