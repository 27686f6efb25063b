"""Row reductions: what of a capture's rows is sent."""

from cola_server.reduce.all import keep

__all__ = ["keep"]
