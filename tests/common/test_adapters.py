"""Adapters against plain autograd, torch's own modules, and torch's flop counter."""

import math
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from cola_common.adapters import Adapter, Parameters, build
from cola_common.errors import ColaError, Reason
from cola_common.families import Family, Head, Linear, Lora, Mlp

FAMILIES: list[Family] = [
    Lora(r=1, scale=1.0),
    Lora(r=4, scale=2.0),
    Lora(r=3, scale=16 / 3),
    Linear(scale=1.0),
    Linear(scale=0.3),
    Mlp(hidden_sizes=(8,), scale=1.0),
    Mlp(hidden_sizes=(1,), scale=3.0),
    Mlp(hidden_sizes=(6, 5, 9), scale=0.7),
    Head(bias=True),
    Head(bias=False),
]
ADDING = [family for family in FAMILIES if not isinstance(family, Head)]
WIDTHS = [(5, 7), (7, 5), (4, 4), (1, 6), (6, 1)]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_width = pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_parameters(adapter: Adapter, dtype: torch.dtype = torch.float64) -> Parameters:
    return {name: normal(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(adapter.shapes().items())}


def by_torch_modules(family: Family, d_in: int, d_out: int, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    """The same function, made of torch's modules; differentiable in the parameters."""
    layers: list[torch.nn.Module]
    names: list[str]
    scale = 1.0
    match family:
        case Lora(r=r, scale=scale):
            layers = [torch.nn.Linear(d_in, r, bias=False), torch.nn.Linear(r, d_out, bias=False)]
            names = ["0.weight", "1.weight"]
        case Linear(scale=scale):
            layers, names = [torch.nn.Linear(d_in, d_out, bias=False)], ["0.weight"]
        case Mlp(hidden_sizes=hidden, scale=scale):
            layers, names = [], []
            for width, next_width in pairwise((d_in, *hidden, d_out)):
                names += [f"{len(layers)}.weight", f"{len(layers)}.bias"]
                layers += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
            layers.pop()
        case Head(bias=bias):
            layers, names = [torch.nn.Linear(d_in, d_out, bias=bias)], ["0.weight", "0.bias"][: 1 + bias]
    weights = dict(zip(names, parameters.values(), strict=True))
    output: torch.Tensor = functional_call(torch.nn.Sequential(*layers), weights, (x,))
    return output * scale


@every_family
@every_width
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_vjp_equals_autograd(family: Family, d_in: int, d_out: int, rows: int) -> None:
    adapter = build(family, d_in, d_out)
    parameters = {name: value.requires_grad_() for name, value in random_parameters(adapter).items()}
    x_ND, g_NO = normal(rows, d_in, seed=11), normal(rows, d_out, seed=12)
    output = by_torch_modules(family, d_in, d_out, parameters, x_ND)
    wanted = torch.autograd.grad(output, list(parameters.values()), g_NO)
    with torch.no_grad():
        found = adapter.vjp(parameters, x_ND, g_NO)
    assert list(found) == list(adapter.shapes())
    for value, right in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)


@every_family
@every_width
@pytest.mark.parametrize("leading", [(0,), (9,), (2, 3), (2, 1, 4)], ids=str)
def test_forward_and_its_gradient_in_x_equal_those_of_torchs_modules(
    family: Family, d_in: int, d_out: int, leading: tuple[int, ...]
) -> None:
    adapter = build(family, d_in, d_out)
    parameters = random_parameters(adapter)
    x, g = normal(*leading, d_in, seed=11).requires_grad_(), normal(*leading, d_out, seed=12)
    found = adapter.forward(parameters, x)
    wanted = by_torch_modules(family, d_in, d_out, parameters, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, g), torch.autograd.grad(wanted, x, g), rtol=1e-12, atol=1e-12
    )


