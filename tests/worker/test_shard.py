"""A shard's owner holds the bits that its deltas make of it, and owes what their codec has not let through."""

import pytest
import torch

from cola_common.adapters import Parameters
from cola_common.errors import ColaError, Reason
from cola_common.families import Lora
from cola_common.messages import EncodedTensor, OptimizerPlan, ShardPlan
from cola_common.tensor import CODECS, decode, digest
from cola_worker.shard import Shard
from tests.worker.driver import FAMILIES, PLAN, changed, parameters_of, shard_plans

PLANS = {
    "sgd": PLAN,
    "momentum": changed(momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": changed(optimizer="adamw", learning_rate=0.02, weight_decay=0.1),
}
ENTRIES = {"sgd": set(), "momentum": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
SHARDS = {name: shard_plans(family)[0] for name, family in FAMILIES.items()}
WIDE = ShardPlan(index=0, site="layers.0.up", family=Lora(r=3, scale=2.0), d_in=70, d_out=90, group=0)
"""Several blocks of int4 long, and with a B that lies down for int8."""

LOSS = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.5 / 127 * (1 + 2.0**-14), "int4": 9.5 / 77 * 1.001}
"""What a codec may lose of a value, of the largest magnitude in the tensor; see `test_codecs` for their true bounds."""

every_codec = pytest.mark.parametrize("codec", CODECS)
every_codec_that_loses = pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "fp32"])
every_plan = pytest.mark.parametrize("plan", PLANS)


def shard_of(plan: ShardPlan, optimizer: OptimizerPlan, codec: str) -> Shard:
    return Shard(plan, parameters_of([plan])[plan.index], optimizer, codec)


def random_gradient(shard: Shard, seed: int) -> Parameters:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=made) for name, p in shard.parameters.items()}


