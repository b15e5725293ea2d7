# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "numpy==2.4.6", "tyro==1.0.17",
#   "wandb==0.31.0", "safetensors==0.8.0", "filelock==4.2.12", "tensorboard==2.21.0", "tqdm==4.70.1", "moviepy==2.2.1",
#   "ninja==1.13.2"]
# ///
"""RNM-TD3: TD3 whose six networks are N:M sparse from the first step to the last (arXiv 2602.14578)."""

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
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
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
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from torch.utils import cpp_extension
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

    n: int = 2  # N: active weights in each group of M
    m: int = 4  # M: consecutive inputs of a neuron that form a group
    mask_update_interval: int = 1000  # K: critic updates between projections of all networks (0 = masks never change)
    target_mask: Literal["own", "online"] = "own"  # targets' masks: projection of their own weights, or online's masks
    dense_layers: Literal["none", "first", "last", "first,last"] = "none"  # layers of every network that stay dense
    backend: Literal["auto", "masked", "native", "semi_structured"] = "auto"  # of the products; auto: the fastest here
    semi_structured_dtype: Literal["bfloat16", "float16"] = "bfloat16"  # of its 2:4 products (1:2 has float32 alone)
    save_masks: bool = True  # write all masks to `masks/` in the run folder, at the start and at every projection


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
    limits |= {"m": (1, math.inf), "n": (1, args.m), "mask_update_interval": (0, math.inf)}
    reasons = {"batch_size": " (--buffer-size)", "learning_starts": " (--total-timesteps)", "n": " (--m)"}
    for name, (low, high) in limits.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{flag} is {value}; give a number from {low} to {high}{reasons.get(name, '')}")
    if min(args.hidden_sizes, default=0) < 1:
        raise UsageError(f"--hidden-sizes is {args.hidden_sizes}; give one or more sizes of at least 1")
    if args.dense_layers == "first,last" and len(args.hidden_sizes) == 1:
        raise UsageError("--dense-layers first,last leaves nothing sparse; give --hidden-sizes a second layer")
    if args.overlap and args.capture_video:
        raise UsageError("--overlap steps the environment in a thread, where it cannot be filmed; drop --capture-video")
    if args.resume and args.evaluate:
        raise UsageError("--resume trains, --evaluate does not; give one of them")
    if not args.exp_name or args.exp_name != Path(args.exp_name).name or not args.exp_name.isprintable():
        raise UsageError(f"--exp-name is {args.exp_name!r}; give a plain name without slashes")


# ---------------------------------------------------------------- the N:M layer


def nm_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask E of the projection P_NM(W): in every row, the n largest magnitudes of each m consecutive columns.

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
    """Drop-in for `nn.Linear` whose weight is row-wise N:M sparse: y = x (E * W)^T + b.

    Every row has the same number A of active weights, so the active ones form a dense matrix:
      values  [R, A] parameter: the active weights, all that forward, backward and the optimizer ever see
      index   [R, A] int64: their columns, ascending in each row
      master  [R, C] dense W: its inactive entries (E = 0) are frozen until a projection brings them back;
                     its active entries are as old as the last `sync()`
      {key}_master   [R, C] the same of the optimizer's state (`exp_avg_master`), from the first projection on
    Backends compute the same: `masked` with W~ as a dense matrix, the reference; `native` with kernels that skip the
    zeros (float32 on the CPU); `semi_structured` with PyTorch's tensors of that name (CUDA).
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, n: int, m: int,
        linear: nn.Linear | None = None, backend: str = "masked", product_dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        """Initialised as `nn.Linear`, on the dense W, or with a copy of `linear`. Raises ValueError for a wrong N:M."""
        super().__init__()
        linear = copy.deepcopy(linear) if linear else nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features, self.n, self.m = in_features, out_features, n, m
        self.backend, self.product_dtype = backend, torch.float32 if m == 2 else product_dtype
        self.register_buffer("master", linear.weight.detach().contiguous())
        self.register_buffer("index", self._projected_index())
        self.values = nn.Parameter(self.master.gather(1, self.index))
        self.bias = linear.bias
        self.register_buffer("layout", None, persistent=False)  # what the backend makes of the index
        self.refresh()

    @classmethod
    def from_linear(cls, linear: nn.Linear, n: int, m: int, **options) -> "NMLinear":
        """The N:M projection of a dense layer (a copy). Raises ValueError if not 1 <= n <= m."""
        return cls(linear.in_features, linear.out_features, n=n, m=m, linear=linear, **options)

    def to_linear(self) -> nn.Linear:
        """Dense layer that computes the same, with zeros in place of the inactive weights (a copy)."""
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None)
        linear.to(self.values).load_state_dict({**self.state_dict(), "weight": self.sparse_weight()}, strict=False)
        return linear

    def sparse_weight(self) -> torch.Tensor:
        """W~ = E * W, [R, C]; its gradient reaches the active weights alone."""
        return torch.zeros_like(self.master).scatter(1, self.index, self.values)

    def mask(self) -> torch.Tensor:
        """E, bool [R, C]."""
        return torch.zeros_like(self.master, dtype=torch.bool).scatter_(1, self.index, True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.backend == "native":
            return native_mlp(x, [self])
        if self.backend == "semi_structured":
            y = SemiStructuredProduct.apply(x.reshape(-1, self.in_features), self.values, self)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.sparse_weight(), self.bias)  # [B, C] -> [B, R]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.refresh()  # pickled on a machine with other registers, perhaps

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        names = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
        self._add_state_masters(name.removesuffix("_master") for name in names if name.endswith("_master"))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        index = self.index
        if (index < 0).any() or (index >= self.in_features).any() or (index.diff(dim=1) <= 0).any():
            raise ValueError(
                f"{prefix}index: columns of a row have to ascend and to lie in 0 to {self.in_features - 1}"
            )
        self.refresh()

    def refresh(self) -> None:
        """Follow a change of the index in what the backend keeps of it."""
        if self.backend == "native":
            if problem := load_kernels():
                raise RuntimeError(problem)
            self.layout = torch.ops.rnm_td3.layout(self.index, self.in_features)
        elif self.backend == "semi_structured":
            if (self.n, self.m) not in ((2, 4), (1, 2)):
                raise ValueError(f"semi-structured tensors are 2:4 or 1:2, not {self.n}:{self.m}")
            kind, mask = semi_structured_pad(self, self.mask())
            cutlass = kind is SparseSemiStructuredTensorCUTLASS
            self.layout = sparse_semi_structured_from_dense_cutlass(mask)[1] if cutlass else None

    @torch.no_grad()
    def sync(self) -> torch.Tensor:
        """Write the active weights to the dense master, and return it: W as it stands now, [R, C]."""
        return self.master.scatter_(1, self.index, self.values)

    @torch.no_grad()
    def polyak_(self, online: "NMLinear", tau: float) -> None:
        """W' <- tau W + (1 - tau) W' over all entries, active or not; the mask E' stays. b' likewise."""
        if self.backend == "native":
            return native_polyak([online], [self], tau)
        self.values.copy_(self.sync().lerp_(online.sync(), tau).gather(1, self.index))
        if self.bias is not None:
            self.bias.lerp_(online.bias, tau)

    @torch.no_grad()
    def project(self, optimizer: torch.optim.Optimizer | None = None, index: torch.Tensor | None = None) -> int:
        """E <- mask of P_NM(W), or the mask that a given `index` [R, A] stands for.

        The weights, and whatever the optimizer holds for each of them (Adam: both moments), go through dense masters:
        an entry that leaves is frozen there, one that returns is picked up as it was.
        Returns: SAD, the number of entries of E that changed (Zhou et al. 2021, arXiv 2102.04010).
        """
        if self.backend == "native":
            return native_project([self], [optimizer], [] if index is None else [index])[0]
        states, state_masters = self.optimizer_state(optimizer)
        old_mask, master = self.mask(), self.sync()
        index = self._projected_index() if index is None else index
        for active, state_master in zip(states, state_masters, strict=True):
            active.copy_(state_master.scatter_(1, self.index, active).gather(1, index))
        self.values.copy_(master.gather(1, index))
        self.index.copy_(index)
        self.refresh()
        return int((self.mask() != old_mask).sum())

    def optimizer_state(self, optimizer: torch.optim.Optimizer | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the optimizer holds for each active weight, [R, A] each, and its dense masters, [R, C]."""
        state = optimizer.state.get(self.values, {}) if optimizer else {}
        state = {key: value for key, value in state.items() if torch.is_tensor(value) and value.dim()}  # not the step
        self._add_state_masters(state)
        return list(state.values()), [self._buffers[f"{key}_master"] for key in state]

    def _add_state_masters(self, keys: Iterable[str]) -> None:
        for key in keys:
            if f"{key}_master" not in self._buffers:
                self.register_buffer(f"{key}_master", torch.zeros_like(self.master))

    def _projected_index(self) -> torch.Tensor:
        return nm_mask(self.master, self.n, self.m).nonzero()[:, 1].reshape(self.out_features, -1).contiguous()


