"""NMLinear as a drop-in for nn.Linear, and what a projection does to weights and Adam's moments."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rnm_td3_continuous import NMLinear, density, nm_mask, sparsify


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    m=st.integers(1, 16),
    share=st.floats(0.01, 1),
    bias=st.booleans(),
    batch=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_equals_masked_dense_layer(rows, columns, m, share, bias, batch):
    n = max(1, round(share * m))
    linear = nn.Linear(columns, rows, bias, dtype=torch.float64)
    layer = NMLinear.from_linear(linear, n, m)
    x = torch.randn(batch, columns, dtype=torch.float64, requires_grad=True)
    mask = nm_mask(linear.weight.detach(), n, m)
    weight = (linear.weight.detach() * mask).requires_grad_()
    expected = F.linear(x, weight, linear.bias)
    gradient = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(expected, [x, weight], gradient, retain_graph=True)
    y = layer(x)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(gradient)
    assert torch.allclose(x.grad, dx, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.values.grad, dw.gather(1, layer.index), rtol=1e-12, atol=1e-12)
    if bias:
        assert torch.allclose(layer.bias.grad, gradient.sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.mask(), mask)
    assert (layer.index.diff(dim=1) > 0).all()  # ascending in each row
    dense = layer.to_linear()
    assert torch.equal(dense.weight, weight) and (not bias or torch.equal(dense.bias, linear.bias))
    again = NMLinear.from_linear(dense, n, m)
    assert torch.equal(again.to_linear().weight, weight)


def test_conversions_copy_and_draw_no_random_number():
    linear = nn.Linear(8, 4)
    state = torch.get_rng_state()
    layer = NMLinear.from_linear(linear, 2, 4)
    dense = layer.to_linear()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        linear.weight.zero_()
        dense.weight.zero_()
    assert layer.values.abs().min() > 0
    frozen = NMLinear.from_linear(linear.requires_grad_(False), 2, 4)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_prints_its_sizes():
    assert str(NMLinear(8, 4, n=2, m=4)) == "NMLinear(8, 4, bias=True, n=2, m=4)"


def test_a_start_that_keeps_the_variance_leaves_tied_weights_alone():
    network = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4, bias=False))
    network[1].weight = network[0].weight
    before = network[0].weight.detach().clone()
    sparsify(network, 2, 4, init="variance")
    assert torch.equal(network[0].weight, before) and not torch.equal(network[1].master, before)


def test_what_an_optimizer_holds_of_rows_and_columns_stays_as_it_is():
    layer = NMLinear(8, 4, n=2, m=4)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    before = optimizer.state[layer.values]["row_var"].clone()
    layer.project(optimizer)
    assert torch.equal(optimizer.state[layer.values]["row_var"], before)


def test_moments_have_one_master_where_all_weights_are_active():
    """There values, moments and masters have the same shape."""
    layer = NMLinear(8, 4, n=4, m=4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    for _ in range(2):
        layer.project(optimizer)
    moments = {"exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[layer.values]) == {"step", *moments, *(f"{name}_master" for name in moments)}


def test_is_initialised_as_linear():
    torch.manual_seed(3)
    linear = nn.Linear(20, 6)
    torch.manual_seed(3)
    layer = partial(NMLinear, n=1, m=4)(20, 6)
    assert torch.equal(layer.master, linear.weight) and torch.equal(layer.bias, linear.bias)


def test_takes_device_and_dtype_and_leaves_subclasses_of_linear_alone():
    layer = NMLinear(8, 4, dtype=torch.float64, device="cpu", n=2, m=4)
    assert layer(torch.ones(1, 8, dtype=torch.float64)).shape == (1, 4)
    attention = nn.MultiheadAttention(8, 2)  # reads the weight of its projection instead of calling it
    x = torch.randn(3, 1, 8)
    expected = attention(x, x, x)[0]
    network = sparsify(nn.ModuleList([attention, nn.Linear(8, 4)]), 2, 4)
    assert isinstance(network[1], NMLinear) and torch.equal(network[0](x, x, x)[0], expected)


def test_state_dict_round_trip_continues_the_same():
    torch.manual_seed(0)
    first = NMLinear(16, 8, n=2, m=4)
    with torch.no_grad():
        first.values.mul_(0.1)  # what is inactive is larger now: the projection must find it
    second = NMLinear(16, 8, n=2, m=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.project() == second.project() > 0
    assert torch.equal(first.values, second.values) and torch.equal(first.index, second.index)


def test_projection_swaps_entries_and_freezes_their_adam_moments():
    """A row of four, 1:4: the active entry loses its place, comes back, and finds weight and moments as they were."""
    layer = NMLinear.from_linear(nn.Linear(4, 1, bias=False), 1, 4)
    with torch.no_grad():
        layer.master.copy_(torch.tensor([[0.1, 0.5, 0.2, 0.3]]))
        layer.index.fill_(1)
        layer.values.fill_(0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    moments = {key: optimizer.state[layer.values][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    assert moments["exp_avg"].abs() > 0
    with torch.no_grad():
        layer.values.fill_(0.25)
    assert layer.project(optimizer) == 2  # one entry left, one came
    assert layer.index.item() == 3 and layer.values.item() == pytest.approx(0.3)
    assert all(optimizer.state[layer.values][key].item() == 0 for key in moments)
    with torch.no_grad():
        layer.values.fill_(0.21)
    assert layer.project(optimizer) == 2
    assert layer.index.item() == 1 and layer.values.item() == pytest.approx(0.25)
    assert all(torch.equal(optimizer.state[layer.values][key], moments[key]) for key in moments)
    assert layer.project(optimizer) == 0
    assert layer.master.tolist() == [pytest.approx([0.1, 0.25, 0.2, 0.21])]


@pytest.mark.parametrize("dense_layers, sparse", [("none", 3), ("first", 2), ("last", 2), ("first,last", 1)])
def test_sparsify_and_density(dense_layers, sparse):
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    sparsify(network, 1, 4, dense_layers)
    kinds = [isinstance(layer, NMLinear) for layer in network[::2]]
    assert sum(kinds) == sparse
    assert kinds[0] == ("first" not in dense_layers) and kinds[-1] == ("last" not in dense_layers)
    weights = [layer.to_linear().weight if isinstance(layer, NMLinear) else layer.weight for layer in network[::2]]
    nonzero = sum(int((weight != 0).sum()) for weight in weights)
    assert density(network) == nonzero / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (1, 8), (3, 7)])
def test_the_start_keeps_the_variance_of_the_outputs(n, m):
    torch.manual_seed(0)
    linear, x = nn.Linear(400, 300, bias=False), torch.randn(1000, 400, dtype=torch.float64)
    weight = linear.weight.detach().double()
    network = sparsify(nn.Sequential(linear), n, m, init="variance")
    mask = nm_mask(weight, n, m)
    factor = (weight.square().sum() / (weight * mask).square().sum()).sqrt()
    assert torch.allclose(network[0].master.double(), weight * factor, rtol=1e-6, atol=0)  # inactive entries as well
    assert torch.equal(network[0].mask(), mask)  # what is active stays so
    outputs = [(x @ w.double().T).var() for w in (network[0].sparse_weight().detach(), weight, weight * mask)]
    assert outputs[0] / outputs[1] == pytest.approx(1, abs=0.02) and outputs[2] / outputs[1] < 0.9


def test_the_start_changes_nothing_where_all_or_nothing_is_active():
    layers = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    nn.init.zeros_(layers[1].weight)
    before = [layer.weight.detach().clone() for layer in layers]
    network = sparsify(nn.Sequential(layers[0]), 4, 4, init="variance")
    assert torch.equal(network[0].master, before[0])
    assert torch.equal(sparsify(nn.Sequential(layers[1]), 1, 4, init="variance")[0].master, before[1])


@pytest.mark.parametrize("option", [{"dense_layers": "frist"}, {"dense_layers": "last,first"}, {"init": "varianc"}])
def test_a_misspelled_option_is_refused(option):
    with pytest.raises(ValueError, match=next(iter(option.values()))):
        sparsify(nn.Sequential(nn.Linear(8, 8)), 1, 4, **option)


def test_wrong_pattern_is_refused():
    with pytest.raises(ValueError, match="5:4"):
        NMLinear(8, 8, n=5, m=4)
