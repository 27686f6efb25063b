"""A job that went through real processes and sockets has the adapter that ordinary back-propagation has.

`tests/numerics` goes over the whole product in process; here every pair of two factors' values meets at least once.
"""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cola_common.adapters import peft_format
from cola_common.jobs import Hyperparameters, JobSpec
from cola_common.messages import OptimizerPlan
from cola_common.schedules import warmup_steps
from cola_server.model import JobAdapter, load, probe
from cola_server.training import data
from tests.support.cluster import Cluster
from tests.support.in_process import Batch
from tests.support.oracle import back_propagate

STEPS = 20
BATCH = 2
SEED = 11
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "bert": ["query", "value"],
}
ADAPTERS = {
    "lora": {"type": "lora", "r": 3, "lora_alpha": 5.0},
    "linear": {"type": "linear", "scale": 0.6},
    "mlp": {"type": "mlp", "hidden_sizes": [5], "scale": 1.2},
}
FACTORS = {
    "kind": ["llama", "gpt2", "opt", "bert"],
    "family": ["lora", "linear", "mlp"],
    "fold": ["unmerged", "merged"],
    "interval": [1, 3],
    "max_grad_norm": [0.05, 0.0],
    "workers": [1, 2],
    "optimizer": ["sgd", "adamw"],
}
Row = dict[str, object]


def allowed(row: Row) -> bool:
    return (row.get("family"), row.get("fold")) != ("mlp", "merged")


def pairs(row: Row) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def pairwise() -> Iterator[Row]:
    """Rows in which every allowed pair of values meets: greedily, always the row with the most new pairs."""
    rows = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    rows = [row for row in rows if allowed(row)]
    missing = set().union(*(pairs(row) for row in rows))
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        yield best


def rows_of(kind: str, interval: int) -> tuple[list[dict[str, str]], int]:
    """Training rows and epochs that make 20 steps, the last of one batch; ragged, and with a batch without targets."""
    random_ = random.Random(interval)
    epochs = 1 if interval == 1 else 2
    count = BATCH * (interval * (STEPS - 1) + 1) // epochs

    def words(low: int, high: int) -> str:
        return " ".join(f"w{random_.randrange(50)}" for _ in range(random_.randint(low, high)))

    if kind == "bert":
        return [{"text": words(3, 20), "label": random_.choice("abc")} for _ in range(count)], epochs
    rows = [{"prompt": words(1, 8), "completion": " " + words(2, 12)} for _ in range(count)]
    for row in rows[4:6]:
        row["prompt"] = words(40, 40)  # cut off before its completion begins
    return rows, epochs


def submit(cluster: Cluster, case: Row, file: bytes, epochs: int) -> tuple[JobSpec, dict[str, dict[str, torch.Tensor]]]:
    """Runs the job. Returns: its spec and the adapter's parameters by site, the head's with them."""
    with cluster.client() as client:
        uploaded = client.files.create(file=("rows.jsonl", file), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=case["kind"],
            training_file=uploaded.id,
            seed=SEED,
            adapter={**ADAPTERS[str(case["family"])], "target_modules": TARGETS[str(case["kind"])]},
            hyperparameters={
                "n_epochs": epochs,
                "batch_size": BATCH,
                "max_length": 32,
                "learning_rate": 0.02 if case["optimizer"] == "sgd" else 0.003,
                "optimizer": case["optimizer"],
                "weight_decay": 0.01,
                "lr_scheduler_type": "cosine" if case["interval"] == 1 else "linear",
                "warmup_ratio": 0.1,
                "max_grad_norm": case["max_grad_norm"],
                "adaptation_interval": case["interval"],
                "shuffle": False,
                **({"momentum": 0.9, "nesterov": True} if case["optimizer"] == "sgd" else {}),
            },
            fold=case["fold"],
            wire={"values": "fp32"},
        )
        done = client.fine_tuning.jobs.wait(job.id, timeout=50)
        assert done.status == "succeeded", done.error
        steps = client.fine_tuning.jobs.metrics(job.id)
        assert [m.step for m in steps] == list(range(1, STEPS + 1))
        if case["max_grad_norm"]:
            limit = float(str(case["max_grad_norm"]))
            assert sum(m.grad_norm > limit for m in steps) > STEPS / 2, "nothing was clipped"
        (latest,) = [c for c in client.fine_tuning.jobs.checkpoints.list(job.id) if c.step_number == STEPS]
        folder = cluster.root / latest.id
        client.fine_tuning.jobs.checkpoints.download(latest.id, folder)
    return job.spec, peft_format.load(folder).parameters


def plan_of(h: Hyperparameters) -> OptimizerPlan:
    return OptimizerPlan(
        optimizer=h.optimizer,
        learning_rate=h.learning_rate,
        momentum=h.momentum,
        nesterov=h.nesterov,
        weight_decay=h.weight_decay,
        max_grad_norm=h.max_grad_norm,
        lr_scheduler_type=h.lr_scheduler_type,
        warmup_steps=warmup_steps(h.warmup_ratio, STEPS),
        total_steps=STEPS,
    )


@pytest.mark.parametrize("case", list(pairwise()), ids=lambda case: "-".join(map(str, case.values())))
def test_the_adapter_is_that_of_back_propagation(
    case: Row, whole: Cluster, split: Cluster, models: dict[str, Path], tmp_path: Path
) -> None:
    kind, interval = str(case["kind"]), int(str(case["interval"]))
    rows, epochs = rows_of(kind, interval)
    text = "\n".join(json.dumps(row) for row in rows).encode()
    spec, trained = submit(whole if case["workers"] == 1 else split, case, text, epochs)

    base = load(kind, str(models[kind]), device="cpu")
    (tmp_path / "rows.jsonl").write_bytes(text)
    dataset = data.read(tmp_path / "rows.jsonl", base.task, base.tokenizer, 32)
    batches = data.Batches(dataset, BATCH, SEED, shuffle=False)
    total = interval * (STEPS - 1) + 1
    collated = [Batch(*data.collate([dataset.examples[i] for i in batches.indices(n)], 0)) for n in range(total)]
    sites = probe(base, spec.adapter, labels=3 if kind == "bert" else None, fold="unmerged")
    start = JobAdapter.initial(sites, SEED, torch.device("cpu")).state()
    oracle = back_propagate(
        base.module,
        {site.name: site.family for site in sites},
        {site.name: parameters for site, parameters in zip(sites, start, strict=True)},
        plan_of(spec.hyperparameters),
        [collated[first : first + interval] for first in range(0, total, interval)],
        peft=case["family"] == "lora",
    )
    assert trained.keys() == oracle.parameters.keys()
    ours = torch.cat([p.flatten() for site in sorted(trained) for p in trained[site].values()])
    theirs = torch.cat([oracle.parameters[site][name].flatten() for site in sorted(trained) for name in trained[site]])
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < (1e-5 if case["optimizer"] == "sgd" else 1e-4), error
