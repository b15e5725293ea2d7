# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "wandb==0.31.0", "pydantic==2.14.4", "filelock==4.2.12", "tensorboard==2.21.0", "moviepy==2.2.1",
# ]
# ///
"""TD3 (Fujimoto et al. 2018), the dense twin of rnm_td3_continuous.py.

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
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = copy.deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = copy.deepcopy(self.qf2).requires_grad_(False)
        critic_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(critic_parameters, lr=args.learning_rate, fused=True)
        self.actor_loss = torch.tensor(math.nan)  # of the last update
        names = ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target")
        self.networks = {name: getattr(self, name) for name in names}

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
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.args.tau)


# ---------------------------------------------------------------- training


def train(args: Args) -> tuple[TD3, ReplayBuffer, Path]:
    """One run, from its first step or from its last checkpoint. Returns agent, buffer, run folder.

    Raises: UsageError before any work; FloatingPointError for NaN or infinity; EnvironmentFault; OSError for a full
    disk, say; RuntimeError for want of memory; KeyboardInterrupt or SystemExit after a signal. Checkpoints stay whole.
    """
    check_args(args)
    env = make_env(args.env_id, args.capture_video)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    env.action_space.seed(args.seed)

    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    td3 = FusedTD3 if device.type == "cpu" else TD3
    agent = td3(obs_dim, env.action_space.low, env.action_space.high, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim)

    with Run(args, agent, buffer, env, device) as run:  # folder, logs, evaluations, checkpoints, signals
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
                run.log_losses(update, *values)

            # store: only termination stops the bootstrap, since an episode that was truncated would have gone on
            next_obs, reward, terminated, truncated, _ = finish_step()
            buffer.add(obs, action, next_obs, reward, terminated)
            run.end_step(reward, terminated or truncated)  # evaluations; checkpoints, where an episode ends if it can
            obs = env.reset()[0] if terminated or truncated else next_obs
    return agent, buffer, run.folder


# ==================================================================================== Part 2: the machine room
# ---------------------------------------------------------------- products on oneDNN


class FusedTD3(TD3):
    """TD3 whose gradients are written out: autograd costs a fifth of an update."""

    @torch.no_grad()
    def update_critics(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        args, actor, target = self.args, self.actor, self.actor_target
        noise = (torch.randn_like(batch.action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        squashed = forward(target.net, batch.next_obs)[0].tanh_()
        next_action = torch.addcmul(actor.action_bias, squashed.add_(noise), actor.action_scale)
        next_x = torch.cat([batch.next_obs, next_action.clamp_(actor.action_low, actor.action_high)], dim=1)
        next_q1, next_q2 = (forward(q.net, next_x)[0].squeeze(1) for q in (self.qf1_target, self.qf2_target))
        target_q = batch.reward + (1 - batch.terminated) * args.gamma * torch.min(next_q1, next_q2)  # [B]
        x, values, gradients = torch.cat([batch.obs, batch.action], dim=1), [], []
        for qf in (self.qf1, self.qf2):
            q, tape = forward(qf.net, x)
            values.append(q.squeeze(1))
            gradients += backward(qf.net, tape, (q - target_q.unsqueeze(1)) * (2 / len(q)))[0]  # of the squared error
        step(self.q_optimizer, gradients)
        return *values, target_q

    @torch.no_grad()
    def update_actor(self, obs: torch.Tensor) -> None:
        output, tape = forward(self.actor.net, obs)
        squashed, scale = output.tanh_(), self.actor.action_scale
        action = torch.addcmul(self.actor.action_bias, squashed, scale)
        q, q_tape = forward(self.qf1.net, torch.cat([obs, action], dim=1))
        _, dx = backward(self.qf1.net, q_tape, torch.full_like(q, -1 / len(q)), need_w=False, need_x=True)
        grad = dx[:, obs.shape[1] :] * (scale * (1 - squashed * squashed))
        step(self.actor_optimizer, backward(self.actor.net, tape, grad)[0])
        self.actor_loss = -q.mean()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, relu=False) -> torch.Tensor:
    """x W^T + b, on oneDNN where that is the faster one."""
    if one_dnn() and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


@cache
def one_dnn() -> bool:
    """On AMD from Zen 5 (family 26) on: MKL, on which `nn.Linear` runs, does not use its registers' whole width."""
    info = Path("/proc/cpuinfo")
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", info.read_text() if info.exists() else "")
    return bool(family) and int(family[1]) >= 26 and torch.backends.mkldnn.is_available()


