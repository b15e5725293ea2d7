# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "wandb==0.31.0", "pydantic==2.14.4", "filelock==4.2.12", "tensorboard==2.21.0", "moviepy==2.2.1",
#   "ninja==1.13.2",
# ]
# ///
"""RNM-TD3: TD3 whose six networks are N:M sparse from the first step to the last (arXiv 2602.14578).

Part 1, the method: arguments, networks, replay buffer, TD3, training loop. Part 2, the machine room, in the order in
which Part 1 calls it: faster products, arguments, environments, runs (folder, logs, evaluations, checkpoints, signals),
models. Part 2 changes no rule of the method.
"""

from __future__ import annotations  # classes name themselves

import contextlib
import copy
import cProfile
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pstats
import random
import re
import shutil
import signal
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import pydantic
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter

# ==================================================================================== Part 1: the method
# ---------------------------------------------------------------- arguments


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, a part of the run folder's name
    seed: int = 1  # seed of every random generator: same seed, machine and thread count give a bit-identical run
    torch_deterministic: bool = True  # sets `torch.backends.cudnn.deterministic`
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project_name: str = "rnm-td3"  # project on Weights & Biases
    wandb_entity: str | None = None  # team or user on Weights & Biases
    capture_video: bool = False  # record episodes to `videos/` in the run folder (with --evaluate: beside the model)
    save_model: bool = False  # write `model.pt` to the run folder at the end, also after Ctrl-C
    checkpoint_interval: int = 50_000  # environment steps between checkpoints; also at the end and at Ctrl-C (0 = none)
    resume: str | None = None  # run folder: go on from its last checkpoint, with its flags
    evaluate: str | None = None  # path of a `model.pt`: do not train, play --eval-episodes episodes with it

    env_id: str = "Hopper-v4"  # environment with Box observations and bounded, one-dimensional Box actions
    total_timesteps: int = 1_000_000  # length of the run, in environment steps
    learning_rate: float = 3e-4  # Adam's step size, for actor and critics
    buffer_size: int = 1_000_000  # capacity of the replay buffer, in transitions
    gamma: float = 0.99  # discount factor, per environment step
    tau: float = 0.005  # share of the online network in each Polyak update of its target
    batch_size: int = 256  # transitions per update
    policy_noise: float = 0.2  # standard deviation of the target policy's noise, in half action ranges
    exploration_noise: float = 0.1  # standard deviation of the acting policy's noise, in half action ranges
    learning_starts: int = 25_000  # environment steps with random actions and no update, before learning
    policy_frequency: int = 2  # critic updates per update of the actor and the targets
    noise_clip: float = 0.5  # bound of the target policy's noise, in half action ranges
    hidden_sizes: tuple[int, ...] = (256, 256)  # neurons of each hidden layer, of actor and critics
    eval_interval: int = 5_000  # environment steps between evaluations (0 = none); the last step is evaluated too
    eval_episodes: int = 10  # episodes per evaluation, without noise, on an environment of its own
    overlap: bool = False  # step the environment in a thread while learning: for a core that would idle; same results
    profile: bool = False  # print at the end where the time of the training loop went

    n: int = 2  # N: active weights in each group of M
    m: int = 4  # M: consecutive inputs of a neuron that form a group
    critic_m: int = 0  # M of the critics (0 = that of the actor, --m)
    mask_update_interval: int = 1000  # K: critic updates between projections of all networks (0 = masks never change)
    target_mask: Literal["own", "online"] = "own"  # targets' masks: projection of their own weights, or online's masks
    dense_layers: Literal["none", "first", "last", "first,last"] = "last"  # layers of every network that stay dense
    init: Literal["variance", "linear"] = "variance"  # start of N:M layers: of nn.Linear's variance, or as nn.Linear
    backend: Literal["auto", "masked", "native", "semi_structured"] = "auto"  # auto: native on a CPU if 2N <= M
    semi_structured_dtype: Literal["bfloat16", "float16"] = "bfloat16"  # of semi_structured's 2:4 (its 1:2 is float32)
    save_masks: bool = True  # write all masks to `masks.bin` in the run folder, at the start and at every projection


# ---------------------------------------------------------------- N:M projection and layer