def sparsify(network: nn.Module, n: int, m: int, dense_layers: str = "none", **options) -> nn.Module:
    """Replace the linear layers of a network by N:M ones, in place; the first, last or both may stay dense.

    `options` are those of `NMLinear`: backend, product_dtype. `native` runs an nn.Sequential inside of it as one call.
    """
    linears = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    start, stop = int("first" in dense_layers), len(linears) - int("last" in dense_layers)
    for name in linears[start:stop]:
        network.set_submodule(name, NMLinear.from_linear(network.get_submodule(name), n, m, **options))
    for name, module in list(network.named_modules()) if options.get("backend") == "native" else ():
        if name and type(module) is nn.Sequential and NMSequential.fits(module._modules.values()):
            network.set_submodule(name, NMSequential(*module))
    return network


def density(network: nn.Module) -> float:
    """Share of active weights among all weights of a network, biases not counted."""
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, NMLinear))]
    active = sum((layer.values if isinstance(layer, NMLinear) else layer.weight).numel() for layer in layers)
    return active / sum(layer.in_features * layer.out_features for layer in layers)


def packed_masks(layers: dict[str, NMLinear]) -> np.ndarray:
    """The masks of all layers, each through `np.packbits`, one after the other."""
    return np.concatenate([np.packbits(layer.mask().cpu().numpy()) for layer in layers.values()])


def save_masks(folder: Path, layers: dict[str, NMLinear], step: int, update: int, previous: np.ndarray) -> np.ndarray:
    """Write the masks of all layers to `{update}.npz` and return their bits, to be given as `previous` next time.
    The file holds `step` (environment steps), `update` (critic updates), `layers` (names), `shapes` (rows, columns) and
    `bits`: `packed_masks`, XORed with the file before, since few entries change.
    """
    bits = packed_masks(layers)
    shapes = [tuple(layer.master.shape) for layer in layers.values()]
    folder.mkdir(exist_ok=True)
    with open(folder / "incomplete", "wb") as file:
        np.savez_compressed(file, step=step, update=update, layers=list(layers), shapes=shapes, bits=bits ^ previous)
    os.replace(folder / "incomplete", folder / f"{update:09d}.npz")
    return bits


# ---------------------------------------------------------------- CPU kernels