def copied(tensors: Parameters) -> Parameters:
    return {name: values.clone() for name, values in tensors.items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


def as_received(delta: EncodedTensor, shape: torch.Size) -> torch.Tensor:
    values = decode(delta)
    return values if values.shape == shape else values.T


@every_codec
@every_plan
@pytest.mark.parametrize("family", [*SHARDS, "wide"])
def test_parameters_are_the_old_ones_and_the_delta_to_the_bit(family: str, plan: str, codec: str) -> None:
    shard = shard_of(WIDE if family == "wide" else SHARDS[family], PLANS[plan], codec)
    of_server, chained = copied(shard.parameters), digest.state(shard.parameters)
    assert shard.digest == chained
    for step in range(4):
        deltas = shard.step(random_gradient(shard, step), 0.05)
        assert [delta.codec for delta in deltas] == [codec] * len(shard.parameters)
        for name, delta in zip(of_server, deltas, strict=True):
            of_server[name] = of_server[name] + as_received(delta, of_server[name].shape)
            assert same_bits(shard.parameters[name], of_server[name])
        chained = digest.chain(chained, list(of_server), deltas)
        assert shard.digest == chained
    assert all(not torch.equal(p, parameters_of([shard.plan])[0][name]) for name, p in shard.parameters.items())


# --- error feedback ---------------------------------------------------------------------------------------------------

STEPS, RATE = 50, 0.01


def uneven_gradient(seed: int = 0) -> Parameters:
    """Of each 37 values one is much larger than the others: most lose much to a scale that is not theirs."""
    made = torch.Generator().manual_seed(seed)
    gradient = {name: 0.05 * torch.randn(p.shape, generator=made) for name, p in parameters_of([WIDE])[0].items()}
    for values in gradient.values():
        values.view(-1)[::37] = 2.77
    return gradient


def after_many_steps(codec: str, gradient: Parameters, *, forgetful: bool = False) -> Shard:
    """From zero, by SGD. A forgetful shard drops what the codec loses."""
    shard = Shard(WIDE, {name: torch.zeros_like(values) for name, values in gradient.items()}, PLAN, codec)
    for _ in range(STEPS):
        shard.step(copied(gradient), RATE)
        if forgetful:  # another, with the same parameters: SGD itself remembers nothing
            shard = Shard(WIDE, shard.parameters, PLAN, codec)
    return shard


@every_codec_that_loses
def test_parameters_stay_within_a_step_s_loss_of_where_the_optimizer_wants_them(codec: str) -> None:
    gradient = uneven_gradient()
    exact, fed = after_many_steps("fp32", gradient), after_many_steps(codec, gradient)
    forgetful = after_many_steps(codec, gradient, forgetful=True)
    owed = fed.optimizer_state()
    for name, wanted in exact.parameters.items():
        largest = RATE * float(gradient[name].abs().max())
        rounding = 2 * STEPS * 2.0**-24 * float(wanted.abs().max())  # of fp32 sums, which no codec can help
        # What is encoded is a step and what the one before has lost of itself.
        loss = LOSS[codec] * largest / (1 - LOSS[codec])
        assert float((fed.parameters[name] - wanted).abs().max()) <= loss + rounding
        assert float((fed.parameters[name] + owed[f"{name}.remainder"] - wanted).abs().max()) <= rounding
        assert float((forgetful.parameters[name] - wanted).abs().max()) > 3 * (loss + rounding)


# --- its state --------------------------------------------------------------------------------------------------------


@every_codec
@every_plan
def test_the_state_is_the_optimizer_s_and_what_the_codec_owes(plan: str, codec: str) -> None:
    shard = shard_of(WIDE, PLANS[plan], codec)
    assert shard.optimizer_state() == {}
    shard.step(random_gradient(shard, 0), 0.05)
    entries = ENTRIES[plan] | (set() if codec == "fp32" else {"remainder"})
    state = shard.optimizer_state()
    assert set(state) == {f"{name}.{entry}" for name in "AB" for entry in entries}
    assert {values.dtype for values in state.values()} <= {torch.float32}
    assert all(state[f"{name}.remainder"].shape == shard.parameters[name].shape for name in "AB" if codec != "fp32")


@every_codec
@every_plan
def test_a_shard_goes_on_from_its_state_with_the_same_bits(plan: str, codec: str) -> None:
    shard = shard_of(WIDE, PLANS[plan], codec)
    for step in range(3):
        shard.step(random_gradient(shard, step), 0.05)
    resumed = Shard(WIDE, copied(shard.parameters), PLANS[plan], codec)
    resumed.take_up(copied(shard.optimizer_state()))
    for step in range(3, 6):
        assert resumed.state_digest() == shard.state_digest()
        ours, theirs = (each.step(random_gradient(shard, step), 0.05) for each in (resumed, shard))
        assert [bytes(delta.data) for delta in ours] == [bytes(delta.data) for delta in theirs]
    assert resumed.state_digest() == shard.state_digest()


@every_codec_that_loses
@every_plan
def test_without_its_remainders_a_shard_would_have_other_bits(plan: str, codec: str) -> None:
    """The test before sees what it is there to see."""
    shard = shard_of(WIDE, PLANS[plan], codec)
    shard.step(random_gradient(shard, 0), 0.05)
    forgetful = Shard(WIDE, copied(shard.parameters), PLANS[plan], codec)
    state = copied(shard.optimizer_state())
    forgetful.take_up({key: values for key, values in state.items() if not key.endswith(".remainder")})
    assert forgetful.state_digest() != shard.state_digest()
    for each in (forgetful, shard):
        each.step(random_gradient(shard, 1), 0.05)
    assert forgetful.digest != shard.digest
    assert not torch.equal(forgetful.parameters["A"], shard.parameters["A"])


@every_codec_that_loses
def test_what_is_owed_is_paid_with_the_next_delta_under_a_codec_that_loses_nothing(codec: str) -> None:
    shard = shard_of(WIDE, PLAN, codec)
    shard.step(random_gradient(shard, 0), 0.05)
    owed = copied(shard.optimizer_state())
    resumed = Shard(WIDE, copied(shard.parameters), PLAN, "fp32")
    resumed.take_up(copied(owed))
    still = {name: torch.zeros_like(p) for name, p in resumed.parameters.items()}
    for name, delta in zip("AB", resumed.step(copied(still), 0.05), strict=True):
        assert torch.equal(decode(delta), owed[f"{name}.remainder"])
        assert torch.equal(resumed.parameters[name], shard.parameters[name] + owed[f"{name}.remainder"])
    assert resumed.optimizer_state() == {}
    assert all(not decode(delta).count_nonzero() for delta in resumed.step(copied(still), 0.05))


@every_codec_that_loses
@pytest.mark.parametrize("shape", [(), (70, 3), (3, 71), (1, 3, 70)], ids=str)
def test_a_remainder_of_another_shape_is_refused(codec: str, shape: tuple[int, ...]) -> None:
    shard = shard_of(WIDE, PLAN, codec)
    with pytest.raises(ColaError, match="remainder of A") as refused:
        shard.take_up({"A.remainder": torch.zeros(shape)})
    assert refused.value.reason is Reason.PROTOCOL_VIOLATION


@every_codec
def test_a_delta_may_be_sent_while_the_next_step_is_made(codec: str) -> None:
    shard = shard_of(WIDE, PLANS["adamw"], codec)
    deltas = shard.step(random_gradient(shard, 0), 0.05)
    before = [bytes(delta.data) for delta in deltas]
    shard.step(random_gradient(shard, 1), 0.05)
    assert [bytes(delta.data) for delta in deltas] == before
