"""What many users get out of one model: tokens a second of K tenants, beside the limit and beside PEFT, in one run.

    (a) the limit: the frozen model's forward and backward pass, at the batch at which it is fastest
    (b) PEFT LoRA with AdamW: jobs one after another, each with an adapter and an optimizer of its own
    (c) the server: K jobs of K tenants at once, a worker on the other core

SmolLM2-135M in fp32, each job B1×T64 without padding, LoRA r=8 on q and v, AdamW, the wire as it is by itself; the
server, (a) and (b) have one and the same core and a thread each. In a round they take turns. A job's rate is that
between its first and its last step of the time that is watched, and the server's is the sum of its jobs'. (b) is
measured on three jobs of 16 steps: any number of them one after another has the same rate. The figures are medians of
rounds.

    python -m benchmarks.tenants [--rounds 2] [--seconds 75] [--counts 1,8,64]
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.process import Child, on_core, pin
from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, RANK, SITES, Cache, filling_rows, lora
from cola_common.client import Client
from cola_server.demo.smollm2 import converted
from tests.support.cluster import Cluster

PLACE = "q, v"
LIMIT_BATCHES = (1, 4, 8, 16, 32)
OF_LIMIT, OF_PEFT = 0.93, 1.2
PEFT_JOBS, PEFT_STEPS = 3, 16
WARM_STEPS = 2
TOKENS = """
worker = "{worker}"
"""
TENANT = """
[tenants.tenant-{number}]
token = "{token}"
"""


def token(number: int) -> str:
    """Of that tenant."""
    return f"token-of-tenant-{number:04}"


# --- (a) and (b) ------------------------------------------------------------------------------------------------------


def plain_rounds(path: str) -> None:
    """The child process: for each line that comes in, prints tokens a second of the limit, by batch, and of PEFT."""
    import torch

    from benchmarks.ordinary import Frozen, Peft, tokens

    torch.set_num_threads(1)
    frozen, peft = Frozen(path), Peft(path, SITES[PLACE], RANK)

    def rate(step: Callable[[], None], count: int) -> float:
        began = time.perf_counter()
        step()
        return count / (time.perf_counter() - began)

    def limit(batch: int) -> float:
        ids = tokens(batch, LENGTH)
        frozen.step(ids)
        passes = max(1, 8 // batch)
        return rate(lambda: [frozen.step(ids) for _ in range(passes)] and None, passes * ids.numel())

    def jobs() -> None:
        for _ in range(PEFT_JOBS):
            peft.next_job()
            for _ in range(PEFT_STEPS):
                peft.step(one)

    one = tokens(1, LENGTH)
    peft.step(one)
    print("ready", flush=True)
    for _ in sys.stdin:
        limits = {batch: limit(batch) for batch in LIMIT_BATCHES}
        print(json.dumps([limits, rate(jobs, PEFT_JOBS * PEFT_STEPS * LENGTH)]), flush=True)


# --- (c) --------------------------------------------------------------------------------------------------------------


def server_rate(clients: list[Client], number: int, seconds: float) -> float:
    """Tokens a second of one job of each client, watched for so many seconds after the first steps of all."""
    jobs = []
    for place, client in enumerate(clients):
        rows = filling_rows(32, mark=f"{number} {place}")
        file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="smollm2",
            training_file=file.id,
            adapter=lora(PLACE),
            hyperparameters={"max_steps": 100_000, "batch_size": 1, "max_length": LENGTH, "learning_rate": 1e-4},
        )
        jobs.append(job.id)
    both = list(zip(clients, jobs, strict=True))
    while any(client.fine_tuning.jobs.retrieve(job).step < WARM_STEPS for client, job in both):
        time.sleep(1)
    began = time.time()
    time.sleep(seconds)
    ended = time.time()
    rate = 0.0
    for client, job in both:
        client.fine_tuning.jobs.cancel(job)
    for client, job in both:
        watched = [m for m in client.fine_tuning.jobs.metrics(job) if began <= m.created_at <= ended]
        assert len(watched) > 1, "too few steps: watch for longer"
        assert all(each.tokens == LENGTH for each in watched)
        rate += LENGTH * (len(watched) - 1) / (watched[-1].created_at - watched[0].created_at)
    return rate


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of the three.")] = 2,
    seconds: Annotated[float, typer.Option(help="For which the server's jobs are watched.")] = 75.0,
    counts: Annotated[str, typer.Option(help="Numbers of tenants.")] = "1,8,64",
    cache: Cache = CACHE,
    plain: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the benchmark and write its record."""
    path = converted(cache)
    if plain:
        plain_rounds(str(path))
        return
    tenants = [int(count) for count in counts.split(",")]
    rounds_of: dict[int, list[dict[str, Any]]] = {k: [] for k in tenants}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        named = "".join(TENANT.format(number=n, token=token(n)) for n in range(max(tenants)))
        (root / "tokens").write_text(TOKENS.format(worker="token-of-workers-0") + named)
        (root / "worker-token").write_text("token-of-workers-0")
        flags = [f"--token-file={root / 'tokens'}", "--threads=1"]
        with (
            Cluster(root / "run", {"smollm2": path}, workers=0, flags=flags, client_token=token(0)) as cluster,
            Child("benchmarks.tenants", ["--plain", f"--cache={cache}"], root / "plain.log", on_core(0)) as ordinary,
        ):
            assert ordinary.says() == "ready"
            pin(cluster.server.process.pid, 0)
            worker = cluster.start_worker("worker", [f"--token-file={root / 'worker-token'}", "--threads=1"])
            pin(worker.process.pid, 1)
            cluster.await_workers(1)
            clients = [Client(cluster.address, token=token(n)) for n in range(max(tenants))]
            for number in range(rounds):
                for k in tenants:
                    limits, peft = json.loads(ordinary.ask())
                    server = server_rate(clients[:k], number, seconds)
                    rounds_of[k].append({"limits": limits, "peft": peft, "server": server})
                    print(f"K={k}: limit {max(limits.values()):.1f}, PEFT {peft:.1f}, server {server:.1f}", flush=True)
            for client in clients:
                client.close()
    ratios = {}
    for k, each in rounds_of.items():
        rate = statistics.median(one["server"] for one in each)
        of_limit = statistics.median(one["server"] / max(one["limits"].values()) for one in each)
        of_peft = statistics.median(one["server"] / one["peft"] for one in each)
        ratios[k] = {"tokens_a_second": rate, "of_limit": of_limit, "of_peft": of_peft}
        print(f"K={k:3}: {rate:.1f} tokens/s, {of_limit:.3f} of the limit, {of_peft:.3f} of PEFT")
    write_record(
        "tenants",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"batch": 1, "length": LENGTH, "rank": RANK, "sites": SITES[PLACE], "wire": "auto"},
            "tokens_a_second": rounds_of,
            "medians": ratios,
            "targets": {"of_limit": OF_LIMIT, "of_peft": OF_PEFT},
        },
    )


if __name__ == "__main__":
    typer.run(main)
