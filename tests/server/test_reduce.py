"""Row reductions: what each is valid for, and `sketch` against the singular value decomposition."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_common.adapters import Adapter, build
from cola_common.families import Family, Head, Linear, Lora, Mlp
from cola_server.reduce import exact, sketch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, relative: float) -> None:
    assert found.shape == wanted.shape
    error = torch.linalg.vector_norm(found.double() - wanted.double())
    assert error <= relative * torch.linalg.vector_norm(wanted.double())


@pytest.mark.parametrize(
    ("family", "by_exact", "by_sketch"),
    [
        (Lora(4, 2.0), True, True),
        (Linear(1.0), False, True),
        (Mlp((8,), 1.0), False, False),
        (Head(bias=True), False, False),
        (Head(bias=False), False, False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else str(value),
)
def test_a_reduction_says_for_which_adapters_it_is_not_valid_and_why(
    family: Family, by_exact: bool, by_sketch: bool
) -> None:
    adapter = build(family, 12, 9)
    for reason, valid in ((exact.valid_for(adapter), by_exact), (sketch.valid_for(adapter), by_sketch)):
        assert (reason is None) is valid
        assert reason is None or len(reason) > 20


# --- sketch ---------------------------------------------------------------------------------------------------------


def with_spectrum(rows: int, d_in: int, d_out: int, spectrum: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """x and g in fp32 whose gᵀx has these singular values."""

    def orthonormal(size: int, which: int) -> torch.Tensor:
        return torch.linalg.qr(normal(size, len(spectrum), seed=3 * seed + which, dtype=torch.float64)).Q

    root_NR = orthonormal(rows, 0) * spectrum.double().sqrt()
    return (root_NR @ orthonormal(d_in, 1).T).float(), (root_NR @ orthonormal(d_out, 2).T).float()


def product(x_ND: torch.Tensor, g_NO: torch.Tensor) -> torch.Tensor:
    return g_NO.double().T @ x_ND.double()


def least_error(matrix: torch.Tensor, k: int) -> float:
    """What the best matrix of rank k leaves (Eckart, Young)."""
    return float(torch.linalg.svdvals(matrix)[k:].square().sum().sqrt())


@st.composite
def spectra(draw: st.DrawFn) -> torch.Tensor:
    j = torch.arange(1, draw(st.integers(2, 40)) + 1).double()
    step = draw(st.integers(1, 40))
    kinds = [j**0, 1 / j, j**-0.5, 0.8**j, 0.95**j, torch.where(j <= step, 1.0, draw(st.floats(0.0, 1.0)))]
    return draw(st.sampled_from(kinds))


@settings(max_examples=150, deadline=None)
@given(spectrum=spectra(), k=st.integers(1, 48), seed=st.integers(0, 2**63 - 1))
def test_the_error_is_at_most_twice_that_of_the_best_matrix_of_rank_k(
    spectrum: torch.Tensor, k: int, seed: int
) -> None:
    x_ND, g_NO = with_spectrum(90, 64, 50, spectrum, seed % 7)
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=seed)
    assert few_x.shape == (min(k, 50), 64) and few_g.shape == (min(k, 50), 50)
    matrix = product(x_ND, g_NO)
    error = torch.linalg.vector_norm(product(few_x, few_g) - matrix)
    assert error <= 2 * least_error(matrix, k) + 1e-5 * torch.linalg.vector_norm(matrix)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [4, 16, 32])
def test_the_error_is_near_the_least_in_the_mean(power: float, k: int) -> None:
    x_ND, g_NO = with_spectrum(90, 64, 60, torch.arange(1, 61.0) ** -power, seed=0)
    matrix = product(x_ND, g_NO)
    errors = []
    for seed in range(20):
        few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=seed)
        errors.append(float(torch.linalg.vector_norm(product(few_x, few_g) - matrix)))
    mean = math.fsum(errors) / len(errors)
    assert mean <= 1.15 * least_error(matrix, k) + 1e-6
    # Theorem 10.5 of Halko, Martinsson and Tropp, with half of k as its oversampling.
    r, p = k // 2, k - k // 2
    assert mean <= math.sqrt(1 + r / (p - 1)) * least_error(matrix, r)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(0, 8),
    extra=st.integers(0, 3),
    rows=st.integers(12, 60),
    d_in=st.integers(9, 30),
    d_out=st.integers(9, 30),
    size=st.sampled_from([1e-30, 1e-12, 1.0, 1e10]),
)
def test_what_has_no_higher_rank_than_k_is_kept_whole(
    rank: int, extra: int, rows: int, d_in: int, d_out: int, size: float
) -> None:
    x_ND = normal(rows, d_in, seed=1)
    g_NO = size * normal(rows, rank, seed=2) @ normal(rank, d_out, seed=3)
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=max(1, rank + extra), seed=4)
    assert_near(product(few_x, few_g), product(x_ND, g_NO), 1e-5)


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 20), (20, 6), (1, 20), (20, 1), (6, 6)])
@pytest.mark.parametrize("k", [8, 30])
def test_narrow_sites_send_no_more_rows_than_the_narrower_side(d_in: int, d_out: int, k: int) -> None:
    x_ND, g_NO = normal(50, d_in), normal(50, d_out, seed=1)
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=0)
    assert len(few_x) == len(few_g) == min(k, d_in, d_out)
    assert_near(product(few_x, few_g), product(x_ND, g_NO), 1e-5)


@pytest.mark.parametrize("rows", [0, 1, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_up_to_k_rows_go_as_they_are(rows: int, dtype: torch.dtype) -> None:
    x_ND, gs = normal(rows, 12).to(dtype), [normal(rows, 9).to(dtype), normal(rows, 5).to(dtype)]
    few_x, few_gs = sketch.pseudo_rows(x_ND, gs, k=8, seed=0)
    assert few_x is x_ND
    assert all(few is g for few, g in zip(few_gs, gs, strict=True))


@pytest.mark.parametrize("k", [4, 16])
def test_the_order_of_the_rows_is_only_seen_in_rounding(k: int) -> None:
    x_ND, g_NO = with_spectrum(90, 64, 50, 0.8 ** torch.arange(50), seed=0)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    once = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=3)
    again = sketch.pseudo_rows(x_ND[order], [g_NO[order]], k=k, seed=3)
    assert_near(product(again[0], again[1][0]), product(once[0], once[1][0]), 1e-5)


def test_a_sketch_is_a_function_of_its_seed() -> None:
    x_ND, g_NO = normal(90, 64), normal(90, 50, seed=1)
    one, two, other = (sketch.pseudo_rows(x_ND, [g_NO], k=8, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1][0], two[1][0])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_dtype_are_sketched_in_fp32(dtype: torch.dtype) -> None:
    x_ND, g_NO = normal(90, 24).to(dtype), normal(90, 30, seed=1).to(dtype)
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=24, seed=0)
    assert few_x.dtype == few_g.dtype == torch.float32
    assert few_x.is_contiguous() and few_g.is_contiguous()
    assert_near(product(few_x, few_g), product(x_ND, g_NO), 1e-5)


def errors_of(x_ND: torch.Tensor, gs: Sequence[torch.Tensor], k: int) -> list[float]:
    """Each site's relative error, of one sketch for all."""
    few_x, few_gs = sketch.pseudo_rows(x_ND, gs, k=k, seed=1)
    wanted = [product(x_ND, g) for g in gs]
    errors = [torch.linalg.vector_norm(product(few_x, few) - M) for few, M in zip(few_gs, wanted, strict=True)]
    return [float(error / torch.linalg.vector_norm(M)) for error, M in zip(errors, wanted, strict=True)]


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1e-4, 1.0, 30.0), (1e-25, 1e20, 1.0)])
def test_sites_that_share_x_share_its_sketch_whatever_the_size_of_their_gradients(sizes: Sequence[float]) -> None:
    x_ND = normal(90, 48) * 0.9 ** torch.arange(48)
    gs = [normal(90, width, seed=width) for width in (40, 10, 25)]
    few_x, few_gs = sketch.pseudo_rows(x_ND, gs, k=16, seed=1)
    assert few_x.shape == (16, 48)
    assert [few.shape for few in few_gs] == [(16, 40), (16, 10), (16, 25)]
    assert errors_of(x_ND, [g * size for g, size in zip(gs, sizes, strict=True)], 16) == pytest.approx(
        errors_of(x_ND, gs, 16), rel=1e-2
    )
    # The stack with every G at norm 1, whose best rank k the one basis is sought for.
    stack = torch.cat([product(x_ND, g / torch.linalg.vector_norm(g)) for g in gs])
    of_stack = torch.cat([product(few_x, few / torch.linalg.vector_norm(g)) for few, g in zip(few_gs, gs, strict=True)])
    assert torch.linalg.vector_norm(of_stack - stack) <= 1.15 * least_error(stack, 16)


