"""The whole update against an independent float64 implementation: NumPy, dense matrices, masks, Adam by hand."""

from itertools import combinations

import numpy as np
import pytest
import torch

from rnm_td3_continuous import TD3, Args, Batch

OBS, LOW, HIGH = 5, np.array([-1.0, 0.0, -3.0]), np.array([1.0, 0.5, 1.0])


def brute_force_mask(w, n, m):
    """In every group, the subset with the largest magnitudes; the lexicographically first of equal ones."""
    mask = np.zeros(w.shape, dtype=bool)
    for row, line in enumerate(np.abs(w)):
        for start in range(0, w.shape[1], m):
            group = range(start, min(start + m, w.shape[1]))
            best = max(combinations(group, min(n, len(group))), key=lambda columns: sorted(line[list(columns)]))
            mask[row, list(best)] = True
    return mask


class Net:
    """MLP on dense weights w with masks e; Adam's moments of inactive entries are frozen."""

    def __init__(self, sequential, n, m, dense):
        linears = [layer.to_linear() if hasattr(layer, "master") else layer for layer in sequential[::2]]
        masters = [getattr(layer, "master", getattr(layer, "weight", None)) for layer in sequential[::2]]
        self.w = [master.detach().numpy().copy() for master in masters]
        self.b = [linear.bias.detach().numpy().copy() for linear in linears]
        self.n, self.m, self.dense = n, m, dense
        self.project()
        self.moments = [[np.zeros_like(p), np.zeros_like(p)] for p in self.w + self.b]
        self.t = 0

    def copy(self):
        twin = object.__new__(Net)
        twin.__dict__ = {**self.__dict__, "w": [w.copy() for w in self.w], "b": [b.copy() for b in self.b]}
        return twin

    def project(self):
        last = len(self.w) - 1
        keep = {"none": [], "first": [0], "last": [last], "first,last": [0, last]}[self.dense]
        self.e = [
            np.ones(w.shape, bool) if i in keep else brute_force_mask(w, self.n, self.m) for i, w in enumerate(self.w)
        ]

    def forward(self, x):
        self.inputs = [x]
        for i, (w, e, b) in enumerate(zip(self.w, self.e, self.b, strict=True)):
            x = x @ (w * e).T + b
            if i < len(self.w) - 1:
                x = np.maximum(x, 0)
                self.inputs.append(x)
        return x

    def backward(self, g):
        dw, db = [None] * len(self.w), [None] * len(self.w)
        for i in reversed(range(len(self.w))):
            dw[i], db[i] = (g.T @ self.inputs[i]) * self.e[i], g.sum(0)
            g = g @ (self.w[i] * self.e[i])
            if i > 0:
                g = g * (self.inputs[i] > 0)
        self.grad = dw + db
        return g

    def adam(self, lr, b1=0.9, b2=0.999, eps=1e-8):
        self.t += 1
        masks = self.e + [np.ones(b.shape, bool) for b in self.b]
        for p, g, (m, v), e in zip(self.w + self.b, self.grad, self.moments, masks, strict=True):
            m[e] = b1 * m[e] + (1 - b1) * g[e]
            v[e] = b2 * v[e] + (1 - b2) * g[e] ** 2
            step = lr * (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + eps)
            p[e] -= step[e]

    def follow(self, online, tau):
        for mine, theirs in zip(self.w + self.b, online.w + online.b, strict=True):
            mine[...] = tau * theirs + (1 - tau) * mine


class Reference:
    def __init__(self, agent, args):
        self.args = args
        make = lambda network, m: Net(network.net, args.n, m, args.dense_layers)  # noqa: E731
        m = args.critic_m or args.m
        self.actor, self.qf1, self.qf2 = make(agent.actor, args.m), make(agent.qf1, m), make(agent.qf2, m)
        self.actor_target, self.qf1_target, self.qf2_target = self.actor.copy(), self.qf1.copy(), self.qf2.copy()

    def policy(self, net, obs):
        return np.tanh(net.forward(obs)) * (HIGH - LOW) / 2 + (HIGH + LOW) / 2

    def update(self, count, batch, noise):
        a = self.args
        obs, action, next_obs, reward, terminated = batch
        noise = np.clip(noise * a.policy_noise, -a.noise_clip, a.noise_clip) * (HIGH - LOW) / 2
        next_action = np.clip(self.policy(self.actor_target, next_obs) + noise, LOW, HIGH)
        next_input = np.concatenate([next_obs, next_action], 1)
        next_q = np.minimum(self.qf1_target.forward(next_input), self.qf2_target.forward(next_input))[:, 0]
        target = reward + (1 - terminated) * a.gamma * next_q
        for qf in (self.qf1, self.qf2):
            q = qf.forward(np.concatenate([obs, action], 1))[:, 0]
            qf.backward((2 * (q - target) / len(q))[:, None])
            qf.adam(a.learning_rate)
        if count % a.policy_frequency == 0:
            act = self.policy(self.actor, obs)
            self.qf1.forward(np.concatenate([obs, act], 1))
            grad_action = self.qf1.backward(np.full((len(obs), 1), -1 / len(obs)))[:, OBS:]
            squashed = (act - (HIGH + LOW) / 2) / ((HIGH - LOW) / 2)
            self.actor.backward(grad_action * (HIGH - LOW) / 2 * (1 - squashed**2))
            self.actor.adam(a.learning_rate)
            for name in ("actor", "qf1", "qf2"):
                getattr(self, name + "_target").follow(getattr(self, name), a.tau)
        if count % a.mask_update_interval == 0:
            for name in ("actor", "qf1", "qf2"):
                online, target = getattr(self, name), getattr(self, name + "_target")
                online.project()
                if a.target_mask == "own":
                    target.project()
                else:
                    target.e = online.e