def nm_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask E of P_NM(W), W's projection: in every row (neuron), the n largest magnitudes of each m consecutive columns.

    A last group of r < m columns keeps min(n, r). Of equal magnitudes the lowest column wins.
    Args: weight [R, C]; 1 <= n <= m. Returns: bool [R, C]. Raises: ValueError if not 1 <= n <= m.
    """
    if not 1 <= n <= m:
        raise ValueError(f"N:M needs 1 <= N <= M, not {n}:{m}")
    rows, columns = weight.shape
    m = min(m, columns)
    groups = F.pad(weight.abs(), (0, -columns % m)).view(rows, -1, m)  # [R, G, M]
    order = groups.sort(dim=-1, descending=True, stable=True).indices  # stable: the padding loses against any zero
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.view(rows, -1)[:, :columns]


class NMLinear(nn.Module):
    """Drop-in for `nn.Linear` whose weight is row-wise N:M sparse: y = x (E * W)^T + b. Part 2 has faster ones.

    Every row has the same number A of active weights, so the active ones form a dense matrix:
      values  [R, A] parameter: the active weights, all that forward, backward and the optimizer ever see
      index   [R, A] int64: their columns, ascending in each row
      master  [R, C] dense W: its inactive entries (E = 0) get no gradient and stay as they are (a target's follow the
                     online ones); its active entries are stale until `sync` or `project` writes `values` into it
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, n: int, m: int, linear=None):
        """Initialised as `nn.Linear`, on the dense W, or with a copy of `linear`. Raises ValueError for a wrong N:M."""
        super().__init__()
        linear = copy.deepcopy(linear) if linear else nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.n, self.m = in_features, out_features, n, m
        self.register_buffer("master", linear.weight.detach().contiguous())
        self.register_buffer("index", self._projected_index())
        self.values = nn.Parameter(self.master.gather(1, self.index), linear.weight.requires_grad)
        self.bias = linear.bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int, m: int, **options) -> NMLinear:
        """The N:M projection of a dense layer (a copy). Raises ValueError if not 1 <= n <= m."""
        return cls(linear.in_features, linear.out_features, n=n, m=m, linear=linear, **options)

    def to_linear(self) -> nn.Linear:
        """Dense layer that computes the same, with zeros in place of the inactive weights (a copy)."""
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None)
        linear.to(self.values).load_state_dict({**self.state_dict(), "weight": self.sparse_weight()}, strict=False)
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, n={self.n}, m={self.m}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.sparse_weight(), self.bias)  # [B, C] -> [B, R]

    def sparse_weight(self) -> torch.Tensor:
        """W~ = E * W, [R, C]; its gradient reaches the active weights alone."""
        return torch.zeros_like(self.master).scatter(1, self.index, self.values)

    def mask(self) -> torch.Tensor:
        """E, bool [R, C]."""
        return torch.zeros_like(self.master, dtype=torch.bool).scatter_(1, self.index, True)

    def _projected_index(self) -> torch.Tensor:
        return nm_mask(self.master, self.n, self.m).nonzero()[:, 1].reshape(self.out_features, -1).contiguous()

    @torch.no_grad()
    def sync(self) -> torch.Tensor:
        """Write the active weights to the dense master, and return it: W as it stands now, [R, C]."""
        return self.master.scatter_(1, self.index, self.values)

    @torch.no_grad()
    def polyak_(self, online: NMLinear, tau: float) -> None:
        """W' <- tau W + (1 - tau) W' over all entries, active or not; the mask E' stays. b' likewise."""
        torch.gather(self.sync().lerp_(online.sync(), tau), 1, self.index, out=self.values)  # lerp_ writes to W' itself
        if self.bias is not None:
            self.bias.lerp_(online.bias, tau)

    @torch.no_grad()
    def project(self, optimizer: torch.optim.Optimizer | None = None, index: torch.Tensor | None = None) -> int:
        """E <- mask of P_NM(W), or of a given `index` [R, A]: a weight that has shrunk below a frozen one leaves.
        Weights and their moments go through dense masters: what leaves is frozen there, what returns is as it was.
        Returns SAD: how many entries of E changed, two for a swap (Zhou et al. 2021, arXiv 2102.04010).
        """
        old_mask = self.mask()
        pairs = [(self.values, self.master), *self.moments(optimizer)]
        for active, master in pairs:
            master.scatter_(1, self.index, active)
        self.index.copy_(self._projected_index() if index is None else index)
        for active, master in pairs:
            torch.gather(master, 1, self.index, out=active)
        return int((self.mask() != old_mask).sum())

    def moments(self, optimizer: torch.optim.Optimizer | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the optimizer holds for each active weight, [R, A], with a dense master beside each, [R, C]."""
        state, shape = optimizer.state.get(self.values, {}) if optimizer else {}, self.values.shape
        names = [key for key, value in state.items() if getattr(value, "shape", 0) == shape and "_master" not in key]
        return [(state[key], state.setdefault(f"{key}_master", torch.zeros_like(self.master))) for key in names]


def sparsify(network: nn.Module, n: int, m: int, dense_layers="none", backend="masked", init="linear", **options):
    """Replace the nn.Linear layers in a network, before its optimizer is made; the first, last or both may stay dense.

    W stays as it is (`init` linear), or is scaled so that outputs keep the variance that the dense layer's had (Evci et
    al. 2022, arXiv 2010.03533): W <- W sqrt(sum W^2 / sum (E W)^2), inactive entries as well. Raises ValueError.
    """
    if dense_layers not in ("none", "first", "last", "first,last") or init not in ("linear", "variance"):
        raise ValueError(f"dense_layers {dense_layers!r}, init {init!r}: unknown; Args has the names")
    names = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    for name in names[int("first" in dense_layers) : len(names) - int("last" in dense_layers)]:
        linear = copy.deepcopy(network.get_submodule(name))  # another layer may share its weight
        if init == "variance":
            weight = linear.weight.detach()
            weight *= (weight.norm() / (weight * nm_mask(weight, n, m)).norm()).nan_to_num(1.0)  # 0 / 0 where W is 0
        network.set_submodule(name, BACKENDS[backend].from_linear(linear, n, m, **options))  # masked: NMLinear
    return fuse(network)  # native: its layers run as one


# ---------------------------------------------------------------- networks


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them."""
    layers = [layer for i in range(1, len(sizes)) for layer in (nn.Linear(sizes[i - 1], sizes[i]), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """Deterministic policy: observation [B, O] to action [B, A] within low and high, vectors of length A."""

    def __init__(self, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = mlp([obs_dim, *hidden_sizes, len(action_low)])
        low, high = (torch.as_tensor(bound, dtype=torch.get_default_dtype()) for bound in (action_low, action_high))
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        self.register_buffer("action_scale", (high - low) / 2)  # half the range
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(obs)) * self.action_scale + self.action_bias

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """Action [A] for one observation of any shape, with Gaussian noise of `noise` half ranges, clipped."""
        x = torch.as_tensor(obs, dtype=self.action_low.dtype, device=self.action_low.device)
        action = self(x.reshape(1, -1)).squeeze(0)
        if noise > 0:
            action += torch.randn_like(action) * (noise * self.action_scale)
        return action.clamp(self.action_low, self.action_high).cpu().numpy()


class QNetwork(nn.Module):
    """Action value: observation [B, O] and action [B, A] to [B]."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = mlp([obs_dim + action_dim, *hidden_sizes, 1])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, action], dim=1)).squeeze(1)


# ---------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    obs: torch.Tensor  # [B, O]
    action: torch.Tensor  # [B, A]
    next_obs: torch.Tensor  # [B, O] what the step returned, not what a reset after it did
    reward: torch.Tensor  # [B]
    terminated: torch.Tensor  # [B] 1 where the episode ended by itself; a truncated one would have gone on


class ReplayBuffer:
    """The last `capacity` transitions, one packed float32 row each: obs, action, next_obs, reward, terminated."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int):
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self.rows = torch.empty(capacity, sum(self.widths), dtype=torch.float32)  # its pages come with the writes
        self.rows_numpy = self.rows.numpy()  # the same memory: NumPy writes a row in a fraction of the time
        self.capacity, self.size, self.added = capacity, 0, 0  # added: since the run began, overwritten ones too

    def add(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool) -> None:
        np.concatenate((obs, action, next_obs, (reward, terminated)), out=self.rows_numpy[self.added % self.capacity])
        self.added += 1
        self.size = min(self.added, self.capacity)

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Uniform, with replacement."""
        drawn = torch.randint(self.size, (batch_size,))
        batch = self.rows.index_select(0, drawn).to(device)  # in a fifth of the time of self.rows[drawn]
        obs, action, next_obs, reward, terminated = batch.split(self.widths, dim=1)
        return Batch(obs, action, next_obs, reward.squeeze(1), terminated.squeeze(1))


# ---------------------------------------------------------------- TD3


class TD3:
    """Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018)."""

    def __init__(self, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray, args: Args, device: torch.device):
        self.args = args
        self.actor = Actor(obs_dim, action_low, action_high, args.hidden_sizes).to(device)
        self.qf1 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        self.qf2 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        for network in (self.actor, self.qf1, self.qf2):
            m = args.m if network is self.actor else args.critic_m or args.m
            sparsify(network, args.n, m, args.dense_layers, init=args.init, **layer_options(args, device))
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = copy.deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = copy.deepcopy(self.qf2).requires_grad_(False)
        critic_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(critic_parameters, lr=args.learning_rate, fused=True)
        self.actor_loss = torch.tensor(math.nan)  # of the last update
        names = ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target")
        self.networks = {name: getattr(self, name) for name in names}
        modules = nn.ModuleDict(self.networks).named_modules()  # by name, such as `qf1_target.net.2`, online ones first
        self.nm_layers = {name: module for name, module in modules if isinstance(module, NMLinear)}
        self.optimizers = {"actor": self.actor_optimizer, "qf1": self.q_optimizer, "qf2": self.q_optimizer}

    def update_critics(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One gradient step of both critics. Returns their values before it, and their Bellman target, [B] each."""
        args, actor = self.args, self.actor
        noise = (torch.randn_like(batch.action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        noise *= actor.action_scale
        with torch.no_grad():
            next_action = (self.actor_target(batch.next_obs) + noise).clamp(actor.action_low, actor.action_high)
            next_q1, next_q2 = (q(batch.next_obs, next_action) for q in (self.qf1_target, self.qf2_target))
            target_q = batch.reward + (1 - batch.terminated) * args.gamma * torch.min(next_q1, next_q2)  # [B]
        qf1_values, qf2_values = self.qf1(batch.obs, batch.action), self.qf2(batch.obs, batch.action)
        qf_loss = F.mse_loss(qf1_values, target_q) + F.mse_loss(qf2_values, target_q)
        self.q_optimizer.zero_grad()
        qf_loss.backward()
        self.q_optimizer.step()
        return qf1_values.detach(), qf2_values.detach(), target_q

    def update_actor(self, obs: torch.Tensor) -> None:
        """One gradient step of the actor. Leaves the loss before the step in `actor_loss`."""
        actor_loss = -self.qf1(obs, self.actor(obs)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # the critic gets no gradient here
        self.actor_optimizer.step()
        self.actor_loss = actor_loss.detach()

    @torch.no_grad()
    def update_targets(self) -> None:
        """W' <- tau W + (1 - tau) W' of the three targets."""
        for name in ("actor", "qf1", "qf2"):
            online, target = self.networks[name], self.networks[f"{name}_target"]
            for layer, target_layer in zip(online.modules(), target.modules(), strict=True):
                if isinstance(layer, NMLinear):
                    target_layer.polyak_(layer, self.args.tau)
                elif isinstance(layer, nn.Linear):
                    torch._foreach_lerp_(list(target_layer.parameters()), list(layer.parameters()), self.args.tau)

    def project(self) -> dict[str, int]:
        """New masks for every layer of all six networks. Returns the SAD of each layer."""
        sad = {}
        for name, layer in self.nm_layers.items():  # online ones come first
            online = self.nm_layers[name.replace("_target", "")]  # the layer itself, unless it is a target's
            index = online.index if layer is not online and self.args.target_mask == "online" else None
            sad[name] = layer.project(self.optimizers.get(name.split(".")[0]), index)
        return sad


# ---------------------------------------------------------------- training


def train(args: Args) -> tuple[TD3, ReplayBuffer, Path]:
    """One run, from its first step or from its last checkpoint. Returns agent, buffer, run folder.

    Raises: UsageError before any work; FloatingPointError for NaN or infinity; EnvironmentFault; OSError for a full
    disk, say; RuntimeError for want of memory; KeyboardInterrupt or SystemExit after a signal. Checkpoints stay whole.
    """
    check_args(args)
    env = make_env(args.env_id, args.capture_video)
    device = torch.device("cuda" if args.cuda and args.backend != "native" and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    env.action_space.seed(args.seed)

    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    td3 = choose_agent(args, obs_dim, action_dim, device)  # TD3, or a faster subclass; settles args.backend
    agent = td3(obs_dim, env.action_space.low, env.action_space.high, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim)

    with SparseRun(args, agent, buffer, env, device) as run:  # folder, logs, evaluations, checkpoints, signals
        obs = run.start()  # that of the first reset
        for step in run.steps():
            # act: the environment steps when `finish_step` is called, or in a thread until then (--overlap)
            if step <= args.learning_starts:
                action = env.action_space.sample()
            else:
                action = agent.actor.act(obs, args.exploration_noise)
            finish_step = run.step_env(action)

            # learn: one update per environment step, on transitions up to the one before
            update = step - max(args.learning_starts, 1)  # its number; at step 1 the buffer is empty
            if update >= 1:
                batch = buffer.sample(args.batch_size, device)
                values = agent.update_critics(batch)
                if update % args.policy_frequency == 0:
                    agent.update_actor(batch.obs)
                    agent.update_targets()
                if args.mask_update_interval and update % args.mask_update_interval == 0:
                    run.log_projection(update, agent.project())
                run.log_losses(update, *values)

            # store: only termination stops the bootstrap, since an episode that was truncated would have gone on
            next_obs, reward, terminated, truncated, _ = finish_step()
            buffer.add(obs, action, next_obs, reward, terminated)
            run.end_step(reward, terminated or truncated)  # evaluations; checkpoints, where an episode ends if it can
            obs = env.reset()[0] if terminated or truncated else next_obs
    return agent, buffer, run.folder


# ==================================================================================== Part 2: the machine room
# ---------------------------------------------------------------- backends of the N:M layer


class CompiledLinear(NMLinear):
    """NMLinear that keeps what its backend makes of the index: `layout`."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.index_changed()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.index_changed()  # pickled on a machine with other registers, perhaps

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self.index_changed()

    def project(self, optimizer: torch.optim.Optimizer | None = None, index: torch.Tensor | None = None) -> int:
        changed = super().project(optimizer, index)
        self.index_changed()
        return changed


class NativeLinear(CompiledLinear):
    """NMLinear on kernels that skip the zeros: float32, on the CPU."""

    def index_changed(self) -> None:
        if problem := load_kernels():
            raise RuntimeError(problem)
        self.register_buffer("layout", torch.ops.rnm_td3.layout(self.index, self.in_features), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return native_mlp(x, [self])

    def project(self, optimizer: torch.optim.Optimizer | None = None, index: torch.Tensor | None = None) -> int:
        pairs = self.moments(optimizer)
        moments = [active for active, _ in pairs], [master for _, master in pairs]
        tensors, m = (self.values, self.index, self.master, self.layout, *moments), min(self.m, self.in_features)
        return torch.ops.rnm_td3.project.default(*tensors, min(self.n, m), m, index)


class NMSequential(nn.Sequential):
    """Linear layers with ReLU between them, native N:M or dense ones: a single call of the kernels, not one a layer."""

    @staticmethod
    def fits(modules) -> bool:
        """Whether these are such layers, without hooks: a slice, say, of such a network need not be."""
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        kinds = [None if any(map(vars(m).get, hooks)) else type(m) for m in modules]
        layers, between = kinds[::2], kinds[1::2]
        native = NativeLinear in layers and {*layers} <= {NativeLinear, nn.Linear}
        return native and between == [nn.ReLU] * (len(layers) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return native_mlp(x, self.layers()) if self.fits(self._modules.values()) else super().forward(x)

    def layers(self) -> list[nn.Module]:
        return list(self._modules.values())[::2]


class NativeActor(Actor):
    """Acts in a single call of the kernels."""

    def action_range(self) -> list[torch.Tensor]:
        """Low, high, half the range and its middle, each [A], as the kernels take them."""
        return [self._buffers[f"action_{name}"] for name in ("low", "high", "scale", "bias")]

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: float = 0.0) -> np.ndarray:
        x, layers = torch.as_tensor(obs, dtype=torch.float32), native_tensors(self.net.layers())
        return torch.ops.rnm_td3.act.default(x, layers, self.action_range(), noise).numpy()


def fuse(network: nn.Module) -> nn.Module:
    """Let every nn.Sequential of native layers in a network run as one call: the same data, another way to run."""
    for module in network.modules():
        if type(module) is nn.Sequential and NMSequential.fits(module):
            module.__class__ = NMSequential
    if type(network) is Actor and isinstance(network.net, NMSequential):
        network.__class__ = NativeActor
    return network


class NativeTD3(TD3):
    """TD3 in one call of the kernels an update, from the rows of the batch to the step of Adam."""

    @torch.no_grad()
    def update_critics(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        args, names = self.args, ("actor_target", "qf1_target", "qf2_target", "qf1", "qf2")
        tensors = (native_tensors(self.networks[name].net.layers()) for name in names)
        state, noise = adam_state(self.q_optimizer), (args.policy_noise, args.noise_clip)
        operator = torch.ops.rnm_td3.update_critics.default
        return operator(batch, self.actor.action_range(), *tensors, *state, *noise, args.gamma)

    @torch.no_grad()
    def update_actor(self, obs: torch.Tensor) -> None:
        tensors = (native_tensors(network.net.layers()) for network in (self.actor, self.qf1))
        operator, state = torch.ops.rnm_td3.update_actor.default, adam_state(self.actor_optimizer)
        self.actor_loss = operator(obs, self.actor.action_range(), *tensors, *state)

    def update_targets(self) -> None:
        lists = []
        for suffix in ("", "_target"):
            layers = [layer for name in ("actor", "qf1", "qf2") for layer in self.networks[name + suffix].net.layers()]
            masters = (layer._buffers.get("master", layer._parameters.get("weight")) for layer in layers)
            lists += native_tensors(layers), list(masters)
        torch.ops.rnm_td3.polyak.default(*lists, self.args.tau)


def native_tensors(layers: list[nn.Module]) -> list[torch.Tensor]:
    """Values, bias and layout of each layer in turn, as the kernels take them."""
    tensors = []
    for layer in layers:
        parameters, layout = layer._parameters, layer._buffers.get("layout")  # ten times as fast as attributes
        values, bias = parameters["weight" if layout is None else "values"], parameters.get("bias")
        tensors += values, values.new_empty(0) if bias is None else bias
        tensors.append(dense_layout(*values.shape) if layout is None else layout)
    return tensors


@cache
@torch.inference_mode(False)  # what is kept has to serve training as well
def dense_layout(rows: int, columns: int) -> torch.Tensor:
    """Layout of a layer whose weights are all active."""
    return torch.ops.rnm_td3.layout(torch.arange(columns).repeat(rows, 1), columns)


def native_mlp(x: torch.Tensor, layers: list[NativeLinear]) -> torch.Tensor:
    """What `layers` with ReLU between them make of x [..., C], float32, in one call of the kernels."""
    rows, tensors = x.reshape(-1, x.shape[-1]), native_tensors(layers)
    operators = torch.ops.rnm_td3
    y = operators.mlp.default(rows, tensors)[0] if torch.is_grad_enabled() else operators.forward.default(rows, tensors)
    return y.view(*x.shape[:-1], y.shape[-1])


def register_gradients() -> None:
    """Let autograd and torch.compile go through `mlp`."""

    def backward(ctx, grad: torch.Tensor, _) -> tuple:
        x, tape, *layers = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        dx, dw = torch.ops.rnm_td3.mlp_backward.default(grad, x, tape, layers, need_x, any(need_w))
        sizes = [size * any(need_w) for values in layers[::3] for size in (values.numel(), len(values), 0)]
        parts = zip(dw.split(sizes), layers, need_w, strict=True)
        return dx if need_x else None, [part.view_as(tensor) if need else None for part, tensor, need in parts]

    def twice(*_) -> None:
        raise RuntimeError("the native backend has no second derivatives; take masked")

    def keep(ctx, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0], output[1], *inputs[1])

    def shapes(x: torch.Tensor, layers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        width = x.shape[1] + sum(values.shape[0] for values in layers[:-3:3])
        return x.new_empty(x.shape[0], layers[-3].shape[0]), x.new_empty(-(-x.shape[0] // 128) * 128 * width)

    def backward_shapes(grad, x, tape, layers, need_x, need_w) -> tuple[torch.Tensor, torch.Tensor]:
        size = sum(values.numel() + len(values) for values in layers[::3])
        return x.new_empty(x.shape[0] * need_x, x.shape[1]), x.new_empty(size * need_w)

    torch.library.register_autograd("rnm_td3::mlp", backward, setup_context=keep)
    torch.library.register_autograd("rnm_td3::mlp_backward", twice)
    for name, fake in (("forward", lambda *a: shapes(*a)[0]), ("mlp", shapes), ("mlp_backward", backward_shapes)):
        torch.library.register_fake(f"rnm_td3::{name}", fake)


def adam_state(optimizer: torch.optim.Adam) -> tuple[list[torch.Tensor], list[float]]:
    """Parameters, both moments of each, and counts of steps; step size, betas, epsilon: as the kernels take them."""
    group, keys = optimizer.param_groups[0], ("exp_avg", "exp_avg_sq", "step")
    if not optimizer.state:  # as PyTorch makes it at its first step
        for p in group["params"]:
            optimizer.state[p] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(p) for key in keys[:2]}}
    states, options = [optimizer.state[p] for p in group["params"]], [group["lr"], *group["betas"], group["eps"]]
    return [*group["params"], *(state[key] for key in keys for state in states)], options


CUTLASS, CUSPARSELT = torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT


class SemiStructuredLinear(CompiledLinear):
    """NMLinear, 2:4 or 1:2, on PyTorch's semi-structured tensors (CUDA): its forward product, in `product_dtype`.

    CUTLASS serves GPUs of compute capability 8, cuSPARSELt later ones. dX and dW~ are dense products.
    """

    def __init__(self, *sizes, product_dtype: torch.dtype = torch.bfloat16, **options):
        if (options["n"], options["m"]) not in ((2, 4), (1, 2)):
            raise ValueError(f"semi-structured tensors are 2:4 or 1:2, not {options['n']}:{options['m']}")
        self.product_dtype = torch.float32 if options["m"] == 2 else product_dtype
        super().__init__(*sizes, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int, m: int, **options) -> NMLinear:
        """Layers below the kernels' 32 rows are masked, in float32: where Q is 300, bfloat16 knows steps of 2 alone."""
        if linear.out_features < 32:
            return NMLinear.from_linear(linear, n, m)
        return super().from_linear(linear, n, m, **options)

    def _apply(self, *arguments, **options) -> nn.Module:
        super()._apply(*arguments, **options)
        self.index_changed()  # moved to a GPU of another kind, perhaps
        return self

    def index_changed(self) -> None:
        """Compresses the mask: a product then needs no more than the values in their place."""
        compress = torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass
        later = self.values.is_cuda and torch.cuda.get_device_capability(self.values.device) >= (9, 0)
        self.kind = CUSPARSELT if later else CUTLASS  # PyTorch's type of tensor for this layer
        self.padded = (mask := self.pad(self.mask())).shape
        self.packed, layout = (torch._cslt_compress(mask), None) if later else compress(mask)
        self.register_buffer("layout", layout, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = SemiStructuredProduct.apply(x.reshape(-1, self.in_features), self.values, self)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)

    def pad(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` [R, C] padded with zeros to the shape that the product takes."""
        limits = self.kind._DTYPE_SHAPE_CONSTRAINTS[self.product_dtype]
        rows, columns = -self.out_features % limits.sparse_min_rows, -self.in_features % limits.sparse_min_cols
        return F.pad(matrix.to(self.product_dtype), (0, columns, 0, rows))

    def packed_weight(self) -> torch.Tensor:
        """W~ [R, C], padded. Both types begin with the active entries, row by row, as `values` has them."""
        (rows, columns), (r, k) = self.padded, self.values.shape
        self.packed.view(-1)[: rows * columns // 2].view(rows, -1)[:r, :k] = self.values.detach()
        return self.kind(self.padded, self.packed, self.layout, None, None, None)


class SemiStructuredProduct(torch.autograd.Function):
    """y = x W~^T of a SemiStructuredLinear, without its bias."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, values: torch.Tensor, layer: SemiStructuredLinear) -> torch.Tensor:
        weight = layer.packed_weight()
        ctx.layer, ctx.dtype, x = layer, x.dtype, x.to(layer.product_dtype)  # [B, C]
        ctx.save_for_backward(x, values, layer.index)
        y = F.linear(F.pad(x, (0, weight.shape[1] - x.shape[1])) if weight.shape[1] > x.shape[1] else x, weight)
        return y[:, : layer.out_features].to(ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (x, values, index), grad, dx, dw = ctx.saved_tensors, grad.to(ctx.layer.product_dtype), None, None
        if ctx.needs_input_grad[0]:
            weight = torch.zeros_like(ctx.layer.master).scatter_(1, index, values).to(grad.dtype)
            dx = (grad @ weight).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = (grad.t() @ x).gather(1, index).to(values.dtype)
        return dx, dw, None


BACKENDS = {"masked": NMLinear, "native": NativeLinear, "semi_structured": SemiStructuredLinear}


def choose_backend(backend: str, n: int, m: int, device: torch.device, sizes: tuple[int, ...] = (1,)) -> str:
    """What `backend` stands for on this machine, with networks of these `sizes`. Raises UsageError if it cannot be had.

    `auto` is `native` where it was measured to be faster, which is on the CPU from 1:2 on, and where it compiles.
    """
    if backend == "semi_structured":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        if capability < (8, 0):
            raise UsageError("--backend semi_structured needs a GPU of compute capability 8.0 or later; try auto")
        if (n, m) not in ((2, 4), (1, 2)) or (m == 2 and capability >= (9, 0)):
            raise UsageError(f"--backend semi_structured is not for {n}:{m} on this GPU; give --n 2 --m 4, or try auto")
        if capability >= (9, 0) and not torch.backends.cusparselt.is_available():
            raise UsageError("--backend semi_structured needs a torch with cuSPARSELt on this GPU; try auto")
    if backend == "native" and device.type != "cpu":
        raise UsageError("--backend native is for the CPU; try auto")
    wanted = device.type == "cpu" and 2 * n <= m and torch.get_default_dtype() == torch.float32
    if backend == "native" or (backend == "auto" and wanted):
        weights = max(a * b * n // m for a, b in zip(sizes, (*sizes[1:], 1), strict=True))
        limits = "the CPU kernels are for layers of up to 65536 neurons and 2^28 active weights"
        problem = limits if max(sizes) > 65536 or weights > 2**28 else load_kernels()
        if problem is None:
            return "native"
        if backend == "native":
            raise UsageError(f"--backend native: {problem}")
        print(f"--backend masked: {problem}", file=sys.stderr)
    return "masked" if backend == "auto" else backend


def layer_options(args: Args, device: torch.device) -> dict:
    """How `sparsify` makes the layers that the flags ask for. Raises UsageError."""
    backend = choose_backend(args.backend, args.n, min(args.m, args.critic_m or args.m), device)
    dtype = {"product_dtype": getattr(torch, args.semi_structured_dtype)} if backend == "semi_structured" else {}
    return {"backend": backend, **dtype}


def try_products(args: Args, obs_dim: int, action_dim: int, device: torch.device) -> None:
    """One forward product of each shape that a run needs. Raises UsageError where PyTorch lacks a kernel for it."""
    hidden, dtype = args.hidden_sizes, getattr(torch, args.semi_structured_dtype)
    for columns, rows in (*pairwise((obs_dim, *hidden, action_dim)), *pairwise((obs_dim + action_dim, *hidden, 1))):
        linear = nn.utils.skip_init(nn.Linear, columns, rows, device=device)  # draws no random numbers
        layer = SemiStructuredLinear.from_linear(linear, args.n, args.m, product_dtype=dtype)
        try:
            for batch_size in (1, args.batch_size):
                layer(torch.zeros(batch_size, columns, device=device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--backend semi_structured: {columns} x {rows}: {reason}; try auto") from error


def choose_agent(args: Args, obs_dim: int, action_dim: int, device: torch.device) -> type[TD3]:
    """TD3, or NativeTD3 where it can be had. Settles `args.backend`. Raises UsageError."""
    options = args.n, min(args.m, args.critic_m or args.m), device, (obs_dim + action_dim, *args.hidden_sizes)
    try:
        args.backend = choose_backend(args.backend, *options)
        if args.backend == "semi_structured":
            try_products(args, obs_dim, action_dim, device)
    except UsageError as problem:
        if not args.resume:
            raise
        print(f"note: the run to resume had a backend that this machine lacks: {problem}", file=sys.stderr)
        args.backend = choose_backend("auto", *options)
    if args.cuda and torch.cuda.is_available():
        where = "CPU, though there is a GPU" if args.backend == "native" else "GPU; with small networks, try --no-cuda"
        print(f"--backend {args.backend}: on the {where}", file=sys.stderr)
    return NativeTD3 if args.backend == "native" else TD3


@cache
def load_kernels() -> str | None:
    """Register `torch.ops.rnm_td3`, compiled on the first call on a machine. Returns why that failed, or None."""
    from tempfile import TemporaryDirectory  # here, since they take 0.2 s

    from torch.utils import cpp_extension

    source, capability = Path(__file__).with_name("nm_kernels.cpp"), torch.backends.cpu.get_cpu_capability()
    if not source.is_file():
        return f"{source} is missing, whose kernels make training on a CPU several times as fast"
    flags = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-tree-vectorize", "-fno-math-errno", *flags.get(capability, [])]
    key = hashlib.sha256("".join([source.read_text(), *flags, torch.__version__]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library, advice = root / f"rnm_td3_{key}.so", "install g++ 11 or later"
    try:
        data = library.read_bytes() if library.exists() else b""
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:  # a damaged library could take the process down
            torch.ops.load_library(library)
        else:
            print(f"compiling the CPU kernels, once ({capability}, {library})", file=sys.stderr, flush=True)
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix="rnm_td3_", dir=root) as folder:
                options = {"extra_cflags": flags, "extra_ldflags": ["-fopenmp"], "build_directory": folder}
                cpp_extension.load("rnm_td3", str(source), **options, is_python_module=False)
                whole, data = Path(folder, "whole"), Path(folder, "rnm_td3.so").read_bytes()
                replace_file(whole, data + hashlib.sha256(data).digest())
                os.replace(whole, library)  # now that it is whole: other runs may look for it
    except Exception as error:  # no compiler, no ninja, an old one of either, a folder that cannot be written
        if isinstance(error, OSError) and str(root) in str(error):
            advice = f"set TORCH_EXTENSIONS_DIR to a folder that can be written, instead of {root}"
        return f"no CPU kernels, {advice} ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    register_gradients()
    return None


# ---------------------------------------------------------------- errors and arguments


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line: what is wrong and what to do."""


def check_args(args: Args) -> None:
    """Refuse arguments that make no sense, before any work. Raises UsageError."""
    limits = dict.fromkeys(["total_timesteps", "buffer_size", "policy_frequency", "eval_episodes", "m"], (1, math.inf))
    limits |= dict.fromkeys(["policy_noise", "exploration_noise", "noise_clip", "learning_rate"], (0, math.inf))
    limits |= dict.fromkeys(["eval_interval", "checkpoint_interval", "mask_update_interval"], (0, math.inf))
    limits |= {"gamma": (0, 1), "tau": (0, 1), "n": (1, args.m), "critic_m": (args.n * bool(args.critic_m), math.inf)}
    limits |= {"seed": (0, 2**31), "batch_size": (1, args.buffer_size), "learning_starts": (0, args.total_timesteps)}
    reasons = dict(batch_size=" (--buffer-size)", learning_starts=" (--total-timesteps)", n=" (--m)", critic_m=", or 0")
    for name, (low, high) in limits.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not (low <= value <= high and value != math.inf):
            raise UsageError(f"{flag} is {value}; give a number from {low} to {high}{reasons.get(name, '')}")
    if min(args.hidden_sizes, default=0) < 1:
        raise UsageError(f"--hidden-sizes is {args.hidden_sizes}; give one or more sizes of at least 1")
    if args.dense_layers == "first,last" and len(args.hidden_sizes) == 1:
        raise UsageError("--dense-layers first,last leaves nothing sparse; give --hidden-sizes a second layer")
    if args.backend == "semi_structured" and args.critic_m not in (0, args.m):
        raise UsageError("--backend semi_structured is for 2:4 or 1:2 in all networks; drop --critic-m, or try auto")
    if args.overlap and args.capture_video:
        raise UsageError("--overlap steps the environment in a thread, where it cannot be filmed; drop --capture-video")
    if args.resume and args.evaluate:
        raise UsageError("--resume trains, --evaluate does not; give one of them")
    if not args.exp_name or args.exp_name != Path(args.exp_name).name or not args.exp_name.isprintable():
        raise UsageError(f"--exp-name is {args.exp_name!r}; give a plain name without slashes")


@contextlib.contextmanager
def enough_memory(flags: str = "--hidden-sizes, --buffer-size or --batch-size") -> Iterator[None]:
    """Of what is too large, say which flags to lower. Raises UsageError."""
    try:
        yield
    except (MemoryError, RuntimeError, TypeError) as error:
        known = re.search("MemoryError|to allocate|out of memory|overflow|argument .*size", repr(error))
        if not known or hasattr(error, "__notes__"):  # a run that got far needs no other flags
            raise
        raise UsageError(f"no memory for {flags}; lower them: {error!r:.200}") from error


# ---------------------------------------------------------------- environments


class EnvironmentFault(Exception):
    """An environment failed, or returned what must not reach the replay buffer; the message is one line."""


class CheckedEnv(gym.Wrapper):
    """Raises EnvironmentFault where an environment raises, or returns a wrong shape, NaN or infinity.

    It gets copies of actions, clipped in its own type, and gives float32 copies of observations: it may change both.
    """

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        space = self.action_space
        try:
            action = np.minimum(np.maximum(action.astype(space.dtype), space.low), space.high)
            obs, reward, terminated, truncated, info = self.env.step(action)
            reward = float(np.asarray(reward).item())  # an array of one number is one, too
            return self.checked(obs, reward), reward, bool(terminated), bool(truncated), info
        except Exception as error:  # whatever an environment's own code raises
            raise EnvironmentFault(f"the environment failed in step: {error!r}") from error

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        try:
            obs, info = self.env.reset(**options)
            return self.checked(obs), info
        except Exception as error:
            raise EnvironmentFault(f"the environment failed in reset: {error!r}") from error

    def checked(self, obs: np.ndarray, reward: float = 0.0) -> np.ndarray:
        if (obs := np.array(obs, np.float32)).shape != (shape := self.observation_space.shape):  # as in the buffer
            raise ValueError(f"observation of shape {obs.shape} instead of {shape}")
        if not (np.isfinite(obs).all() and math.isfinite(reward)):
            raise ValueError("NaN or infinity in observation or reward")
        return obs


def make_env(env_id: str, capture_video: bool = False) -> gym.Env:
    """Environment with flat Box observations and bounded Box actions. Raises UsageError if it cannot be one."""
    try:
        env = gym.make(env_id, **{"render_mode": "rgb_array"} if capture_video else {})
        if capture_video:  # without a screen or a driver, find out now
            if renderer := getattr(env.unwrapped, "mujoco_renderer", None):  # its own camera (-1) stays behind
                renderer.camera_id = max(renderer.camera_id, min(0, renderer.model.ncam - 1))
            env.reset()
            env.render()
    except Exception as error:  # whatever an environment's own code raises; Gymnasium knows names that are alike
        hint = "; to render without a screen, try MUJOCO_GL=egl" if capture_video else ""
        raise UsageError(f"--env-id {env_id}: cannot be made{hint}: {error!r}") from error
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or 0 in obs.shape:
        raise UsageError(f"--env-id {env_id}: observations are {type(obs).__name__}; TD3 needs a Box that is not empty")
    continuous = isinstance(action, gym.spaces.Box) and action.dtype in (np.float16, np.float32, np.float64)
    if not continuous or len(action.shape) != 1 or 0 in action.shape or not action.is_bounded():
        raise UsageError(f"--env-id {env_id}: actions are {action}; TD3 needs a bounded, one-dimensional Box of floats")
    return CheckedEnv(env if len(obs.shape) == 1 else gym.wrappers.FlattenObservation(env))


def evaluate(policy: Callable[[np.ndarray], np.ndarray], env: gym.Env, episodes: int, seed: int) -> list[float]:
    """Undiscounted return of each episode. The seed fixes the initial states: every evaluation sees the same ones."""
    returns = [0.0] * episodes
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        over = False, False  # terminated, truncated
        while not any(over):
            obs, reward, *over, _ = env.step(policy(obs))
            returns[episode] += reward
    return returns


# ---------------------------------------------------------------- runs


def on_cpu(network: nn.Module) -> nn.Module:
    """Copy on the CPU that computes the same in dense layers, with zeros in place of inactive weights."""
    dense = {id(layer): layer.to_linear() for layer in network.modules() if isinstance(layer, NMLinear)}
    return copy.deepcopy(network, dense).cpu()  # which takes these in place of copies


class Run(contextlib.AbstractContextManager):
    """What surrounds a training loop: run folder, logs, evaluations, checkpoints, signals, overlap, profile.

    A context: leaving it saves what is to be saved, closes everything, and says where the run ended and how to go on.
    """

    def __init__(self, args: Args, agent: TD3, buffer: ReplayBuffer, env: gym.Env, device: torch.device):
        """Takes the run folder for this process alone. Raises UsageError."""
        self.args, self.agent, self.buffer, self.env, self.device = args, agent, buffer, env, device
        versions = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        cpu = re.findall(r"^(?:vendor_id|cpu family|model)\t*: (.*)", info, re.MULTILINE)[:3]
        cpu.append(torch.backends.cpu.get_cpu_capability())  # by these, libraries choose their kernels
        self.config = {**vars(args), "device": name, "cpu": " ".join(cpu), "num_threads": torch.get_num_threads()}
        self.config |= {"versions": versions, "obs_dim": buffer.widths[0], "action_dim": buffer.widths[1]}
        self.eval_env = make_env(args.env_id)
        self.folder, lock = claim_run_folder(args)
        self.writer, self.profile, self.pool = None, cProfile.Profile(), ThreadPoolExecutor(1)
        self.closing = [lock.release, self.eval_env.close, env.close, self.pool.shutdown]  # the last one first
        self.checkpoints, self.checkpointed, self.due_since = Checkpoints(self.folder / "checkpoints"), None, None
        self.step, self.first_step, self.episodic_return, self.episode_steps = 0, 0, 0.0, 0
        self.last_return, self.last_evaluation, self.rows = math.nan, math.nan, Counter()
        self.started = self.clock = self.last_line = time.monotonic()  # the clock stands still in evaluations
        self.signal, self.deadline, self.handlers, self.stopped = 0, math.inf, {}, False

    # ---- the loop

    def start(self) -> np.ndarray:
        """The first observation. Raises UsageError, EnvironmentFault."""
        args = self.args
        if args.profile:
            self.profile.enable()
        if args.resume:
            self.restore()
        if args.capture_video:  # of a resumed run beside those before
            videos = self.folder / "videos" / (f"resumed-{self.step}" if args.resume else "")
            self.env.env = gym.wrappers.RecordVideo(self.env.env, str(videos))
        obs, _ = self.env.reset(seed=None if args.resume else args.seed)
        if args.checkpoint_interval and not isinstance(self.env.unwrapped.np_random, np.random.Generator):
            raise EnvironmentFault("its np_random is no NumPy Generator, to be kept; give --checkpoint-interval 0")
        self.open_logs()
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` set it
                    self.handlers[number] = signal.signal(number, self.receive)
        where = f"{self.folder}, resumed at step {self.step}" if args.resume else self.folder
        print(f"{args.env_id} on {self.device}, {torch.get_num_threads()} threads, run folder {where}", flush=True)
        return obs

    def receive(self, number: int, frame) -> None:
        """Finish the episode, for 10 s at most. A SIGINT after the signal ends the process at once."""
        self.signal, self.deadline = number, time.monotonic() + 10
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGINT else signal.SIG_IGN)  # Slurm may send two
        what = b"episode" if self.args.checkpoint_interval else b"step"
        try:
            os.write(2, b"\nfinishing the " + what + b"; Ctrl-C again ends at once\n")
        except OSError:  # the terminal is closed: nothing is left to say
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def steps(self) -> Iterator[int]:
        while self.step < self.args.total_timesteps and not self.stopped:
            self.step += 1
            yield self.step
        self.writer.flush()  # raises what TensorBoard's thread has met

    def step_env(self, action: np.ndarray) -> Callable[[], tuple]:
        """Returns what makes the step, or, with --overlap, waits for it."""
        self.check_finite("action", action)
        return self.pool.submit(self.env.step, action).result if self.args.overlap else lambda: self.env.step(action)

    def end_step(self, reward: float, done: bool) -> None:
        interval, self.episode_over, signalled = self.args.checkpoint_interval, done, self.signal  # read once
        self.episodic_return, self.episode_steps = self.episodic_return + reward, self.episode_steps + 1
        if done:
            self.write_row("episodes.csv", self.episodic_return, self.episode_steps)
            self.scalars({"charts/episodic_return": self.episodic_return, "charts/episodic_length": self.episode_steps})
            self.last_return, self.episodic_return, self.episode_steps = self.episodic_return, 0.0, 0
        if self.due(self.args.eval_interval):
            self.evaluate()
        if self.due(100):
            self.log_progress()
        if self.due_since is None and interval and (self.due(interval) or signalled):
            self.due_since = self.step
        if self.due_since is not None:  # between two episodes, an environment is no more than its generators
            late = self.step - self.due_since >= interval or time.monotonic() > self.deadline
            if done or late or self.step == self.args.total_timesteps:
                self.checkpoint()
        self.stopped = bool(signalled) and self.due_since is None

    def due(self, interval: int) -> bool:
        return interval > 0 and (self.step % interval == 0 or self.step == self.args.total_timesteps)

    def evaluate(self) -> None:
        start, actor = time.monotonic(), self.agent.actor
        actor = actor if self.device.type == "cpu" else on_cpu(actor)  # single observations keep a GPU waiting
        returns = evaluate(actor.act, self.eval_env, self.args.eval_episodes, self.args.seed + 100)
        seconds = time.monotonic() - start
        self.clock, self.deadline = self.clock + seconds, self.deadline + seconds
        self.last_evaluation, std = float(np.mean(returns)), float(np.std(returns))
        self.write_row("evaluations.csv", *returns, self.last_evaluation, std)
        self.scalars({"eval/episodic_return": self.last_evaluation, "eval/episodic_return_std": std})

    def check_finite(self, name: str, *values: float | np.ndarray) -> None:
        """Raises FloatingPointError with the step, the networks and what to try if a value is not finite."""
        if not all(np.isfinite(value).all() for value in values):
            networks = self.agent.networks.items()
            broken = [key for key, net in networks if not all(p.isfinite().all() for p in net.parameters())]
            advice = "lower --learning-rate, and check the size of rewards and observations; all files are kept"
            raise FloatingPointError(f"step {self.step}: not finite: {name}, networks {broken or 'none yet'}; {advice}")

    # ---- logs

    def open_logs(self) -> None:
        """`config.json`, CSV, TensorBoard, W&B if asked. What was logged after the checkpoint counts no more."""
        args, resume = self.args, bool(self.args.resume)
        if args.track:
            import wandb  # here, since it takes a second

            name = self.folder.resolve().name  # also of `--resume .`
            options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": self.config}
            options |= {"name": name, "id": re.sub(r"[^\w.-]", "_", name), "resume": "allow"}
            try:
                self.closing.append(wandb.init(**options, sync_tensorboard=True, save_code=True).finish)
            except Exception as error:  # no key, no network, a wrong mode
                if not resume:
                    shutil.rmtree(self.folder)
                raise UsageError(f"--track: {error!r}; run `wandb login`, or set WANDB_MODE=offline") from error
        replace_file(self.folder / "config.json", json.dumps(self.config, indent=2).encode())
        returns = ",".join(f"return_{i + 1}" for i in range(args.eval_episodes))
        headers = {"episodes.csv": "step,return,length,seconds", "evaluations.csv": f"step,{returns},mean,std,seconds"}
        for name, header in headers.items():
            path, count = self.folder / name, self.rows[name]
            rows = path.read_text(errors="replace").split("\n")[1:-1][:count] if path.exists() else []
            if len(rows) < count:
                print(f"note: {path} has {len(rows)} of {count} rows; what is missing stays missing", file=sys.stderr)
            self.rows[name] = len(rows)
            replace_file(path, "\n".join([header, *rows, ""]).encode())
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1 if resume else None)
        self.closing.append(self.writer.close)
        if not resume:
            self.writer.add_text("hyperparameters", "\n".join(f"    {k}: {v}" for k, v in self.config.items()))

    def write_row(self, name: str, *values: float) -> None:
        with open(self.folder / name, "a") as file:
            print(self.step, *values, f"{time.monotonic() - self.clock:.3f}", sep=",", file=file)
        self.rows[name] += 1

    def scalars(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.check_finite(name, value)
            self.writer.add_scalar(name, value, self.step)

    def log_losses(self, update: int, qf1_values: torch.Tensor, qf2_values: torch.Tensor, target_q: torch.Tensor):
        """Once in 100 updates, before evaluations and at the end. Raises FloatingPointError if one is not finite."""
        if update % 100 and not self.due(self.args.eval_interval) and self.step < self.args.total_timesteps:
            return
        losses = {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean()}
        losses |= {"qf1_loss": F.mse_loss(qf1_values, target_q), "qf2_loss": F.mse_loss(qf2_values, target_q)}
        losses["qf_loss"] = (losses["qf1_loss"] + losses["qf2_loss"]) / 2
        if update >= self.args.policy_frequency:
            losses["actor_loss"] = self.agent.actor_loss
        losses = {f"losses/{name}": value.item() for name, value in losses.items()}
        self.scalars(losses)
        self.check_finite("actor", *(parameter.detach().cpu().numpy() for parameter in self.agent.actor.parameters()))

    def log_progress(self) -> None:
        """Steps/s of this process. On a terminal one line, written over and over; else a line each minute."""
        now, total, terminal = time.monotonic(), self.args.total_timesteps, sys.stdout.isatty()
        speed = int((self.step - self.first_step) / (now - self.started))
        self.scalars({"charts/SPS": speed})
        if terminal or now - self.last_line >= 60 or self.step == total:
            end, self.last_line = "\033[K\r" if terminal and self.step < total else "\n", now  # \033[K: clears the rest
            returns = f"return {self.last_return:.1f}, evaluation {self.last_evaluation:.1f}"
            with contextlib.suppress(OSError):  # a terminal or a pager that is closed: the logs have it
                print(f"step {self.step}/{total}, {speed} steps/s, {returns}", end=end, flush=True)

    # ---- checkpoints

    def generators(self) -> list[np.random.BitGenerator]:
        """All that an environment is between two episodes."""
        return [owner.np_random.bit_generator for owner in (self.env.unwrapped, self.env.action_space)]

    def checkpoint(self) -> None:
        """All that the next step depends on. Without room, a warning. Raises FloatingPointError for NaN in it."""
        self.due_since, agent = None, self.agent
        if not self.args.checkpoint_interval or not self.buffer.size or self.checkpointed == self.step:
            return
        self.check_finite("checkpoint", *(p.detach().cpu().numpy() for p in nn.ModuleDict(agent.networks).parameters()))
        state = {"config": self.config, "step": self.step, "episode_over": self.episode_over, "rows": dict(self.rows)}
        state |= {"seconds": time.monotonic() - self.clock, "last": [self.last_return, self.last_evaluation]}
        state |= {"networks": {name: network.state_dict() for name, network in agent.networks.items()}}
        state |= {"optimizers": [agent.actor_optimizer.state_dict(), agent.q_optimizer.state_dict()]}
        generators = [generator.state for generator in self.generators()]
        generators += [random.getstate(), np.random.get_state(legacy=False)]  # some environments draw from these
        state |= {"generators": json.dumps(generators, default=np.ndarray.tolist), "torch": torch.get_rng_state()}
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        state |= {"actor_loss": agent.actor_loss, "cuda": cuda}
        try:
            self.writer.flush()  # what was logged until now is there when a run is resumed
            self.checkpoints.write(self.step, state, self.buffer)
            self.checkpointed = self.step
        except OSError as error:
            print(f"warning: no checkpoint at step {self.step}, the one before is kept: {error}", file=sys.stderr)

    def restore(self) -> None:
        """All as it was at the newest whole checkpoint; the environment is to be reset next. Raises UsageError."""
        for path in self.checkpoints.newest_first():
            try:
                return self.load(self.checkpoints.read(path, self.buffer))
            except UsageError:
                raise
            except Exception as error:  # damaged or foreign: zip, torch and files each have errors of their own
                print(f"note: checkpoint {path} is refused: {' '.join(str(error).split())}", file=sys.stderr)
        raise UsageError(f"--resume {self.folder}: no whole checkpoint in it")

    def load(self, state: dict) -> None:
        """Raises UsageError for a flag that would change the result, one of several errors for what does not fit."""
        agent, step, total, config = self.agent, int(state["step"]), self.args.total_timesteps, state["config"]
        common = config.keys() & self.config.keys() - HARMLESS  # a flag that is new since then has its default
        for name in sorted(name for name in common if self.config[name] != config[name]):
            difference = f"{name} is {self.config[name]}, {config[name]} in the run to resume"
            if name in Args.__dataclass_fields__.keys() - OF_THE_MACHINE:
                raise UsageError(f"--resume: {difference}, which it keeps; drop it, or start a new run")
            print(f"note: {difference}; the last bits of the results may differ", file=sys.stderr)
        if step > total:
            raise UsageError(f"--total-timesteps is {total}; the run is at {step} already")
        for name, network in agent.networks.items():
            network.load_state_dict(state["networks"][name])
        for optimizer, saved in zip((agent.actor_optimizer, agent.q_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            names = [(p, key) for p in optimizer.param_groups[0]["params"] for key in ("exp_avg", "exp_avg_sq")]
            if optimizer.state and any(optimizer.state[p][key].shape != p.shape for p, key in names):
                raise ValueError("moments of Adam do not fit")
        agent.actor_loss = state["actor_loss"].to(self.device)
        *generators, (version, numbers, gauss), numpy_state = json.loads(state["generators"])
        for generator, saved in zip(self.generators(), generators, strict=True):
            generator.state = saved
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(numpy_state)
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
        self.step = self.first_step = self.checkpointed = step
        self.rows, self.clock = Counter(state["rows"]), self.clock - float(state["seconds"])
        self.last_return, self.last_evaluation = map(float, state["last"])
        if not state["episode_over"] and step < total:
            what = "broke off an episode: on with a new one, not to the bit what a run without a break gives"
            print(f"note: the checkpoint at step {step} {what}", file=sys.stderr)

    # ---- the end

    def __exit__(self, kind, error, traceback) -> None:
        if self.writer and self.args.save_model and kind is not FloatingPointError:
            self.closing.append(lambda: save_model(self.folder / "model.pt", self.agent, self.args))
        if self.writer and kind is EnvironmentFault:
            self.episode_over = False
            self.closing.append(self.checkpoint)
        for close in reversed(self.closing):
            try:
                close()
            except Exception as problem:  # a full disk, a simulator that is dead: the rest is closed all the same
                print(f"warning: at the end: {problem!r}", file=sys.stderr)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.args.profile:
            self.profile.disable()
            pstats.Stats(self.profile).sort_stats("cumulative").print_stats(40)
        advice = f"--resume {self.folder} goes on from step {self.checkpointed}"
        advice = advice if self.checkpointed else "there is no checkpoint"
        if isinstance(error, EnvironmentFault | OSError):
            raise kind(f"step {self.step}: {error}; {advice}") from error
        if error and self.checkpointed:
            error.add_note(advice)
        if self.signal and not error:
            print(f"\ninterrupted at step {self.step}; everything so far is in {self.folder};", advice, file=sys.stderr)
            raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


class SparseRun(Run):
    """Adds what is N:M: density and SAD in the logs, and the mask history, `masks.bin`."""

    def open_logs(self) -> None:
        super().open_logs()
        path, kept = self.folder / "masks.bin", self.folder / f"masks.bin.{self.step}"
        if not kept.exists() and (path.stat().st_size if path.exists() else 0) < self.rows["masks.bin"]:
            print(f"note: {path} is missing or cut; the history goes on in a new one", file=sys.stderr)
            path.touch()
            path.rename(kept)
        if kept.exists():  # the checkpoint knows the size of that one
            self.rows["masks.bin"] = 0
        if path.exists():
            os.truncate(path, self.rows["masks.bin"])  # to where the checkpoint was
        self.masks = flat_masks(self.agent)
        if not self.args.resume:
            networks = {**self.agent.networks, "total": nn.ModuleDict(self.agent.networks)}
            self.scalars({f"density/{name}": density(network) for name, network in networks.items()})
            self.save_masks(0)

    def log_projection(self, update: int, changed: dict[str, int]) -> None:
        """SAD of each layer, each network and all: count, and rate per active entry; at most once in 100 updates."""
        if update // 100 > (update - self.args.mask_update_interval) // 100:
            sad, active = Counter(), Counter()
            for name, layer in self.agent.nm_layers.items():
                for key in (name, name.split(".")[0], "total"):
                    sad[key] += changed[name]
                    active[key] += layer.values.numel()
            self.scalars({f"sad/{key}": sad[key] for key in sad} | {f"sad_rate/{k}": sad[k] / active[k] for k in sad})
        self.save_masks(update)

    def save_masks(self, update: int) -> None:
        """Append to `masks.bin` what has changed since the record before, or all active entries to an empty file.

        First a line of JSON: `layers` (names), `shapes` (rows, columns). A record: step, update and size as uint64,
        then as many bytes, in which zlib packed uint32: distances between the changed entries, in order, in all layers
        one after the other, row by row, the first one from 0. Little-endian.
        """
        if not self.args.save_masks:
            return
        before, self.masks, layers = self.masks, flat_masks(self.agent), self.agent.nm_layers
        with open(self.folder / "masks.bin", "ab") as file:
            if file.tell() == 0:
                shapes = [tuple(layer.master.shape) for layer in layers.values()]
                file.write(json.dumps({"layers": list(layers), "shapes": shapes}).encode() + b"\n")
                before = np.zeros_like(self.masks)
            changed = np.flatnonzero(self.masks != before)
            data = zlib.compress(np.diff(changed, prepend=0).astype("<u4"))
            file.write(struct.pack("<3Q", self.step, update, len(data)) + data)
            self.rows["masks.bin"] = file.tell()


def density(network: nn.Module) -> float:
    """Share of active weights among all weights of a network's linear layers, biases not counted."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, NMLinear))]
    active = sum((layer.values if isinstance(layer, NMLinear) else layer.weight).numel() for layer in layers)
    return active / sum(layer.in_features * layer.out_features for layer in layers)


def flat_masks(agent: TD3) -> np.ndarray:
    """The masks of all layers, row by row, one after the other: bool [entries]."""
    return np.concatenate([layer.mask().cpu().numpy().ravel() for layer in agent.nm_layers.values()])


def claim_run_folder(args: Args) -> tuple[Path, FileLock]:
    """Make the run folder, or take that of --resume, for this process alone. Raises UsageError."""
    name, started = f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}", int(time.time())
    folder = Path(args.resume or f"runs/{name}__{started}")
    if args.resume and not (folder / "checkpoints").is_dir():
        raise UsageError(f"--resume {folder}: no checkpoints in it")
    try:
        while not args.resume and folder.exists():  # two runs started in the same second
            started += 1
            folder = folder.with_name(f"{name}__{started}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=1)  # the system releases it however the process ends
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{folder}: another process trains in this run folder; wait for it, or stop it") from error
    except OSError as error:
        raise UsageError(f"the run folder {folder} cannot be written: {error.strerror}") from error
    return folder, lock


# Flags that may change when a run is resumed: its training stays the same to the bit.
HARMLESS = {"total_timesteps", "checkpoint_interval", "overlap", "profile", "save_model", "resume"}
HARMLESS |= {"capture_video", "track", "wandb_project_name", "wandb_entity"}
OF_THE_MACHINE = {"cuda", "backend"}  # a run may go on on another one; that it is not the same to the bit is said


class Checkpoints:
    """The last two states of a run: `{step}.pt`, and `replay.f32`, the transitions since the run began, row by row.

    A checkpoint gets its name when all of it is on the disk, rows first: a crash at any moment leaves the one before
    whole. It knows how many rows are its own; what a later one has added is cut.
    """

    def __init__(self, folder: Path):
        self.folder, self.rows, self.digest, self.added = folder, 0, hashlib.sha256(), 0

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]" * 9 + ".pt"), reverse=True)

    def write(self, step: int, state: dict, buffer: ReplayBuffer) -> None:
        """Raises OSError; the next call then writes what this one could not."""
        path, rows = self.folder / "replay.f32", buffer.rows_numpy
        if (path.stat().st_size if path.exists() else 0) < self.rows * rows[0].nbytes:  # deleted, say: write all anew
            self.rows, self.digest, self.added = 0, hashlib.sha256(), buffer.added - buffer.size
        new, stop = min(buffer.added - self.added, buffer.size), buffer.added % buffer.capacity
        start, digest = stop - new, self.digest.copy()
        self.folder.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            file.truncate(self.rows * rows[0].nbytes)
            for part in [rows[start:stop]] if start >= 0 else [rows[start:], rows[:stop]]:
                file.write(part)
                digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        content, replay = io.BytesIO(), {"rows": self.rows + new, "digest": digest.hexdigest(), "added": buffer.added}
        torch.save({"format": CHECKPOINT_FORMAT, "replay": replay, **state}, content)
        replace_file(self.folder / f"{step:09d}.pt", content.getbuffer())
        self.rows, self.digest, self.added = self.rows + new, digest, buffer.added
        for path in self.newest_first()[2:]:
            path.unlink()

    def read(self, path: Path, buffer: ReplayBuffer) -> dict:
        """A state; its transitions go to the buffer. Nothing is unpickled. Raises one of several errors."""
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a check sum is wrong")  # torch.load does not look at them
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"{state['format']} is not a checkpoint of this script ({CHECKPOINT_FORMAT})")
        count, added = state["replay"]["rows"], state["replay"]["added"]
        rows = np.memmap(self.folder / "replay.f32", np.float32, "r", shape=(count, sum(buffer.widths)))
        digest = hashlib.sha256(rows)
        if digest.hexdigest() != state["replay"]["digest"]:
            raise ValueError("its rows of replay.f32 are damaged")
        buffer.added, buffer.size = added, min(added, buffer.capacity)
        buffer.rows_numpy[np.arange(added - buffer.size, added) % buffer.capacity] = rows[count - buffer.size :]
        self.rows, self.digest, self.added = count, digest, added
        return state


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write beside, bring down to the disk, rename: at any moment the old file or the new one is whole."""
    incomplete = path.with_name("incomplete")
    try:
        with open(incomplete, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(incomplete, path)
    except OSError:
        incomplete.unlink(missing_ok=True)  # on a full disk it would be in the way
        raise


# ---------------------------------------------------------------- model files

MODEL_FORMAT = "rnm-td3-1"
CHECKPOINT_FORMAT = "rnm-td3-checkpoint-2"


def save_model(path: Path, agent: TD3, args: Args) -> None:
    """Write what it takes to act, and the critics, without pickled code; the dense masters serve only training."""
    model = {"format": MODEL_FORMAT, "args": vars(args), "obs_dim": agent.actor.net[0].in_features}
    for name in ("actor", "qf1", "qf2"):
        state = {key: value.cpu() for key, value in agent.networks[name].state_dict().items() if "master" not in key}
        if not all(value.isfinite().all() for value in state.values()):
            raise FloatingPointError(f"{path} is not written: not finite: {name}")
        model[name] = {key: value.int() if "index" in key else value for key, value in state.items()}
    torch.save(model, content := io.BytesIO())
    replace_file(path, content.getbuffer())


def read_model(path: str | Path, backend: str = "auto") -> tuple[Actor, dict]:
    """Actor of a model file, and all that stands in it, as `save_model` wrote it. Raises UsageError."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a check sum is wrong")  # torch.load does not look at them
        model = torch.load(path, map_location="cpu", weights_only=True)
        if model["format"] != MODEL_FORMAT:
            raise ValueError(f"its format is {model['format']}; td3_continuous.py plays td3-1")
        args, state, obs_dim, _ = model["args"], model["actor"], model["obs_dim"], model["args"]["env_id"]
        actor = Actor(obs_dim, state["action_low"], state["action_high"], args["hidden_sizes"])
        backend = choose_backend(backend, args["n"], args["m"], torch.device("cpu"), (obs_dim, *args["hidden_sizes"]))
        sparsify(actor, args["n"], args["m"], args["dense_layers"], backend)
        masters = {key: torch.zeros_like(value) for key, value in actor.state_dict().items() if key.endswith(".master")}
        actor.load_state_dict(masters | state)
        actor.act(np.zeros(obs_dim))
        return actor, model
    except UsageError:
        raise
    except Exception as error:  # pickle, zip and torch each have errors of their own; a part may be missing or wrong
        raise UsageError(f"{path}: cannot be read as a model of this script ({MODEL_FORMAT}): {error!r}") from error


def load_actor(path: str | Path, backend: str = "auto") -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a `model.pt`: observation, as the environment gives it, to action [A], no noise. Raises UsageError."""
    return read_model(path, backend)[0].act


def check_import(env_id: str, args: Args) -> None:
    """Raises UsageError if `env_id`, read from a file, imports a module, and the command line does not name it too."""
    if ":" in str(env_id) and env_id != args.env_id:
        raise UsageError(f"the environment {env_id!r} imports code; if you trust it, add --env-id {env_id}")


def evaluate_model(args: Args) -> None:
    """Play the policy of a model file on its own environment, print the returns, and record videos if asked."""
    check_args(args)
    actor, model = read_model(args.evaluate)
    check_import(model["args"]["env_id"], args)
    env = make_env(model["args"]["env_id"], args.capture_video)
    sizes = model["obs_dim"], len(actor.action_low)
    if env.observation_space.shape + env.action_space.shape != sizes:
        raise UsageError(f"{args.evaluate}: its inputs and actions are {sizes}, unlike those of {env.spec.id} here")
    if args.capture_video:
        env.env = gym.wrappers.RecordVideo(env.env, f"{Path(args.evaluate).parent}/videos/evaluation", lambda _: True)
    returns = evaluate(actor.act, env, args.eval_episodes, args.seed)
    env.close()
    print(f"returns {np.round(returns, 2).tolist()}, mean {np.mean(returns):.2f}, std {np.std(returns):.2f}")


# ---------------------------------------------------------------- command line


def main() -> int:
    """Exit code: 0 done, 1 stopped by a fault, 2 bad input, 130 interrupted (SIGINT), 143 SIGTERM, 129 SIGHUP."""
    args, show = tyro.cli(Args, description=__doc__), threading.excepthook
    # a full disk in TensorBoard's thread: flushing its writer raises that where a run can end with it
    threading.excepthook = lambda failure: None if issubclass(failure.exc_type, OSError) else show(failure)
    try:
        if args.resume is not None:  # its flags are the defaults
            try:
                text = Path(args.resume, "config.json").read_bytes()
                saved = pydantic.TypeAdapter(Args).validate_json(text, strict=True)
            except (OSError, ValueError) as error:
                raise UsageError(f"--resume {args.resume}: not a run folder of this script: {error}") from error
            check_import(saved.env_id, args)
            args = tyro.cli(Args, description=__doc__, default=saved)
            if args.env_id != saved.env_id:  # whose transitions would not fit
                raise UsageError(f"--resume: env_id is {args.env_id}, {saved.env_id} in the run to resume; drop it")
        if args.profile:
            os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # the time of a kernel counts where it is launched
        with enough_memory():  # some of it is taken at the first update
            train(args) if args.evaluate is None else evaluate_model(args)
    except (UsageError, EnvironmentFault, FloatingPointError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library had to say
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
