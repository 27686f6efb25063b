"""Row reductions: what of a capture's rows is sent. `all`, `exact` and `sketch`; each says what it is valid for."""

from cola_server.reduce import exact, sketch
from cola_server.reduce.all import keep

__all__ = ["exact", "keep", "sketch"]
