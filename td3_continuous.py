# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "wandb==0.31.0", "safetensors==0.8.0", "filelock==4.2.12", "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
"""TD3 (Fujimoto et al. 2018), the dense twin of rnm_td3_continuous.py."""

import contextlib
import copy
import difflib
import functools
import hashlib
import io
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import mujoco
import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

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


# Flags that may change when a run is resumed: its training stays the same to the bit.
HARMLESS = {"total_timesteps", "checkpoint_interval", "overlap", "profile", "save_model", "resume"}
HARMLESS |= {"capture_video", "track", "wandb_project_name", "wandb_entity"}


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line: what is wrong and what to do."""


def check_args(args: Args) -> None:
    """Refuse arguments that make no sense, before any work. Raises UsageError."""
    limits = dict.fromkeys(["total_timesteps", "buffer_size", "policy_frequency", "eval_episodes"], (1, math.inf))
    limits |= dict.fromkeys(["policy_noise", "exploration_noise", "noise_clip", "learning_rate"], (0, math.inf))
    limits |= {"gamma": (0, 1), "tau": (0, 1), "eval_interval": (0, math.inf), "seed": (0, 2**31)}
    limits |= {"checkpoint_interval": (0, math.inf)}
    limits |= {"batch_size": (1, args.buffer_size), "learning_starts": (0, args.total_timesteps)}
    reasons = {"batch_size": " (--buffer-size)", "learning_starts": " (--total-timesteps)"}
    for name, (low, high) in limits.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{flag} is {value}; give a number from {low} to {high}{reasons.get(name, '')}")
    if min(args.hidden_sizes, default=0) < 1:
        raise UsageError(f"--hidden-sizes is {args.hidden_sizes}; give one or more sizes of at least 1")
    if args.overlap and args.capture_video:
        raise UsageError("--overlap steps the environment in a thread, where it cannot be filmed; drop --capture-video")
    if args.resume and args.evaluate:
        raise UsageError("--resume trains, --evaluate does not; give one of them")
    if not args.exp_name or args.exp_name != Path(args.exp_name).name or not args.exp_name.isprintable():
        raise UsageError(f"--exp-name is {args.exp_name!r}; give a plain name without slashes")


# ---------------------------------------------------------------- oneDNN


class FusedMLP(torch.autograd.Function):
    """Linear layers with ReLU between them in one call, on oneDNN, which `nn.Linear` does not use for float32."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """x [B, C]; weight and bias of each layer in turn."""
        x, inputs = x.contiguous(), []  # other strides would take a slow path
        for i in range(0, len(parameters), 2):
            inputs.append(x)
            activation = "relu" if i + 2 < len(parameters) else "none"
            x = torch.ops.mkldnn._linear_pointwise(x, *parameters[i : i + 2], activation, [], "")
        ctx.save_for_backward(*inputs, *parameters)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        layers = len(ctx.saved_tensors) // 3
        inputs, weights, gradients = ctx.saved_tensors[:layers], ctx.saved_tensors[layers::2], []
        product = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # noqa: E731
        grad = grad.contiguous()
        for i in reversed(range(layers)):
            if ctx.needs_input_grad[1]:
                gradients = [product(grad.t(), inputs[i]), grad.sum(0), *gradients]
            if i > 0:
                grad = torch.ops.aten.threshold_backward(product(grad, weights[i]), inputs[i], 0)
        dx = product(grad, weights[0]) if ctx.needs_input_grad[0] else None
        return dx, *(gradients or [None] * 2 * layers)


class FusedSequential(nn.Sequential):
    """Linear layers with ReLU between them, as `mlp` makes them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:  # acting
            return super().forward(x)
        layers = list(self._modules.values())[::2]
        return FusedMLP.apply(x, *(parameter for layer in layers for parameter in layer._parameters.values()))


def one_dnn_is_faster(device: torch.device) -> bool:
    """With AVX-512, measured on AMD, where `nn.Linear` runs at half the speed; with AVX2 it is not."""
    cpu = device.type == "cpu" and torch.get_default_dtype() == torch.float32
    return cpu and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


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


class ReplayBuffer:
    """The last `capacity` transitions, one packed float32 row each: obs, action, next_obs, reward, terminated."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int):
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1]
        self.rows = torch.empty(capacity, sum(self.widths), dtype=torch.float32)  # its pages come with the writes
        self.rows_numpy = self.rows.numpy()  # the same memory: NumPy writes a row in a fraction of the time
        self.capacity, self.size, self.added = capacity, 0, 0  # added: since the run began, overwritten ones too

    def add(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool) -> None:
        """`next_obs` is what the step returned, not what a reset after it did; `terminated` excludes truncation."""
        np.concatenate((obs, action, next_obs, (reward, terminated)), out=self.rows_numpy[self.added % self.capacity])
        self.added += 1
        self.size = min(self.added, self.capacity)

    def sample(self, batch_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Uniform with replacement: obs [B, O], action [B, A], next_obs [B, O], reward [B], terminated [B]."""
        drawn = torch.randint(self.size, (batch_size,))
        batch = self.rows.index_select(0, drawn).to(device)  # in a fifth of the time of self.rows[drawn]
        obs, action, next_obs, reward, terminated = batch.split(self.widths, dim=1)
        return obs, action, next_obs, reward.squeeze(1), terminated.squeeze(1)

    def rows_since(self, start: int) -> list[np.ndarray]:
        """Rows of the transitions `start` to the newest, in one part or two, without a copy."""
        first, stop = start % self.capacity, self.added % self.capacity
        return [self.rows_numpy[first:stop]] if first < stop else [self.rows_numpy[first:], self.rows_numpy[:stop]]

    def restore(self, start: int, rows: np.ndarray) -> None:
        """Put back the transitions `start` to `start + len(rows) - 1`, which become the newest. Raises ValueError."""
        self.added = start + len(rows)
        self.size = min(self.added, self.capacity)
        self.rows_numpy[np.arange(start, self.added) % self.capacity] = rows