def make_agent(**changes):
    noise = {"policy_noise": 1.0, "noise_clip": 1.5}  # both the noise and the next action meet their bounds
    args = Args(hidden_sizes=(16, 12), learning_rate=1e-2, tau=0.1, mask_update_interval=3, **noise, **changes)
    torch.manual_seed(0)
    return TD3(OBS, LOW, HIGH, args, torch.device("cpu")), args


def random_batch(rng, size=32):
    obs, next_obs = rng.normal(size=(2, size, OBS))
    action = rng.uniform(LOW, HIGH, size=(size, 3))
    return obs, action, next_obs, rng.normal(size=size), rng.integers(0, 2, size=size).astype(float)


def relative_error(ours, reference):
    return np.abs(ours - reference).max() / np.abs(reference).max()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dense_layers", ["none", "last", "first,last"])
@pytest.mark.parametrize("target_mask", ["own", "online"])
@pytest.mark.parametrize(
    "n, m, init, critic_m", [(2, 4, "linear", 0), (1, 4, "variance", 0), (3, 5, "variance", 0), (1, 8, "variance", 3)]
)
def test_update_equals_reference(float64, n, m, init, critic_m, target_mask, dense_layers):
    options = {"target_mask": target_mask, "dense_layers": dense_layers, "critic_m": critic_m}
    agent, args = make_agent(n=n, m=m, init=init, **options)
    reference, rng, total_sad = Reference(agent, args), np.random.default_rng(1), 0
    for count in range(1, 21):
        batch = random_batch(rng)
        torch.manual_seed(count)
        noise = torch.randn(32, 3).numpy()
        torch.manual_seed(count)
        tensors = Batch(*(torch.from_numpy(part) for part in batch))
        agent.update_critics(tensors)
        if count % args.policy_frequency == 0:
            gradients = [parameter.grad.clone() for parameter in agent.qf1.parameters()]
            agent.update_actor(tensors.obs)
            agent.update_targets()
            assert all(map(torch.equal, gradients, [parameter.grad for parameter in agent.qf1.parameters()]))
        if count % args.mask_update_interval == 0:
            total_sad += sum(agent.project().values())
        reference.update(count, batch, noise)
    assert total_sad > 20  # else the projections were not tested
    for name, network in agent.networks.items():
        ref = getattr(reference, name)
        optimizer = {"actor": agent.actor_optimizer, "qf1": agent.q_optimizer, "qf2": agent.q_optimizer}.get(name)
        for i, layer in enumerate(network.net[::2]):
            sparse = hasattr(layer, "master")
            weight = layer.sync() if sparse else layer.weight.detach()
            assert relative_error(weight.numpy(), ref.w[i]) < 1e-10, (name, i)
            assert relative_error(layer.bias.detach().numpy(), ref.b[i]) < 1e-10, (name, i)
            if sparse:
                assert (layer.mask().numpy() == ref.e[i]).all(), (name, i)
            if sparse and optimizer:
                for key, moment in zip(("exp_avg", "exp_avg_sq"), ref.moments[i], strict=True):
                    active = optimizer.state[layer.values][key]
                    dense = optimizer.state[layer.values][f"{key}_master"].scatter(1, layer.index, active)
                    assert relative_error(dense.numpy(), moment) < 1e-10, (name, i, key)


@pytest.mark.parametrize("target_mask", ["own", "online"])
def test_inactive_entries_are_frozen_between_projections(target_mask):
    """Online: inactive entries of the dense W keep their value to the bit. Targets: the mask stays, what they compute
    with is zero outside of it, and the dense W' follows tau W + (1 - tau) W' to the bit, on inactive entries too."""
    agent, args = make_agent(target_mask=target_mask)
    rng = np.random.default_rng(2)
    layers = agent.nm_layers
    for count in range(1, 13):
        before = {name: (layer.mask(), layer.sync().clone()) for name, layer in layers.items()}
        tensors = Batch(*(torch.from_numpy(part).float() for part in random_batch(rng)))
        agent.update_critics(tensors)
        if count % args.policy_frequency == 0:
            agent.update_actor(tensors.obs)
            agent.update_targets()
        for name, layer in layers.items():
            mask, master = before[name]
            assert torch.equal(layer.mask(), mask)
            assert not layer.sparse_weight()[~mask].any()
            online = layers[name.replace("_target", "")].sync()
            if "_target" not in name:
                assert torch.equal(layer.sync()[~mask], master[~mask])
                moved = not torch.equal(layer.sync()[mask], master[mask])
                assert moved or (name.startswith("actor") and count % args.policy_frequency)
            elif count % args.policy_frequency == 0:
                assert torch.equal(layer.sync(), master.lerp(online, args.tau))
            else:
                assert torch.equal(layer.sync(), master)
        if count % args.mask_update_interval == 0:
            assert sum(agent.project().values()) > 0