@every_family
@every_width
@pytest.mark.parametrize("leading", [(0,), (9,), (2, 3)], ids=str)
def test_pull_equals_autograd(family: Family, d_in: int, d_out: int, leading: tuple[int, ...]) -> None:
    adapter = build(family, d_in, d_out)
    parameters = random_parameters(adapter)
    x, g = normal(*leading, d_in, seed=11).requires_grad_(), normal(*leading, d_out, seed=12)
    (wanted,) = torch.autograd.grad(by_torch_modules(family, d_in, d_out, parameters, x), x, g)
    torch.testing.assert_close(adapter.pull(parameters, x.detach(), g), wanted, rtol=1e-12, atol=1e-12)
    narrow = adapter.pull(parameters, x.detach().to(torch.bfloat16), g.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16 and narrow.shape == x.shape


@every_family
def test_inputs_that_are_strided_count_as_what_they_hold(family: Family) -> None:
    adapter = build(family, 5, 7)
    parameters = random_parameters(adapter)
    x, g = normal(5, 3, 8, seed=11).permute(2, 1, 0)[::2], normal(7, 3, 8, seed=12).permute(2, 1, 0)[::2]  # 4×3 rows
    copies = x.contiguous(), g.contiguous()
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(adapter.forward(parameters, x), adapter.forward(parameters, copies[0]), **tolerance)
    torch.testing.assert_close(adapter.pull(parameters, x, g), adapter.pull(parameters, *copies), **tolerance)
    for name, value in adapter.vjp(parameters, x[:, 0], g[:, 0]).items():
        wanted = adapter.vjp(parameters, copies[0][:, 0].clone(), copies[1][:, 0].clone())[name]
        torch.testing.assert_close(value, wanted, **tolerance)


@every_family
def test_vjp_of_all_rows_is_the_sum_over_parts(family: Family) -> None:
    adapter = build(family, 5, 7)
    parameters = random_parameters(adapter)
    x_ND, g_NO = normal(12, 5, seed=11), normal(12, 7, seed=12)
    whole = adapter.vjp(parameters, x_ND, g_NO)
    parts = [adapter.vjp(parameters, x_ND[i : i + 5], g_NO[i : i + 5]) for i in (0, 5, 10)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([part[name] for part in parts]).sum(0), rtol=1e-12, atol=1e-12)


@every_family
def test_vjp_leaves_its_arguments_alone(family: Family) -> None:
    adapter = build(family, 5, 7)
    parameters = random_parameters(adapter)
    x_ND, g_NO = normal(6, 5, seed=11), normal(6, 7, seed=12)
    before = [value.clone() for value in (*parameters.values(), x_ND, g_NO)]
    adapter.vjp(parameters, x_ND, g_NO)
    assert all(torch.equal(a, b) for a, b in zip(before, (*parameters.values(), x_ND, g_NO), strict=True))


@pytest.mark.parametrize("family", ADDING, ids=str)
@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e2])
def test_vjp_in_fp32_keeps_its_digits_however_large_the_adapters_output_is(family: Family, magnitude: float) -> None:
    # The regression form, whose target holds out - g, loses 3 digits at an output of 1 and more beyond (trap 1).
    adapter = build(family, 64, 48)
    parameters = {name: value * magnitude for name, value in random_parameters(adapter).items()}
    x_ND, g_NO = normal(200, 64, seed=11), 1e-4 * normal(200, 48, seed=12)
    exact = adapter.vjp(parameters, x_ND, g_NO)
    found = adapter.vjp({name: value.float() for name, value in parameters.items()}, x_ND.float(), g_NO.float())
    for name, value in exact.items():
        assert torch.linalg.vector_norm(found[name] - value) <= 2e-6 * torch.linalg.vector_norm(value)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_fp32_and_come_out_narrow(family: Family, dtype: torch.dtype) -> None:
    adapter = build(family, 5, 7)
    parameters = random_parameters(adapter, torch.float32)
    x_ND, g_NO = normal(6, 5, seed=11).to(dtype), normal(6, 7, seed=12).to(dtype)
    assert torch.equal(adapter.forward(parameters, x_ND), adapter.forward(parameters, x_ND.float()).to(dtype))
    found, wanted = adapter.vjp(parameters, x_ND, g_NO), adapter.vjp(parameters, x_ND.float(), g_NO.float())
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value)


