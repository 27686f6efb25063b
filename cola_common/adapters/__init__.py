"""Adapters: what is trained at a site. `build` makes the one that a family names."""

from cola_common.adapters.base import Adapter, Cost, Parameters
from cola_common.adapters.registry import build

__all__ = ["Adapter", "Cost", "Parameters", "build"]
