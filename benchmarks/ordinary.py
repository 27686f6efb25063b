"""What ordinary training does with SmolLM2-135M in one process, for comparison: fp32, one thread, random tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def tokens(batch: int, length: int) -> torch.Tensor:
    """Token ids: int64, (batch, length)."""
    return torch.randint(100, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))


def _load(path: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.config.use_cache = False
    return model


class Frozen:
    """The forward and backward pass through the model, without a parameter's gradient: nobody can do less."""

    def __init__(self, path: str) -> None:
        self._model = _load(path).requires_grad_(False).eval()
        root = torch.zeros((), requires_grad=True)
        # The gradient has to flow through the whole model although no parameter takes one.
        self._model.get_input_embeddings().register_forward_hook(lambda _m, _x, out: out + root)

    def step(self, ids: torch.Tensor) -> None:
        """One pass."""
        self._model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()


class Peft:
    """LoRA and AdamW: one job at a time."""

    def __init__(self, path: str, targets: Sequence[str], rank: int) -> None:
        self._config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(targets), lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        self._model = get_peft_model(_load(path), self._config).eval()
        self._optimizer = self._made_optimizer()

    def next_job(self) -> None:
        """Another adapter in place of the one before."""
        self._model.delete_adapter("default")
        self._model.add_adapter("default", self._config)
        self._model.set_adapter("default")
        self._optimizer = self._made_optimizer()

    def step(self, ids: torch.Tensor) -> None:
        """One step of training."""
        self._optimizer.zero_grad(set_to_none=True)
        self._model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        self._optimizer.step()

    def _made_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self._model.parameters() if p.requires_grad], lr=1e-4)