@every_family
@every_width
def test_initial_values_have_the_shapes_and_are_fp32(family: Family, d_in: int, d_out: int) -> None:
    adapter = build(family, d_in, d_out)
    parameters = adapter.initial(3, "model.layers.0.q_proj")
    assert {name: tuple(value.shape) for name, value in parameters.items()} == adapter.shapes()
    assert list(parameters) == list(adapter.shapes())
    assert {(value.dtype, value.device.type) for value in parameters.values()} == {(torch.float32, "cpu")}


@every_family
def test_a_fresh_adapter_adds_nothing_and_a_fresh_head_has_an_output(family: Family) -> None:
    adapter = build(family, 5, 7)
    output = adapter.forward(adapter.initial(0, "site"), normal(6, 5, seed=11, dtype=torch.float32))
    assert bool(output.abs().sum() == 0) is not adapter.replaces


@every_family
def test_initial_values_depend_on_seed_and_site_and_on_nothing_else(family: Family) -> None:
    adapter = build(family, 5, 7)

    def bits(seed: int, site: str) -> bytes:
        return b"".join(value.numpy().tobytes() for value in adapter.initial(seed, site).values())

    state = torch.get_rng_state()
    first = bits(0, "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert bits(0, "a") == first
    if not isinstance(family, Linear):
        assert len({bits(seed, site) for seed in (0, 1, 2**63 - 1) for site in ("a", "b", "a.b")}) == 9


def test_lora_and_hidden_layers_start_spread_as_torchs_linear_does() -> None:
    d_in, hidden = 256, 512
    bound = 1 / math.sqrt(d_in)
    fresh = [
        build(Lora(r=hidden, scale=1.0), d_in, 8).initial(0, "s")["A"],
        build(Mlp(hidden_sizes=(hidden,), scale=1.0), d_in, 8).initial(0, "s")["W0"],
        build(Mlp(hidden_sizes=(hidden,), scale=1.0), d_in, 8).initial(0, "s")["b0"],
    ]
    for value in fresh:  # uniform on ±bound has the deviation bound / √3
        assert value.abs().max() <= bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(value.mean()) < 0.1 * bound


def test_heads_start_as_transformers_starts_them() -> None:
    fresh = build(Head(bias=True), 256, 64).initial(0, "s")
    assert fresh["W"].std() == pytest.approx(0.02, rel=0.05)
    assert not fresh["b"].any()


@every_family
@every_width
def test_delta_weight_is_the_jacobian_in_x_of_adapters_linear_in_it(family: Family, d_in: int, d_out: int) -> None:
    adapter = build(family, d_in, d_out)
    parameters = random_parameters(adapter)
    if not adapter.linear_in_x:
        with pytest.raises(ColaError) as caught:
            adapter.delta_weight(parameters)
        assert caught.value.reason == Reason.NOT_MERGEABLE
        return
    jacobian = torch.func.jacrev(lambda x: adapter.forward(parameters, x))(normal(d_in, seed=11))
    torch.testing.assert_close(adapter.delta_weight(parameters), jacobian, rtol=1e-12, atol=1e-12)


@every_family
def test_delta_weight_shares_no_memory_with_the_parameters(family: Family) -> None:
    adapter = build(family, 5, 7)
    if adapter.linear_in_x:
        parameters = random_parameters(adapter)
        before = {name: value.clone() for name, value in parameters.items()}
        adapter.delta_weight(parameters).zero_()
        assert all(torch.equal(parameters[name], value) for name, value in before.items())


@every_family
@every_width
@pytest.mark.parametrize("rows", [1, 13])
def test_cost_is_what_torchs_flop_counter_counts(family: Family, d_in: int, d_out: int, rows: int) -> None:
    adapter = build(family, d_in, d_out)
    parameters = random_parameters(adapter, torch.float32)
    x_ND = normal(rows, d_in, seed=11, dtype=torch.float32)
    cost = adapter.cost(rows)
    with FlopCounterMode(display=False) as forward:
        output = adapter.forward(parameters, x_ND)
    with FlopCounterMode(display=False) as vjp:
        adapter.vjp(parameters, x_ND, torch.ones_like(output))
    assert (cost.forward_flops, cost.vjp_flops) == (forward.get_total_flops(), vjp.get_total_flops())
    assert cost.parameter_bytes == sum(value.nbytes for value in parameters.values())
