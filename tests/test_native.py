"""The CPU kernels against float64, dense matrices and PyTorch's own checks of operators."""

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils import cpp_extension

from rnm_td3_continuous import (
    BACKENDS,
    TD3,
    Actor,
    Args,
    Batch,
    NativeActor,
    NativeLinear,
    NativeTD3,
    NMLinear,
    NMSequential,
    QNetwork,
    UsageError,
    choose_backend,
    load_kernels,
    native_tensors,
    sparsify,
)

SCRIPT = Path(__file__).parents[1] / "rnm_td3_continuous.py"
needs_kernels = pytest.mark.skipif(load_kernels() is not None, reason=str(load_kernels()))


def network(sizes, n, m, bias=True, seed=0, **options):
    torch.manual_seed(seed)
    layers = [layer for i in range(1, len(sizes)) for layer in (nn.Linear(*sizes[i - 1 : i + 1], bias), nn.ReLU())]
    return sparsify(nn.Sequential(*layers[:-1]), n, m, **options)


def in_float64(net):
    """The same weights as dense float64 matrices: nothing of the kernels, nothing of the layer."""
    return nn.Sequential(*(layer.to_linear().double() if isinstance(layer, NMLinear) else layer for layer in net))


def close(got, want, what, floor=1.0):
    """Within 1e-5 of the largest number, or of `floor` where sums of numbers around one cancel."""
    if want.numel():
        error, largest = (got.double() - want).abs().max().item(), want.abs().max().item()
        assert error <= 1e-5 * max(floor, largest), (what, error, largest)
    assert got.shape == want.shape


