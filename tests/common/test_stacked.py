"""Many adapters at once: against each of them alone, and against autograd."""

import math
from collections.abc import Sequence

import pytest
import torch

from cola_common.adapters import Adapter, Parameters, build
from cola_common.adapters.lora import LoraAdapter
from cola_common.adapters.stacked import LoraStack, alike, stack
from cola_common.families import Family, Head, Linear, Lora, Mlp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
D_IN, D_OUT = 12, 9  # of the site


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    assert found.shape == wanted.shape
    error = torch.linalg.vector_norm(found.double() - wanted.double())
    assert error <= relative * torch.linalg.vector_norm(wanted.double())


def shard(r: int, scale: float, seed: int, fresh: bool = False) -> tuple[LoraAdapter, Parameters]:
    B_OR = torch.zeros(D_OUT, r) if fresh else normal(D_OUT, r, seed=seed + 1)
    return LoraAdapter(Lora(r, scale), D_IN, D_OUT), {"A": normal(r, D_IN, seed=seed), "B": B_OR}


def by_autograd(adapter: LoraAdapter, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
    A_RD, B_OR = (parameters[name].double().requires_grad_() for name in ("A", "B"))
    y_NO = adapter.scale * x_ND.double() @ (B_OR @ A_RD).T
    of_A, of_B = torch.autograd.grad(y_NO, (A_RD, B_OR), g_NO.double())
    return {"A": of_A, "B": of_B}


# --- one --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 50])
@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("fresh", [False, True], ids=["B", "B=0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lora_s_vjp_is_the_gradient_of_ordinary_back_propagation(
    rows: int, r: int, fresh: bool, dtype: torch.dtype
) -> None:
    adapter, parameters = shard(r, 1.7, seed=5, fresh=fresh)
    x_ND, g_NO = normal(rows, D_IN, seed=1).to(dtype), (normal(rows, D_OUT, seed=2) * 1e-3).to(dtype)
    found = adapter.vjp(parameters, x_ND, g_NO)
    wanted = by_autograd(adapter, parameters, x_ND, g_NO)
    assert list(found) == ["A", "B"]
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32 and found[name].is_contiguous()
        assert_near(found[name], value, 1e-5)


def test_the_vjps_of_calls_add_up_to_that_of_their_rows() -> None:
    adapter, parameters = shard(3, 1.0, seed=5)
    x_ND, g_NO = normal(30, D_IN, seed=1), normal(30, D_OUT, seed=2)
    whole = adapter.vjp(parameters, x_ND, g_NO)
    parts = [adapter.vjp(parameters, x_ND[i : i + 10], g_NO[i : i + 10]) for i in (0, 10, 20)]
    for name, value in whole.items():
        assert_near(torch.stack([part[name] for part in parts]).sum(0), value, 1e-6)


# --- many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1,), (4,), (4, 4), (1, 1, 1, 1, 1), (2, 5, 1), (1, 8, 3, 8)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vjps_of_many_loras_at_once_are_each_one_s_own(ranks: Sequence[int], rows: int, dtype: torch.dtype) -> None:
    pairs = [shard(r, 0.5 + i, seed=10 * i, fresh=i == 1) for i, r in enumerate(ranks)]
    x_JND, g_JNO = normal(len(ranks), rows, D_IN, seed=1).to(dtype), normal(len(ranks), rows, D_OUT, seed=2).to(dtype)
    found = LoraStack([adapter for adapter, _ in pairs], [values for _, values in pairs]).vjp(x_JND, g_JNO)
    assert len(found) == len(pairs)
    for i, (adapter, values) in enumerate(pairs):
        alone = adapter.vjp(values, x_JND[i], g_JNO[i])
        assert list(found[i]) == list(alone)
        for name, value in alone.items():
            assert found[i][name].dtype == torch.float32 and found[i][name].shape == value.shape
            # A single row's A·x can cancel: then what was added up bounds the rounding, and not the sum.
            terms = [x_JND[i].float(), g_JNO[i].float(), values["B" if name == "A" else "A"]]
            reach = adapter.scale * math.prod(float(torch.linalg.vector_norm(term)) for term in terms)
            assert torch.linalg.vector_norm(found[i][name] - value) <= 1e-6 * value.norm() + 1e-7 * reach


def test_loras_that_share_x_need_no_copies_of_it() -> None:
    pairs = [shard(4, 2.0, seed=i) for i in range(3)]
    x_ND, g_JNO = normal(20, D_IN), normal(3, 20, D_OUT, seed=1)
    found = LoraStack([a for a, _ in pairs], [p for _, p in pairs]).vjp(x_ND.expand(3, -1, -1), g_JNO)
    for i, (adapter, values) in enumerate(pairs):
        for name, value in adapter.vjp(values, x_ND, g_JNO[i]).items():
            assert_near(found[i][name], value, 1e-6)


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_rows_whose_g_is_zero_take_no_part_in_the_vjps(rows: int) -> None:
    pairs = [shard(r, 1.5, seed=r) for r in (2, 4)]
    x_JND, g_JNO = normal(2, 16, D_IN), normal(2, 16, D_OUT, seed=1)
    g_JNO[1, rows:] = 0.0
    found = LoraStack([a for a, _ in pairs], [p for _, p in pairs]).vjp(x_JND, g_JNO)
    for name, value in pairs[1][0].vjp(pairs[1][1], x_JND[1, :rows], g_JNO[1, :rows]).items():
        assert_near(found[1][name], value, 1e-5)


def test_a_neighbour_that_is_not_finite_is_so_alone() -> None:
    pairs = [shard(r, 1.5, seed=r) for r in (2, 4)]
    x_JND, g_JNO = normal(2, 16, D_IN), normal(2, 16, D_OUT, seed=1)
    x_JND[0, 3, 3] = float("nan")
    found = LoraStack([a for a, _ in pairs], [p for _, p in pairs]).vjp(x_JND, g_JNO)
    assert not torch.isfinite(found[0]["A"]).all()
    for name, value in pairs[1][0].vjp(pairs[1][1], x_JND[1], g_JNO[1]).items():
        assert_near(found[1][name], value, 1e-5)


NEIGHBOURS: dict[str, list[Family]] = {
    "lora": [Lora(4, 2.0), Lora(1, 0.5), Lora(8, 1.0)],
    "linear": [Linear(0.3), Linear(1.0), Linear(2.0)],
    "mlp": [Mlp((6, 5), 0.7), Mlp((6, 5), 1.0), Mlp((6, 5), 3.0)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("families", list(NEIGHBOURS.values()), ids=list(NEIGHBOURS))
def test_neighbours_add_and_pull_what_each_does_alone(families: Sequence[Family], dtype: torch.dtype) -> None:
    adapters: list[Adapter] = [build(family, D_IN, D_OUT) for family in families]
    assert len({alike(adapter) for adapter in adapters}) == 1
    parameters = [
        {name: normal(*shape, seed=10 * j + i) for i, (name, shape) in enumerate(adapter.shapes().items())}
        for j, adapter in enumerate(adapters)
    ]
    together = stack(adapters, parameters)
    h_JNO, x_JND, g_JNO = (normal(3, 16, width, seed=width).to(dtype) for width in (D_OUT, D_IN, D_OUT))
    added, pulled = torch.empty_like(h_JNO), torch.empty_like(x_JND)
    together.add(h_JNO, x_JND, added)
    together.pull(x_JND, g_JNO, pulled)
    for j, adapter in enumerate(adapters):
        whole = h_JNO[j] + adapter.forward(parameters[j], x_JND[j])
        assert_near(added[j], whole, ROUNDING[dtype])
        x_ND = x_JND[j].float().requires_grad_()
        (wanted,) = torch.autograd.grad(adapter.forward(parameters[j], x_ND), x_ND, g_JNO[j].float())
        assert_near(pulled[j], wanted, ROUNDING[dtype])


def test_who_is_not_alike_is_not_stacked() -> None:
    kinds = [alike(build(f, D_IN, D_OUT)) for f in (Lora(1, 1.0), Linear(1.0), Mlp((4,), 1.0), Mlp((5,), 1.0))]
    assert len(set(kinds)) == 4
    assert alike(build(Head(bias=True), D_IN, D_OUT)) is None