def forward(net: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What linear layers with ReLU between them make of x [B, C], and the input of each layer."""
    tape, layers = [], list(net._modules.values())[::2]
    for layer in layers:
        tape.append(x.contiguous())  # other strides would take a slow path
        x = product(tape[-1], *layer._parameters.values(), relu=layer is not layers[-1])
    return x, tape


def backward(net: nn.Sequential, tape: list[torch.Tensor], grad: torch.Tensor, need_w=True, need_x=False) -> tuple:
    """Gradients of all parameters, if they are wanted, and of x, from that of the output."""
    gradients, layers = [], list(net._modules.values())[::2]
    for i in reversed(range(len(layers))):
        if need_w:
            gradients = [product(grad.t(), tape[i].t()), grad.sum(0), *gradients]
        if i or need_x:
            grad = product(grad, layers[i]._parameters["weight"].t())
        if i:
            grad = torch.ops.aten.threshold_backward(grad, tape[i], 0)
    return gradients, grad


def step(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    """The optimizer's step, with the given gradients of its parameters."""
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


# ---------------------------------------------------------------- errors and arguments


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line: what is wrong and what to do."""


def check_args(args: Args) -> None:
    """Refuse arguments that make no sense, before any work. Raises UsageError."""
    limits = dict.fromkeys(["total_timesteps", "buffer_size", "policy_frequency", "eval_episodes"], (1, math.inf))
    limits |= dict.fromkeys(["policy_noise", "exploration_noise", "noise_clip", "learning_rate"], (0, math.inf))
    limits |= dict.fromkeys(["eval_interval", "checkpoint_interval"], (0, math.inf))
    limits |= {"gamma": (0, 1), "tau": (0, 1), "seed": (0, 2**31), "batch_size": (1, args.buffer_size)}
    limits |= {"learning_starts": (0, args.total_timesteps)}
    reasons = {"batch_size": " (--buffer-size)", "learning_starts": " (--total-timesteps)"}
    for name, (low, high) in limits.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not (low <= value <= high and value != math.inf):
            raise UsageError(f"{flag} is {value}; give a number from {low} to {high}{reasons.get(name, '')}")
    if min(args.hidden_sizes, default=0) < 1:
        raise UsageError(f"--hidden-sizes is {args.hidden_sizes}; give one or more sizes of at least 1")
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
    """Copy on the CPU."""
    return copy.deepcopy(network).cpu()


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

MODEL_FORMAT = "td3-1"
CHECKPOINT_FORMAT = "td3-checkpoint-2"


def save_model(path: Path, agent: TD3, args: Args) -> None:
    """Write what it takes to act, and the critics, without pickled code."""
    model = {"format": MODEL_FORMAT, "args": vars(args), "obs_dim": agent.actor.net[0].in_features}
    for name in ("actor", "qf1", "qf2"):
        model[name] = {key: value.cpu() for key, value in agent.networks[name].state_dict().items()}
        if not all(value.isfinite().all() for value in model[name].values()):
            raise FloatingPointError(f"{path} is not written: not finite: {name}")
    torch.save(model, content := io.BytesIO())
    replace_file(path, content.getbuffer())


def read_model(path: str | Path) -> tuple[Actor, dict]:
    """Actor of a model file, and all that stands in it, as `save_model` wrote it. Raises UsageError."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a check sum is wrong")  # torch.load does not look at them
        model = torch.load(path, map_location="cpu", weights_only=True)
        if model["format"] != MODEL_FORMAT:
            raise ValueError(f"its format is {model['format']}; rnm_td3_continuous.py plays rnm-td3-1")
        args, state, obs_dim, _ = model["args"], model["actor"], model["obs_dim"], model["args"]["env_id"]
        actor = Actor(obs_dim, state["action_low"], state["action_high"], args["hidden_sizes"])
        actor.load_state_dict(state)
        actor.act(np.zeros(obs_dim))
        return actor, model
    except Exception as error:  # pickle, zip and torch each have errors of their own; a part may be missing or wrong
        raise UsageError(f"{path}: cannot be read as a model of this script ({MODEL_FORMAT}): {error!r}") from error


def load_actor(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a `model.pt`: observation, as the environment gives it, to action [A], no noise. Raises UsageError."""
    return read_model(path)[0].act


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