@pytest.fixture
def poisoned():
    """What PyTorch hands out uninitialised is NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def beside_a_kink(reference, x):
    """Whether a ReLU gets what float32 may round to the other side of zero, where its derivative is another."""
    near = False
    for layer, following in pairwise(reference):
        x = layer(x)
        near |= isinstance(following, nn.ReLU) and ((x != 0) & (x.abs() < 1e-6)).any().item()
    return near


def check(sizes, batch, n, m, bias, contiguous, seed):
    net = network(sizes, n, m, bias, seed, backend="native")
    reference = in_float64(net)
    draw = lambda: torch.randn(batch, sizes[0]) if contiguous else torch.randn(sizes[0], 2 * batch).t()[::2]  # noqa: E731
    x = draw()
    while beside_a_kink(reference, x.double()):
        x = draw()
    grad = torch.randn(batch, sizes[-1]) if contiguous else torch.randn(sizes[-1], batch).t()
    with torch.no_grad():
        close(net(x), reference(x.double()), "output without a tape")
    x, x64 = x.detach().requires_grad_(), x.double().requires_grad_()
    y, y64 = net(x), reference(x64)
    close(y, y64, "output")
    y.backward(grad)
    y64.backward(grad.double())
    close(x.grad, x64.grad, "dX")
    for i in range(0, len(net), 2):
        close(net[i].values.grad, reference[i].weight.grad.gather(1, net[i].index), f"dW of layer {i}")
        if bias:
            close(net[i].bias.grad, reference[i].bias.grad, f"db of layer {i}")


@needs_kernels
@pytest.mark.usefixtures("poisoned")
@settings(max_examples=150, deadline=None)
@example([1, 1, 26, 1], 61, (1, 2), True, True, 943)
@example([54, 54, 32, 54], 37, (4, 4), True, True, 224)  # 1e-7 beside a kink at first
@given(
    st.lists(st.integers(1, 70), min_size=2, max_size=4),
    st.integers(0, 150),
    st.sampled_from(
        [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (1, 8), (1, 16), (5, 16), (4, 4), (2, 3), (3, 7), (1, 99)]
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_networks_match_float64(sizes, batch, pattern, bias, contiguous, seed):
    check(sizes, batch, *pattern, bias, contiguous, seed)


@needs_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 8), (1, 16)])
@pytest.mark.parametrize("batch", [1, 256])
def test_sizes_of_td3_and_beyond_a_block_match_float64(batch, pattern):
    check([17, 256, 256, 6], batch, *pattern, True, True, 0)
    check([300, 520, 1], batch, *pattern, True, False, 1)


@needs_kernels
def test_scratch_memory_keeps_nothing_of_an_earlier_call():
    net = network([70, 90, 60, 5], 1, 4, backend="native")
    x = torch.randn(70, 70)
    want = net(x)
    poison = torch.full((200, 70), torch.nan, requires_grad=True)
    net(poison).sum().backward()
    with torch.no_grad():
        net(poison[:1])
    assert torch.equal(net(x), want)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_reach_what_is_connected_and_nothing_else(poison, batch):
    net = network([20, 24], 1, 4, backend="native")
    x = torch.randn(batch, 20)
    clean = net(x)
    x[batch // 2, 7] = poison
    touched = torch.zeros(batch, 24, dtype=torch.bool)
    touched[batch // 2] = net[0].mask()[:, 7]
    assert 0 < touched.sum() < 24
    for y in (net(x), net(x.requires_grad_()), torch.no_grad()(net)(x)):
        assert not y[touched].isfinite().any()
        torch.testing.assert_close(y[~touched], clean[~touched])
    relu = nn.Sequential(*net, nn.ReLU(), nn.Linear(24, 1))
    native = sparsify(relu, 24, 24, backend="native")
    assert isinstance(native, NMSequential)
    native[2].values.data.fill_(1.0)
    out = native(x).flatten()
    want = torch.relu(in_float64(net)(x.double()) if not np.isnan(poison) else net(x).double()).sum(1) + native[2].bias
    assert out[batch // 2].isfinite() == want[batch // 2].isfinite()


@needs_kernels
def test_thread_count_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        net = network([33, 256, 1100, 3], 2, 4, backend="native")  # so wide that a single sample is shared out too
        x = torch.randn(300, 33, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results.append([y, torch.no_grad()(net)(x[:1]), x.grad, *(p.grad for p in net.parameters())])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("needs_grad", [False, True])
def test_operators_pass_pytorchs_opcheck(needs_grad):
    net = network([10, 12, 5], 2, 4, backend="native").requires_grad_(needs_grad)
    tensors = [tensor for layer in (net[0], net[2]) for tensor in (layer.values, layer.bias, layer.layout)]
    x = torch.randn(9, 10, requires_grad=needs_grad)
    torch.library.opcheck(torch.ops.rnm_td3.mlp.default, (x, tensors))
    y, tape = torch.ops.rnm_td3.mlp(x, tensors)
    frozen = [tensor.detach() for tensor in tensors]
    args = (torch.randn_like(y), x.detach(), tape.detach(), frozen, True, True)  # it has no derivative itself
    torch.library.opcheck(torch.ops.rnm_td3.mlp_backward.default, args)
    if not needs_grad:
        torch.library.opcheck(torch.ops.rnm_td3.forward.default, (x, tensors))


@needs_kernels
def test_a_network_keeps_its_names_and_hooks_and_learns_after_inference():
    layers = {"first": nn.Linear(10, 13), "relu": nn.ReLU(), "last": nn.Linear(13, 1)}  # no other test has such a layer
    masked, native = (sparsify(nn.Sequential(OrderedDict(layers)), 1, 4, "last", b) for b in ("masked", "native"))
    assert isinstance(native, NMSequential) and native.state_dict().keys() == masked.state_dict().keys()
    with torch.inference_mode():
        native(torch.randn(3, 10))
    shapes = []
    hook = native.relu.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    native(torch.randn(3, 10))
    hook.remove()
    assert shapes == [(3, 13)]
    hook = native.first.register_full_backward_hook(lambda layer, *grads: shapes.append(grads[1][0].shape))
    native(torch.randn(3, 10)).sum().backward()
    hook.remove()
    assert shapes == [(3, 13)] * 2
    hook = native.first.register_full_backward_pre_hook(lambda layer, grads: shapes.append(grads[0].shape))
    native(torch.randn(3, 10)).sum().backward()
    hook.remove()
    assert shapes == [(3, 13)] * 3
    native(torch.randn(3, 10)).sum().backward()
    assert native.last.weight.grad is not None


@needs_kernels
@pytest.mark.parametrize("dense_layers", ["none", "last"])
def test_torch_compile_takes_it_whole_or_breaks_its_graph_at_dense_layers(dense_layers):
    net = network([10, 12, 5], 2, 4, backend="native", dense_layers=dense_layers)
    x = torch.randn(9, 10)
    want = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=dense_layers == "none", backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_kernels
def test_only_what_is_asked_for_gets_a_gradient():
    net = network([10, 12, 5], 2, 4, backend="native")
    x = torch.randn(9, 10, requires_grad=True)
    whole = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    net.requires_grad_(False)
    net[2].bias.requires_grad_()
    y = net(x)
    assert torch.equal(torch.autograd.grad(y.sum(), [x], retain_graph=True)[0], whole[0])
    assert torch.equal(torch.autograd.grad(y.sum(), [net[2].bias])[0], whole[-1])
    assert not net(x.detach()[:0]).isnan().any()


@needs_kernels
def test_layer_alone_and_leading_dimensions():
    layer = NativeLinear(12, 5, n=1, m=4)
    plain = NMLinear(12, 5, n=1, m=4)
    plain.load_state_dict(layer.state_dict())
    for shape in ((12,), (3, 12), (2, 3, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), plain(x))


@needs_kernels
def test_kernels_follow_projections_and_loaded_states():
    net = network([16, 24, 4], 1, 4, backend="native")
    x = torch.randn(7, 16)
    for layer in (net[0], net[2]):
        layer.values.data *= 0.01
        assert layer.project() > 0
    close(net(x), in_float64(net)(x.double()), "after a projection")
    other = network([16, 24, 4], 1, 4, seed=5, backend="native")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


LOW, HIGH = np.array([-1, 0, -30], np.float32), np.array([1, 0.5, 10], np.float32)
DENSE_LAYERS = ["none", "first", "last", "first,last"]


def make_agents(*kinds, **options):
    """Agents of (class, backend, dtype) with the same weights and random numbers: 5 observations, 3 actions."""
    agents, options = [], {"n": 1, "m": 4, "hidden_sizes": (37, 24), **options}
    for kind, backend, dtype in kinds:
        torch.manual_seed(3)
        agents.append(kind(5, LOW, HIGH, Args(**options, backend=backend), torch.device("cpu")))
        for net in agents[-1].networks.values():
            net.to(dtype)
    return agents


NATIVE, AUTOGRAD = (NativeTD3, "native", torch.float32), (TD3, "native", torch.float32)
MASKED, EXACT = (TD3, "masked", torch.float32), (TD3, "masked", torch.float64)


def random_batch(generator, size):
    """Parts of longer rows, as the replay buffer gives them."""
    rows = torch.randn(size, 15, generator=generator)
    rows[:, 14] = (rows[:, 14] > 0.5).float()
    obs, action, next_obs, reward, terminated = rows.split([5, 3, 5, 1, 1], dim=1)
    return Batch(obs, action, next_obs, reward.squeeze(1), terminated.squeeze(1))


def update(agents, batch, step, policy_frequency=2, project=0):
    """One step of the training loop; returns what each agent computes on the way. Noise is the same for every dtype."""
    results = []
    for agent in agents:
        dtype = agent.actor.action_low.dtype
        torch.manual_seed(step)
        draw, noise = torch.randn_like, torch.randn(batch.action.shape)
        torch.manual_seed(step)
        torch.randn_like = lambda x, noise=noise, draw=draw: noise.to(x.dtype) if x.dtype == torch.float64 else draw(x)
        try:
            parts = Batch(*(part.to(dtype) for part in batch))
            results.append(list(agent.update_critics(parts)))
        finally:
            torch.randn_like = draw
        if step % policy_frequency == 0:
            agent.update_actor(parts.obs)
            agent.update_targets()
            results[-1].append(agent.actor_loss)
        if project and step % project == 0:
            results[-1].append(torch.tensor(list(agent.project().values())))
    return results


@needs_kernels
@pytest.mark.parametrize("dense_layers", DENSE_LAYERS)
@pytest.mark.parametrize("batch_size", [1, 40, 128, 300, 1000])
def test_values_and_gradients_of_an_update_match_float64(dense_layers, batch_size):
    """Critics, targets included, and actor. After its first step, Adam's average is a tenth of the gradient."""
    agents = native, exact = make_agents(NATIVE, EXACT, dense_layers=dense_layers, policy_noise=1.0)
    assert isinstance(native.actor.net, NMSequential)
    batch = random_batch(torch.Generator().manual_seed(0), batch_size)
    ours, theirs = update(agents, batch, 1)
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, "values")
    for name in ("qf1", "qf2"):
        for p, q in zip(*(agent.networks[name].parameters() for agent in agents), strict=True):
            close(native.q_optimizer.state[p]["exp_avg"] * 10, q.grad, name, floor=1e-3)
            q.data.copy_(p.data)  # Adam's first step is a sign: it may differ where a gradient is zero
    for agent in agents:
        agent.update_actor(batch.obs.to(agent.actor.action_low.dtype))
    close(native.actor_loss, exact.actor_loss, "actor loss")
    for p, q in zip(*(agent.actor.parameters() for agent in agents), strict=True):
        close(native.actor_optimizer.state[p]["exp_avg"] * 10, q.grad, "actor", floor=1e-3)


