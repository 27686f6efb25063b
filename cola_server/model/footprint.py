"""What a pass takes: memory for each token that goes through a model, measured once with a few tokens.

Counted is what is alive at once of all tensors that the pass makes, with the input of every linear layer kept until the
backward pass, as for a job that adapts them all. What an allocator loses between them is not in it.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from cola_server.model.base import BaseModel

SHORT, LONG = 8, 24
"""Tokens of the two passes: their difference is free of what does not depend on the tokens. Memory that grows with the
square of the length, as attention's did before fused kernels, is not looked for."""


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that are made under it, as long as each lives; `peak` is the most."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, storage: int, nbytes: int) -> None:
        self._known.discard(storage)
        self._bytes -= nbytes


def token_bytes(base: BaseModel) -> int:
    """Bytes that a pass takes for each padded token. For the numerics thread; the base must hold its own weights."""
    return -(-(_peak(base, LONG) - _peak(base, SHORT)) // (LONG - SHORT))


def _peak(base: BaseModel, tokens: int) -> int:
    module = base.module
    ids = torch.ones(1, tokens, dtype=torch.long, device=base.device)
    mask = torch.ones_like(ids)
    root = torch.zeros((), device=base.device, dtype=base.dtype, requires_grad=True)
    inputs: list[Any] = []
    # Under checkpointing the inputs of one layer are there at a time, when it is computed again.
    kept = () if base.gradient_checkpointing else (nn.Linear, Conv1D)
    linear = [part for part in module.modules() if isinstance(part, kept)]
    hooks = [part.register_forward_pre_hook(lambda _part, args: inputs.append(args)) for part in linear]
    # All of the model is differentiated, as if its first layer were adapted.
    hooks.append(module.get_input_embeddings().register_forward_hook(lambda _part, _args, out: out + root))
    try:
        with _Alive([*module.parameters(), *module.buffers()]) as alive:
            logits = module(input_ids=ids, attention_mask=mask).logits
            rows = logits.reshape(-1, logits.shape[-1]).float()
            targets = torch.zeros(len(rows), dtype=torch.long, device=base.device)
            torch.autograd.backward(functional.cross_entropy(rows, targets, reduction="sum"))
    finally:
        for hook in hooks:
            hook.remove()
    peak: int = alive.peak  # the mode has no types
    return peak
