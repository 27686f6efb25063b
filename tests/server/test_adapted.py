"""The server's copy of an adapter: where it starts, and what a fold does to it or refuses to."""

from dataclasses import replace

import pytest
import torch

from cola_common.errors import ColaError, Reason
from cola_common.jobs import LoraAdapter
from cola_common.messages import EncodedTensor
from cola_common.tensor import CODECS, decode_parameter, digest, encode, encode_parameter
from cola_server.model import JobAdapter, Site, probe
from tests.support.models import base_of, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    spec = LoraAdapter(r=3, target_modules=("q_proj", "down_proj"))
    return probe(base_of(tiny("llama")), spec, labels=None, fold="unmerged")


def delta(adapter: JobAdapter, index: int, codec: str = "fp32", seed: int = 0) -> tuple[list[str], list[EncodedTensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter.adapters[index].shapes()
    return list(shapes), [encode_parameter(torch.randn(s, generator=generator), codec) for s in shapes.values()]


def test_the_start_is_a_function_of_seed_and_site_alone(sites: tuple[Site, ...]) -> None:
    one = JobAdapter.initial(sites, 5, CPU).state()
    assert all(
        torch.equal(a[n], b[n]) for a, b in zip(one, JobAdapter.initial(sites, 5, CPU).state(), strict=True) for n in a
    )
    (last,) = JobAdapter.initial([replace(sites[-1], index=0)], 5, CPU).state()
    assert torch.equal(last["A"], one[-1]["A"])
    assert not torch.equal(JobAdapter.initial(sites, 6, CPU).state()[0]["A"], one[0]["A"])
    assert not torch.equal(one[0]["A"], one[2]["A"])


def test_an_imported_adapter_is_where_a_job_starts(sites: tuple[Site, ...]) -> None:
    other = {site.name: shard for site, shard in zip(sites, JobAdapter.initial(sites, 9, CPU).state(), strict=True)}
    adapter = JobAdapter.initial(sites, 0, CPU, other)
    for site, shard in zip(sites, adapter.state(), strict=True):
        assert all(torch.equal(shard[name], other[site.name][name]) for name in shard)


def test_an_adapter_of_other_sites_or_shapes_is_refused(sites: tuple[Site, ...]) -> None:
    whole = {site.name: shard for site, shard in zip(sites, JobAdapter.initial(sites, 9, CPU).state(), strict=True)}
    first = sites[0].name
    missing = {name: shard for name, shard in whole.items() if name != first}
    foreign = {**whole, "model.layers.7.q_proj": whole[first]}
    wide = {**whole, first: {"A": torch.zeros(4, 32), "B": torch.zeros(32, 4)}}
    for odd, name in [(missing, first), (foreign, "model.layers.7.q_proj"), (wide, first)]:
        with pytest.raises(ColaError) as refused:
            JobAdapter.initial(sites, 0, CPU, odd, source="ftckpt-1")
        assert refused.value.reason == Reason.INVALID_ADAPTER
        assert refused.value.details["source"] == "ftckpt-1"
        assert name in refused.value.details["problem"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_fold_adds_the_decoded_delta_and_chains_the_digest(sites: tuple[Site, ...], codec: str) -> None:
    adapter = JobAdapter.initial(sites, 0, CPU)
    wanted = adapter.state()
    chain = digest.state(wanted[1])
    for step in range(3):
        names, tensors = delta(adapter, 1, codec, seed=step)
        adapter.fold(1, names, tensors)
        folded = zip(wanted[1].items(), tensors, strict=True)
        wanted[1] = {name: p + decode_parameter(tensor, tuple(p.shape)) for (name, p), tensor in folded}
        chain = digest.chain(chain, names, tensors)
    for shard, expected in zip(adapter.state(), wanted, strict=True):
        assert all(torch.equal(shard[name], expected[name]) for name in shard)
    assert adapter.versions == [0, 3, *[0] * (len(sites) - 2)]
    assert adapter.digests[1] == chain
    assert adapter.digest([1, 0]) == digest.combine([digest.state(wanted[0]), chain])


def test_a_delta_that_is_not_what_was_assigned_changes_nothing(sites: tuple[Site, ...]) -> None:
    adapter = JobAdapter.initial(sites, 0, CPU)
    names, tensors = delta(adapter, 0)
    damaged = replace(tensors[1], checksum=tensors[1].checksum ^ 1)
    infinite = encode(torch.full(tensors[1].shape, float("inf")), "fp32")
    wide = encode(torch.zeros(tensors[1].shape[0] + 1, 3), "fp32")
    before = adapter.state(), list(adapter.versions), list(adapter.digests)
    for odd_names, odd, reason in [
        (names[::-1], tensors, Reason.DELTA_MISMATCH),
        (names[:1], tensors[:1], Reason.DELTA_MISMATCH),
        (names, [tensors[0], wide], Reason.DELTA_MISMATCH),
        (names, [tensors[0], damaged], Reason.CHECKSUM_MISMATCH),
        (names, [tensors[0], infinite], Reason.NON_FINITE_DELTA),
    ]:
        with pytest.raises(ColaError) as refused:
            adapter.fold(0, odd_names, odd)
        assert refused.value.reason == reason
        for shard, expected in zip(adapter.state(), before[0], strict=True):
            assert all(torch.equal(shard[name], expected[name]) for name in shard)
        assert (adapter.versions, adapter.digests) == before[1:]


def test_what_it_was_made_of_and_what_it_gives_out_stay_as_they_are(sites: tuple[Site, ...]) -> None:
    given = JobAdapter.initial(sites, 0, CPU).state()
    adapter = JobAdapter(sites, given, CPU, version=4)
    before = adapter.state()
    adapter.fold(0, *delta(adapter, 0))
    assert adapter.versions[0] == 5
    for name in given[0]:
        assert torch.equal(given[0][name], before[0][name])
        assert not torch.equal(adapter.state()[0][name], before[0][name])
