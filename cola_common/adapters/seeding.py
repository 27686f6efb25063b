"""Random numbers that depend on a job's seed and a site's name, and on nothing else: not on placement, not on order."""

import hashlib

import torch


def generator(seed: int, site: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, site)."""
    digest = hashlib.sha256(f"{seed}:{site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # torch takes 63 bits