@needs_kernels
@pytest.mark.parametrize(
    "target_mask, dense_layers, sizes, n, m, critic_m",
    [
        ("own", "none", (37, 24), 1, 4, 0),
        ("online", "none", (37, 24), 2, 4, 0),
        ("online", "first,last", (64, 70), 1, 8, 0),
        ("own", "last", (33,), 3, 7, 0),
        ("own", "last", (64, 70), 1, 8, 4),
    ],
)
def test_300_updates_are_as_near_to_float64_as_those_of_the_reference(target_mask, dense_layers, sizes, n, m, critic_m):
    options = {"n": n, "m": m, "hidden_sizes": sizes, "dense_layers": dense_layers, "target_mask": target_mask}
    options["critic_m"] = critic_m
    agents = make_agents(NATIVE, MASKED, EXACT, **options, tau=0.05, policy_noise=1.0)
    generator, sad = torch.Generator().manual_seed(0), 0
    for step in range(1, 301):
        results = update(agents, random_batch(generator, 50), step, project=25)
        sad += int(results[0][-1].sum()) if step % 25 == 0 else 0
    assert sad > 100  # else the projections were not tested
    errors = {}
    for name, networks in {name: [agent.networks[name] for agent in agents] for name in agents[0].networks}.items():
        for i, layers in enumerate(zip(*(network.net[::2] for network in networks), strict=True)):
            whole = [layer.sync() if hasattr(layer, "master") else layer.weight for layer in layers]
            native, masked = ((w.double() - whole[2]).norm() / whole[2].norm() for w in whole[:2])
            errors[f"{name} {i}"] = native.item(), masked.item()
    for native, masked in errors.values():
        assert native < 3 * masked + 1e-6, errors


