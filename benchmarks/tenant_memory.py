"""What a further tenant costs in memory: the server's RSS by the number of its running jobs, beside PEFT's.

    (a) the server: 1, 16, 64, 256 jobs that run at once, each with data and an adapter of its own
    (b) PEFT in one process: as many adapters on one model, each with its gradients and AdamW's moments

A Llama of 4 layers, hidden size 256, fp32; LoRA r=8 on q and v; AdamW; batches of 1 example of 64 tokens out of 1,000;
`bf16` values. One more job runs from the start, whose batches fill a pass each: the room for that is there once, for
whoever passes. RSS is read when every job has made some steps since the last was added, as the highest of some seconds.
The bytes of a further tenant are the slope between the first count and each other one.

    python -m benchmarks.tenant_memory [--counts 1,16,64,256] [--steps 3]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import write_record
from benchmarks.small import save_llama
from cola_common.client import Client
from tests.support.cluster import Cluster

LAYERS, HIDDEN, RANK, EXAMPLES, LENGTH = 4, 256, 8, 1000, 64
TARGETS = ["q_proj", "v_proj"]
ADAPTER_BYTES = 4 * LAYERS * len(TARGETS) * RANK * (HIDDEN + HIDDEN)
AIM_BYTES = 1.2 * ADAPTER_BYTES + 64 * 1024
COHORT_TOKENS = 256
BUFFER_BYTES = 2 << 20
WATCH_SECONDS = 4.0
TOKENS = f"""
worker = "{"w" * 16}"
[tenants.default]
token = "{"c" * 16}"
max_queued = {{jobs}}
max_running = {{jobs}}
"""


def resident(pid: int | str) -> int:
    """RSS in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def submit(client: Client, number: int, **hyperparameters: int) -> str:
    """A job on data of its own. Returns: its id."""
    rows = "\n".join(
        json.dumps({"text": " ".join(f"w{(number + i * j) % 50}" for j in range(LENGTH))}) for i in range(EXAMPLES)
    )
    file = client.files.create(file=(f"{number}.jsonl", rows.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="small",
        training_file=file.id,
        adapter={"type": "lora", "r": RANK, "target_modules": TARGETS},
        hyperparameters={"max_length": LENGTH, "batch_size": 1, "max_steps": 1_000_000, **hyperparameters},
        wire={"rows": "all", "values": "bf16"},
    )
    return job.id


def server_bytes(cluster: Cluster, client: Client, counts: list[int], steps: int) -> dict[int, int]:
    """RSS by the number of running jobs."""
    submit(client, 0, batch_size=COHORT_TOKENS // LENGTH)
    found: dict[int, int] = {}
    jobs: list[str] = []
    for count in counts:
        while len(jobs) < count:
            jobs.append(submit(client, len(jobs)))
        wanted = {job: client.fine_tuning.jobs.retrieve(job).step + steps for job in jobs}
        while any(client.fine_tuning.jobs.retrieve(job).step < step for job, step in wanted.items()):
            time.sleep(0.5)
        highest, end = 0, time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            highest = max(highest, resident(cluster.server.process.pid))
            time.sleep(0.1)
        found[count] = highest
        print(f"server, {count} jobs: {highest / 1e6:.1f} MB", flush=True)
    return found


def peft_bytes(path: str, counts: list[int]) -> None:
    """The child process for (b): prints RSS by the number of adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.randint(8, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base.config.use_cache = False
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="0").eval()
    optimizers, found = [], {}
    for number in range(max(counts)):
        if number:
            model.add_adapter(str(number), config)
        model.set_adapter(str(number))
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4))
        for _ in range(2):
            optimizers[-1].zero_grad(set_to_none=False)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizers[-1].step()
        if number + 1 in counts:
            found[number + 1] = resident("self")
    print(json.dumps(found), flush=True)


def slopes(found: dict[int, int]) -> dict[int, float]:
    """Bytes of a further tenant, from the first count to each other one."""
    first = min(found)
    return {count: (rss - found[first]) / (count - first) for count, rss in found.items() if count != first}


def main(
    counts: Annotated[str, typer.Option(help="Numbers of jobs, ascending.")] = "1,16,64,256",
    steps: Annotated[int, typer.Option(help="Of every job, before memory is read.")] = 3,
    peft: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run the benchmark and write its record."""
    wanted = [int(count) for count in counts.split(",")]
    if peft:
        peft_bytes(peft, wanted)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = save_llama(
            root / "small", layers=LAYERS, hidden=HIDDEN, intermediate=2 * HIDDEN, heads=4, positions=2 * LENGTH
        )
        command = [sys.executable, "-m", "benchmarks.tenant_memory", f"--counts={counts}", f"--peft={model}"]
        told = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        of_peft = {int(count): rss for count, rss in json.loads(told.splitlines()[-1]).items()}
        (root / "tokens").write_text(TOKENS.format(jobs=wanted[-1] + 1))
        (root / "worker-token").write_text(f"{'w' * 16}")
        flags = [f"--token-file={root / 'tokens'}", "--threads=1", f"--buffer-bytes={BUFFER_BYTES}",
                 f"--cohort-tokens={COHORT_TOKENS}"]  # fmt: skip
        cluster = Cluster(root / "run", {"small": model}, workers=0, flags=flags, client_token="c" * 16)
        with cluster, cluster.client() as client:
            cluster.start_worker("worker", [f"--token-file={root / 'worker-token'}"])
            of_server = server_bytes(cluster, client, wanted, steps)
    further = {"server": slopes(of_server), "peft": slopes(of_peft)}
    for name, values in further.items():
        for count, value in values.items():
            print(f"{name}, up to {count:3} tenants: {value / 1024:.0f} KiB for each further one")
    last = further["server"][wanted[-1]]
    verdict = "met" if last <= AIM_BYTES else "missed"
    print(f"adapter {ADAPTER_BYTES / 1024:.0f} KiB, aim {AIM_BYTES / 1024:.0f} KiB: {verdict}")
    if len(wanted) < 4:
        return
    write_record(
        "tenant_memory",
        {
            "what": __doc__.splitlines()[0],
            "shape": {"layers": LAYERS, "hidden": HIDDEN, "rank": RANK, "sites": TARGETS, "examples": EXAMPLES,
                      "length": LENGTH, "batch": 1},
            "adapter_bytes": ADAPTER_BYTES,
            "aim_bytes": AIM_BYTES,
            "resident_bytes": {"server": of_server, "peft": of_peft},
            "bytes_a_further_tenant": further,
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
