"""What travels in place of rows in fp32: `exact` is the same to the bit, everything else within its stated error; and
whatever is lost, server and worker hold the same bits (the fold compares digests at every step).
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.adapters import Parameters
from cola_common.jobs import AdapterSpec, LinearAdapter, LoraAdapter, MlpAdapter, WirePlan
from cola_common.tensor import CODECS
from cola_server.model import BaseModel, JobAdapter, Site, probe
from tests.numerics.test_equality import ADAMW, CLIP, HEADS, LABELS, SEED, SGD, TARGETS, base, bits, distance, steps
from tests.support.in_process import InProcess, dealt
from tests.support.wires import wire

FAMILIES: dict[str, AdapterSpec] = {
    "lora": LoraAdapter(r=4, lora_alpha=6.0),
    "linear": LinearAdapter(scale=0.7),
    "mlp": MlpAdapter(hidden_sizes=(5,), scale=1.3),
}
VALID = {"lora": ("all", "exact", "sketch"), "linear": ("all", "sketch"), "mlp": ("all",)}


def sites(kind: str, family: str, fold: str = "unmerged") -> tuple[Site, ...]:
    spec = FAMILIES[family].model_copy(update={"target_modules": TARGETS[kind]})
    return probe(base(kind), spec, labels=LABELS if kind in HEADS else None, fold=fold)


def train(
    kind: str,
    of_job: Sequence[Site],
    travels: WirePlan,
    folder: Path,
    *,
    plan: object = SGD,
    interval: int = 1,
    fold: str = "unmerged",
    count: int = 20,
) -> tuple[dict[str, Parameters], int]:
    """Returns: the parameters by site, and the bytes of all captures."""
    model: BaseModel = base(kind)
    adapter = JobAdapter.initial(of_job, SEED, torch.device("cpu"))
    owners = dealt(of_job, ["one", "other"])
    with InProcess(model, of_job, adapter, plan, folder, owners=owners, fold=fold, travels=travels) as job:  # type: ignore[arg-type]
        for batches in steps(kind, interval)[:count]:
            job.step(batches)
    return {site.name: shard for site, shard in zip(of_job, adapter.state(), strict=True)}, job.bytes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("fold", ["unmerged", "merged"])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_exact_rows_in_fp32_train_the_very_same_bits_as_all_rows(
    kind: str, interval: int, fold: str, optimizer: str, tmp_path: Path
) -> None:
    plan = replace(SGD if optimizer == "sgd" else ADAMW, max_grad_norm=CLIP if interval == 3 else 0.0)
    of_job = sites(kind, "lora", fold)
    rows, nbytes = train(kind, of_job, wire("all"), tmp_path / "a", plan=plan, interval=interval, fold=fold)
    exact, fewer = train(kind, of_job, wire("exact"), tmp_path / "e", plan=plan, interval=interval, fold=fold)
    assert bits(exact) == bits(rows)
    assert fewer < nbytes / 2


@pytest.mark.parametrize("family", ["lora", "linear"])
def test_a_sketch_of_as_many_rows_as_there_are_is_all_of_them(family: str, tmp_path: Path) -> None:
    of_job = sites("llama", family)
    rows, _ = train("llama", of_job, wire("all"), tmp_path / "a")
    sketched, _ = train("llama", of_job, wire("sketch", sketch_rows=64), tmp_path / "s")
    assert bits(sketched) == bits(rows)


def test_a_sketch_s_error_is_held_by_sending_all_rows(tmp_path: Path) -> None:
    of_job = sites("llama", "linear")
    rows, nbytes = train("llama", of_job, wire("all"), tmp_path / "a")
    poor, fewer = train("llama", of_job, wire("sketch", sketch_rows=4), tmp_path / "p")
    assert fewer < nbytes / 3 and distance(poor, rows) > 0.05, "four rows are enough here: the test shows nothing"
    held, more = train("llama", of_job, wire("sketch", sketch_rows=4, max_error=0.01), tmp_path / "h")
    assert fewer < more <= nbytes and distance(held, rows) < 0.02


LOSSY = [
    (family, rows, values, deltas)
    for family, modes in VALID.items()
    for rows, values, deltas in itertools.product(modes, CODECS, CODECS)
    if values != "fp32" or deltas != "fp32" or rows == "sketch"
]
LOSS = {"fp32": 0.0, "fp16": 0.002, "bf16": 0.01, "int8": 0.05, "int4": 0.25}
"""Of 20 steps' way from the start, for captures and deltas alike; the sum of both is allowed."""


@pytest.mark.parametrize(("family", "rows", "values", "deltas"), LOSSY, ids="-".join)
def test_what_is_lost_is_little_and_lost_alike_on_both_sides(
    family: str, rows: str, values: str, deltas: str, tmp_path: Path
) -> None:
    of_job = sites("llama", family)
    travels = wire(rows, values, deltas, sketch_rows=24)  # type: ignore[arg-type]
    start = {
        site.name: shard
        for site, shard in zip(of_job, JobAdapter.initial(of_job, SEED, torch.device("cpu")).state(), strict=True)
    }
    wanted, _ = train("llama", of_job, wire(), tmp_path / "w")
    found, _ = train("llama", of_job, travels, tmp_path / "f")
    way, apart = between(start, wanted), between(found, wanted)
    allowed = LOSS[values] + LOSS[deltas] + (0.15 if rows == "sketch" else 0.0)
    assert 0 < apart <= allowed * way, apart / way


def between(one: dict[str, Parameters], other: dict[str, Parameters]) -> float:
    apart = [one[site][name] - value for site, of_site in other.items() for name, value in of_site.items()]
    return float(torch.cat([each.flatten() for each in apart]).norm())