@needs_kernels
def test_saturated_actions_match_float64():
    agents = make_agents(NATIVE, EXACT, policy_noise=0.0)
    for agent in agents:
        for name in ("actor", "actor_target"):
            bias = agent.networks[name].net[-1].bias.data
            bias[:2] = torch.tensor([60.0, -1e4], dtype=bias.dtype)
    for got, want in zip(*update(agents, random_batch(torch.Generator().manual_seed(0), 200), 2), strict=True):
        close(got, want, "values")


@needs_kernels
@pytest.mark.parametrize("name", ["qf1_target", "qf2_target"])
def test_nan_of_one_target_reaches_the_bellman_target(name):
    (agent,) = make_agents(NATIVE)
    agent.networks[name].net[-1].bias.data.fill_(torch.nan)
    *_, target = agent.update_critics(random_batch(torch.Generator().manual_seed(0), 8))
    assert target.isnan().all()


@needs_kernels
@pytest.mark.parametrize("dense_layers", ["none", "first,last"])
def test_fused_updates_equal_those_with_autograd(dense_layers):
    """The same kernels and random numbers with and without autograd, over updates of critics, actor and targets."""
    agents = make_agents(AUTOGRAD, NATIVE, dense_layers=dense_layers, policy_noise=1.0, tau=0.3, learning_rate=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 21):
        batch = random_batch(generator, 40)
        results = update(agents, batch, step, policy_frequency=1, project=7)
        for agent, result in zip(agents, results, strict=True):
            torch.manual_seed(step)
            obs = batch.obs[0].numpy()
            act = NativeActor.act if agent is agents[1] else Actor.act  # both have native layers
            result += [torch.from_numpy(act(agent.actor, obs, noise)) for noise in (0, 3)]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for agent in agents:
        for layer in agent.nm_layers.values():
            layer.sync()
    plain, fused = agents
    for name, network in plain.networks.items():
        for key, value in fused.networks[name].state_dict().items():
            torch.testing.assert_close(value, network.state_dict()[key], rtol=1e-3, atol=1e-4)
    assert (fused.actor.act(obs, 100.0) == [LOW, HIGH]).any(0).all()


