"""PyTorch's semi-structured tensors: what can be checked without a GPU, and, marked `cuda`, what cannot."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from environments import needs_gpu
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils._python_dispatch import TorchDispatchMode

import rnm_td3_continuous
import td3_continuous
from rnm_td3_continuous import (
    TD3,
    Args,
    Batch,
    NMLinear,
    SemiStructuredLinear,
    UsageError,
    choose_backend,
    on_cpu,
    try_products,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = [(2, 4, torch.bfloat16), (2, 4, torch.float16), (1, 2, torch.float32)]
SIZES = [(256, 256), (17, 256), (256, 6), (23, 40), (256, 1), (65, 33), (3, 2)]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")


def layer_of(n, m, dtype, columns, rows, device="cpu"):
    torch.manual_seed(columns + rows)
    return SemiStructuredLinear(columns, rows, n=n, m=m, product_dtype=dtype, device=device)


def assert_unpacks(weight, layer):
    """PyTorch's own unpacking. It moves float32 as pairs of float16, and on the CPU changes the pairs that are NaNs."""
    dense = sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta)
    rtol = 2e-3 if layer.product_dtype is torch.float32 else 0
    torch.testing.assert_close(dense, padded(layer), rtol=rtol, atol=0)


def padded(layer):
    return layer.pad(layer.sparse_weight().detach())


@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_values_are_pytorchs_packed_tensor_to_the_byte(n, m, dtype, columns, rows):
    layer = layer_of(n, m, dtype, columns, rows)
    weight = layer.packed_weight()
    packed, meta = sparse_semi_structured_from_dense_cutlass(padded(layer))
    assert weight.dtype == layer.product_dtype == dtype
    assert torch.equal(weight.packed, packed)
    assert torch.equal(weight.packed[:rows, : layer.values.shape[1]], layer.values.to(dtype))
    assert_unpacks(weight, layer)
    if columns % 4 == 0 and padded(layer).shape == (rows, columns):
        assert torch.equal(layer.layout, meta)


@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_zero_weights_and_projections_keep_positions(n, m, dtype):
    """A weight that is 0.0 by chance is active all the same: the metadata comes from the mask."""
    layer = layer_of(n, m, dtype, 256, 64)
    layer.values.data[:, ::3] = 0.0
    before = layer.layout.clone()
    layer.index_changed()
    assert torch.equal(layer.layout, before)
    layer.values.data *= 0.01
    assert layer.project() > 0
    assert not torch.equal(layer.layout, before)
    weight = layer.packed_weight()
    assert_unpacks(weight, layer)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.layout, layer.layout)


BOTH = [(kind, *pattern) for kind in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)
        for pattern in KINDS if pattern[2] in kind._DTYPE_SHAPE_CONSTRAINTS]  # fmt: skip


@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("kind, n, m, dtype", BOTH)
def test_padding_meets_pytorchs_own_shape_check(kind, columns, rows, n, m, dtype, monkeypatch):
    later = kind is SparseSemiStructuredTensorCUSPARSELT
    layer = layer_of(n, m, dtype, columns, rows)
    weight = layer.sparse_weight().detach()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0) if later else (8, 0))
    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    on_gpu = SimpleNamespace(**vars(layer), values=SimpleNamespace(device=CUDA, is_cuda=True), mask=layer.mask)
    on_gpu.pad, buffers = partial(SemiStructuredLinear.pad, on_gpu), {}
    on_gpu.register_buffer = lambda name, value, **_: buffers.update({name: value})
    SemiStructuredLinear.index_changed(on_gpu)
    assert on_gpu.kind is kind and (buffers["layout"] is None) == later
    matrix = on_gpu.pad(weight)

    class OnCuda(torch.Tensor):
        is_cuda = True

    kind._validate_device_dim_dtype_shape(matrix.as_subclass(OnCuda))
    if matrix.shape != weight.shape:
        with pytest.raises(RuntimeError, match="not supported"):
            kind._validate_device_dim_dtype_shape(weight.to(dtype).contiguous().as_subclass(OnCuda))
    assert torch.equal(matrix[:rows, :columns], weight.to(dtype)) and matrix.count_nonzero() == weight.count_nonzero()


