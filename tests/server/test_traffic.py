"""What captures and deltas weigh is what the packer and a worker make of them, to the byte."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_common.jobs import Codec, Rows, WirePlan
from cola_common.messages import OptimizerPlan, ShardPlan
from cola_common.tensor import CODECS
from cola_server.model import Site
from cola_server.training.captures import CapturePacker
from cola_server.training.traffic import capture_bytes, delta_bytes, refusal, rows_of, sent_rows
from cola_worker.shard import Shard
from tests.server.capturing import captured, packer, parameters, site, values
from tests.support.wires import wire

EXAMPLES, LENGTH = 3, 20
TOKENS = 41  # of 60, the others are padding
K = 10
FAMILIES: dict[str, Family] = {"lora": Lora(4, 2.0), "linear": Linear(0.3), "mlp": Mlp((7,), 1.0)}
VALID = {"lora": ("exact", "sketch"), "linear": ("sketch",), "mlp": ()}
PLAN = OptimizerPlan("sgd", 1e-3, 0.0, False, 0.0, 0.0, "constant", 0, 1)

every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_codec = pytest.mark.parametrize("codec", CODECS)


def sites_of(family: str) -> list[Site]:
    """Two that share x, one that is called twice, one that sees a row an example, and a head; odd widths."""
    of = FAMILIES[family]
    return [
        site(0, 0, of, 67, 33),
        site(1, 0, of, 67, 129),
        site(2, 1, of, 30, 65, calls=2),
        site(3, 2, of, 31, 12, layout="examples"),
        site(4, 3, Head(bias=True), 31, 3, kind="head", layout="examples"),
    ]


def passed(sites: Sequence[Site], plan: WirePlan, *, noise: float = 1.0) -> CapturePacker:
    """A batch through the packer. Without noise a gradient's rank is 1, and a sketch loses nothing of it."""
    sink, received = packer(sites, plan)
    padding = torch.randperm(EXAMPLES * LENGTH, generator=torch.Generator().manual_seed(0))[:TOKENS].sort().values
    for each in reversed(sites):
        by_example = each.layout == "examples"
        for call in range(each.calls):
            of_group = 100 * each.group + call
            x = values(of_group, each.d_in, EXAMPLES, 1 if by_example else LENGTH)
            g = noise * values(7 + each.index, each.d_out, EXAMPLES, x.shape[1]) + torch.ones(each.d_out)
            sink.capture(captured(each, call, x, g, None if by_example else padding))
    sink.finish()
    assert sink.sent["w"] == sum(t.nbytes for frame in received.frames["w"] for t in frame.tensors)
    return sink


def weighed(sites: Sequence[Site], plan: WirePlan, *, bound: bool = False) -> int:
    return capture_bytes(sites, plan, tokens=TOKENS, examples=EXAMPLES, bound=bound)


@every_codec
@every_family
@pytest.mark.parametrize("rows", ["all", "exact"])
@pytest.mark.parametrize("bound", [False, True])
def test_all_rows_and_gradients_weigh_what_is_sent(family: str, rows: Rows, codec: Codec, bound: bool) -> None:
    sites, plan = sites_of(family), wire(rows, codec)
    assert weighed(sites, plan, bound=bound) == passed(sites, plan).sent["w"]


@every_codec
@pytest.mark.parametrize("family", ["lora", "linear"])
@pytest.mark.parametrize("max_error", [0.0, 1e-9, 1.0])
def test_a_sketch_weighs_no_more_than_is_told_and_no_more_than_its_bound_where_it_is_no_good(
    family: str, codec: Codec, max_error: float
) -> None:
    sites, plan = sites_of(family), wire("sketch", codec, sketch_rows=K, max_error=max_error)
    sent = passed(sites, plan).sent["w"]
    if max_error == 1e-9:
        assert sent == weighed(sites, plan, bound=True) == weighed(sites, wire("all", codec))
        assert sent > weighed(sites, plan)
    else:
        assert sent == weighed(sites, plan) <= weighed(sites, plan, bound=True)