# Lanes are samples: a tile of samples lies feature-major, so that an active weight is one scalar times a few contiguous
# vectors. That skips the zeros of any pattern and size without gathers, and serves W~ and its transpose alike.
KERNELS = r"""
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
using at::Tensor, at::TensorList, std::min, std::max;

#if defined(__AVX512F__)
constexpr int V = 16;  // lanes of a vector
#elif defined(__AVX2__)
constexpr int V = 8;
#else
constexpr int V = 4;
#endif
constexpr int T = 8, TILE = T * V;  // one feature of a tile is 8 vectors: 8 sums hide the latency of a multiply-add
constexpr int BLOCK = 8192 / TILE;  // features of a tile that fill a first-level cache of 32 KB
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef uint16_t lanes __attribute__((vector_size(2 * V), aligned(2), may_alias));
INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE void store(float* p, vec v) { *(vec*)p = v; }

// Of V vectors in registers, swap the off-diagonal H x H blocks, then those of half the size, and so on: a transpose.
// Or add the halves instead: in the end, lane i of r[0] is the sum over the lanes of r[i].
template <bool ADD, int H, int... K> INLINE void swap_blocks(vec* r, std::integer_sequence<int, K...> k) {
  const ivec low = {(K & H ? V + K - H : K)...}, high = {(K & H ? V + K : K + H)...};
  UNROLL for (int i = 0; i < (ADD ? H : V); i++) if (!(i & H)) {
    const vec a = __builtin_shuffle(r[i], r[i + H], low), b = __builtin_shuffle(r[i], r[i + H], high);
    r[i] = ADD ? a + b : a;
    if (!ADD) r[i + H] = b;
  }
  if constexpr (H > 1) swap_blocks<ADD, H / 2>(r, k);
}
INLINE void transpose(vec* r) { swap_blocks<false, V / 2>(r, std::make_integer_sequence<int, V>()); }
INLINE void add_lanes(vec* r) { swap_blocks<true, V / 2>(r, std::make_integer_sequence<int, V>()); }

// A tile of x (batch-major, rows of C) to [C][TILE] (IN), or back. Samples that x lacks are zeros in the tile.
template <bool IN, bool WHOLE> INLINE void turn_block(float* x, int64_t C, float* tile, int samples, int features) {
  const int S = WHOLE ? V : samples, F = WHOLE ? V : features;
  vec r[V] = {};
  if (IN) {
    UNROLL for (int i = 0; i < S; i++) memcpy(&r[i], x + i * C, 4 * F);
    transpose(r);
    UNROLL for (int i = 0; i < F; i++) store(tile + i * TILE, r[i]);
  } else {
    UNROLL for (int i = 0; i < F; i++) r[i] = load(tile + i * TILE);
    transpose(r);
    UNROLL for (int i = 0; i < S; i++) memcpy(x + i * C, &r[i], 4 * F);
  }
}
template <bool IN> static void turn(const float* x, int64_t samples, int64_t C, float* tile) {
  for (int64_t c = 0; c < C; c += V) for (int64_t s = 0; s < TILE; s += V) {
    float *from = (float*)x + s * C + c, *to = tile + c * TILE + s;
    const int S = max<int64_t>(0, min<int64_t>(V, samples - s)), F = min<int64_t>(V, C - c);
    if (S == V && F == V) turn_block<IN, true>(from, C, to, S, F); else turn_block<IN, false>(from, C, to, S, F);
  }
}

// One layer. What its mask compiles to stands in one int tensor, `layout`:
//   range, column    W~: the values [begin, end) of each row by block of columns, [blocks][R][2]; their columns, [R][A]
//   t_range, row     its transpose: the like ranges [t_blocks][C][2]; the row of each value, column by column
//   place            where in the transpose each value of W~ stands, [R][A]
//   lane             column % V of V rows side by side, [R / V][A][V]; of use if the rows are regular: if value j of
//                    every row lies among the same V columns, as it does when M divides V
struct Layer {
  int64_t R, A, C, blocks, t_blocks, size;
  int *irregular, *range, *t_range, *place;
  uint16_t *column, *row;
  lanes* lane;
  Tensor values, bias;
  const float *v, *b = nullptr;
  Layer(int64_t R, int64_t A, int64_t C, int* p) : R(R), A(A), C(C), irregular(p), range(p + 1) {
    blocks = (C + BLOCK - 1) / BLOCK, t_blocks = (R + BLOCK - 1) / BLOCK;
    t_range = range + 2 * blocks * R, place = t_range + 2 * t_blocks * C;
    column = (uint16_t*)(place + R * A), row = column + R * A, lane = (lanes*)(row + R * A);
    size = place + 2 * R * A + (R + V - 1) / V * V / 2 * A - p;
  }
  Layer(int64_t C, const Tensor& values_, const Tensor& bias_, const Tensor& layout)
      : Layer(values_.size(0), values_.size(1), C, layout.data_ptr<int>()) {
    TORCH_CHECK(R > 0 && A > 0 && C > 0, "a layer has at least one weight");
    TORCH_CHECK(size == layout.numel(), "x or values do not fit the layout");
    TORCH_CHECK(bias_.numel() == R || bias_.numel() == 0, "the bias needs a number for each row, or none at all");
    values = values_.contiguous(), bias = bias_.contiguous(), v = values.data_ptr<float>();
    if (bias.numel()) b = bias.data_ptr<float>();
  }
};
static void write_layout(const Layer& l, const int64_t* id) {
  const int64_t R = l.R, A = l.A;
  memset(l.irregular, 0, 4 * l.size);
  for (int64_t r = 0; r < R; r++) for (int64_t b = 0, j = 0; b < l.blocks; b++) {
    l.range[2 * (b * R + r)] = r * A + j;
    for (const int64_t* row = id + r * A; j < A && row[j] < (b + 1) * BLOCK; j++) {
      l.column[r * A + j] = row[j];
      l.t_range[2 * (r / BLOCK * l.C + row[j]) + 1]++;  // at first the number of values,
      *l.irregular |= row[j] / V != id[j] / V;
    }
    l.range[2 * (b * R + r) + 1] = r * A + j;
  }
  for (int64_t i = 0, begin = 0; i < l.t_blocks * l.C; i++) {  // then where they begin,
    const int count = l.t_range[2 * i + 1];
    l.t_range[2 * i] = l.t_range[2 * i + 1] = begin;
    begin += count;
  }
  for (int64_t r = 0; r < R; r++) for (int64_t j = 0; j < A; j++) {
    const int64_t column = l.column[r * A + j];
    const int end = l.t_range[2 * (r / BLOCK * l.C + column) + 1]++;  // and last where they end
    l.row[end] = r, l.place[r * A + j] = end, l.lane[r / V * A + j][r % V] = column % V;
  }
}
Tensor layout(const Tensor& index_, int64_t columns) {
  TORCH_CHECK(index_.is_cpu(), "the native backend is for the CPU");
  const Tensor index = index_.contiguous();
  const int64_t R = index.size(0), A = index.size(1), *id = index.data_ptr<int64_t>();
  TORCH_CHECK(max(R, columns) <= 65536 && R * A <= INT_MAX / 4, "native layers have up to 65536 neurons");
  for (int64_t j = 0; j < R * A; j++) TORCH_CHECK(id[j] >= 0 && id[j] < columns, "index out of range");
  Tensor out = at::empty({Layer(R, A, columns, nullptr).size}, at::kInt);
  write_layout(Layer(R, A, columns, out.data_ptr<int>()), id);
  return out;
}

// A tile of Y = X W~^T + b, and of dX = G W~ with the transpose: out[r] = bias[r] + sum of v[j] in[index[j]] over the
// ranges of r. Then a ReLU, or its gradient: zero where the gate is.
static void product(const float* v, const uint16_t* index, const int* range, int64_t blocks, int64_t rows,
                    const float* in, float* out, const float* bias, bool relu, const float* gate) {
  for (int64_t block = 0; block < blocks; block++) for (int64_t r = 0; r < rows; r++, range += 2) {
    for (int j = range[2]; j < range[2] + range[1] - range[0]; j += 16)  // of the next row
      __builtin_prefetch(v + j), __builtin_prefetch(index + j);
    vec sum[T];
    UNROLL for (int k = 0; k < T; k++) sum[k] = block ? load(out + r * TILE + k * V) : vec{} + (bias ? bias[r] : 0);
    for (int j = range[0]; j < range[1]; j++) {
      const float* x = in + index[j] * TILE;
      UNROLL for (int k = 0; k < T; k++) sum[k] += v[j] * load(x + k * V);
    }
    const bool last = block == blocks - 1;
    if (last && relu) UNROLL for (int k = 0; k < T; k++) sum[k] = sum[k] < 0.f ? vec{} : sum[k];
    if (last && gate)
      UNROLL for (int k = 0; k < T; k++) sum[k] = load(gate + r * TILE + k * V) <= 0.f ? vec{} : sum[k];
    UNROLL for (int k = 0; k < T; k++) store(out + r * TILE + k * V, sum[k]);
  }
}

// dW~ at the active entries: dot products of a row of G^T with rows of X^T, V values of a row of W~ at once, a group of
// tiles after the other, so that the rows of X^T stay in the cache from one row of W~ to the next. And db.
static void weight_gradient(const Layer& l, const float* g, int64_t g_stride, const float* x, int64_t x_stride,
                            int64_t tiles, int64_t first, int64_t last, float* dv, float* db) {
  const int64_t group = max<int64_t>(2, BLOCK * l.A / (V * l.C));
  for (int64_t t0 = 0; t0 < tiles; t0 += group) for (int64_t j = 0; j < l.A; j += V)
    for (int64_t r = first; r < last; r++) {
      const int n = min<int64_t>(V, l.A - j);
      const float* xj[V];
      vec sum[V] = {}, gr[T];
      UNROLL for (int i = 0; i < V; i++) xj[i] = x + t0 * x_stride + l.column[r * l.A + j + min(i, n - 1)] * TILE;
      for (int64_t t = t0; t < min(tiles, t0 + group); t++) {
        UNROLL for (int k = 0; k < T; k++) gr[k] = load(g + t * g_stride + r * TILE + k * V);
        UNROLL for (int i = 0; i < V; i++) {
          UNROLL for (int k = 0; k < T; k++) sum[i] += gr[k] * load(xj[i] + k * V);
          xj[i] += x_stride;
        }
      }
      add_lanes(sum);
      float* d = dv + r * l.A + j;
      if (n == V) store(d, load(d) + sum[0]); else for (int i = 0; i < n; i++) d[i] += sum[0][i];
    }
  for (int64_t r = first; l.b && r < last; r++) {
    vec sum[V] = {};
    for (int64_t t = 0; t < tiles; t++) for (int k = 0; k < T; k++) sum[0] += load(g + t * g_stride + r * TILE + k * V);
    add_lanes(sum);
    db[r] = sum[0][0];
  }
}

// One sample, groups of V rows: lanes are rows, and x is picked from a register, if the rows are regular.
static void rows_of_sample(const Layer& l, const float* x, float* y, int64_t first, int64_t last, bool relu) {
  for (int64_t group = first; group < last; group++) {
    const int n = min<int64_t>(V, l.R - group * V);
    int64_t at[V], j = 0;
    vec sum, w[V];
    UNROLL for (int i = 0; i < V; i++) {
      const int64_t r = group * V + min(i, n - 1);
      at[i] = r * l.A, sum[i] = l.b ? l.b[r] : 0;
    }
    for (; j + V <= l.A && !*l.irregular; j += V) {
      UNROLL for (int i = 0; i < V; i++) w[i] = load(l.v + at[i] + j);
      transpose(w);
      UNROLL for (int i = 0; i < V; i++) {
        const vec near = load(x + l.column[j + i] / V * V);
        sum += w[i] * __builtin_shuffle(near, __builtin_convertvector(l.lane[group * l.A + j + i], ivec));
      }
    }
    for (; j < l.A; j++) UNROLL for (int i = 0; i < V; i++) sum[i] += l.v[at[i] + j] * x[l.column[at[i] + j]];
    sum = relu && sum < 0.f ? vec{} : sum;
    memcpy(y + group * V, &sum, 4 * n);
  }
}

template <int ID> static float* scratch(int64_t n) {  // kept per thread, aligned to cache lines
  static thread_local std::vector<float> buffer;
  if ((int64_t)buffer.size() < n + 16) buffer.resize(n + 16);
  return (float*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
}

// Linear layers with ReLU between them, with how many inputs, outputs and values come before each.
struct Network : std::vector<Layer> {
  std::vector<int64_t> inputs = {0}, outputs = {0}, values = {0};
  Network(const Tensor& x, TensorList layers) {  // values, bias, layout of each layer in turn
    TORCH_CHECK(layers.size() && layers.size() % 3 == 0, "needs values, bias and layout of each layer");
    TORCH_CHECK(x.dim() == 2 && x.is_cpu(), "needs x [B, C] on the CPU");
    for (size_t i = 0; i < layers.size(); i += 3) {
      const Layer& l = emplace_back(i ? back().R : x.size(1), layers[i], layers[i + 1], layers[i + 2]);
      inputs.push_back(inputs.back() + l.C), outputs.push_back(outputs.back() + l.R);
      values.push_back(values.back() + l.R * l.A);
    }
  }
};

// Each tile goes through all layers at once. The tape keeps the input of every layer, tiles as they are.
std::tuple<Tensor, Tensor> mlp(const Tensor& x_, TensorList layers, bool save) {
  const Network net(x_, layers);
  const Tensor x = x_.contiguous();
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, width = net.inputs.back();
  const Tensor y = at::empty({B, R}, x.options());
  const Tensor tape = at::empty({save ? (B + 127) / 128 * 128 * width : 0}, x.options());  // 128: the longest TILE
  const float* xp = x.data_ptr<float>();
  float *yp = y.data_ptr<float>(), *tp = tape.data_ptr<float>();
  if (!save && B < V) {  // acting: too few samples to fill the lanes
    for (int64_t s = 0; s < B; s++) {
      float* in = scratch<0>(width + R + 2 * V * (net.size() + 1));
      std::copy_n(xp + s * C, C, in);
      for (const Layer& l : net) {
        float* out = in + l.C + V;  // a register of the input may reach past its end
        at::parallel_for(0, (l.R + V - 1) / V, 65536 / (V * l.A) + 1, [&](int64_t first, int64_t last) {
          rows_of_sample(l, in, out, first, last, &l != &net.back());
        });
        in = out;
      }
      std::copy_n(in, R, yp + s * R);
    }
    return {y, tape};
  }
  const int64_t tiles = (B + TILE - 1) / TILE;
  if (save) std::fill(tp + tiles * TILE * width, tp + tape.numel(), 0);
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    float* own = scratch<0>((width + R) * TILE);
    for (int64_t t = first, s = t * TILE; t < last; t++, s += TILE) {
      float* in = save ? tp + t * width * TILE : own;
      turn<true>(xp + s * C, B - s, C, in);
      for (const Layer& l : net) {
        const bool hidden = &l != &net.back();
        float* out = hidden ? in + l.C * TILE : own + width * TILE;
        product(l.v, l.column, l.range, l.blocks, l.R, in, out, l.b, hidden, nullptr);
        in = out;
      }
      turn<false>(yp + s * R, B - s, R, in);
    }
  });
  return {y, tape};
}

std::tuple<Tensor, std::vector<Tensor>> mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& tape,
                                                     TensorList layers, bool need_x, bool need_w) {
  const Network net(x, layers);
  const Tensor g = grad.contiguous(), dx = at::empty({need_x ? x.size(0) : 0, x.size(1)}, x.options());
  const int64_t B = x.size(0), C = x.size(1), R = net.back().R, L = net.size(), tiles = (B + TILE - 1) / TILE;
  const int64_t width = net.inputs.back() * TILE, g_width = net.outputs.back() * TILE;
  TORCH_CHECK(g.size(0) == B && g.size(1) == R, "the gradient has another shape than the output");
  TORCH_CHECK(tape.numel() >= tiles * width, "no tape for a gradient: mlp was called with save=False");
  std::vector<Tensor> dw;  // of values and bias of each layer in turn
  for (const Layer& l : net) {
    dw.push_back(at::zeros({need_w ? l.R : 0, l.A}, x.options()));
    dw.push_back(at::zeros({need_w && l.b ? l.R : 0}, x.options()));
  }
  const float *gp = g.data_ptr<float>(), *tp = tape.data_ptr<float>();
  float *dxp = dx.data_ptr<float>(), *gt = scratch<1>(tiles * g_width), *vt = scratch<2>(net.values.back());
  for (int64_t i = !need_x; i < L; i++)
    at::parallel_for(0, net[i].R * net[i].A, 8192, [&](int64_t j, int64_t last) {
      for (; j < last; j++) vt[net.values[i] + net[i].place[j]] = net[i].v[j];
    });
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    float* own = scratch<0>(C * TILE);
    for (int64_t t = first, s = t * TILE; t < last; t++, s += TILE) {
      turn<true>(gp + s * R, B - s, R, gt + t * g_width + net.outputs[L - 1] * TILE);
      for (int64_t i = L - 1; i >= !need_x; i--) {
        const Layer& l = net[i];
        float *from = gt + t * g_width + net.outputs[i] * TILE, *to = i ? from - l.C * TILE : own;
        const float* gate = i ? tp + t * width + net.inputs[i] * TILE : nullptr;
        product(vt + net.values[i], l.row, l.t_range, l.t_blocks, l.C, from, to, nullptr, false, gate);
      }
      if (need_x) turn<false>(dxp + s * C, B - s, C, own);
    }
  });
  const int64_t shares = need_w ? at::get_num_threads() : 0;  // each thread takes a share of the rows of every layer
  at::parallel_for(0, shares, 1, [&](int64_t share, int64_t last) {
    for (; share < last; share++) for (int64_t i = 0; i < L; i++) {
      const int64_t begin = net[i].R * share / shares, end = net[i].R * (share + 1) / shares;
      weight_gradient(net[i], gt + net.outputs[i] * TILE, g_width, tp + net.inputs[i] * TILE, width, tiles, begin, end,
                      dw[2 * i].data_ptr<float>(), dw[2 * i + 1].data_ptr<float>());
    }
  });
  return {dx, dw};
}

// W' <- tau W + (1 - tau) W' over all entries, and b'. Both masters get their values first, then the target's follow.
void polyak(TensorList online, TensorList masters, TensorList target, TensorList target_masters, double tau) {
  TORCH_CHECK(online.size() == 3 * masters.size() && target.size() == online.size() &&
              target_masters.size() == masters.size(), "needs values, bias, layout and master of the same layers");
  const float share = tau;
  for (size_t i = 0; i < masters.size(); i++) {
    const int64_t C = masters[i].size(1);
    const Layer from(C, online[3 * i], online[3 * i + 1], online[3 * i + 2]);
    const Layer to(C, target[3 * i], target[3 * i + 1], target[3 * i + 2]);
    TORCH_CHECK(from.R == to.R && from.A == to.A && !from.b == !to.b && masters[i].size(0) == from.R &&
                masters[i].sizes() == target_masters[i].sizes(), "the two layers differ in shape");
    for (const Tensor& t : {target[3 * i], target[3 * i + 1], masters[i], target_masters[i]}) {
      TORCH_CHECK(t.is_contiguous(), "values, biases and masters have to be contiguous");
      t.unsafeGetTensorImpl()->bump_version();
    }
    float *w = masters[i].data_ptr<float>(), *tw = target_masters[i].data_ptr<float>();
    float *tv = (float*)to.v, *tb = (float*)to.b;
    at::parallel_for(0, from.R, 16384 / C + 1, [&](int64_t r, int64_t last) {
      for (; r < last; r++) {
        const int64_t begin = r * from.A, end = begin + from.A;
        for (int64_t j = begin; j < end; j++) w[r * C + from.column[j]] = from.v[j];
        for (int64_t j = begin; j < end; j++) tw[r * C + to.column[j]] = tv[j];
        int64_t c = r * C;
        for (; c + V <= (r + 1) * C; c += V) store(tw + c, load(tw + c) + share * (load(w + c) - load(tw + c)));
        for (; c < (r + 1) * C; c++) tw[c] += share * (w[c] - tw[c]);
        for (int64_t j = begin; j < end; j++) tv[j] = tw[r * C + to.column[j]];
        if (tb) tb[r] += share * (from.b[r] - tb[r]);
      }
    });
  }
}

// How many of its group of m, a divisor of V, are larger than each of V weights, or as large and in a lower column.
// Magnitudes are compared as integers, which the bits of positive floats are in the same order as; NaN is the largest.
INLINE ivec larger_ones(const float* w, int m) {
  const ivec magnitude = *(const ivec*)w & 0x7fffffff;
  ivec larger = {}, lane;
  UNROLL for (int i = 0; i < V; i++) lane[i] = i;
  for (int shift = 1; shift < m; shift++) {
    const ivec wrapped = (lane & (m - 1)) + shift >= m;
    const ivec other = __builtin_shuffle(magnitude, lane + shift + (wrapped & -m));
    larger -= (other > magnitude) | ((other == magnitude) & wrapped);
  }
  return larger;
}
// The columns from `c` to `end` of a row that P_NM keeps, ascending.
static void select(const float* w, int64_t c, int64_t end, int64_t n, int64_t m, int64_t* ids) {
  std::vector<uint64_t> group;
  for (; c < end; c += m) {
    for (int64_t i = c; i < min(c + m, end); i++) {
      uint32_t bits;
      memcpy(&bits, w + i, 4);
      group.push_back((uint64_t)(0x7fffffff - (bits & 0x7fffffff)) << 32 | i);
    }
    const int64_t kept = min<int64_t>(n, group.size());
    std::nth_element(group.begin(), group.begin() + kept - 1, group.end());
    for (int64_t i = 0; i < kept; i++) ids[i] = group[i] & 0xffffffff;
    std::sort(ids, ids + kept);
    ids += kept, group.clear();
  }
}
// The same for a whole row. Where the mask stays as it is `now`, V columns at once cost but a look.
static void select_row(const float* w, int64_t C, int64_t n, int64_t m, const int64_t* now, int64_t* ids) {
  int64_t c = 0;
  for (const int64_t kept = V / m * n; V % m == 0 && c + V <= C; c += V, now += kept, ids += kept) {
    const ivec larger = larger_ones(w + c, m);
    bool same = true;
    for (int64_t j = 0; j < kept; j++) same = same && (size_t)(now[j] - c) < V && larger[now[j] - c] < n;
    if (same) std::copy_n(now, kept, ids); else select(w, c, c + V, n, m, ids);
  }
  select(w, c, C, n, m, ids);
}

// NMLinear.project of several layers, with as many optimizer states each. Rows whose mask stays cost but the look.
std::vector<int64_t> project(TensorList values, TensorList index, TensorList masters, TensorList layouts,
                             TensorList states, TensorList state_masters, int64_t n, int64_t m, TensorList given) {
  const size_t L = values.size(), S = L ? states.size() / L : 0;
  TORCH_CHECK(index.size() == L && masters.size() == L && layouts.size() == L && states.size() == S * L &&
              state_masters.size() == S * L && (given.empty() || given.size() == L), "lists of different lengths");
  for (TensorList tensors : {values, index, masters, layouts, states, state_masters}) for (const Tensor& t : tensors) {
    TORCH_CHECK(t.is_contiguous(), "tensors have to be contiguous");
    t.unsafeGetTensorImpl()->bump_version();
  }
  std::vector<Layer> layers;
  std::vector<int64_t> changed(L);
  for (size_t i = 0; i < L; i++) {
    const int64_t R = values[i].size(0), A = values[i].size(1), C = masters[i].size(1);
    const Layer& l = layers.emplace_back(R, A, C, layouts[i].data_ptr<int>());
    TORCH_CHECK(l.size == layouts[i].numel() && index[i].sizes() == values[i].sizes() && masters[i].size(0) == R &&
                (given.empty() || given[i].sizes() == index[i].sizes()), "the tensors of a layer differ in shape");
    TORCH_CHECK(1 <= n && n <= m && A == C / m * n + min(n, C % m), "values do not have the size of this N:M");
    for (size_t s = i * S; s < (i + 1) * S; s++)
      TORCH_CHECK(states[s].sizes() == values[i].sizes() && state_masters[s].sizes() == masters[i].sizes(), "state");
    float *v = values[i].data_ptr<float>(), *w = masters[i].data_ptr<float>();
    int64_t *id = index[i].data_ptr<int64_t>(), *other = given.empty() ? nullptr : given[i].data_ptr<int64_t>();
    std::atomic<int64_t> sad = 0;
    at::parallel_for(0, R, 16384 / C + 1, [&](int64_t r, int64_t last) {
      std::vector<int64_t> next(A + V);
      for (; r < last; r++) {
        int64_t *now = id + r * A, stayed = 0;
        for (int64_t j = 0; j < A; j++) w[r * C + now[j]] = v[r * A + j];
        if (other) std::copy_n(other + r * A, A, next.data()); else select_row(w + r * C, C, n, m, now, next.data());
        if (std::equal(now, now + A, next.data())) continue;
        for (int64_t k = 0, j = 0; k < A && j < A;)
          if (now[k] == next[j]) stayed++, k++, j++; else if (now[k] < next[j]) k++; else j++;
        sad += 2 * (A - stayed);
        for (size_t s = i * S; s < (i + 1) * S; s++) {
          float *state = states[s].data_ptr<float>() + r * A, *all = state_masters[s].data_ptr<float>() + r * C;
          for (int64_t j = 0; j < A; j++) all[now[j]] = state[j];
          for (int64_t j = 0; j < A; j++) state[j] = all[next[j]];
        }
        for (int64_t j = 0; j < A; j++) now[j] = next[j], v[r * A + j] = w[r * C + next[j]];
      }
    });
    changed[i] = sad;
  }
  at::parallel_for(0, L, 1, [&](int64_t i, int64_t last) {
    for (; i < last; i++) if (changed[i]) write_layout(layers[i], index[i].data_ptr<int64_t>());
  });
  return changed;
}

// A step of torch.optim.Adam with fused=True, which spends more time on what surrounds it.
__attribute__((optimize("tree-vectorize"))) static void adam_range(int64_t n, float* __restrict p, float* __restrict m,
    float* __restrict s, const float* __restrict g, float beta1, float beta2, float rate, float correction, float eps) {
  for (int64_t i = 0; i < n; i++) {
    m[i] += (1 - beta1) * (g[i] - m[i]);
    s[i] = beta2 * s[i] + (1 - beta2) * g[i] * g[i];
    p[i] -= rate * m[i] / (std::sqrt(s[i]) / correction + eps);
  }
}
void adam(TensorList parameters, TensorList gradients, TensorList averages, TensorList squares, TensorList steps,
          double lr, double beta1, double beta2, double eps) {
  for (size_t i = 0; i < parameters.size(); i++) {
    for (const Tensor& t : {parameters[i], gradients[i], averages[i], squares[i]})
      TORCH_CHECK(t.is_contiguous() && t.numel() == parameters[i].numel(), "parameter, gradient and state do not fit");
    parameters[i].unsafeGetTensorImpl()->bump_version();
    float *p = parameters[i].data_ptr<float>(), *m = averages[i].data_ptr<float>(), *s = squares[i].data_ptr<float>();
    const float *g = gradients[i].data_ptr<float>(), step = *steps[i].data_ptr<float>() += 1;
    const double rate = lr / (1 - std::pow(beta1, step)), correction = std::sqrt(1 - std::pow(beta2, step));
    at::parallel_for(0, parameters[i].numel(), 16384, [&](int64_t j, int64_t last) {
      adam_range(last - j, p + j, m + j, s + j, g + j, beta1, beta2, rate, correction, eps);
    });
  }
}

// What the actor's output becomes; action_range: low, high, half the range, its middle.
static Tensor squash(const Tensor& output, TensorList action_range) {
  return output.tanh().mul_(action_range[2]).add_(action_range[3]);
}
Tensor act(const Tensor& obs, TensorList actor, TensorList action_range, double noise) {
  Tensor action = squash(std::get<0>(mlp(obs, actor, false)), action_range);
  if (noise > 0) action.add_(at::randn_like(action).mul_(action_range[2] * noise));
  return action.clamp_(action_range[0], action_range[1]);
}

// What TD3.update_critics does up to the optimizer's step; autograd would cost as much as the products. Returns the
// values of both critics, their target, and the gradients.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> critic_gradients(
    TensorList batch, TensorList action_range, double policy_noise, double noise_clip, double gamma,
    TensorList actor_target, TensorList qf1_target, TensorList qf2_target, TensorList qf1, TensorList qf2) {
  const Tensor &obs = batch[0], &action = batch[1], &next_obs = batch[2], &reward = batch[3], &terminated = batch[4];
  const auto q = [](const Tensor& x, TensorList net) { return std::get<0>(mlp(x, net, false)).squeeze(1); };
  Tensor noise = at::randn_like(action).mul_(policy_noise).clamp_(-noise_clip, noise_clip).mul_(action_range[2]);
  Tensor next_action = squash(std::get<0>(mlp(next_obs, actor_target, false)), action_range).add_(noise);
  const Tensor next_x = at::cat({next_obs, next_action.clamp_(action_range[0], action_range[1])}, 1);
  const Tensor next_q = at::minimum(q(next_x, qf1_target), q(next_x, qf2_target));
  const Tensor target_q = reward + (1 - terminated) * gamma * next_q, x = at::cat({obs, action}, 1);
  std::vector<Tensor> values, gradients;
  for (TensorList net : {qf1, qf2}) {
    const auto [y, tape] = mlp(x, net, true);
    values.push_back(y.squeeze(1));
    const Tensor grad = (values.back() - target_q).mul_(2. / x.size(0)).unsqueeze(1);
    const auto [dx, dw] = mlp_backward(grad, x, tape, net, false, true);
    gradients.insert(gradients.end(), dw.begin(), dw.end());
  }
  return {values[0], values[1], target_q, gradients};
}

// TD3.update_actor likewise: the loss, and the gradients.
std::tuple<Tensor, std::vector<Tensor>> actor_gradients(const Tensor& obs, TensorList action_range, TensorList actor,
                                                        TensorList qf1) {
  const auto [output, actor_tape] = mlp(obs, actor, true);
  const Tensor squashed = output.tanh(), scale = action_range[2];
  const Tensor x = at::cat({obs, squashed * scale + action_range[3]}, 1);
  const auto [q, tape] = mlp(x, qf1, true);
  const Tensor dq = at::full_like(q, -1. / q.size(0)), dx = std::get<0>(mlp_backward(dq, x, tape, qf1, true, false));
  const Tensor dy = dx.narrow(1, obs.size(1), scale.size(0)) * scale * (1 - squashed * squashed);
  return {-q.mean(), std::get<1>(mlp_backward(dy, obs, actor_tape, actor, false, true))};
}

TORCH_LIBRARY(rnm_td3, m) {
  m.def("layout(Tensor index, int columns) -> Tensor", layout);
  m.def("mlp(Tensor x, Tensor[] layers, bool save) -> (Tensor y, Tensor tape)");
  m.def("mlp_backward(Tensor grad, Tensor x, Tensor tape, Tensor[] layers, bool need_x, bool need_w) -> "
        "(Tensor dx, Tensor[] dlayers)");
  m.def("polyak(Tensor[] online, Tensor(a!)[] masters, Tensor(b!)[] target, Tensor(c!)[] target_masters, float tau) "
        "-> ()");
  m.def("project(Tensor(a!)[] values, Tensor(b!)[] index, Tensor(c!)[] masters, Tensor(d!)[] layouts, "
        "Tensor(e!)[] states, Tensor(f!)[] state_masters, int n, int m, Tensor[] given) -> int[]");
  m.def("adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] averages, Tensor(c!)[] squares, "
        "Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps) -> ()");
  m.def("act(Tensor obs, Tensor[] actor, Tensor[] action_range, float noise) -> Tensor");
  m.def("critic_gradients(Tensor[] batch, Tensor[] action_range, float policy_noise, float noise_clip, float gamma, "
        "Tensor[] actor_target, Tensor[] qf1_target, Tensor[] qf2_target, Tensor[] qf1, Tensor[] qf2) -> "
        "(Tensor, Tensor, Tensor, Tensor[])");
  m.def("actor_gradients(Tensor obs, Tensor[] action_range, Tensor[] actor, Tensor[] qf1) -> (Tensor, Tensor[])");
}
TORCH_LIBRARY_IMPL(rnm_td3, CPU, m) {
  m.impl("mlp", mlp), m.impl("mlp_backward", mlp_backward), m.impl("polyak", polyak), m.impl("project", project);
  m.impl("adam", adam), m.impl("act", act);
  m.impl("critic_gradients", critic_gradients), m.impl("actor_gradients", actor_gradients);
}

template <class F> static auto op(const char* name, F*) {  // through the dispatcher, so that torch.compile can trace it
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
std::tuple<Tensor, Tensor> mlp_below_autograd(const Tensor& x, TensorList layers, bool save) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static auto mlp_op = op("rnm_td3::mlp", mlp);
  return mlp_op.call(x, layers, save);
}
struct Mlp : torch::autograd::Function<Mlp> {  // in C++: an autograd function in Python costs as much as a product
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;
  static Tensors forward(Context* ctx, const Tensor& x, TensorList layers) {
    const auto [y, tape] = mlp_below_autograd(x, layers, true);
    Tensors saved = {x, tape};
    saved.insert(saved.end(), layers.begin(), layers.end());
    ctx->save_for_backward(saved);
    ctx->mark_non_differentiable({tape});
    ctx->set_materialize_grads(false);  // no zeros for the tape
    return {y, tape};
  }
  static Tensors backward(Context* ctx, const Tensors& grad) {
    const Tensors saved = ctx->get_saved_variables();
    const TensorList layers = TensorList(saved).slice(2);
    if (!grad[0].defined()) return Tensors(1 + layers.size());
    const bool need_x = ctx->needs_input_grad(0), need_w = ctx->needs_input_grad({{1, 1 + layers.size()}});
    static auto backward_op = op("rnm_td3::mlp_backward", mlp_backward);
    const auto [dx, dw] = backward_op.call(grad[0], saved[0], saved[1], layers, need_x, need_w);
    Tensors out(1 + layers.size());
    if (need_x) out[0] = dx;
    for (size_t i = 0; i < layers.size(); i++)
      if (i % 3 < 2 && ctx->needs_input_grad(1 + i)) out[1 + i] = dw[i / 3 * 2 + i % 3];
    return out;
  }
};
TORCH_LIBRARY_IMPL(rnm_td3, Autograd, m) {
  m.impl("mlp", [](const Tensor& x, TensorList layers, bool save) {
    if (!save) return mlp_below_autograd(x, layers, save);
    const auto y = Mlp::apply(x, layers);
    return std::make_tuple(y[0], y[1]);
  });
}
"""