# ---------------------------------------------------------------- environment


class EnvironmentFault(Exception):
    """An environment failed, or returned what must not reach the replay buffer; the message is one line."""

    def __init__(self, message: str, env: gym.Env):
        super().__init__(message)
        self.env = env


class CheckedEnv(gym.Wrapper):
    """Raises EnvironmentFault where an environment raises, or returns a wrong shape, NaN or infinity."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.shape = env.observation_space.shape

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.check(obs, float(reward))
        except Exception as error:  # whatever an environment's own code raises
            raise EnvironmentFault(f"the environment failed in step: {error!r}", self) from error
        return obs, float(reward), terminated, truncated, info

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        try:
            obs, info = self.env.reset(**options)
            self.check(obs)
        except Exception as error:
            raise EnvironmentFault(f"the environment failed in reset: {error!r}", self) from error
        return obs, info

    def check(self, obs: np.ndarray, reward: float = 0.0) -> None:
        if np.shape(obs) != self.shape:
            raise ValueError(f"observation of shape {np.shape(obs)} instead of {self.shape}")
        if not (np.isfinite(obs).all() and math.isfinite(reward)):
            raise ValueError("NaN or infinity in observation or reward")


def make_env(env_id: str, capture_video: bool = False) -> gym.Env:
    """Environment with flat Box observations and bounded Box actions. Raises UsageError if it cannot be one."""
    try:
        env = gym.make(env_id, **{"render_mode": "rgb_array"} if capture_video else {})
        if capture_video:  # without a screen or a driver, find out now
            env.reset()
            env.render()
    except gym.error.UnregisteredEnv as error:
        near = ", ".join(difflib.get_close_matches(env_id, gym.registry)) or "one of `gymnasium.pprint_registry()`"
        raise UsageError(f"--env-id {env_id}: no such environment; did you mean {near}?") from error
    except Exception as error:  # whatever an environment's own code raises
        hint = "; to render without a screen, try MUJOCO_GL=egl" if capture_video else ""
        raise UsageError(f"--env-id {env_id}: cannot be made{hint}: {error!r}") from error
    obs, action = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box):
        raise UsageError(f"--env-id {env_id}: observations are {type(obs).__name__}; choose an environment with Box")
    continuous = isinstance(action, gym.spaces.Box) and action.dtype.kind == "f"
    if not continuous or len(action.shape) != 1 or not action.is_bounded():
        raise UsageError(f"--env-id {env_id}: actions are {action}; TD3 needs a bounded, one-dimensional Box of floats")
    return CheckedEnv(env if len(obs.shape) == 1 else gym.wrappers.FlattenObservation(env))


def check_import(env_id: str, args: Args) -> None:
    """Raises UsageError if `env_id`, read from a file, imports a module, and the command line does not name it too."""
    if ":" in env_id and env_id != args.env_id:
        raise UsageError(f"the environment {env_id!r} imports code; if you trust it, add --env-id {env_id}")


def evaluate(
    policy: Callable[[np.ndarray], np.ndarray], env: gym.Env, episodes: int, seed: int, stop=lambda: False
) -> list[float] | None:
    """Undiscounted return of each episode. The seed fixes the initial states: every evaluation sees the same ones.

    Returns None as soon as `stop()` is true.
    """
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        episodic_return, done = 0.0, False
        while not done:
            if stop():
                return None
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            episodic_return += reward
            done = terminated or truncated
        returns.append(episodic_return)
    return returns


# ---------------------------------------------------------------- run folder


def claim_run_folder(args: Args) -> tuple[Path, FileLock]:
    """Make the run folder, or take that of --resume, for this process alone. Raises UsageError."""
    folder, started = Path(args.resume or ""), int(time.time())
    if args.resume and not (folder / "checkpoints").is_dir():
        raise UsageError(f"--resume {folder}: no checkpoints in it")
    for path in folder.rglob("*") if args.resume else ():  # files are cut and deleted: not those of others
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError(f"--resume {folder}: {path} is neither a file nor a folder; move it elsewhere")
    while not args.resume:
        folder = Path("runs", f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__{started}")
        try:
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
            break
        except FileExistsError:  # two runs started in the same second
            started += 1
        except OSError as error:
            raise UsageError(f"cannot make the run folder {folder}: {error.strerror}") from error
    lock = FileLock(folder / "lock", timeout=0)  # the system releases it however the process ends
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{folder}: another process trains in this run folder; wait for it, or stop it") from error
    except OSError as error:
        raise UsageError(f"{folder}: the run folder cannot be written: {error.strerror}") from error
    return folder, lock


def run_config(args: Args, device: torch.device) -> dict:
    """What made a run: all flags, and the machine."""
    versions = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np)}
    machine = {"device": str(device), "cpu": torch.backends.cpu.get_cpu_capability(), "versions": versions}
    return {**vars(args), **machine, "num_threads": torch.get_num_threads()}


class RunLog:
    """The files of a run folder with configuration, TensorBoard events and CSV; the progress bar; W&B if asked."""

    def __init__(self, folder: Path, config: dict, resumed: dict | None = None):
        """`resumed`: what `state()` gave. Lines that were written after it are cut: they will be written again."""
        self.folder, state = folder, resumed or {"seconds": 0.0, "returns": [math.nan, math.nan]}
        path, self.wandb = folder / "config.json", None
        run_id = json.loads(path.read_text()).get("wandb_id") if resumed else None
        if config["track"]:
            import wandb  # here, since it takes a second

            options = {"project": config["wandb_project_name"], "entity": config["wandb_entity"], "name": folder.name}
            options |= {"config": config, "id": run_id, "resume": "allow" if run_id else None}
            try:
                self.wandb = wandb.init(**options, sync_tensorboard=True, save_code=True)
            except Exception as error:  # no key, no network, a wrong mode
                if not resumed:
                    shutil.rmtree(folder)
                raise UsageError(f"--track: {error!r}; run `wandb login`, or set WANDB_MODE=offline") from error
            run_id = self.wandb.id
        content = json.dumps({**config, "wandb_id": run_id}, indent=2)
        write_durably(path.with_suffix(".incomplete"), content.encode())
        os.replace(path.with_suffix(".incomplete"), path)
        for path in self.files() if resumed else ():
            size = state["files"].get(path.name, 0)
            if size > path.stat().st_size:
                print(f"note: {path} is shorter than at the checkpoint; what is missing stays missing", file=sys.stderr)
            elif size > 0:
                os.truncate(path, size)
            else:
                path.unlink()  # events after the checkpoint alone
        self.writer = SummaryWriter(str(folder))
        if not resumed:
            self.writer.add_text("hyperparameters", "\n".join(f"    {key}: {value}" for key, value in config.items()))
            self.append("episodes.csv", ["step", "return", "length", "seconds"])
            returns = [f"return_{i + 1}" for i in range(config["eval_episodes"])]
            self.append("evaluations.csv", ["step", *returns, "mean", "std"])
        self.last_line = time.time()
        self.start = self.last_line - state["seconds"]
        self.last_return, self.last_evaluation = state["returns"]
        self.bar = tqdm(
            total=config["total_timesteps"], unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def files(self) -> list[Path]:
        csv = [self.folder / name for name in ("episodes.csv", "evaluations.csv")]
        return [*filter(Path.exists, csv), *self.folder.glob("events.out.tfevents.*")]

    def state(self) -> dict:
        """Wall time so far, last returns, and the size of every file, all of which is on the disk."""
        self.flush()
        files = {}
        for path in self.files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[path.name] = path.stat().st_size
        returns = [self.last_return, self.last_evaluation]
        return {"seconds": time.time() - self.start, "returns": returns, "files": files}

    def append(self, name: str, row: list) -> None:
        with open(self.folder / name, "a") as file:
            print(*row, sep=",", file=file)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def episode(self, step: int, episodic_return: float, length: int) -> None:
        self.append("episodes.csv", [step, episodic_return, length, f"{time.time() - self.start:.3f}"])
        self.scalars({"charts/episodic_return": episodic_return, "charts/episodic_length": length}, step)
        self.last_return = episodic_return

    def evaluation(self, step: int, returns: list[float]) -> None:
        mean, std = float(np.mean(returns)), float(np.std(returns))
        self.append("evaluations.csv", [step, *returns, mean, std])
        self.scalars({"eval/episodic_return": mean, "eval/episodic_return_std": std}, step)
        self.last_evaluation = mean

    def progress(self, step: int) -> None:
        """Log steps/s and move the bar; without a terminal, print a line each minute and at the end."""
        speed = int(step / (time.time() - self.start))
        self.scalars({"charts/SPS": speed}, step)
        status = f"return {self.last_return:.1f}, evaluation {self.last_evaluation:.1f}"
        if not self.bar.disable:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(step - self.bar.n)
        elif time.time() - self.last_line >= 60 or step == self.bar.total:
            self.last_line = time.time()
            print(f"step {step}/{self.bar.total}, {speed} steps/s, {status}", flush=True)

    def flush(self) -> None:
        """Raises OSError, such as TensorBoard's thread has met."""
        self.writer.flush()

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


