"""The base model on a GPU: captures, folds and merging give what they give on the CPU."""

from pathlib import Path

import pytest
import torch

from cola_common.jobs import LoraAdapter
from cola_common.messages import OptimizerPlan
from cola_server.model import JobAdapter, Merging, load, probe
from tests.support.in_process import Batch, InProcess
from tests.support.models import VOCABULARY, save_tiny

PLAN = OptimizerPlan(
    optimizer="sgd",
    learning_rate=0.05,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.01,
    max_grad_norm=1.0,
    lr_scheduler_type="linear",
    warmup_steps=1,
    total_steps=8,
)


def trained(model: Path, device: str, fold: str, folder: Path) -> torch.Tensor:
    base = load("tiny", str(model), device="cuda" if device == "cuda" else "cpu")
    assert base.device.type == device
    sites = probe(base, LoraAdapter(r=4), labels=None, fold=fold)
    adapter = JobAdapter.initial(sites, 0, base.device)
    generator = torch.Generator().manual_seed(0)
    with InProcess(base, sites, adapter, PLAN, folder, fold=fold) as job:
        for _ in range(PLAN.total_steps):
            ids = torch.randint(5, VOCABULARY, (3, 16), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, 9:] = 0
            job.step([Batch(ids, mask, ids.masked_fill(mask == 0, -100))])
    return torch.cat([p.flatten() for shard in adapter.state() for p in shard.values()])


@pytest.mark.parametrize("fold", ["unmerged", "merged"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_on_the_gpu_agrees_with_the_cpu(kind: str, fold: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path / "model")
    torch.backends.cuda.matmul.allow_tf32 = False
    on_gpu, on_cpu = (trained(model, device, fold, tmp_path / device) for device in ("cuda", "cpu"))
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 1e-5


def test_merging_on_the_gpu_is_undone_to_the_bit(tmp_path: Path) -> None:
    base = load("tiny", str(save_tiny("llama", tmp_path)), device="cuda", dtype="bf16")
    sites = probe(base, LoraAdapter(r=4), labels=None, fold="merged")
    before = {name: p.clone() for name, p in base.module.named_parameters()}
    merging = Merging(base, JobAdapter.initial(sites, 0, base.device))
    for _ in range(3):
        merging.merge()
        merging.restore()
    assert all((p == before[name]).all() and p.is_cuda for name, p in base.module.named_parameters())