def test_what_the_gpu_cannot_do_is_one_line(monkeypatch):
    with pytest.raises(UsageError, match=r"semi_structured needs a GPU of compute capability 8\.0"):
        choose_backend("semi_structured", 2, 4, CPU)
    for capability, n, m, message in [
        ((7, 5), 2, 4, "capability 8.0"), ((8, 0), 1, 4, "1:4"), ((8, 6), 4, 8, "4:8"), ((9, 0), 1, 2, "1:2"),
    ]:  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        with pytest.raises(UsageError, match=message):
            choose_backend("semi_structured", n, m, CUDA)
    for capability, n, m in [((8, 0), 2, 4), ((8, 9), 1, 2), ((9, 0), 2, 4), ((10, 0), 2, 4)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        assert choose_backend("semi_structured", n, m, CUDA) == "semi_structured"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cuSPARSELt"):
        choose_backend("semi_structured", 2, 4, CUDA)
    assert choose_backend("auto", 2, 4, CUDA) == "masked"
    with pytest.raises(UsageError, match="--backend native is for the CPU; try auto"):
        choose_backend("native", 2, 4, CUDA)


@pytest.fixture
def products_on_the_cpu(monkeypatch):
    """PyTorch's sparse product, which needs CUDA, as what it stands for: unpack, then multiply in the same type."""
    unpack = sparse_semi_structured_to_dense_cutlass
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda packed, meta, x: unpack(packed, meta) @ x)
    monkeypatch.setattr(rnm_td3_continuous, "choose_backend", lambda *_: "semi_structured")


class SameProduct(SemiStructuredLinear):
    """The same products in the same types, dense, and differentiated by PyTorch."""

    def forward(self, x):
        y = F.linear(x.to(self.product_dtype), self.sparse_weight().to(self.product_dtype))
        return y.to(x.dtype) + self.bias


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_equal_those_of_autograd_on_the_same_products(dtype, products_on_the_cpu, monkeypatch):
    options = {"hidden_sizes": (64, 128), "learning_rate": 1e-2, "dense_layers": "none"}
    args = Args(backend="semi_structured", semi_structured_dtype=dtype, **options)
    agents = []
    for kind in (SemiStructuredLinear, SameProduct):
        monkeypatch.setitem(rnm_td3_continuous.BACKENDS, "semi_structured", kind)
        torch.manual_seed(0)
        agents.append(TD3(32, np.full(3, -1.0, np.float32), np.ones(3, np.float32), args, CPU))
    assert {type(layer) for layer in agents[0].nm_layers.values()} == {SemiStructuredLinear, NMLinear}
    for count in range(1, 7):
        for agent in agents:
            torch.manual_seed(count)
            obs, action, next_obs, reward = (torch.randn(64, width).squeeze(1) for width in (32, 3, 32, 1))
            agent.update_critics(Batch(obs, action, next_obs, reward, (reward > 1).float()))
            if count % 2 == 0:
                agent.update_actor(obs)
                agent.update_targets()
            if count % 3 == 0:
                assert sum(agent.project().values()) > 0
    for name, layer in agents[0].nm_layers.items():
        other = agents[1].nm_layers[name]
        assert torch.equal(layer.index, other.index), name
        torch.testing.assert_close(layer.values, other.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 0.4), ("float16", 0.05)])
def test_a_value_of_300_is_not_rounded_to_the_type_of_the_products(dtype, bound, products_on_the_cpu):
    """bfloat16 has steps of 2 there, float16 of 0.25; the last layer adds up in float32. `bound`: root mean square."""
    args = Args(backend="semi_structured", semi_structured_dtype=dtype, dense_layers="none")
    torch.manual_seed(0)
    critic = TD3(32, np.full(3, -1.0, np.float32), np.ones(3, np.float32), args, CPU).qf1
    obs, action = torch.randn(256, 32), torch.rand(256, 3) * 2 - 1
    with torch.no_grad():
        last = critic.net[-1]
        last.values.abs_()
        last.values *= 300 / critic(obs, action).mean()
        values = on_cpu(critic.net).double()(torch.cat([obs, action], 1).double()).squeeze(1)
        found = critic(obs, action)
    errors = [(q - values).square().mean().sqrt() for q in (found, found.to(getattr(torch, dtype)))]
    assert values.mean() == pytest.approx(300, rel=0.1) and errors[0] < bound < errors[1]


def test_a_kernel_that_is_missing_is_one_line_before_the_first_step(monkeypatch):
    """Each shape is tried; without a GPU, PyTorch's product is replaced by one that refuses a shape."""
    tried = []

    def product(x, weight, bias=None):
        tried.append((weight.shape[1], weight.shape[0], len(x)))
        if weight.shape[0] == refused:
            raise NotImplementedError("no kernel\nfor this")
        return x.new_zeros(len(x), weight.shape[0])

    monkeypatch.setattr("rnm_td3_continuous.F.linear", product)
    args, refused = Args(hidden_sizes=(64, 128), batch_size=32), 128
    with pytest.raises(UsageError, match=r"^--backend semi_structured: 64 x 128: no kernel; try auto$"):
        try_products(args, 17, 6, CPU)
    refused = None
    tried.clear()
    state = torch.get_rng_state()
    try_products(args, 17, 6, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert len([rows for _, rows, _ in tried if rows >= 32]) == 8 and {batch for *_, batch in tried} == {1, 32}
    assert {rows for _, rows, _ in tried} == {64, 128, 6, 1}


def operators(monitored):
    """Names of the operators that a call runs, each of which is a launch or more on a GPU."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.__name__.split(".")[0])
            return operator(*args, **kwargs or {})

    names = []
    with Recorder():
        monitored()
    return names


def test_a_layer_computes_nothing_to_throw_it_away(products_on_the_cpu, monkeypatch):
    layer, x = layer_of(2, 4, torch.bfloat16, 64, 32), torch.randn(8, 64)
    for needs_grad, products in ((False, 1), (True, 2)):  # dX takes the dense weight, dW~ does not
        y = layer(x.requires_grad_(needs_grad))
        names = operators(lambda y=y: y.sum().backward())
        assert names.count("mm") == products and names.count("scatter_") == products - 1
    monkeypatch.setattr(SparseSemiStructuredTensorCUTLASS, "__new__", lambda *_: None)
    names = operators(layer.packed_weight)
    assert names.count("copy_") == 1 and set(names) <= {"view", "slice", "detach", "copy_"}  # one launch


def test_a_layer_that_moves_asks_for_the_capability_again(monkeypatch):
    layer, asked = layer_of(2, 4, torch.bfloat16, 64, 32), []
    monkeypatch.setattr(SemiStructuredLinear, "index_changed", lambda self: asked.append(self.values.device))
    torch.nn.Sequential(layer).to("meta")
    assert asked == [torch.device("meta")]


@pytest.mark.parametrize("script", [rnm_td3_continuous, td3_continuous])
def test_evaluations_act_on_the_cpu_with_what_the_layers_hold(script, monkeypatch):
    """In float32, as `--evaluate` plays a model file; the actor itself stays where it is."""
    actor = script.Actor(17, np.full(3, -1.0, np.float32), np.ones(3, np.float32), (64, 64))
    played, moved, obs = [], [], np.random.default_rng(0).normal(size=17)
    expected = actor.act
    if script is rnm_td3_continuous:
        masked = rnm_td3_continuous.sparsify(copy.deepcopy(actor), 2, 4)
        rnm_td3_continuous.sparsify(actor, 2, 4, backend="semi_structured")
        for layer in actor.net[::2]:
            layer.values.data *= 2  # since the last projection: the masters are stale
        masked.load_state_dict(actor.state_dict())
        expected = masked.act
    before = {name: (id(parameter), parameter.clone()) for name, parameter in actor.named_parameters()}
    run = SimpleNamespace(device=CUDA, agent=SimpleNamespace(actor=actor), args=script.Args(), clock=0, deadline=0)
    run.eval_env, run.write_row, run.scalars = None, lambda *_: None, lambda *_: None
    monkeypatch.setattr(script, "evaluate", lambda policy, *_: played.append(policy(obs)) or [0.0])
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: moved.append(self) or self)
    script.Run.evaluate(run)
    assert len(moved) == 1 and moved[0] is not actor
    np.testing.assert_allclose(played[0], expected(obs), rtol=1e-6)
    for name, parameter in actor.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
    assert not {id(parameter) for parameter in moved[0].parameters()} & {number for number, _ in before.values()}


@pytest.mark.parametrize("backend", ["masked", "semi_structured"])
def test_on_cpu_takes_whole_networks_and_layers(backend):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    rnm_td3_continuous.sparsify(net, 2, 4, backend=backend)
    dense, x = on_cpu(net), torch.randn(5, 64)
    assert [type(module) for module in dense] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    y = F.relu(F.linear(x, net[0].sparse_weight(), net[0].bias))
    torch.testing.assert_close(dense(x), F.linear(y, net[2].sparse_weight(), net[2].bias))
    assert torch.equal(on_cpu(net[0]).weight, net[0].sparse_weight())


def test_tests_see_a_gpu_only_where_they_are_marked():
    """conftest.py on a machine that says it has one."""
    Path("conftest.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n" + Path(conftest.__file__).read_text()
    )
    Path("test_it.py").write_text(
        """
import os, pytest, subprocess, sys, torch
def visible():
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    return torch.cuda.is_available(), subprocess.check_output([sys.executable, "-c", code], text=True).strip()
def test_hidden():
    assert visible() == (False, "")
@pytest.mark.cuda
def test_seen():
    assert visible() == (True, "0")
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-o", "markers=cuda", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "2 passed" in result.stdout, result.stdout


def test_other_patterns_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="2:4 or 1:2, not 1:4"):
        layer_of(1, 4, torch.bfloat16, 64, 32)


# ---------------------------------------------------------------- on a GPU


def skip_what_pytorch_lacks(n, m):
    try:
        choose_backend("semi_structured", n, m, CUDA)
    except UsageError as error:
        pytest.skip(str(error))


def assert_close_to(ours, theirs, x, dense, grad, index, dtype):
    """Output and gradients of x, bias and values, each within three roundings of the sum of its summands' sizes."""
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-11}[dtype]  # float32 runs as TF32
    weight, x, grad = dense.weight.abs(), x.abs(), grad.abs()
    sizes = x @ weight.T + dense.bias.abs(), grad @ weight, grad.sum(0), (grad.T @ x).gather(1, index)
    for our, their, size in zip(ours, theirs, sizes, strict=True):
        assert ((our - their).abs() <= 3 * rounding * size + 1e-6).all(), (our.shape, dtype)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_holds_for_rounded_products_and_not_for_worse_ones(dtype, seed):
    """Operands and results rounded to `dtype`, as on a GPU, but float64 between; worse: three bits less."""
    torch.manual_seed(seed)
    batch, columns, rows = (1, 7, 256)[seed % 3], *SIZES[seed % len(SIZES)]
    layer, x = layer_of(2, 4, dtype, columns, rows), torch.randn(batch, columns, dtype=torch.float64)
    dense, grad = layer.to_linear().double().requires_grad_(False), torch.randn(batch, rows, dtype=torch.float64)
    exact = x @ dense.weight.T + dense.bias, grad @ dense.weight, grad.sum(0), (grad.T @ x).gather(1, layer.index)

    def products(to):
        a, w, g = to(x), to(dense.weight), to(grad)
        return to(a @ w.T) + dense.bias, to(g @ w), grad.sum(0), to(g.T @ a).gather(1, layer.index)

    assert_close_to(products(lambda t: t.to(dtype).double()), exact, x, dense, grad, layer.index, dtype)
    bits = 5 if dtype is torch.bfloat16 else 8
    coarse = lambda t: torch.ldexp((torch.frexp(t)[0] * 2**bits).round(), torch.frexp(t)[1] - bits)  # noqa: E731
    if columns > 4:  # a few numbers may be lucky
        with pytest.raises(AssertionError):
            assert_close_to(products(coarse), exact, x, dense, grad, layer.index, dtype)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_products_match_float64(n, m, dtype, columns, rows, batch):
    skip_what_pytorch_lacks(n, m)
    layer = layer_of(n, m, dtype, columns, rows, device="cuda")
    dense = layer.to_linear().double()
    x = torch.randn(batch, columns, device="cuda", requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    grad = torch.randn(batch, rows, device="cuda")
    y, y64 = layer(x), dense(x64)
    y.backward(grad)
    y64.backward(grad.double())
    ours = y, x.grad, layer.bias.grad, layer.values.grad
    theirs = y64, x64.grad, dense.bias.grad, dense.weight.grad.gather(1, layer.index)
    assert_close_to(ours, theirs, x64, dense, grad.double(), layer.index, dtype)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_an_update_and_a_projection_of_all_six_networks(n, m, dtype):
    skip_what_pytorch_lacks(n, m)
    half = "float16" if dtype is torch.float16 else "bfloat16"
    options = {"backend": "semi_structured", "semi_structured_dtype": half, "dense_layers": "none"}
    args = Args(n=n, m=m, **options, hidden_sizes=(64, 64))
    torch.manual_seed(0)
    agent = TD3(11, np.full(3, -1.0, np.float32), np.ones(3, np.float32), args, CUDA)
    assert {type(layer) for layer in agent.nm_layers.values()} == {SemiStructuredLinear, NMLinear}
    twin = TD3(
        11, np.full(3, -1.0, np.float32), np.ones(3, np.float32), Args(**{**vars(args), "backend": "masked"}), CUDA
    )
    for name, network in twin.networks.items():
        network.load_state_dict(agent.networks[name].state_dict())
    batch = [torch.randn(256, width, device="cuda").squeeze(1) for width in (11, 3, 11, 1)]
    batch.append((torch.rand(256, device="cuda") < 0.3).float())
    for each in (agent, twin):
        torch.manual_seed(1)
        each.results = each.update_critics(Batch(*batch))
        each.update_actor(batch[0])
        each.results += (each.actor_loss,)
    for value, expected in zip(agent.results, twin.results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0.1, atol=0.02)
    assert np.isfinite(list(agent.project().values())).all()
    agent.update_critics(Batch(*batch))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_pytorch_compresses_to_the_same_bytes(n, m, dtype, columns, rows):
    """After other values and another mask, too."""
    skip_what_pytorch_lacks(n, m)
    layer = layer_of(n, m, dtype, columns, rows, device="cuda")
    x = torch.randn(16, columns, device="cuda", dtype=dtype)
    for _ in range(2):
        weight, fresh = layer.packed_weight(), layer.kind.from_dense(padded(layer))
        assert type(weight) is type(fresh) and weight.shape == fresh.shape
        half = weight.numel() // 2  # what follows is metadata, and room that cuSPARSELt leaves as it was
        assert torch.equal(weight.packed.flatten()[:half], fresh.packed.flatten()[:half])
        wide = F.pad(x, (0, weight.shape[1] - columns))
        assert torch.equal(F.linear(wide, weight), F.linear(wide, fresh))
        layer.values.data *= -0.01
        layer.project()