@pytest.mark.parametrize("max_error", [0.0, 0.5])
def test_a_sketch_of_more_rows_than_a_site_is_wide_weighs_less_than_is_told(max_error: float) -> None:
    narrow = [site(0, 0, Linear(1.0), 6, 40)]
    plan = wire("sketch", sketch_rows=K, max_error=max_error)
    assert (
        passed(narrow, plan).sent["w"] == 6 * (6 + 40) * 4 < weighed(narrow, plan) <= weighed(narrow, plan, bound=True)
    )


@every_family
@pytest.mark.parametrize("rows", ["all", "exact", "sketch"])
def test_rows_are_told_as_they_are_sent(family: str, rows: Rows) -> None:
    sites, plan = sites_of(family), wire(rows, sketch_rows=K)
    whole = [TOKENS, TOKENS, 2 * TOKENS, EXAMPLES, EXAMPLES]
    reduced = {"all": whole, "exact": [0, 0, 0, 0, EXAMPLES], "sketch": [K, K, 2 * K, EXAMPLES, EXAMPLES]}
    told = [each.calls * sent_rows(each, plan, tokens=TOKENS, examples=EXAMPLES) for each in sites]
    assert told == (reduced[rows] if rows in VALID[family] else whole)
    made = 4 * 5 if rows == "exact" and family == "lora" else 0  # a gradient counts as its rank, of five calls
    assert passed(sites, plan).sent_rows == sum(told) + made


@every_family
@pytest.mark.parametrize("rows", ["exact", "sketch"])
def test_what_an_adapter_cannot_be_reduced_to_is_told_why_and_sent_as_all_rows(family: str, rows: Rows) -> None:
    *adapted, head = sites_of(family)
    for each in adapted:
        valid = rows in VALID[family]
        assert (refusal(each, rows) is None) is valid
        assert rows_of(each, rows) == (rows if valid else "all")
    assert "head" in (refusal(head, "exact") or "") and rows_of(head, rows) == "all"
    assert all(refusal(each, "all") is None and rows_of(each, "all") == "all" for each in (*adapted, head))


@every_codec
@pytest.mark.parametrize("family", [*FAMILIES, "head"])
def test_a_delta_weighs_what_a_worker_sends(family: str, codec: Codec) -> None:
    of = FAMILIES.get(family, Head(bias=True))
    wide, high = site(0, 0, of, 67, 33), site(1, 1, of, 9, 130)
    sent = 0
    for each in (wide, high):
        shard = Shard(
            ShardPlan(each.index, each.name, of, each.d_in, each.d_out, each.group), parameters(each), PLAN, codec
        )
        gradient = {name: torch.randn_like(p) for name, p in shard.parameters.items()}
        deltas = shard.step(gradient, 1e-3)
        assert sum(len(d.data) for d in deltas) == sum(d.nbytes for d in deltas)
        sent += sum(d.nbytes for d in deltas)
    assert delta_bytes([wide, high], codec) == sent
    assert delta_bytes([], codec) == 0


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from([Lora(1, 1.0), Lora(5, 1.0), Lora(8, 1.0), Linear(1.0), Mlp((3, 2), 1.0)]),
    d_in=st.integers(1, 80),
    d_out=st.integers(1, 80),
    tokens=st.integers(1, 40),
    rows=st.sampled_from(["all", "exact", "sketch"]),
    codec=st.sampled_from(CODECS),
)
def test_no_width_is_an_exception(family: Family, d_in: int, d_out: int, tokens: int, rows: Rows, codec: Codec) -> None:
    one, plan = site(0, 0, family, d_in, d_out), wire(rows, codec, sketch_rows=6)
    sink, _ = packer([one], plan)
    sink.capture(captured(one, 0, values(0, d_in, 1, tokens), values(1, d_out, 1, tokens)))
    sink.finish()
    told = capture_bytes([one], plan, tokens=tokens, examples=1)
    assert sink.sent["w"] == told or (rows == "sketch" and sink.sent["w"] < told)