@functools.cache
def load_kernels() -> str | None:
    """Register `torch.ops.rnm_td3`, compiled on the first call on a machine. Returns why that failed, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-tree-vectorize", "-fno-math-errno", *flags.get(capability, [])]
    key = hashlib.sha256("".join([KERNELS, *flags, torch.__version__]).encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library, advice = root / f"rnm_td3_{key}.so", "install g++ 11 or later"
    try:
        data = library.read_bytes() if library.exists() else b""
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:  # a damaged library could take the process down
            torch.ops.load_library(library)
        else:
            print(f"compiling the CPU kernels, once ({capability}, {library})", file=sys.stderr, flush=True)
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="rnm_td3_", dir=root) as folder:
                options = {"extra_cflags": flags, "extra_ldflags": ["-fopenmp"], "build_directory": folder}
                cpp_extension.load_inline(
                    "rnm_td3", KERNELS, **options, is_python_module=False, no_implicit_headers=True
                )
                built = Path(folder, "rnm_td3.so")
                data = built.read_bytes()
                write_durably(built.with_suffix(".whole"), data, hashlib.sha256(data).digest())
                os.replace(built.with_suffix(".whole"), library)  # now that it is whole: other runs may look for it
    except Exception as error:  # no compiler, no ninja, an old one of either, a folder that cannot be written
        if isinstance(error, OSError) and str(root) in str(error):
            advice = f"set TORCH_EXTENSIONS_DIR to a folder that can be written, instead of {root}"
        return f"no CPU kernels, {advice} ({type(error).__name__}: {' '.join(str(error).split())[:100]})"

    @torch.library.register_fake("rnm_td3::mlp")
    def _(x, layers, save):
        width = x.shape[1] + sum(values.shape[0] for values in layers[:-3:3])
        tape = (x.shape[0] + 127) // 128 * 128 * width if save else 0
        return x.new_empty(x.shape[0], layers[-3].shape[0]), x.new_empty(tape)

    @torch.library.register_fake("rnm_td3::mlp_backward")
    def _(grad, x, tape, layers, need_x, need_w):
        weights = [tensor for i, tensor in enumerate(layers) if i % 3 < 2]
        shapes = [(tensor.shape[0] * need_w, *tensor.shape[1:]) for tensor in weights]
        return x.new_empty(x.shape[0] * need_x, x.shape[1]), [x.new_empty(shape) for shape in shapes]

    return None


def native_tensors(layers: list["NMLinear"]) -> list[torch.Tensor]:
    """Values, bias and layout of each layer in turn, as the kernels take them."""
    tensors = []
    for layer in layers:
        parameters = layer._parameters  # an attribute of a module takes ten times as long, and this is called often
        bias = parameters.get("bias")
        tensors += parameters["values"], layer.master.new_empty(0) if bias is None else bias, layer._buffers["layout"]
    return tensors


def native_mlp(x: torch.Tensor, layers: list["NMLinear"]) -> torch.Tensor:
    """What `layers` with ReLU between them make of x [..., C], float32, in one call of the kernels."""
    tensors = native_tensors(layers)
    y, _ = torch.ops.rnm_td3.mlp.default(x.reshape(-1, x.shape[-1]), tensors, torch.is_grad_enabled())
    return y.view(*x.shape[:-1], y.shape[-1])


def native_polyak(online: list["NMLinear"], target: list["NMLinear"], tau: float) -> None:
    """`NMLinear.polyak_` of several layers in one call of the kernels."""
    lists = (f(layers) for layers in (online, target) for f in (native_tensors, lambda x: [y.master for y in x]))
    torch.ops.rnm_td3.polyak.default(*lists, tau)


def native_project(
    layers: list["NMLinear"], optimizers: list[torch.optim.Optimizer | None], index: list[torch.Tensor]
) -> list[int]:
    """`NMLinear.project` of several layers in one call of the kernels; one `index` each, or none. Returns their SAD."""
    pairs = [layer.optimizer_state(optimizer) for layer, optimizer in zip(layers, optimizers, strict=True)]
    states, state_masters = ([tensor for pair in pairs for tensor in pair[i]] for i in (0, 1))
    tensors = ([getattr(layer, name) for layer in layers] for name in ("values", "index", "master", "layout"))
    n, m = layers[0].n, layers[0].m
    return torch.ops.rnm_td3.project.default(*tensors, states, state_masters, n, m, index)


def native_adam(optimizer: torch.optim.Adam, gradients: list[torch.Tensor]) -> None:
    """`optimizer.step()` with the given gradients of its parameters, in one call of the kernels."""
    group = optimizer.param_groups[0]
    if not optimizer.state:  # PyTorch makes it
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return optimizer.zero_grad()
    states = [optimizer.state[parameter] for parameter in group["params"]]
    lists = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    operator, options = torch.ops.rnm_td3.adam.default, (group["lr"], *group["betas"], group["eps"])
    operator(group["params"], gradients, *lists, *options)


class NMSequential(nn.Sequential):
    """N:M layers with ReLU between them and native kernels: a single call, instead of one per layer."""

    @staticmethod
    def fits(modules) -> bool:
        """Whether these are native N:M layers with ReLU between them: a slice, say, of such a network need not be."""
        kinds = [type(module) for module in modules]
        native = all(module.backend == "native" for module in modules if type(module) is NMLinear)
        return native and kinds == [NMLinear, nn.ReLU] * (len(kinds) // 2) + [NMLinear]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return native_mlp(x, self.layers()) if self.fits(self._modules.values()) else super().forward(x)

    def layers(self) -> list[NMLinear]:
        return list(self._modules.values())[::2]


# ---------------------------------------------------------------- semi-structured tensors (CUDA)


def semi_structured_pad(layer: NMLinear, matrix: torch.Tensor, columns: int = 1) -> tuple[type, torch.Tensor]:
    """PyTorch's tensor type for a layer, and `matrix` padded with zeros to its shapes; its rows are C / `columns` long.

    CUTLASS serves GPUs of compute capability 8, cuSPARSELt later ones.
    """
    device, dtype = layer.values.device, layer.product_dtype
    later = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    kind = SparseSemiStructuredTensorCUSPARSELT if later else SparseSemiStructuredTensorCUTLASS
    limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows = math.ceil(layer.out_features / limits.sparse_min_rows) * limits.sparse_min_rows
    width = math.ceil(layer.in_features / limits.sparse_min_cols) * limits.sparse_min_cols // columns
    return kind, F.pad(matrix.to(dtype), (0, width - matrix.shape[1], 0, rows - matrix.shape[0]))


def semi_structured_weight(layer: NMLinear) -> torch.Tensor:
    """W~ [R, C], padded. CUTLASS takes `values` as they lie, and new metadata only for a new mask."""
    kind, packed = semi_structured_pad(layer, layer.values.detach(), columns=2)
    if kind is SparseSemiStructuredTensorCUSPARSELT:  # compresses anew
        return kind.from_dense(semi_structured_pad(layer, layer.sparse_weight().detach())[1])
    return kind(torch.Size([packed.shape[0], 2 * packed.shape[1]]), packed, layer.layout, None, None, None)


class SemiStructuredProduct(torch.autograd.Function):
    """y = x W~^T in the layer's `product_dtype`. Row-wise N:M serves this product alone: dX and dW~ are dense ones."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, values: torch.Tensor, layer: NMLinear) -> torch.Tensor:
        weight = semi_structured_weight(layer)
        ctx.layer, ctx.dtype, x = layer, x.dtype, x.to(layer.product_dtype)  # [B, C]
        ctx.save_for_backward(x, values, layer.index)
        y = F.linear(F.pad(x, (0, weight.shape[1] - x.shape[1])), weight)
        return y[:, : layer.out_features].to(ctx.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        (x, values, index), grad = ctx.saved_tensors, grad.to(ctx.layer.product_dtype)
        weight = torch.zeros_like(ctx.layer.master).scatter_(1, index, values).to(grad.dtype)
        dx = (grad @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        dw = (grad.t() @ x).gather(1, index).to(values.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def choose_backend(backend: str, n: int, m: int, device: torch.device) -> str:
    """What `backend` stands for on this machine. Raises UsageError if it cannot be had.

    `auto` is `native` where it was measured to be faster, which is on the CPU from 1:2 on, and where it compiles.
    """
    if backend == "semi_structured":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            raise UsageError("--backend semi_structured needs a GPU of compute capability 8.0 or later; try auto")
        if (n, m) not in ((2, 4), (1, 2)) or (m == 2 and torch.cuda.get_device_capability(device) >= (9, 0)):
            raise UsageError(f"--backend semi_structured is not for {n}:{m} on this GPU; give --n 2 --m 4, or try auto")
        if torch.cuda.get_device_capability(device) >= (9, 0) and not torch.backends.cusparselt.is_available():
            raise UsageError("--backend semi_structured needs a torch with cuSPARSELt on this GPU; try auto")
    wanted = device.type == "cpu" and 2 * n <= m and torch.get_default_dtype() == torch.float32
    if backend == "native" and device.type != "cpu":
        raise UsageError("--backend native is for the CPU; add --no-cuda, or try auto")
    if backend == "native" or (backend == "auto" and wanted):
        if (problem := load_kernels()) is None:
            return "native"
        if backend == "native":
            raise UsageError(f"--backend native: {problem}")
        print(f"--backend masked: {problem}", file=sys.stderr)
    return "masked" if backend == "auto" else backend


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

    def action_range(self) -> list[torch.Tensor]:
        """Low, high, half the range and its middle, each [A], as the kernels take them."""
        return [self._buffers[f"action_{name}"] for name in ("low", "high", "scale", "bias")]

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """Action [A] for one observation of any shape, with Gaussian noise of `noise` half ranges, clipped."""
        x = torch.as_tensor(obs, dtype=self.action_low.dtype, device=self.action_low.device)
        if isinstance(self.net, NMSequential):
            operator, layers = torch.ops.rnm_td3.act.default, native_tensors(self.net.layers())
            return operator(x.view(1, -1), layers, self.action_range(), noise).numpy()[0]
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

MODEL_FORMAT = "rnm-td3-1"


def save_model(path: Path, agent: "TD3", args: Args) -> None:
    """Write what it takes to act, and the critics, without pickled code; the dense masters serve only training."""
    model = {"format": MODEL_FORMAT, "args": vars(args), "obs_dim": agent.actor.net[0].in_features}
    for name in ("actor", "qf1", "qf2"):
        state = {key: value.cpu() for key, value in getattr(agent, name).state_dict().items() if "master" not in key}
        model[name] = {key: value.int() if "index" in key else value for key, value in state.items()}
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


def load_actor(path: str | Path, backend: str = "auto") -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a `model.pt`: observation, as the environment gives it, to action [A], no noise. Raises UsageError."""
    model = read_model(path)
    try:
        args, state, _ = model["args"], model["actor"], model["args"]["env_id"]
        actor = Actor(model["obs_dim"], state["action_low"], state["action_high"], args["hidden_sizes"])
        backend = choose_backend(backend, args["n"], args["m"], torch.device("cpu"))
        sparsify(actor, args["n"], args["m"], args["dense_layers"], backend=backend)
        masters = {key: torch.zeros_like(value) for key, value in actor.state_dict().items() if key.endswith(".master")}
        actor.load_state_dict(masters | state)
        actor.act(np.zeros(model["obs_dim"]))
    except UsageError:
        raise
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
    """W' <- tau W + (1 - tau) W'; in N:M layers over all entries of the dense W."""
    for module, module_target in zip(online.children(), target.children(), strict=True):
        if isinstance(module, NMSequential):
            native_polyak(module.layers(), module_target.layers(), tau)
        elif isinstance(module, NMLinear):
            module_target.polyak_(module, tau)
        elif isinstance(module, nn.Linear):
            module_target.weight.lerp_(module.weight, tau)
            module_target.bias.lerp_(module.bias, tau)
        else:
            polyak_update(module, module_target, tau)


class TD3:
    """Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018) with six N:M sparse networks."""

    def __init__(self, obs_dim: int, action_low: np.ndarray, action_high: np.ndarray, args: Args, device: torch.device):
        self.args = args
        self.actor = Actor(obs_dim, action_low, action_high, args.hidden_sizes).to(device)
        self.qf1 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        self.qf2 = QNetwork(obs_dim, len(action_low), args.hidden_sizes).to(device)
        args.backend = choose_backend(args.backend, args.n, args.m, device)  # for `config.json` too
        options = {"backend": args.backend, "product_dtype": getattr(torch, args.semi_structured_dtype)}
        for network in (self.actor, self.qf1, self.qf2):
            sparsify(network, args.n, args.m, args.dense_layers, **options)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.qf1_target = copy.deepcopy(self.qf1).requires_grad_(False)
        self.qf2_target = copy.deepcopy(self.qf2).requires_grad_(False)
        names = ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target")
        self.networks = {name: getattr(self, name) for name in names}
        modules = nn.ModuleDict(self.networks).named_modules()  # by name, such as `qf1_target.net.2`, online ones first
        self.nm_layers = {name: module for name, module in modules if isinstance(module, NMLinear)}
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

    def project(self) -> dict[str, float]:
        """Re-project all networks. Returns SAD per layer, network and in total: count, and rate per active entry."""
        sad, active = Counter(), Counter()
        for (name, layer), changed in zip(self.nm_layers.items(), self.project_layers(), strict=True):
            for key in (name, name.split(".")[0], "total"):
                sad[key] += changed
                active[key] += layer.values.numel()
        return {f"sad/{key}": sad[key] for key in sad} | {f"sad_rate/{key}": sad[key] / active[key] for key in sad}

    def project_layers(self) -> list[int]:
        """New masks for all of `nm_layers`. Returns their SAD."""
        optimizers = {"actor": self.actor_optimizer, "qf1": self.q_optimizer, "qf2": self.q_optimizer}
        changed = []
        for name, layer in self.nm_layers.items():
            network = name.split(".")[0]
            follows_online = network.endswith("_target") and self.args.target_mask == "online"
            index = self.nm_layers[name.replace("_target", "")].index if follows_online else None
            changed.append(layer.project(optimizers.get(network), index))
        return changed


class NativeTD3(TD3):
    """The same without autograd, whose overhead is that of the products: one call of the kernels for all gradients.

    For networks that are sparse throughout, with the native backend.
    """

    @torch.no_grad()
    def update_critics(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        networks = (self.actor_target, self.qf1_target, self.qf2_target, self.qf1, self.qf2)
        tensors = (native_tensors(network.net.layers()) for network in networks)
        operator, noise = torch.ops.rnm_td3.critic_gradients.default, (self.args.policy_noise, self.args.noise_clip)
        *values, gradients = operator(batch, self.actor.action_range(), *noise, self.args.gamma, *tensors)
        native_adam(self.q_optimizer, gradients)
        return tuple(values)

    @torch.no_grad()
    def update_actor(self, obs: torch.Tensor) -> torch.Tensor:
        tensors = (native_tensors(network.net.layers()) for network in (self.actor, self.qf1))
        actor_loss, gradients = torch.ops.rnm_td3.actor_gradients.default(obs, self.actor.action_range(), *tensors)
        native_adam(self.actor_optimizer, gradients)
        return actor_loss

    def project_layers(self) -> list[int]:
        layers = list(self.nm_layers.values())
        actor, critics, targets = (
            layers[len(layers) * i // 6 : len(layers) * j // 6] for i, j in ((0, 1), (1, 3), (3, 6))
        )
        changed = native_project(actor, [self.actor_optimizer] * len(actor), [])
        changed += native_project(critics, [self.q_optimizer] * len(critics), [])
        index = [layer.index for layer in actor + critics] if self.args.target_mask == "online" else []
        return changed + native_project(targets, [None] * len(targets), index)


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
        args.backend = choose_backend(args.backend, args.n, args.m, device)
        agent_class = NativeTD3 if args.backend == "native" and args.dense_layers == "none" else TD3
        agent = agent_class(obs_dim, env.action_space.low, env.action_space.high, args, device)
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
        layers, masks_folder = agent.nm_layers, folder / "masks"
        mask_bits = packed_masks(layers)
        if args.resume:
            for path in masks_folder.glob("[0-9]" * 9 + ".npz"):
                if int(path.stem) > max(0, global_step - max(args.learning_starts, 1)):
                    path.unlink()  # later than the checkpoint: it will be written again
        else:
            log.scalars({f"density/{name}": density(network) for name, network in agent.networks.items()}, 0)
            if args.save_masks:
                save_masks(masks_folder, layers, 0, 0, np.uint8(0))
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
                if args.mask_update_interval and update % args.mask_update_interval == 0:
                    sad = agent.project()
                    if update // 100 > (update - args.mask_update_interval) // 100:  # at most once in 100 updates
                        log.scalars(sad, global_step)
                    if args.save_masks:
                        mask_bits = save_masks(masks_folder, layers, global_step, update, mask_bits)
                    lap("masks")

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