@needs_kernels
def test_steps_of_adam_match_pytorchs():
    """The gradients come from autograd through the same kernels; what the optimizer holds is as PyTorch makes it."""
    agents = make_agents(AUTOGRAD, NATIVE, learning_rate=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 11):
        update(agents, random_batch(generator, 64), step, policy_frequency=1)
        for plain, fused in zip(*((agent.q_optimizer, agent.actor_optimizer) for agent in agents), strict=True):
            theirs, ours = plain.state_dict(), fused.state_dict()
            torch.testing.assert_close(ours["state"], theirs["state"], rtol=2e-3, atol=1e-6)
            assert ours["param_groups"] == theirs["param_groups"]
            fused.load_state_dict(copy.deepcopy(theirs))
        for name, network in agents[0].networks.items():
            torch.testing.assert_close(
                [*agents[1].networks[name].parameters()], [*network.parameters()], rtol=1e-3, atol=1e-4
            )
            agents[1].networks[name].load_state_dict(network.state_dict())


@needs_kernels
@pytest.mark.parametrize("dense_layers", ["none", "first,last"])
def test_updates_are_the_same_bits_with_any_number_of_threads_and_again(dense_layers):
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        (agent,) = make_agents(NATIVE, dense_layers=dense_layers, hidden_sizes=(70, 200))
        generator = torch.Generator().manual_seed(0)
        outputs = [update([agent], random_batch(generator, 300), step, project=5)[0] for step in range(1, 13)]
        states = [network.state_dict() for network in agent.networks.values()]
        optimizers = [optimizer.state_dict()["state"] for optimizer in (agent.q_optimizer, agent.actor_optimizer)]
        results.append((outputs, states, optimizers))
    torch.set_num_threads(1)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_kernels
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 70), m=st.integers(1, 20), share=st.floats(0.01, 1),
    levels=st.sampled_from([2, 5, 10**6]), seed=st.integers(0, 10**6), follow=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_projection_matches_the_reference(rows, columns, m, share, levels, seed, follow):
    """Masks, weights, Adam's moments and SAD to the bit; few levels make many ties."""
    n, generator = max(1, round(share * m)), torch.Generator().manual_seed(seed)

    def numbers(*size):
        return (torch.rand(size, generator=generator) * levels).round() / levels - 0.5

    linear = nn.Linear(columns, rows)
    linear.weight.data = numbers(rows, columns)
    layers = [BACKENDS[backend].from_linear(linear, n, m) for backend in ("native", "masked")]
    optimizers = [torch.optim.Adam([layer.values], lr=0.1) for layer in layers]
    for _ in range(3):
        gradient = numbers(*layers[0].values.shape)
        index = NMLinear(columns, rows, n=n, m=m).index if follow else None
        changes = []
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer.values.grad = gradient.clone()
            optimizer.step()
            changes.append(layer.project(optimizer, index))
        assert changes[0] == changes[1]
        for key, value in layers[1].state_dict().items():
            assert torch.equal(layers[0].state_dict()[key], value), key
        for key in ("exp_avg", "exp_avg_sq"):
            states = [optimizer.state[layer.values] for layer, optimizer in zip(layers, optimizers, strict=True)]
            moments = [
                state[f"{key}_master"].scatter(1, layer.index, state[key])
                for layer, state in zip(layers, states, strict=True)
            ]
            assert torch.equal(*moments)
        assert torch.equal(layers[0].layout, torch.ops.rnm_td3.layout(layers[0].index, columns))


