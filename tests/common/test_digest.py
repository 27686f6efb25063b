"""Digests tell any two states apart, and are the same wherever they are computed."""

import itertools

import pytest
import torch

from cola_common.tensor import CODECS, decode, digest, encode


def parameters() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return {"A": torch.randn(2, 6, generator=source), "B": torch.randn(3, 4, generator=source)}


def test_states_that_differ_in_anything_have_different_digests() -> None:
    base = parameters()
    flipped = base["A"].clone()
    flipped.view(torch.int32)[1, 1] ^= 1
    states = [
        base,
        {**base, "A": flipped},
        {**base, "A": base["A"].view(6, 2)},
        {**base, "A": base["A"].view(12)},
        {"A": base["B"], "B": base["A"]},
        {"A": base["A"], "C": base["B"]},
        {"A": base["A"]},
        {"AB": base["A"]},
        {},
        {"A": torch.zeros(3)},
        {"A": torch.tensor([0.0, -0.0, 0.0])},
        {"A": torch.zeros(0)},
        {"A": torch.zeros(0, 1)},
    ]
    assert len({digest.state(state) for state in states}) == len(states)


def test_a_state_s_digest_is_of_values_not_of_memory() -> None:
    base = parameters()
    wanted = digest.state(base)
    assert digest.state(dict(reversed(base.items()))) == wanted
    assert digest.state({name: value.T.contiguous().T for name, value in base.items()}) == wanted
    assert digest.state({name: value.clone().requires_grad_() for name, value in base.items()}) == wanted
    assert digest.state({name: decode(encode(value, "fp32")) for name, value in base.items()}) == wanted


@pytest.mark.parametrize("codec", CODECS)
def test_both_ends_of_a_stream_chain_to_the_same_digest(codec: str) -> None:
    sent = [encode(value, codec) for value in parameters().values()]
    received = [type(tensor)(**{**vars(tensor), "data": bytearray(tensor.data)}) for tensor in sent]
    assert digest.chain("00", ["A", "B"], sent) == digest.chain("00", ["A", "B"], received)


def test_chains_that_differ_in_anything_have_different_digests() -> None:
    a, b = (encode(value, "fp32") for value in parameters().values())
    chains = [
        digest.chain("00", ["A", "B"], [a, b]),
        digest.chain("01", ["A", "B"], [a, b]),
        digest.chain("00", ["B", "A"], [b, a]),
        digest.chain("00", ["A", "B"], [b, a]),
        digest.chain("00", ["A"], [a]),
        digest.chain("00", [], []),
        digest.chain(digest.chain("00", ["A"], [a]), ["B"], [b]),
        digest.chain("00", ["A", "B"], [encode(parameters()["A"], "bf16"), b]),
        digest.chain("00", ["A", "B"], [type(a)(**{**vars(a), "exponent": 1}), b]),
    ]
    assert len(set(chains)) == len(chains)


def test_names_and_tensors_must_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        digest.chain("00", ["A", "B"], [encode(torch.zeros(1), "fp32")])


def test_combined_digests_depend_on_each_part_and_on_the_order() -> None:
    parts = [digest.state({"A": torch.tensor([float(i)])}) for i in range(3)]
    combined = {digest.combine(order) for length in range(4) for order in itertools.permutations(parts, length)}
    assert len(combined) == 1 + 3 + 6 + 6


def test_digests_are_those_of_earlier_versions() -> None:
    # Saved shards carry them: a change here makes every worker's shards look stale.
    state = digest.state({"A": torch.arange(6.0).view(2, 3), "B": torch.zeros(1)})
    after = digest.chain(state, ["A"], [encode(torch.ones(2, 3), "bf16")])
    assert [state, after, digest.combine([state, after])] == [
        "3b618fe0b546898a93531d54b3317ee2",
        "8b3d59d3493c11f933d40ccec7cd674d",
        "6e57904be31a75b1c705da2c1da536c0",
    ]
