"""A merged model alone is what base and adapter are together."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cola_common.errors import ColaError, Reason
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter
from cola_server.model import JobAdapter, JobBatch, evaluate, export_merged, probe
from tests.support.models import VOCABULARY, load_tiny

ADAPTERS: dict[str, AdapterSpec] = {"lora": LoraAdapter(r=3), "linear": LinearAdapter(scale=0.5)}


@pytest.mark.parametrize("family", ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_its_loss_is_that_of_base_and_adapter(kind: str, family: str, tmp_path: Path) -> None:
    base = load_tiny(kind, tmp_path / "base")
    labels = 4 if kind == "bert" else None
    sites = probe(base, ADAPTERS[family], labels=labels, fold="merged")
    fresh = JobAdapter.initial(sites, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    parameters = {
        site.name: {name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in shard.items()}
        for site, shard in zip(sites, fresh.state(), strict=True)
    }
    export_merged(base, sites, parameters, tmp_path / "merged")

    ids = torch.randint(5, VOCABULARY, (3, 16), generator=generator)
    classes = torch.tensor([0, 3, 1])
    batch = JobBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids if labels is None else classes,
        adapter=JobAdapter.initial(sites, 0, torch.device("cpu"), parameters),
    )
    ((total, count),) = evaluate(base, [batch])
    auto = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        loss = merged(input_ids=ids, attention_mask=torch.ones_like(ids), labels=batch.labels).loss
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == VOCABULARY


def test_what_is_not_linear_cannot_be_merged(tmp_path: Path) -> None:
    base = load_tiny("llama", tmp_path / "base")
    sites = probe(base, MlpAdapter(hidden_sizes=(4,)), labels=None, fold="unmerged")
    start = {
        site.name: shard
        for site, shard in zip(sites, JobAdapter.initial(sites, 0, torch.device("cpu")).state(), strict=True)
    }
    with pytest.raises(ColaError) as refused:
        export_merged(base, sites, start, tmp_path / "merged")
    assert refused.value.reason == Reason.NOT_MERGEABLE
