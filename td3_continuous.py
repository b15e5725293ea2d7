# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "wandb==0.31.0", "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1"]
# ///
"""TD3 (Fujimoto et al. 2018), the dense twin of rnm_td3_continuous.py."""

import copy
import difflib
import functools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
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


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line: what is wrong and what to do."""


def check_args(args: Args) -> None:
    """Refuse arguments that make no sense, before any work. Raises UsageError."""
    limits = dict.fromkeys(["total_timesteps", "buffer_size", "policy_frequency", "eval_episodes"], (1, math.inf))
    limits |= dict.fromkeys(["policy_noise", "exploration_noise", "noise_clip", "learning_rate"], (0, math.inf))
    limits |= {"gamma": (0, 1), "tau": (0, 1), "eval_interval": (0, math.inf), "seed": (0, 2**31)}
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
    if not args.exp_name or args.exp_name != Path(args.exp_name).name:
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
        self.capacity, self.position, self.size = capacity, 0, 0

    def add(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool) -> None:
        """`next_obs` is what the step returned, not what a reset after it did; `terminated` excludes truncation."""
        np.concatenate((obs, action, next_obs, (reward, terminated)), out=self.rows_numpy[self.position])
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Uniform with replacement: obs [B, O], action [B, A], next_obs [B, O], reward [B], terminated [B]."""
        drawn = torch.randint(self.size, (batch_size,))
        batch = self.rows.index_select(0, drawn).to(device)  # in a fifth of the time of self.rows[drawn]
        obs, action, next_obs, reward, terminated = batch.split(self.widths, dim=1)
        return obs, action, next_obs, reward.squeeze(1), terminated.squeeze(1)


# ---------------------------------------------------------------- environment


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
    return env if len(obs.shape) == 1 else gym.wrappers.FlattenObservation(env)


def evaluate(policy: Callable[[np.ndarray], np.ndarray], env: gym.Env, episodes: int, seed: int) -> list[float]:
    """Undiscounted return of each episode. The seed fixes the initial states: every evaluation sees the same ones."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        episodic_return, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            episodic_return += float(reward)
            done = terminated or truncated
        returns.append(episodic_return)
    return returns


# ---------------------------------------------------------------- run folder


class RunLog:
    """The run folder with configuration, TensorBoard events and CSV files; the progress bar; W&B if asked."""

    def __init__(self, args: Args, device: torch.device):
        started = int(time.time())
        while True:
            name = f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}__{started}"
            self.folder = Path("runs", name)
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:  # two runs started in the same second
                started += 1
            except OSError as error:
                raise UsageError(f"cannot make the run folder {self.folder}: {error.strerror}") from error
        config = {**vars(args), "device": str(device), "num_threads": torch.get_num_threads()}
        config["versions"] = {package.__name__: package.__version__ for package in (torch, gym, mujoco, np)}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))
        self.wandb = None
        if args.track:
            import wandb  # here, since it takes a second

            options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "config": config}
            try:
                self.wandb = wandb.init(**options, sync_tensorboard=True, save_code=True)
            except Exception as error:  # no key, no network, a wrong mode
                raise UsageError(f"--track: {error!r}; run `wandb login`, or set WANDB_MODE=offline") from error
        self.writer = SummaryWriter(str(self.folder))
        self.writer.add_text("hyperparameters", "\n".join(f"    {key}: {value}" for key, value in config.items()))
        self.append("episodes.csv", ["step", "return", "length", "seconds"])
        self.append("evaluations.csv", ["step", *(f"return_{i + 1}" for i in range(args.eval_episodes)), "mean", "std"])
        self.start = self.last_line = time.time()
        self.last_return = self.last_evaluation = math.nan
        self.bar = tqdm(total=args.total_timesteps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

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

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


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
    torch.save(model, path.with_suffix(".incomplete"))
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
    env = make_env(model["args"]["env_id"], args.capture_video)
    if env.observation_space.shape != (model["obs_dim"],):
        raise UsageError(f"{args.evaluate}: made for {model['obs_dim']} inputs, unlike {env.spec.id} as it is here")
    if args.capture_video:
        videos = f"{Path(args.evaluate).parent}/videos"
        env = gym.wrappers.RecordVideo(env, videos, lambda _: True, name_prefix="evaluation")
    returns = evaluate(policy, env, args.eval_episodes, args.seed)
    env.close()
    print(f"returns {np.round(returns, 2).tolist()}, mean {np.mean(returns):.2f}, std {np.std(returns):.2f}")


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


# ---------------------------------------------------------------- training


def train(args: Args) -> tuple[TD3, ReplayBuffer, Path]:
    """Returns agent, buffer, run folder. Raises UsageError before any work, FloatingPointError for NaN or infinity."""
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
    log = RunLog(args, device)
    global_step, episodic_return, episodic_length = 0, 0.0, 0
    profile, pool = Profile(), ThreadPoolExecutor(1)
    lap = profile.lap if args.profile else lambda part: None
    try:
        print(f"{args.env_id} on {device}, {torch.get_num_threads()} threads, run folder {log.folder}", flush=True)
        if args.capture_video:
            env = gym.wrappers.RecordVideo(env, str(log.folder / "videos"))
        obs, _ = env.reset(seed=args.seed)
        lap("start")
        for global_step in range(1, args.total_timesteps + 1):
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
            buffer.add(obs, action, next_obs, float(reward), terminated)
            obs = next_obs
            episodic_return += float(reward)
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
                    losses["losses/actor_loss"] = actor_loss.item()
                check_finite(losses | {"action": agent.actor.act(obs)}, global_step, agent)
                log.scalars(losses, global_step)
                lap("logging")
            if evaluating:
                log.evaluation(global_step, evaluate(agent.actor.act, eval_env, args.eval_episodes, args.seed + 100))
                lap("evaluation")
            if global_step % 100 == 0 or last:
                log.progress(global_step)
                lap("logging")
        if args.profile:
            log.bar.close()
            print(profile)
    except KeyboardInterrupt:
        print(f"\ninterrupted at step {global_step}; everything so far is in {log.folder}", file=sys.stderr)
        raise
    finally:
        if args.save_model:  # first, since closing may take long or fail
            save_model(log.folder / "model.pt", agent, args)
        pool.shutdown()  # before the environment that steps in it
        for resource in (log, env, eval_env):
            resource.close()
    return agent, buffer, log.folder


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
    """Exit code: 0 done, 1 stopped at a non-finite value, 2 bad input, 130 interrupted."""
    args = tyro.cli(Args, description=__doc__)
    try:
        train(args) if args.evaluate is None else evaluate_model(args)
    except (UsageError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library had to say
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