def test_sites_without_a_gradient_cost_the_others_nothing() -> None:
    x_ND, g_NO = normal(90, 48), normal(90, 40, seed=1)
    for gs in ([torch.zeros(90, 7), g_NO], [g_NO, torch.full((90, 7), 1e-44)]):
        few_x, few_gs = sketch.pseudo_rows(x_ND, gs, k=40, seed=0)
        for few, g in zip(few_gs, gs, strict=True):
            error = torch.linalg.vector_norm(product(few_x, few) - product(x_ND, g))
            assert error <= 1e-5 * torch.linalg.vector_norm(product(x_ND, g)) + 1e-40
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [torch.zeros(90, 7)], k=4, seed=0)
    assert few_x.isfinite().all() and (few_g == 0).all()


@pytest.mark.parametrize("family", [Lora(4, 2.0), Linear(0.5)], ids=["lora", "linear"])
def test_the_vjp_of_pseudo_rows_is_as_near_as_their_product(family: Family) -> None:
    adapter: Adapter = build(family, 48, 40)
    parameters = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(adapter.shapes().items())}
    x_ND, g_NO = with_spectrum(90, 48, 40, 0.7 ** torch.arange(40), seed=0)
    wanted = adapter.vjp(parameters, x_ND, g_NO)
    for k, relative in ((8, 0.1), (16, 0.01), (40, 1e-5)):
        few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=0)
        for name, value in adapter.vjp(parameters, few_x, few_g).items():
            assert_near(value, wanted[name], relative)