def thread_excepthook(failure) -> None:
    """Keep quiet about a full disk in TensorBoard's thread: `RunLog.flush` raises that where a run can end with it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


class Profile:
    """Where the time goes: every lap counts for one part, from the end of the lap before."""

    def __init__(self):
        self.seconds, self.laps, self.last = Counter(), Counter(), time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.laps[part] += 1
        self.last = now

    def __str__(self) -> str:
        rows = [f"{'part':12}{'seconds':>10}{'share':>8}{'us a lap':>10}"]
        for part, seconds in self.seconds.most_common():
            share = seconds / self.seconds.total()
            rows.append(f"{part:12}{seconds:10.2f}{share:8.1%}{seconds / self.laps[part] * 1e6:10.1f}")
        return "\n".join(rows)


# ---------------------------------------------------------------- model files

MODEL_FORMAT = "td3-1"


def save_model(path: Path, agent: "TD3", args: Args) -> None:
    """Write what it takes to act, and the critics, without pickled code."""
    model = {"format": MODEL_FORMAT, "args": vars(args), "obs_dim": agent.actor.net[0].in_features}
    for name in ("actor", "qf1", "qf2"):
        model[name] = {key: value.cpu() for key, value in getattr(agent, name).state_dict().items()}
    content = io.BytesIO()
    torch.save(model, content)
    write_durably(path.with_suffix(".incomplete"), content.getbuffer())
    os.replace(path.with_suffix(".incomplete"), path)


def read_model(path: str | Path) -> dict:
    """Contents of a model file: format, args, obs_dim, and the state of actor, qf1, qf2. Raises UsageError."""
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception:  # pickle, zip and torch each have errors of their own for a foreign file
        model = None
    if not isinstance(model, dict) or model.get("format") != MODEL_FORMAT:
        raise UsageError(f"{path}: not a model file of this script ({MODEL_FORMAT})")
    return model


def load_actor(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a `model.pt`: observation, as the environment gives it, to action [A], no noise. Raises UsageError."""
    model = read_model(path)
    try:
        args, state, _ = model["args"], model["actor"], model["args"]["env_id"]
        actor = Actor(model["obs_dim"], state["action_low"], state["action_high"], args["hidden_sizes"])
        actor.load_state_dict(state)
        actor.act(np.zeros(model["obs_dim"]))
    except Exception as error:  # a part is missing, or has the wrong type, shape or range
        raise UsageError(f"{path}: damaged model file: {error!r}") from error
    return actor.act