@needs_kernels
def test_projection_to_an_index_that_lies_elsewhere_or_is_none():
    index = torch.tensor([[0, 5], [2, 4], [1, 7]])
    layer = NativeLinear(8, 3, n=1, m=4)
    layer.project(index=index.t().contiguous().t())
    assert torch.equal(layer.index, index)
    for wrong in ([0, 8], [5, 0], [3, 3], [0, 10**9], [-1, 5]):
        with pytest.raises(RuntimeError, match="columns of a row have to ascend and to lie in its matrix"):
            layer.project(index=torch.tensor([[0, 5], wrong, [1, 7]]))
    assert torch.equal(layer.index, index)


@needs_kernels
def test_groups_longer_than_any_number_the_kernels_know():
    layers = [BACKENDS[backend].from_linear(nn.Linear(6, 5), 10**30 - 1, 10**30) for backend in ("native", "masked")]
    assert [layer.project() for layer in layers] == [0, 0] and layers[0].values.shape == (5, 6)


@needs_kernels
def test_second_derivatives_are_refused():
    """They would be zero without a word."""
    layer, x = NativeLinear(16, 8, n=1, m=4), torch.randn(3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; take masked"):
        first.pow(2).sum().backward()


@needs_kernels
@pytest.mark.parametrize("backend", ["native", "masked"])
def test_projection_with_an_optimizer_that_has_made_no_step_of_the_layer(backend):
    layers = [BACKENDS[backend](16, 8, n=1, m=4) for _ in range(2)]
    optimizer = torch.optim.Adam([layer.values for layer in layers])
    layers[0].values.grad = torch.ones_like(layers[0].values)
    optimizer.step()
    for layer in layers:
        layer.values.data *= 0.01
        assert layer.project(optimizer) > 0 and torch.equal(layer.values, layer.master.gather(1, layer.index))


@needs_kernels
def test_projection_takes_nan_for_the_largest_as_the_reference_does():
    linear = nn.Linear(32, 1)
    for backend in ("native", "masked"):
        layer = BACKENDS[backend].from_linear(linear, 1, 4)
        layer.master[0, 7], layer.master[0, 9], layer.master[0, 8] = torch.nan, torch.inf, -torch.inf
        layer.values.data[:] = 0
        layer.index[0, 1:3] = torch.tensor([4, 11])
        if backend == "native":
            layer.index_changed()
        layer.project()
        assert layer.index[0, 1:3].tolist() == [7, 8]


def polyak(online, target, tau):
    lists = [f([layer]) for layer in (online, target) for f in (native_tensors, lambda layers: [layers[0].master])]
    torch.ops.rnm_td3.polyak(*lists, tau)


@needs_kernels
@pytest.mark.parametrize("sizes", [[5, 3], [17, 256], [300, 70]])
@pytest.mark.parametrize("same_masks", [False, True])
def test_polyak_matches_the_reference(sizes, same_masks):
    pairs = []
    for backend in ("native", "masked"):
        online, target = (network(sizes, 1, 4, seed=seed, backend=backend)[0] for seed in (1, 2))
        if same_masks:  # of all rows but one
            target.project(index=torch.cat([target.index[:1], online.index[1:]]))
        for layer in (online, target):  # not what the masters hold
            layer.values.data += 0.1
        for _ in range(3):
            polyak(online, target, 0.3) if backend == "native" else target.polyak_(online, 0.3)
            online.values.data += 0.1
        pairs.append((online, target))
    for native, masked in zip(*pairs, strict=True):
        for layer in (native, masked):
            layer.sync()
        for name, tensor in masked.state_dict().items():
            torch.testing.assert_close(native.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@needs_kernels
def test_a_network_that_was_cut_or_grown_runs_as_it_reads():
    net = network([10, 12, 5], 2, 4, backend="native")
    x = torch.randn(3, 10)
    hidden, tanh = net[:2](x), copy.deepcopy(net).append(nn.Tanh())(x)
    torch.testing.assert_close(hidden, torch.relu(net[0](x)))
    torch.testing.assert_close(tanh, torch.tanh(net(x)))
    torch.testing.assert_close(net[1:](hidden), net(x))


@needs_kernels
def test_weights_changed_before_the_backward_pass_are_seen():
    online, target = (NativeLinear(12, 5, bias=False, n=1, m=4) for _ in range(2))
    y = target(torch.randn(3, 12, requires_grad=True))
    polyak(online, target, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_kernels
def test_transposed_weights_of_a_dense_layer():
    linear = nn.Linear(8, 12)
    linear.weight = nn.Parameter(torch.randn(8, 12).t())
    layers = [[BACKENDS[backend].from_linear(linear, 1, 4) for _ in range(2)] for backend in ("native", "masked")]
    for online, _ in layers:
        online.values.data += 1
    polyak(*layers[0], 0.3)
    layers[1][1].polyak_(layers[1][0], 0.3)
    torch.testing.assert_close(layers[0][1].sync(), layers[1][1].sync())


@needs_kernels
def test_what_does_not_fit_is_refused():
    layer = NativeLinear(12, 5, n=1, m=4)
    with pytest.raises(RuntimeError, match="do not fit"):
        layer(torch.randn(3, 16))
    with pytest.raises(RuntimeError, match="Float"):
        layer.double()(torch.randn(3, 12).double())
    for wrong in (-1, 0, 12, 40, 128, 300, 2**40):
        with pytest.raises(RuntimeError, match="columns of a row have to ascend and to lie in its matrix"):
            torch.ops.rnm_td3.layout(torch.tensor([[0, 3], [0, wrong]]), 12)
    for other in (NativeLinear(4096, 2048, n=1, m=4), NativeLinear(12, 5, n=2, m=4)):
        with pytest.raises(RuntimeError, match=r"differ in shape|do not fit"):
            polyak(other, NativeLinear(12, 5, n=1, m=4), 0.5)
    with pytest.raises(RuntimeError, match="65536"):
        torch.ops.rnm_td3.layout(torch.zeros(65537, 1, dtype=torch.int64), 12)
    tensors = [tensor.detach() for tensor in (layer.values.float(), layer.bias.float(), layer.layout)]
    y, tape = torch.ops.rnm_td3.mlp(torch.randn(3, 12), tensors)
    with pytest.raises(RuntimeError, match="tape is of another batch"):
        torch.ops.rnm_td3.mlp_backward(y, torch.randn(3, 12), tape[:10], tensors, True, True)
    (agent,) = make_agents(NATIVE)
    batch = random_batch(torch.Generator().manual_seed(0), 8)
    with pytest.raises(RuntimeError, match="batch empty, of different lengths"):
        agent.update_critics(batch._replace(reward=batch.reward[:7]))
    with pytest.raises(RuntimeError, match="do not belong together"):
        agent.update_critics(batch._replace(next_obs=batch.next_obs[:, :4]))
    for name in ("reward", "terminated"):
        with pytest.raises(RuntimeError, match="do not belong together"):
            agent.update_critics(batch._replace(**{name: torch.zeros(8, 2)}))
    (two_values,) = make_agents(NATIVE)
    for name in ("qf1", "qf2", "qf1_target", "qf2_target"):
        network = QNetwork(batch.obs.shape[1], batch.action.shape[1], (32,))
        network.net[-1] = torch.nn.Linear(32, 2)
        two_values.networks[name] = sparsify(network, 1, 4, backend="native")
    two_values.qf1, two_values.qf2 = two_values.networks["qf1"], two_values.networks["qf2"]
    two_values.q_optimizer = torch.optim.Adam([*two_values.qf1.parameters(), *two_values.qf2.parameters()])
    with pytest.raises(RuntimeError, match="do not belong together"):
        two_values.update_critics(batch)
    with pytest.raises(RuntimeError, match="do not belong together"):
        two_values.update_actor(batch.obs)
    agent.qf2 = agent.networks["qf2"] = make_agents(NATIVE, hidden_sizes=(37, 25))[0].qf2
    with pytest.raises(RuntimeError, match="do not belong together"):
        agent.update_critics(batch)


@needs_kernels
def test_layers_beyond_the_kernels_are_masked(capsys):
    cpu = torch.device("cpu")
    for sizes in ((17, 65536), (65536, 17), (20000, 50000)):
        assert choose_backend("auto", 1, 4, cpu, sizes) == "native"
    assert [choose_backend("auto", n, 4, cpu) for n in (1, 2, 3, 4)] == ["native", "native", "masked", "masked"]
    assert capsys.readouterr().err == ""
    for sizes in ((17, 65537), (65537, 17), (17, 65536, 65536)):
        assert choose_backend("auto", 1, 4, cpu, sizes) == "masked"
        message = "--backend masked: the CPU kernels are for layers of up to 65536 neurons and 2^28 active weights\n"
        assert capsys.readouterr().err == message
        with pytest.raises(UsageError, match="--backend native: the CPU kernels are for layers of up to 65536 neurons"):
            choose_backend("native", 1, 4, cpu, sizes)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


LANES = [["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], ["-mavx2", "-mfma"], []]


@needs_compiler
@pytest.mark.parametrize("flags", [LANES[0], *(pytest.param(flags, marks=pytest.mark.slow) for flags in LANES[1:])])
def test_the_kernels_compile_without_a_warning(flags):
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = ["g++", "-std=c++20", "-fopenmp", *flags, *includes, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += [SCRIPT.with_name("nm_kernels.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_script_alone_trains_and_says_what_is_missing():
    script = Path(shutil.copy(SCRIPT, "."))
    command = [sys.executable, script, "--env-id", "Pendulum-v1", "--total-timesteps", "20", "--learning-starts", "10"]
    command += ["--batch-size", "4", "--eval-interval", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "step 20/20" in result.stdout
    (line,) = (line for line in result.stderr.splitlines() if "kernels" in line)
    missing = Path("nm_kernels.cpp").resolve()
    assert line == f"--backend masked: {missing} is missing, whose kernels make training on a CPU several times as fast"
    result = subprocess.run([*command, "--backend", "native"], capture_output=True, text=True)
    assert result.returncode == 2 and f"error: --backend native: {missing} is missing" in result.stderr


def run(backend, **environment):
    command = [sys.executable, SCRIPT, "--env-id", "Pendulum-v1", "--total-timesteps", "20", "--learning-starts", "10"]
    command += ["--batch-size", "4", "--hidden-sizes", "8", "--eval-interval", "0", "--backend", backend]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


FOLDER = "set TORCH_EXTENSIONS_DIR to a folder that can be written, instead of"


@pytest.mark.parametrize(
    "backend, environment, advice",
    [
        ("auto", {"CXX": "/no/compiler"}, "install g++ 11 or later"),
        ("native", {"PATH": "/no"}, "install g++ 11 or later"),
        ("auto", {"TORCH_EXTENSIONS_DIR": "/proc/no"}, FOLDER),
    ],
)
def test_without_kernels_auto_goes_on_and_native_stops(backend, environment, advice, tmp_path):
    result = run(backend, **{"TORCH_EXTENSIONS_DIR": str(tmp_path / "empty"), **environment})
    (line,) = (line for line in result.stderr.splitlines() if "no CPU kernels" in line)
    beginning = "--backend masked" if backend == "auto" else "error: --backend native"
    assert line.startswith(f"{beginning}: no CPU kernels, {advice}") and "Traceback" not in result.stderr
    assert (result.returncode, Path("runs").exists()) == ((0, True) if backend == "auto" else (2, False))


@pytest.mark.slow
@needs_kernels
def test_a_damaged_library_is_not_taken_for_a_whole_one(tmp_path):
    """Neither what a killed compile leaves in a folder of its own, nor what stands under the library's name."""
    (tmp_path / "rnm_td3_killed").mkdir()
    (tmp_path / "rnm_td3_killed" / "rnm_td3.so").write_bytes(b"half")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for damage in (lambda whole: whole[: len(whole) // 2], lambda whole: whole[:5000] + b"?" + whole[5001:], None):
        broken = run("auto", TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/no/compiler")
        assert broken.returncode == 0 and "compiling" in broken.stderr and "masked" in broken.stderr
        library = Path(re.search(r"(/\S+\.so)\)", broken.stderr).group(1))
        whole = (root / library.name).read_bytes()
        library.write_bytes(damage(whole) if damage else whole)
    whole = run("native", TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/no/compiler")
    assert whole.returncode == 0 and "compiling" not in whole.stderr


@pytest.mark.slow
@needs_kernels
def test_generic_build_without_avx(tmp_path):
    """The same source for four lanes and no fused multiply-add: this file's tests, in a process that has no AVX."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    result = subprocess.run(command, cwd=SCRIPT.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout
