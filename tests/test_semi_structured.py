"""PyTorch's semi-structured tensors: what can be checked without a GPU, and, marked `cuda`, what cannot."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from rnm_td3_continuous import (
    TD3,
    Args,
    Batch,
    SemiStructuredLinear,
    UsageError,
    choose_backend,
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
    _, weight = layer.pad(layer.sparse_weight().detach())
    return weight


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
    on_gpu = SimpleNamespace(**vars(layer), values=SimpleNamespace(device=CUDA))
    chosen, matrix = SemiStructuredLinear.pad(on_gpu, weight)
    assert chosen is kind

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
    with pytest.raises(UsageError, match="--no-cuda"):
        choose_backend("native", 2, 4, CUDA)


def test_other_patterns_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="2:4 or 1:2, not 1:4"):
        layer_of(1, 4, torch.bfloat16, 64, 32)


# ---------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU of compute capability 8.0 or later",
)


def skip_what_pytorch_lacks(n, m):
    try:
        choose_backend("semi_structured", n, m, CUDA)
    except UsageError as error:
        pytest.skip(str(error))


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
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 4e-3}[dtype]  # float32 runs as TF32
    pairs = [(y, y64), (x.grad, x64.grad), (layer.bias.grad, dense.bias.grad)]
    pairs.append((layer.values.grad, dense.weight.grad.gather(1, layer.index)))
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), (ours.shape, tolerance)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("n, m, dtype", KINDS)
def test_an_update_and_a_projection_of_all_six_networks(n, m, dtype):
    skip_what_pytorch_lacks(n, m)
    half = "float16" if dtype is torch.float16 else "bfloat16"
    args = Args(n=n, m=m, backend="semi_structured", semi_structured_dtype=half, hidden_sizes=(64, 64))
    torch.manual_seed(0)
    agent = TD3(11, np.full(3, -1.0, np.float32), np.ones(3, np.float32), args, CUDA)
    assert {type(layer) for layer in agent.nm_layers.values()} == {SemiStructuredLinear}
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
def test_metadata_is_that_of_a_new_compression():
    """With float16 on CUTLASS, the tensor that we put together equals the one that PyTorch compresses."""
    layer = layer_of(2, 4, torch.float16, 256, 256, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    weight = layer.packed_weight()
    fresh = type(weight).from_dense(layer.sparse_weight().detach().to(torch.float16))
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, fresh))
