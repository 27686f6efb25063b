"""The error of a step's gradient in each mode of the wire, ‖ĝ - g‖ / ‖g‖ over all sites, against `all` rows in fp32.

1,024 rows of real text, adapters that have made some steps of AdamW, SmolLM2-135M in fp32; LoRA r=8, `linear`, and
`mlp` with 128 hidden; q and v, and seven linears. One thread. The constants of `cola_server/training/planner.py` are
these, rounded up.

    python -m benchmarks.wire_errors [--draws 2] [--rows 1024] [--adapters "lora:q, v;mlp:seven"]
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import write_record
from benchmarks.smollm2 import CACHE, LENGTH, Cache
from benchmarks.wire import MODES, RATES, say, sites_of
from cola_common.adapters import Parameters
from cola_common.tensor import decode, decode_parameter, encode, encode_parameter
from cola_server.demo.dialogues import read_dialogues, split_dialogues
from cola_server.demo.smollm2 import converted
from cola_server.model import BaseModel, Captured, JobAdapter, JobBatch, Site, load, train
from cola_server.reduce import sketch
from cola_server.training.traffic import refusal

CODECS = ("fp32", "fp16", "bf16", "int8", "int4")
SKETCHES = (64, 128, 256, 512)
WARM_STEPS, WARM_BATCH = 10, 4
"""Of AdamW, so that no parameter is zero any more."""


class Groups:
    """A sink that hands over each group once all of its sites are there, and keeps none: on seven linears the rows of a
    step are a gigabyte.
    """

    def __init__(self, found: Sequence[Site], take: Callable[[list[Captured]], None]) -> None:
        self._members = Counter(site.group for site in found)
        self._take = take
        self._waiting: dict[int, list[Captured]] = defaultdict(list)

    def capture(self, captured: Captured) -> None:
        group = captured.site.group
        self._waiting[group].append(captured)
        if len(self._waiting[group]) == self._members[group]:
            self._take(self._waiting.pop(group))

    def finish(self) -> None:
        assert not self._waiting


def pass_through(
    base: BaseModel, adapter: JobAdapter, ids: torch.Tensor, take: Callable[[list[Captured]], None]
) -> None:
    (result,) = train(
        base,
        [
            JobBatch(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                labels=ids,
                adapter=adapter,
                sink=Groups(adapter.sites, take),
            )
        ],
    )
    if isinstance(result, Exception):
        raise result


def warmed(
    base: BaseModel, found: Sequence[Site], form: str, batches: Iterator[torch.Tensor]
) -> tuple[JobAdapter, list[torch.Tensor]]:
    """An adapter that has made some steps, and the deltas of the last."""
    adapter = JobAdapter.initial(found, 0, base.device)
    parameters = [p for shard in adapter.parameters for p in shard.values()]
    optimizer = torch.optim.AdamW(parameters, lr=RATES[form], weight_decay=0.0)

    def take(group: list[Captured]) -> None:
        for each in group:
            for name, values in each.gradient()[0].items():
                adapter.parameters[each.site.index][name].grad = values

    old: list[torch.Tensor] = []
    for step in range(WARM_STEPS):
        pass_through(base, adapter, next(batches), take)
        if step == WARM_STEPS - 1:
            old = [p.clone() for p in parameters]
        optimizer.step()
    for p in parameters:
        p.grad = None
    return adapter, [p - before for p, before in zip(parameters, old, strict=True)]


def written(values: torch.Tensor, codec: str) -> torch.Tensor:
    return decode(encode(values, codec))


def written_parameter(values: torch.Tensor, codec: str) -> torch.Tensor:
    return decode_parameter(encode_parameter(values, codec), tuple(values.shape))


def square(values: Parameters) -> float:
    return sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in values.values())


def apart(one: Parameters, other: Parameters) -> float:
    return square({name: one[name] - other[name] for name in one})


class Errors:
    """‖ĝ - g‖² of every choice, summed over sites, and ‖g‖²."""

    def __init__(self) -> None:
        self._squares: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.of_groups: dict[int, list[float]] = defaultdict(list)
        """‖M - M P Pᵀ‖ / ‖M‖ of sketches, as the server estimates it, by k."""

    def add(self, rows: str, codec: str, made: Parameters, true: Parameters) -> None:
        sums = self._squares[rows, codec]
        sums[0] += apart(made, true)
        sums[1] += square(true)

    def relative(self) -> dict[str, dict[str, float]]:
        """By rows and codec."""
        table: dict[str, dict[str, float]] = defaultdict(dict)
        for (rows, codec), (error, whole) in self._squares.items():
            table[rows][codec] = math.sqrt(error / whole)
        for k, each in self.of_groups.items():
            ordered = sorted(each)
            table[f"sketch {k}"] |= {
                "median_group": ordered[len(ordered) // 2],
                "worst_group": ordered[-1],
                "groups_above_0.1": sum(e > 0.1 for e in ordered) / len(ordered),
            }
        return table


def note_group(errors: Errors, adapter: JobAdapter, group: list[Captured]) -> None:
    """What every choice makes of a group."""
    site = group[0].site
    x_ND = group[0].x.detach().reshape(-1, site.d_in)
    gs_NO = [each.g.detach().reshape(-1, each.site.d_out) for each in group]

    def gradients(x: torch.Tensor, gs: Sequence[torch.Tensor]) -> list[Parameters]:
        indices = [each.site.index for each in group]
        return [adapter.adapters[i].vjp(adapter.parameters[i], x, g) for i, g in zip(indices, gs, strict=True)]

    def note(rows: str, codec: str, made: list[Parameters], true: list[Parameters]) -> None:
        for one, other in zip(made, true, strict=True):
            errors.add(rows, codec, one, other)

    true = gradients(x_ND, gs_NO)
    for codec in CODECS:
        note("all", codec, gradients(written(x_ND, codec), [written(g, codec) for g in gs_NO]), true)
        if refusal(site, "exact") is None:
            coded = [{name: written_parameter(v, codec) for name, v in each.items()} for each in true]
            note("exact", codec, coded, true)
    if refusal(site, "sketch") is not None:
        return
    for k in SKETCHES:
        x_kD, gs_kO = sketch.pseudo_rows(x_ND, gs_NO, k=k, seed=site.group)
        if len(x_kD) < len(x_ND):
            errors.of_groups[k].append(sketch.error(x_ND, gs_NO, x_kD.T, seed=site.group))
        sketched = gradients(x_kD, gs_kO)
        for codec in CODECS:
            coded = gradients(written(x_kD, codec), [written(g, codec) for g in gs_kO])
            note(f"sketch {k}", codec, coded, true)
            note(f"values of sketch {k}", codec, coded, sketched)


def error_part(base: BaseModel, draws: int, rows: int, chosen: list[tuple[str, str]]) -> dict[str, Any]:
    text = "\n".join(f"User: {q}\nAssistant: {a}" for q, a in split_dialogues(read_dialogues()).train)
    ids = torch.tensor(base.tokenizer(text)["input_ids"])
    texts = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    tables: dict[str, Any] = {}
    for form, sites in chosen:
        began = time.monotonic()
        picks = (texts[order[torch.arange(i, i + WARM_BATCH) % len(order)]] for i in range(0, 10**6, WARM_BATCH))
        found = sites_of(base, next(mode for mode in MODES.values() if mode.form == form), sites)
        adapter, deltas = warmed(base, found, form, picks)
        each = []
        for draw in range(draws):
            # From the end, which the warm-up has not seen.
            batch = texts[order[len(order) - (draw + 1) * (rows // LENGTH) :][: rows // LENGTH]]
            errors = Errors()
            pass_through(base, adapter, batch, partial(note_group, errors, adapter))
            for codec in CODECS:
                for delta in deltas:
                    errors.add("deltas", codec, {"": written_parameter(delta, codec)}, {"": delta})
            each.append(errors.relative())
        worst = {
            kind: {column: max(one[kind][column] for one in each) for column in columns}
            for kind, columns in each[0].items()
        }
        tables[f"{form}, {sites}"] = {"worst": worst, "draws": each}
        say(f"{form} on {sites}, {time.monotonic() - began:.0f} s; the worst of {draws}:")
        for kind, columns in worst.items():
            say(f"    {kind:20} " + "  ".join(f"{column} {value:.2g}" for column, value in columns.items()))
    return {"errors": tables}


def main(
    draws: Annotated[int, typer.Option(help="Texts for which errors are taken.")] = 2,
    rows: Annotated[int, typer.Option(help="Rows of each.")] = 1024,
    adapters: Annotated[str, typer.Option(help="Whose gradients: form:sites, separated by semicolons.")] = (
        "lora:q, v;lora:seven;linear:q, v;linear:seven;mlp:q, v;mlp:seven"
    ),
    cache: Cache = CACHE,
) -> None:
    """Run the benchmark and write its record."""
    torch.set_num_threads(1)
    base = load("smollm2", str(converted(cache)), device="cpu")
    pairs = [(form, sites) for form, _, sites in (each.partition(":") for each in adapters.split(";"))]
    write_record(
        "wire_errors",
        {"what": __doc__.splitlines()[0], "rows": rows, **error_part(base, draws, rows, pairs)},
    )


if __name__ == "__main__":
    typer.run(main)