# --- how far off a sketch is ----------------------------------------------------------------------------------------

SPECTRA = {
    "flat": torch.ones(40),
    "1/j": 1 / torch.arange(1, 41.0),
    "1/j^2": torch.arange(1, 41.0) ** -2,
    "0.8^j": 0.8 ** torch.arange(40),
    "0.5^j": 0.5 ** torch.arange(16),
    "a step": torch.where(torch.arange(40) < 12, 1.0, 0.05),
    "one of a hundred": torch.where(torch.arange(40) < 1, 100.0, 1.0),
}


def estimated(x_ND: torch.Tensor, gs: Sequence[torch.Tensor], k: int, seed: int) -> tuple[float, float]:
    """The estimate and the truth, of one sketch for all."""
    few_x, few_gs = sketch.pseudo_rows(x_ND, gs, k=k, seed=seed)
    matrix = torch.cat([product(x_ND, g_NO) for g_NO in gs])
    left = torch.cat([product(few_x, few_g) for few_g in few_gs]) - matrix
    true = float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(matrix))
    return sketch.error(x_ND, gs, few_x.T, seed=seed), true


@pytest.mark.parametrize("k", [4, 8, 24])
@pytest.mark.parametrize("spectrum", list(SPECTRA.values()), ids=list(SPECTRA))
def test_an_estimated_error_is_within_a_factor_of_2_of_the_true_one_and_right_in_the_mean(
    spectrum: torch.Tensor, k: int
) -> None:
    x_ND, g_NO = with_spectrum(90, 64, 50, spectrum, seed=0)
    squares = []
    for seed in range(20):
        guess, true = estimated(x_ND, [g_NO], k, seed)
        assert true / 2 - 1e-6 <= guess <= 2 * true + 1e-6
        squares.append((guess / true) ** 2 if true > 1e-6 else 1.0)
    assert math.fsum(squares) / len(squares) == pytest.approx(1.0, abs=1 / 3)


@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1e-4, 1.0, 30.0), (30.0, 1e-10, 1.0)])
def test_the_error_of_sites_that_share_x_is_that_of_their_whole_gradient(sizes: Sequence[float]) -> None:
    x_ND = normal(90, 48) * 0.9 ** torch.arange(48)
    gs = [size * normal(90, width, seed=width) for width, size in zip((40, 10, 25), sizes, strict=True)]
    for seed in range(10):
        guess, true = estimated(x_ND, gs, 16, seed)
        assert true / 2 <= guess <= 2 * true


def test_without_a_gradient_there_is_no_error() -> None:
    assert sketch.error(normal(90, 24), [torch.zeros(90, 7)], torch.eye(24)[:, :4], seed=0) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [8, 24])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_a_sketch_further_off_than_it_may_be_is_no_sketch_and_another_is_the_same_as_without_a_limit(
    name: str, k: int, dtype: torch.dtype
) -> None:
    x_ND, g_NO = (values.to(dtype) for values in with_spectrum(90, 64, 50, SPECTRA[name], seed=0))
    plain = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=3)
    found = sketch.error(x_ND.float(), [g_NO.float()], plain[0].T, seed=3)
    loose = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=3, max_error=found * 1.01)
    assert torch.equal(loose[0], plain[0]) and torch.equal(loose[1][0], plain[1][0])
    strict = sketch.pseudo_rows(x_ND, [g_NO], k=k, seed=3, max_error=found * 0.99)
    assert torch.equal(strict[0], x_ND.float()) and torch.equal(strict[1][0], g_NO.float())


def test_up_to_k_rows_go_as_they_are_whatever_the_limit() -> None:
    x_ND, g_NO = normal(8, 12), normal(8, 9, seed=1)
    few_x, (few_g,) = sketch.pseudo_rows(x_ND, [g_NO], k=8, seed=0, max_error=1e-30)
    assert few_x is x_ND and few_g is g_NO