def evaluate_model(args: Args) -> None:
    """Play the policy of a model file on its own environment, print the returns, and record videos if asked."""
    check_args(args)
    policy, model = load_actor(args.evaluate), read_model(args.evaluate)
    check_import(model["args"]["env_id"], args)
    env = make_env(model["args"]["env_id"], args.capture_video)
    if env.observation_space.shape != (model["obs_dim"],):
        raise UsageError(f"{args.evaluate}: made for {model['obs_dim']} inputs, unlike {env.spec.id} as it is here")
    if args.capture_video:
        videos = f"{Path(args.evaluate).parent}/videos"
        env = gym.wrappers.RecordVideo(env, videos, lambda _: True, name_prefix="evaluation")
    returns = evaluate(policy, env, args.eval_episodes, args.seed)
    env.close()
    print(f"returns {np.round(returns, 2).tolist()}, mean {np.mean(returns):.2f}, std {np.std(returns):.2f}")


# ---------------------------------------------------------------- checkpoints

CHECKPOINT_FORMAT = f"{MODEL_FORMAT}-checkpoint-1"


class StopSignals:
    """SIGINT and SIGTERM wait here until the training loop has finished its step; a second SIGINT does not wait."""

    def __init__(self):
        self.received, self.previous = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` set it
                    self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def write_durably(path: Path, *parts: bytes | np.ndarray) -> str:
    """Write a file down to the disk. Returns its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The last two states of a run, in `checkpoints/` of its folder; another process goes on from them to the bit.

    {step}/state.json            counters, random states, environment, positions in the log files
    {step}/agent.safetensors     all that training changes in networks and optimizers
    {step}/SHA256SUMS            of these two, and of the parts of the replay buffer; for `sha256sum -c`
    replay/{start}-{stop}.f32    transitions start to stop - 1 of the run: rows of the buffer, written once

    A checkpoint gets its name when all of it is on the disk, so a crash at any moment leaves the one before whole.
    """

    def __init__(self, run_folder: Path):
        self.folder = run_folder / "checkpoints"
        self.replay: dict[tuple[int, int], str] = {}  # (start, stop) of each part on the disk: SHA-256
        self.kept: dict[str, set[Path]] = {}  # the last two checkpoints: their parts

    def advice(self) -> str:
        """What to tell at the end."""
        if not self.kept:
            return "; there is no checkpoint"
        return f"; --resume {self.folder.parent} goes on from step {int(max(self.kept))}"

    def part(self, start: int, stop: int) -> Path:
        return self.folder / "replay" / f"{start:09d}-{stop:09d}.f32"

    def write(self, step: int, state: dict, agent: "TD3", buffer: ReplayBuffer) -> None:
        """Raises OSError."""
        (self.folder / "replay").mkdir(parents=True, exist_ok=True)
        incomplete, target = self.folder / "incomplete", self.folder / f"{step:09d}"
        shutil.rmtree(incomplete, ignore_errors=True)
        oldest = buffer.added - buffer.size
        replay = {span: digest for span, digest in self.replay.items() if span[1] > oldest}
        start, stop = max([oldest, *(stop for _, stop in replay)]), buffer.added
        try:
            if start < stop:
                replay[start, stop] = write_durably(self.part(start, stop), *buffer.rows_since(start))
            incomplete.mkdir()
            state = {"format": CHECKPOINT_FORMAT, "added": buffer.added, **state}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in agent.state_dict().items()}
            sums = {f"../replay/{self.part(*span).name}": digest for span, digest in replay.items()}
            sums["state.json"] = write_durably(incomplete / "state.json", json.dumps(state).encode())
            sums["agent.safetensors"] = write_durably(incomplete / "agent.safetensors", safetensors.torch.save(tensors))
            lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
            write_durably(incomplete / "SHA256SUMS", lines.encode())
            sync_folder(incomplete)
            sync_folder(self.folder / "replay")
            shutil.rmtree(target, ignore_errors=True)  # a damaged one, which a resumed run has come to again
            os.rename(incomplete, target)
        except OSError:
            shutil.rmtree(incomplete, ignore_errors=True)
            if start < stop:
                self.part(start, stop).unlink(missing_ok=True)
            raise
        self.replay = replay
        self.kept = dict([*self.kept.items(), (target.name, {self.part(*span) for span in replay})][-2:])
        with contextlib.suppress(OSError):  # of what is no longer needed something stays, at worst
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
            for path in self.folder.iterdir():
                if re.fullmatch(r"\d{9,}", path.name) and path.name not in self.kept:
                    shutil.rmtree(path)
            for path in set((self.folder / "replay").glob("*-*.f32")) - set().union(*self.kept.values()):
                path.unlink()

    def read(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """State and tensors of the newest whole checkpoint. Raises UsageError."""
        for path in sorted(self.folder.glob("[0-9]*"), reverse=True):
            try:
                return self._read(path)
            except Exception as error:  # damaged or hostile: json, safetensors and files each have errors of their own
                if isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError):
                    raise UsageError(f"--resume {self.folder.parent}: {path} cannot be read: {error!r}") from error
                print(f"note: checkpoint {path} is refused: {error}", file=sys.stderr)
        raise UsageError(f"--resume {self.folder.parent}: no whole checkpoint in it")

    def _read(self, path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
        sums = dict(line.split("  ")[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
        contents, replay = {}, {}
        for name, digest in sums.items():
            span = re.fullmatch(r"\.\./replay/(\d{9,})-(\d{9,})\.f32", name)
            if span:
                replay[int(span[1]), int(span[2])] = digest
                with open(path / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                contents[name] = (path / Path(name).name).read_bytes()
                found = hashlib.sha256(contents[name]).hexdigest()
            if found != digest:
                raise ValueError(f"{name} is damaged")
        state = json.loads(contents["state.json"])
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"{state['format']} is not a checkpoint of this script ({CHECKPOINT_FORMAT})")
        replay = dict(sorted(replay.items()))
        starts, stops = [start for start, _ in replay], [stop for _, stop in replay]
        if [*starts[1:], state["added"]] != (stops or [0]):
            raise ValueError("parts of the replay buffer are missing")
        self.replay, self.kept = replay, {path.name: {self.part(*span) for span in replay}}
        return state, safetensors.torch.load(contents["agent.safetensors"])

    def read_replay(self, buffer: ReplayBuffer) -> None:
        """Fill a buffer. Raises ValueError if the rows do not fit."""
        for start, stop in self.replay:
            rows = np.fromfile(self.part(start, stop), np.float32)
            buffer.restore(start, rows.reshape(stop - start, sum(buffer.widths)))
        if min(self.replay, default=(0, 0))[0] > buffer.added - buffer.size:
            raise ValueError("the oldest part of the replay buffer is missing")


def saved_args(run_folder: str) -> Args:
    """The flags of a run. Raises UsageError."""
    path = Path(run_folder, "config.json")
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        config, saved, hints = json.loads(path.read_text()), {}, get_type_hints(Args)
        for name, default in vars(Args()).items():
            value = tuple(map(operator.index, config[name])) if name == "hidden_sizes" else config[name]
            saved[name] = float(value) if type(default) is float and type(value) is int else value
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else [saved[name]]
            type_fits = type(saved[name]) is type(default) or (default is None and type(saved[name]) is str)
            if not type_fits or saved[name] not in choices:
                raise TypeError(f"{name} is {saved[name]!r}")
    except Exception as error:
        raise UsageError(f"--resume {run_folder}: not a run folder of this script: {path}: {error!r}") from error
    return Args(**saved)


def check_resumed(config: dict, saved: dict) -> None:
    """Raises UsageError for a flag that would change the result; says where the machine may."""
    for name, now in json.loads(json.dumps(config)).items():
        if name not in HARMLESS and now != saved.get(name):
            difference = f"{name} is {now}, {saved.get(name)} in the run to resume"
            if name in Args.__dataclass_fields__:
                raise UsageError(f"--resume: {difference}, whose result it would change; drop it, or start a new run")
            print(f"note: {difference}; the last bits of the results may differ", file=sys.stderr)


def get_random_states(device: torch.device) -> dict:
    """Of Python, NumPy and PyTorch, as JSON knows them."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state().tolist()}
    return states | {"cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None}


def set_random_states(states: dict, device: torch.device) -> None:
    """Raises one of several errors if they are none."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    mt19937 = states["numpy"]["state"]
    if not 0 <= mt19937["pos"] <= 624:  # NumPy takes it as it is
        raise ValueError("random state of NumPy")
    np.random.set_state({**states["numpy"], "state": {**mt19937, "key": np.array(mt19937["key"], np.uint32)}})
    torch_state = torch.tensor(states["torch"], dtype=torch.uint8)
    left, position = (int.from_bytes(bytes(states["torch"][i : i + 4]), "little") for i in (8, 16))
    if (left, position) != (1, 0) and left + position != 625:  # as PyTorch's generator keeps them; it takes any
        raise ValueError("random state of PyTorch")
    torch.set_rng_state(torch_state)
    if states["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8), device)


def env_attributes(env: gym.Env) -> dict[str, tuple[gym.Env, str, Any]]:
    """Attributes of an environment and of its wrappers that may change: path to (owner, name, value)."""
    layers, constant = [env], {"spec", "render_mode", "mujoco_renderer", "_ezpickle_args", "_ezpickle_kwargs"}
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    layers = [x for x in layers if not isinstance(x, gym.wrappers.PassiveEnvChecker | gym.wrappers.RecordVideo)]
    attributes = {"action_space": (env, "action_space", env.action_space)}  # of the class, perhaps
    for i, layer in enumerate(layers):
        skipped = constant | {"env", "func", "_cached_spec", "_saved_kwargs"} if layer is not layers[-1] else constant
        attributes |= {f"{i}.{name}": (layer, name, x) for name, x in vars(layer).items() if name not in skipped}
    return attributes


def mujoco_arrays(model: mujoco.MjModel) -> list[str]:
    """Arrays of MjData that steps leave behind for the next one to look at, such as `xpos`."""
    empty = mujoco.MjData(model)  # without contacts: what depends on their number is made anew in every step
    arrays = [(name, getattr(empty, name)) for name in dir(empty) if not name.startswith("_")]
    return [name for name, value in arrays if isinstance(value, np.ndarray) and value.dtype == float and value.size]


def encode(value: Any) -> Any:
    """A value of an environment's attribute for JSON, to the bit and with its type. Raises TypeError if it has none."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if (type(value) is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biuf":
        array = {"array": value.ravel().tolist(), "dtype": value.dtype.str, "shape": list(value.shape)}
        return array | {"scalar": isinstance(value, np.generic)}
    if isinstance(value, gym.Space | np.random.Generator):
        generator = value.np_random if isinstance(value, gym.Space) else value
        return {"generator": json.loads(json.dumps(generator.bit_generator.state))}
    if isinstance(value, mujoco.MjModel):
        content = np.empty(mujoco.mj_sizeModel(value), np.uint8)
        mujoco.mj_saveModel(value, None, content)
        return {"model": hashlib.sha256(content).hexdigest()}
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def decode(saved: Any) -> Any:
    """The value of an `encode`, if it is made of numbers, strings and arrays. Raises one of several errors if not."""
    if not isinstance(saved, dict):
        return saved
    kind, content = next(iter(saved.items()))
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](decode(item) for item in content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind != "array" or np.dtype(saved["dtype"]).kind not in "biuf":
        raise ValueError(f"a {kind} cannot be made anew")
    array = np.array(content, saved["dtype"]).reshape(saved["shape"])
    return array[()] if saved["scalar"] else array


def get_env_state(env: gym.Env, obs: np.ndarray) -> dict:
    """All that an environment and its wrappers hold, for JSON, or the reason why there is no such form."""
    state, path = {}, "state"
    try:
        for path, (owner, _, value) in env_attributes(env).items():
            if isinstance(value, mujoco.MjData):
                physics = np.empty(mujoco.mj_stateSize(owner.model, mujoco.mjtState.mjSTATE_INTEGRATION))
                mujoco.mj_getState(owner.model, value, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
                arrays = {array: encode(getattr(value, array)) for array in mujoco_arrays(owner.model)}
                state[path] = {"physics": encode(physics), "arrays": arrays}
            else:
                state[path] = encode(value)
        return {"obs": encode(np.asarray(obs)), "attributes": state}
    except Exception as error:  # an environment may hold anything
        return {"reason": f"its {path.split('.')[-1]}: {error}"}


def set_env_state(env: gym.Env, state: dict) -> np.ndarray:
    """Bring an environment that was reset to a state of `get_env_state`. Returns the observation.

    Raises one of several errors if it cannot.
    """
    if "reason" in state:
        raise ValueError(state["reason"])
    attributes = env_attributes(env)
    if different := attributes.keys() ^ state["attributes"].keys():
        raise ValueError(f"its attributes {sorted(different)} come and go")
    for path, (owner, name, value) in attributes.items():
        saved = state["attributes"][path]
        if isinstance(value, mujoco.MjData):
            for array in mujoco_arrays(owner.model):
                getattr(value, array)[...] = decode(saved["arrays"][array])
            mujoco.mj_setState(owner.model, value, decode(saved["physics"]), mujoco.mjtState.mjSTATE_INTEGRATION)
        elif encode(value) == saved:
            continue  # most are constants
        elif isinstance(value, gym.Space | np.random.Generator):
            generator = value.np_random if isinstance(value, gym.Space) else value
            generator.bit_generator.state = saved["generator"]
        elif isinstance(value, np.ndarray) and value.base is not None:
            raise ValueError(f"its {name} is a part of another array")
        else:
            setattr(owner, name, decode(saved))
    obs = decode(state["obs"])
    if obs.shape != env.observation_space.shape:
        raise ValueError(f"its observation has the shape {obs.shape}")
    return obs


def resume(
    checkpoints: Checkpoints, config: dict, agent: "TD3", buffer: ReplayBuffer, env: gym.Env
) -> tuple[dict, np.ndarray]:
    """Bring everything to the newest whole checkpoint. Returns its state and the observation. Raises UsageError."""
    state, tensors = checkpoints.read()
    try:
        check_resumed(config, state["config"])
        if type(state["step"]) is not int or type(state["evaluation_due"]) is not bool or state["step"] < 1:
            raise ValueError(f"step {state['step']}")
        if state["step"] > config["total_timesteps"]:
            raise UsageError(f"--total-timesteps is {config['total_timesteps']}; the run is at {state['step']} already")
        agent.load_state_dict(tensors)
        checkpoints.read_replay(buffer)
        try:
            obs = set_env_state(env, state["env"])
        except Exception as error:
            print(f"note: the environment cannot be brought back ({error}): on with a new episode", file=sys.stderr)
            env.action_space.seed(config["seed"] + state["step"])
            obs, _ = env.reset(seed=config["seed"] + state["step"])
            state["episode"] = [0.0, 0]
        set_random_states(state["random"], torch.device(config["device"]))
        state["episode"] = [float(state["episode"][0]), int(state["episode"][1])]
        state["actor_loss"], log = float(state["actor_loss"]), state["log"]
        log["returns"] = [float(log["returns"][0]), float(log["returns"][1])]
        log["files"] = {name: int(size) for name, size in log["files"].items()}
        if not (math.isfinite(log["seconds"]) and buffer.size):
            raise ValueError("wall time or replay buffer")
    except (UsageError, EnvironmentFault):
        raise
    except Exception as error:  # each part of what was read has errors of its own
        raise UsageError(f"--resume {checkpoints.folder.parent}: damaged checkpoint: {error!r}") from error
    return state, obs


# ---------------------------------------------------------------- TD3


@torch.no_grad()
def polyak_update(online: nn.Module, target: nn.Module, tau: float) -> None:
    """W' <- tau W + (1 - tau) W'."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class TD3:
    """Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018)."""

    def __init__(self, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray, args: Args, device: torch.device):
        self.args = args
        self.actor = Actor(obs_dim, action_low, action_high, args.hidden_sizes).to(device)
        self.qf1 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        self.qf2 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        if one_dnn_is_faster(device):
            for network in (self.actor, self.qf1, self.qf2):
                network.net = FusedSequential(*network.net)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = copy.deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = copy.deepcopy(self.qf2).requires_grad_(False)
        names = ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target")
        self.networks = {name: getattr(self, name) for name in names}
        critic_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(critic_parameters, lr=args.learning_rate, fused=True)

    def update_critics(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """One gradient step of both critics on a batch of `ReplayBuffer.sample`.

        Returns: values of critic 1 and 2 before the step, and their target, each [B]; see `critic_scalars`.
        """
        args, actor = self.args, self.actor
        obs, action, next_obs, reward, terminated = batch
        noise = (torch.randn_like(action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        noise *= actor.action_scale
        with torch.no_grad():
            next_action = (self.actor_target(next_obs) + noise).clamp(actor.action_low, actor.action_high)
            next_q = torch.min(self.qf1_target(next_obs, next_action), self.qf2_target(next_obs, next_action))
            target_q = reward + (1 - terminated) * args.gamma * next_q  # [B]
        qf1_values, qf2_values = self.qf1(obs, action), self.qf2(obs, action)
        qf_loss = F.mse_loss(qf1_values, target_q) + F.mse_loss(qf2_values, target_q)
        self.q_optimizer.zero_grad()
        qf_loss.backward()
        self.q_optimizer.step()
        return qf1_values.detach(), qf2_values.detach(), target_q

    def update_actor(self, obs: torch.Tensor) -> torch.Tensor:
        """One gradient step of the actor. Returns the loss before it."""
        actor_loss = -self.qf1(obs, self.actor(obs)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # the critic gets no gradient here
        self.actor_optimizer.step()
        return actor_loss.detach()

    def update_targets(self) -> None:
        """Polyak update of the three targets."""
        for name in ("actor", "qf1", "qf2"):
            polyak_update(self.networks[name], self.networks[f"{name}_target"], self.args.tau)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that training changes, networks and optimizers, by names such as `q_optimizer.0.exp_avg`."""
        states = {name: network.state_dict() for name, network in self.networks.items()}
        for name in ("actor_optimizer", "q_optimizer"):
            moments = getattr(self, name).state_dict()["state"].items()
            states[name] = {f"{i}.{key}": value for i, state in moments for key, value in state.items()}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises one of several errors if names or shapes are not those of `state_dict`."""
        states = defaultdict(dict)
        for path, tensor in tensors.items():
            name, key = path.split(".", 1)
            states[name][key] = tensor
        for name, network in self.networks.items():
            network.load_state_dict(states.pop(name))
        for name in ("actor_optimizer", "q_optimizer"):
            optimizer, moments = getattr(self, name), defaultdict(dict)
            for path, tensor in states.pop(name, {}).items():
                i, key = path.split(".")
                moments[int(i)][key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            parameters = optimizer.param_groups[0]["params"] if moments else []
            found = [{key: value.shape for key, value in optimizer.state[x].items()} for x in parameters]
            expected = [{"step": (), "exp_avg": x.shape, "exp_avg_sq": x.shape} for x in parameters]
            if found != expected or len(moments) != len(parameters):
                raise ValueError(f"the state of {name} does not fit")
        if states:
            raise ValueError(f"{sorted(states)} are no part of an agent")


# ---------------------------------------------------------------- training


def train(args: Args) -> tuple[TD3, ReplayBuffer, Path]:
    """Returns agent, buffer, run folder.

    Raises: UsageError before any work; FloatingPointError for NaN or infinity; EnvironmentFault; OSError for a full
    disk, say; KeyboardInterrupt or SystemExit after SIGINT or SIGTERM. The checkpoints stay whole.
    """
    check_args(args)
    env, eval_env = make_env(args.env_id, args.capture_video), make_env(args.env_id)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    env.action_space.seed(args.seed)

    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    try:
        agent = TD3(obs_dim, env.action_space.low, env.action_space.high, args, device)
        buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"no memory for --hidden-sizes or --buffer-size; lower them: {error!r}") from error
    config = run_config(args, device)
    folder, lock = claim_run_folder(args)
    checkpoints, log, state = Checkpoints(folder), None, {}
    global_step, episodic_return, episodic_length, actor_loss, evaluation_due = 0, 0.0, 0, math.nan, False
    profile, pool = Profile(), ThreadPoolExecutor(1)
    lap = profile.lap if args.profile else lambda part: None

    def evaluation() -> bool:
        """False if a signal cut it short."""
        returns = evaluate(agent.actor.act, eval_env, args.eval_episodes, args.seed + 100, lambda: signals.received)
        if returns:
            log.evaluation(global_step, returns)
        return returns is not None

    def checkpoint(env_state: dict) -> None:
        state = {"config": config, "step": global_step, "episode": [episodic_return, episodic_length], "env": env_state}
        state |= {
            "actor_loss": float(actor_loss),
            "evaluation_due": evaluation_due,
            "random": get_random_states(device),
        }
        state["log"] = log.state()
        if f"{global_step:09d}" in checkpoints.kept or not buffer.size:
            return  # there is one already, or nothing to go on from
        try:
            checkpoints.write(global_step, state, agent, buffer)
        except OSError as error:
            print(f"warning: no checkpoint at step {global_step}, the one before is kept: {error}", file=sys.stderr)

    try:
        if args.resume:
            env.reset(seed=args.seed)
            state, obs = resume(checkpoints, config, agent, buffer, env)
            global_step, (episodic_return, episodic_length) = state["step"], state["episode"]
            actor_loss, evaluation_due = state["actor_loss"], state["evaluation_due"]
        if args.capture_video:  # of a resumed run from its next episode on, beside those before
            prefix = f"rl-video-resumed-{global_step}" if args.resume else "rl-video"
            env = gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=prefix)
        if not args.resume:
            obs, _ = env.reset(seed=args.seed)
        log, signals = RunLog(folder, config, state.get("log")), StopSignals()
        resumed = f", resumed at step {global_step}" if args.resume else ""
        print(f"{args.env_id} on {device}, {torch.get_num_threads()} threads, run folder {folder}{resumed}", flush=True)
        if evaluation_due:
            evaluation_due = not evaluation()
        lap("start")
        steps = range(global_step + 1, args.total_timesteps + 1)
        for global_step in steps if not evaluation_due else ():
            if global_step <= args.learning_starts:
                action = env.action_space.sample()
            else:
                action = agent.actor.act(obs, args.exploration_noise)
                check_finite({"observation": obs, "action": action}, global_step, agent)
            lap("acting")
            # the environment steps now in a thread, or after the update: the newest transition joins the next batch
            step = pool.submit(env.step, action).result if args.overlap else functools.partial(env.step, action)
            lap("environment")

            last = global_step == args.total_timesteps
            evaluating = args.eval_interval > 0 and (global_step % args.eval_interval == 0 or last)
            update = global_step - max(args.learning_starts, 1)  # critic updates, with the one that comes now
            evaluation_due = evaluating
            if update >= 1:
                batch = buffer.sample(args.batch_size, device)
                lap("sampling")
                values = agent.update_critics(batch)
                lap("critics")
                if update % args.policy_frequency == 0:
                    actor_loss = agent.update_actor(batch[0])
                    lap("actor")
                    agent.update_targets()
                    lap("targets")

            next_obs, reward, terminated, truncated, _ = step()
            buffer.add(obs, action, next_obs, reward, terminated)
            obs = next_obs
            episodic_return += reward
            episodic_length += 1
            lap("environment")
            if terminated or truncated:
                log.episode(global_step, episodic_return, episodic_length)
                lap("logging")
                obs, _ = env.reset()
                episodic_return, episodic_length = 0.0, 0
                lap("environment")

            if update >= 1 and (update % 100 == 0 or evaluating or last):
                losses = critic_scalars(*values)
                if update >= args.policy_frequency:
                    losses["losses/actor_loss"] = float(actor_loss)
                check_finite(losses | {"action": agent.actor.act(obs)}, global_step, agent)
                log.scalars(losses, global_step)
                lap("logging")
            if evaluating:
                evaluation_due = not evaluation()
                lap("evaluation")
            if global_step % 100 == 0 or last:
                log.progress(global_step)
                lap("logging")
            if args.checkpoint_interval and (global_step % args.checkpoint_interval == 0 or last or signals.received):
                checkpoint(get_env_state(env, obs))
                lap("checkpoint")
            if signals.received:
                break
        log.flush()
        if args.profile:
            log.bar.close()
            print(profile)
    except EnvironmentFault as error:
        if log and args.checkpoint_interval:
            exact = error.env is eval_env
            episodic_return, episodic_length = (episodic_return, episodic_length) if exact else (0.0, 0)
            checkpoint(get_env_state(env, obs) if exact else {"reason": str(error)})
        raise EnvironmentFault(f"step {global_step}: {error}{checkpoints.advice()}", error.env) from error
    except OSError as error:
        raise OSError(f"step {global_step}: {error}{checkpoints.advice()}") from error
    finally:
        closing = [pool.shutdown, env.close, eval_env.close, lock.release]  # the pool before the environment in it
        if log:
            closing = [log.close, signals.close, *closing]
            if args.save_model and not isinstance(sys.exception(), FloatingPointError):
                closing = [lambda: save_model(folder / "model.pt", agent, args), *closing]
        for close in closing:
            try:
                close()
            except Exception as error:  # a full disk, a simulator that is dead: the rest is closed all the same
                print(f"warning: at the end: {error!r}", file=sys.stderr)
    if signals.received:
        logs = f"everything so far is in {folder}"
        print(f"\ninterrupted at step {global_step}; {logs}{checkpoints.advice()}", file=sys.stderr)
        raise KeyboardInterrupt if signals.received == signal.SIGINT else SystemExit(128 + signals.received)
    return agent, buffer, folder


def critic_scalars(qf1_values: torch.Tensor, qf2_values: torch.Tensor, target_q: torch.Tensor) -> dict[str, float]:
    """What to log of what `TD3.update_critics` returns: computed when it is, since that is once in 100 updates."""
    log = {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean()}
    log |= {"qf1_loss": F.mse_loss(qf1_values, target_q), "qf2_loss": F.mse_loss(qf2_values, target_q)}
    log["qf_loss"] = (log["qf1_loss"] + log["qf2_loss"]) / 2
    return {f"losses/{name}": value.item() for name, value in log.items()}


def check_finite(values: dict[str, float | np.ndarray], step: int, agent: TD3) -> None:
    """Raises FloatingPointError with the step, the networks and what to try if a value is not finite."""
    for name, value in values.items():
        if not np.isfinite(value).all():
            broken = [k for k, net in agent.networks.items() if not all(p.isfinite().all() for p in net.parameters())]
            advice = "lower --learning-rate, and check the size of rewards and observations; all files are kept"
            raise FloatingPointError(f"step {step}: not finite: {name}, networks {broken or 'none yet'}; {advice}")


def main() -> int:
    """Exit code: 0 done, 1 stopped by a fault, 2 bad input, 130 interrupted (SIGINT), 143 terminated (SIGTERM)."""
    args = tyro.cli(Args, description=__doc__)
    threading.excepthook = thread_excepthook
    try:
        if args.resume:  # its flags are the defaults
            saved = saved_args(args.resume)
            check_import(saved.env_id, args)
            args = tyro.cli(Args, description=__doc__, default=saved)
        train(args) if args.evaluate is None else evaluate_model(args)
    except (UsageError, EnvironmentFault, FloatingPointError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library had to say
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
