"""A gradient that comes in place of rows counts as what the rows would have made, and only as it was announced."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cola_common.adapters import Parameters, build
from cola_common.errors import Reason
from cola_common.messages import Capture, Credit, Delta, StepEnd
from cola_common.tensor import CODECS, decode, encode
from cola_worker.shards import Shards
from cola_worker.trainer import Trainer
from tests.worker.driver import FAMILIES, PLAN, Driver, changed, only, random_batch, refused, shard_plans

ADAMW = changed(optimizer="adamw", learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.7)
MIXED = {"exact": (0, 1, 2), "one of two with one input": (0,), "the other": (1,), "a whole group": (2,)}
"""The shards that are sent gradients."""


def driver_of(folder: Path, family: str = "lora", exact: tuple[int, ...] = (0, 1, 2), **fields: object) -> Driver:
    plans = tuple(
        replace(plan, rows="exact" if plan.index in exact else "all") for plan in shard_plans(FAMILIES[family])
    )
    driver = Driver.of(ADAMW, plans, Trainer(Shards(folder)))
    for name, value in fields.items():
        setattr(driver, name, value)
    driver.assign()
    return driver


def equal(left: dict[int, Parameters], right: dict[int, Parameters]) -> bool:
    return all(torch.equal(left[i][name], right[i][name]) for i in left for name in left[i])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("exact", MIXED)
def test_gradients_give_the_bits_that_their_rows_give(
    family: str, calls: int, interval: int, exact: str, tmp_path: Path
) -> None:
    of_rows = driver_of(tmp_path / "rows", family, exact=())
    driver = driver_of(tmp_path / "gradients", family, MIXED[exact])
    for step in range(3):
        batches = [random_batch(driver.plans, 10 * step + i, calls=calls) for i in range(interval)]
        (expected,), (delta,) = of_rows.train(batches), driver.train(batches)
        assert delta.squares == expected.squares
        sent = [part for frame in driver.captures(batches[0]) for part in frame.parts]
        assert {part.index for part in sent if part.kind == "w"} == set(MIXED[exact])
    assert equal(driver.parameters, of_rows.parameters)


@pytest.mark.parametrize("values", CODECS)
@pytest.mark.parametrize("family", ["lora", "mlp"])
def test_gradients_are_understood_in_every_codec(values: str, family: str, tmp_path: Path) -> None:
    driver = driver_of(tmp_path, family, plan=PLAN, values=values)
    batch = random_batch(driver.plans, 1, calls=2)
    expected = {index: {name: p.double() for name, p in of.items()} for index, of in driver.parameters.items()}
    for call in batch:
        plan = driver.plans[call.index]
        made = build(plan.family, plan.d_in, plan.d_out).vjp(driver.parameters[call.index], call.x_ND, call.g_NO)
        for name, values_ in made.items():
            lies = values == "int8" and values_.dim() == 2 and values_.shape[0] > values_.shape[1]
            sent = decode(encode(values_.T, values)).T if lies else decode(encode(values_, values))
            expected[call.index][name] -= PLAN.learning_rate * sent.double()
    driver.train([batch])
    for index, parameters in driver.parameters.items():
        for name, parameter in parameters.items():
            assert torch.allclose(parameter.double(), expected[index][name], rtol=1e-6, atol=1e-6)
    assert driver.credited == driver.captured > 0


def test_the_parts_of_a_gradient_may_come_one_by_one(tmp_path: Path) -> None:
    together, apart = (driver_of(tmp_path / name, plan=PLAN) for name in ("together", "apart"))
    batch = random_batch(apart.plans, 1, calls=2)
    together.train([batch])
    (trainer,) = apart.trainers
    for frame in apart.captures(batch):
        for part, tensor in zip(frame.parts, frame.tensors, strict=True):
            trainer.handle(replace(frame, parts=(part,), tensors=(tensor,)))
    apart.fold([only(trainer.handle(apart.step_end(batch, 1)), Delta)])
    assert equal(apart.parameters, together.parameters)


Wrong = Callable[[list[Capture], StepEnd], tuple[list[Capture], StepEnd]]


def _without(frames: list[Capture], frame: int, part: int) -> list[Capture]:
    changed = list(frames)
    kept = [i for i in range(len(frames[frame].parts)) if i != part]
    parts, tensors = (tuple(of[i] for i in kept) for of in (frames[frame].parts, frames[frame].tensors))
    changed[frame] = replace(frames[frame], parts=parts, tensors=tensors)
    return changed


WRONG_BATCHES: dict[str, Wrong] = {
    "half a gradient": lambda frames, end: (_without(frames, 0, 0), end),
    "the other half": lambda frames, end: (_without(frames, 0, 1), end),
    "half of one call and half of another": lambda frames, end: (_without(_without(frames, 0, 0), 1, 1), end),
    "a call fewer": lambda frames, end: (frames[1:], end),
    "a call more": lambda frames, end: (frames, _calls(end, calls=1)),
    "a call fewer than was announced": lambda frames, end: (frames, _calls(end, calls=3)),
    "rows announced": lambda frames, end: (frames, _calls(end, rows=9)),
    "a shard not announced": lambda frames, end: (frames, replace(end, calls=end.calls[1:])),
    "nothing announced": lambda frames, end: (frames, replace(end, calls=())),
    "nothing came": lambda _, end: ([], end),
}


def _calls(end: StepEnd, **fields: int) -> StepEnd:
    return replace(end, calls=(replace(end.calls[0], **fields), *end.calls[1:]))


@pytest.mark.parametrize("wrong", WRONG_BATCHES)
def test_a_batch_of_gradients_that_is_not_what_was_announced_is_refused(wrong: str, tmp_path: Path) -> None:
    driver, undisturbed = driver_of(tmp_path / "shards"), driver_of(tmp_path / "undisturbed")
    (trainer,) = driver.trainers
    batch = random_batch(driver.plans, 1, calls=2)
    frames, end = WRONG_BATCHES[wrong](driver.captures(batch), driver.step_end(batch, 1))
    for frame in frames:
        assert [type(answer) for answer in trainer.handle(frame)] == [Credit]
    assert refused(trainer.handle(end)).reason == Reason.PROTOCOL_VIOLATION
    driver.epoch += 1
    driver.assign()
    for each in (driver, undisturbed):
        each.train([batch])
    assert equal(driver.parameters, undisturbed.parameters)


def test_a_gradient_that_comes_twice_is_refused(tmp_path: Path) -> None:
    driver = driver_of(tmp_path)
    (trainer,) = driver.trainers
    first, *_ = driver.captures(random_batch(driver.plans, 1))
    trainer.handle(first)
    for again in (first, _without([first], 0, 0)[0], _without([first], 0, 1)[0]):
        assert refused(trainer.handle(again)).reason == Reason.PROTOCOL_VIOLATION


def test_a_gradient_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    driver = driver_of(tmp_path)
    first, *_ = driver.captures(random_batch(driver.plans, 1))
    tensors = (replace(first.tensors[0], checksum=first.tensors[0].checksum ^ 1), *first.tensors[1:])
    refusal = refused(driver.trainers[0].handle(replace(first, tensors=tensors)))
    assert refusal.reason == Reason.CHECKSUM_MISMATCH


def test_a_gradient_that_is_not_finite_is_refused_with_its_site(tmp_path: Path) -> None:
    driver = driver_of(tmp_path)
    batch = [replace(c, g_NO=c.g_NO * 1e38 * 1e3) if c.index == 2 else c for c in random_batch(driver.plans, 1)]
    (answers,) = driver.send_batch(batch, 1)
    assert refused(answers).reason == Reason.NON_FINITE_GRADIENT
    assert "layers.0.o" in refused(answers).message


def test_no_input_waits_for_a_shard_that_is_sent_gradients(tmp_path: Path) -> None:
    driver = driver_of(tmp_path, exact=(0,))
    held = []
    for frame in driver.captures(random_batch(driver.plans, 1, rows=61)):  # of the three sites, q the last
        driver.trainers[0].handle(frame)
        held.append(sum(type(o) is torch.Tensor and o.shape == (61, 6) for o in gc.get_objects()))
    assert held[1] == held[0]  # k's x, which q's gradient is not made of
