"""How fast the products of N:M layers are, against every dense and sparse rival that PyTorch has on this machine.

Forward Y = X W~^T + b, dX = G W~, dW~ = G^T X at the active entries with db, and the three together, as in a step of
training; then TD3's critic as a whole. Every result is checked against float64 before it is timed; rounds alternate
between all rivals.
"""

import contextlib
import copy
import csv
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro

from rnm_td3_continuous import (
    NativeLinear,
    NMLinear,
    SemiStructuredLinear,
    SemiStructuredProduct,
    UsageError,
    choose_backend,
    enough_memory,
    load_kernels,
    make_env,
    mlp,
    sparsify,
)

PRODUCTS = ("forward", "dX", "dW", "together")


@dataclass
class Args:
    sizes: tuple[int, ...] = (128, 256, 512, 1024)  # neurons in and out of the square layers
    env_id: str = "HalfCheetah-v4"  # also the layers that TD3 has here, with two hidden layers of 256
    batch_sizes: tuple[int, ...] = (1, 256)  # samples: acting, learning
    patterns: tuple[str, ...] = ("2:4", "1:4", "1:8", "1:16")  # N:M
    threads: int = 2  # threads of PyTorch
    rounds: int = 21  # every rival runs once in each; the table shows medians
    milliseconds: float = 4.0  # length of a rival's turn in a round, at least one call
    cuda: bool = True  # measure the GPU instead of the CPU if there is one
    out: str = "bench"  # folder of bench.csv and bench.png
    seed: int = 1  # of weights and samples


def td3_shapes(env_id: str) -> list[tuple[int, int]]:
    """(in, out) of every linear layer of actor and critic with two hidden layers of 256. Raises UsageError."""
    env = make_env(env_id)
    obs, action = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    return [(obs, 256), (obs + action, 256), (256, 256), (256, action), (256, 1)]


# ---------------------------------------------------------------- rivals

# A rival is a dictionary of functions without arguments by product; `forward` returns Y, `dX` dX, `dW` (dW, db), and
# `together` (Y, dX, dW, db). Where a rival wants a transposed or compressed matrix, it gets it made beforehand, once.


def step(forward: Callable, dx: Callable, dw: Callable) -> dict[str, Callable]:
    return {"forward": forward, "dX": dx, "dW": dw, "together": lambda: (forward(), dx(), *dw())}


def dense(x, w, b, g):
    return step(lambda: F.linear(x, w, b), lambda: g @ w, lambda: (g.t() @ x, g.sum(0)))


def onednn(x, w, b, g):
    product, w_t, x_t, g_t = torch.ops.mkldnn._linear_pointwise, *(matrix.t().contiguous() for matrix in (w, x, g))
    return step(
        lambda: product(x, w, b, "none", [], ""),
        lambda: product(g, w_t, None, "none", [], ""),
        lambda: (product(g_t, x_t, None, "none", [], ""), g.sum(0)),
    )


def masked(layer, x, b, g):
    """The reference in rnm_td3_continuous.py: W~ as a dense matrix, made anew by each; `together` makes it once."""

    def weight():
        return torch.zeros_like(layer.master).scatter_(1, layer.index, layer.values.detach())

    def dw():
        return (g.t() @ x).gather(1, layer.index), g.sum(0)

    def together():
        w = weight()
        return F.linear(x, w, b), g @ w, *dw()

    return {**step(lambda: F.linear(x, weight(), b), lambda: g @ weight(), dw), "together": together}


def compressed_rows(layer, x, b, g):
    """PyTorch's CSR: W~ and its transpose, and a product sampled at the pattern of W~."""
    w, x_t, g_t = layer.sparse_weight().detach(), x.t().contiguous(), g.t().contiguous()
    mask, w_t = layer.mask().float().to_sparse_csr(), w.t().contiguous().to_sparse_csr()
    w = w.to_sparse_csr()
    return step(
        lambda: torch.sparse.mm(w, x_t).t() + b,
        lambda: torch.sparse.mm(w_t, g_t).t(),
        lambda: (torch.sparse.sampled_addmm(mask, g_t, x_t.t(), beta=0).values().view_as(layer.index), g.sum(0)),
    )


def native(layer, x, b, g):
    """The kernels of rnm_td3_continuous.py. What dX and dW need of the forward pass, `together` includes."""
    operators = torch.ops.rnm_td3
    forward, mlp, backward = operators.forward.default, operators.mlp.default, operators.mlp_backward.default
    tensors = [layer.values.detach(), b, layer.layout]
    _, tape = mlp(x, tensors)

    def split(dw):
        return dw[: layer.values.numel()].view_as(layer.values), dw[layer.values.numel() :]

    def together():
        y, tape = mlp(x, tensors)
        dx, dw = backward(g, x, tape, tensors, True, True)
        return y, dx, *split(dw)

    return {
        "forward": lambda: forward(x, tensors),
        "dX": lambda: backward(g, x, tape, tensors, True, False)[0],
        "dW": lambda: split(backward(g, x, tape, tensors, False, True)[1]),
        "together": together,
    }


def semi_structured(layer, x, b, g):
    """Forward with the tensor compressed beforehand; `together` compresses it too, as training has to."""
    weight, x_half, g_half = layer.packed_weight(), x.to(layer.product_dtype), g.to(layer.product_dtype)
    w = layer.sparse_weight().detach().to(layer.product_dtype)
    padded = F.pad(x_half, (0, weight.shape[1] - x.shape[1]))
    rows = layer.out_features

    def together():
        y = SemiStructuredProduct.apply(x_half, layer.values, layer)[:, :rows] + b
        return y, g_half @ w, (g_half.t() @ x_half).gather(1, layer.index), g.sum(0)

    products = step(
        lambda: F.linear(padded, weight)[:, :rows] + b,
        lambda: g_half @ w,
        lambda: ((g_half.t() @ x_half).gather(1, layer.index), g.sum(0)),
    )
    return {**products, "together": torch.no_grad()(together), "compress": layer.packed_weight}


def network(net, x, g):
    """A whole network with ReLU: `forward` as when acting, `together` as when learning, through autograd."""
    parameters = list(net.parameters())
    return {"forward": torch.no_grad()(lambda: net(x)), "together": lambda: torch.autograd.grad(net(x), parameters, g)}


def networks(sizes: tuple[int, ...], batch: int, patterns: list[tuple[int, int]], device: torch.device) -> dict:
    """Rivals by (name, pattern) for a network of these sizes: products, number of weights, error against float64."""
    x, g = torch.randn(batch, sizes[0], device=device), torch.randn(batch, sizes[-1], device=device)
    plain = mlp(list(sizes)).to(device)
    nets = {("nn.Linear", "dense"): plain}
    for n, m in patterns:
        nets["masked", f"{n}:{m}"] = sparsify(copy.deepcopy(plain), n, m)
        with contextlib.suppress(UsageError):
            choose_backend("native", n, m, device, sizes)
            nets["ours (native)", f"{n}:{m}"] = sparsify(copy.deepcopy(plain), n, m, backend="native")
    out = {}
    for key, net in nets.items():
        layers = [layer.to_linear() if isinstance(layer, NMLinear) else copy.deepcopy(layer) for layer in net]
        reference = network(torch.nn.Sequential(*layers).double(), x.double(), g.double())
        want = [reference["forward"](), *reference["together"]()]  # Y, and of each layer dW and db
        for i, layer in enumerate(list(net)[::2]):
            if isinstance(layer, NMLinear):
                want[1 + 2 * i] = want[1 + 2 * i].gather(1, layer.index)
        products = network(net, x, g)
        weights = sum(parameter.numel() for parameter in net.parameters() if parameter.dim() == 2)
        out[key] = products, weights, worst([products["forward"](), *products["together"]()], want)
    return out


def rivals(columns: int, rows: int, batch: int, patterns: list[tuple[int, int]], device: torch.device) -> dict:
    """Rivals by (name, pattern) for a linear layer: products, number of weights, error against float64."""
    layer = torch.nn.Linear(columns, rows, device=device)
    x, g = torch.randn(batch, columns, device=device), torch.randn(batch, rows, device=device)
    w, b = layer.weight.detach(), layer.bias.detach()
    out = {}
    if device.type == "cpu":
        out["nn.Linear", "dense"] = dense(x, w, b, g), w, None
        if torch.backends.mkldnn.is_available():
            out["oneDNN", "dense"] = onednn(x, w, b, g), w, None
    else:
        for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
            out[f"dense {name}", "dense"] = dense(*(t.to(dtype) for t in (x, w, b, g))), w, None
        out["dense TF32", "dense"] = {k: with_tf32(f) for k, f in dense(x, w, b, g).items()}, w, None
    for n, m in patterns:
        pattern = f"{n}:{m}"
        plain = NMLinear.from_linear(layer, n, m)
        w = plain.sparse_weight().detach()
        out["masked", pattern] = masked(plain, x, b, g), w, plain.index
        if device.type == "cpu":
            if torch.backends.mkl.is_available():
                out["PyTorch CSR", pattern] = compressed_rows(plain, x, b, g), w, plain.index
            with contextlib.suppress(UsageError):
                choose_backend("native", n, m, device, (columns, rows))
                ours = NativeLinear.from_linear(layer, n, m)
                out["ours (native)", pattern] = native(ours, x, b, g), w, plain.index
        else:
            for dtype in (torch.bfloat16, torch.float16) if m == 4 else (torch.float32,):
                try:
                    choose_backend("semi_structured", n, m, device)
                except UsageError:
                    continue
                ours = SemiStructuredLinear.from_linear(layer, n, m, product_dtype=dtype)
                if not isinstance(ours, SemiStructuredLinear):  # too thin: masked
                    continue
                name = f"ours ({type(ours.packed_weight()).__name__[26:]} {str(dtype)[6:]})"
                out[name, pattern] = semi_structured(ours, x, b, g), w, plain.index
    reference = x.double(), b.double(), g.double()
    for key, (products, w, index) in out.items():
        weights = (w if index is None else index).numel()
        out[key] = products, weights, errors(products, w, index, reference)
    return out


def with_tf32(function: Callable) -> Callable:
    def call():
        torch.backends.cuda.matmul.allow_tf32 = True
        result = function()
        torch.backends.cuda.matmul.allow_tf32 = False
        return result

    return call


# ---------------------------------------------------------------- measuring


def worst(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest difference of what we got and what we want, relative to the largest number of each; NaN comes through."""
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in want]
    differences = [(a - b).abs().max() / b.abs().max().clamp_min(1e-3) for a, b in zip(got, want, strict=True)]
    return torch.stack(differences).max().item()


def errors(products: dict, w: torch.Tensor, index: torch.Tensor | None, reference: tuple) -> float:
    """Largest difference from float64 of all results, relative to the largest number of each."""
    x, b, g = reference
    w = w.double()
    dw = g.t() @ x
    want = [x @ w.t() + b, g @ w, dw if index is None else dw.gather(1, index), g.sum(0)]
    got = [products["forward"](), products["dX"](), *products["dW"](), *products["together"]()]
    return worst(got, want * 2)


def measure(functions: dict, rounds: int, seconds: float, device: torch.device) -> dict[tuple, list[float]]:
    """Seconds per call of each function in each round; the rounds alternate between all functions."""
    synchronize = torch.get_device_module(device).synchronize  # on a CPU, it does nothing

    def turn(function: Callable, calls: int) -> float:
        function()  # the one before has left other data in the caches
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls = {key: max(1, int(seconds / turn(function, 2))) for key, function in functions.items()}
    times = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            times[key].append(turn(function, calls[key]))
    return times


def rows_of(everyone: dict, sizes: tuple[int, ...], batch: int, args: Args, device: torch.device) -> list[dict]:
    """Measure rivals {(name, pattern): (products, weights, error)} together. Raises UsageError if one is wrong."""
    for (name, pattern), (_, _, error) in everyone.items():
        exact = 1e-5 if len(sizes) == 2 else 1e-4  # gradients through a network cancel
        if not error <= (5e-2 if device.type == "cuda" and name != "dense fp32" else exact):
            raise UsageError(f"{name} {pattern} of {'-'.join(map(str, sizes))} is wrong by {error:.1e}; not timed")
    functions = {(*key, p): function for key, value in everyone.items() for p, function in value[0].items()}
    times = measure(functions, args.rounds, args.milliseconds / 1000, device)
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    table = []
    for (name, pattern, product), seconds in times.items():
        mine = median[name, pattern, product]
        n, m = (1, 1) if pattern == "dense" else map(int, pattern.split(":"))
        flops = 2 * batch * everyone[name, pattern][1] * {"together": 3, "compress": 0}.get(product, 1)
        row = {"layers": "-".join(map(str, sizes)), "batch": batch, "rival": name, "pattern": pattern}
        row |= {"sparsity": m / n, "product": product, "us": mine * 1e6}
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [0, 0, 0]
        row |= {"spread": (quartiles[2] - quartiles[0]) / mine, "gflops": flops / mine / 1e9}
        if product in PRODUCTS:
            fastest = min((key for key in median if key[1:] == ("dense", product)), key=median.get)
            row |= {"fastest_dense": fastest[0], "speedup": median[fastest] / mine}
        table.append(row | {"error": everyone[name, pattern][2]})
    show(table)
    return table


def benchmark(args: Args, device: torch.device) -> list[dict]:
    """One row per layers, batch size, rival, pattern and product."""
    patterns = [tuple(map(int, pattern.split(":"))) for pattern in args.patterns]
    shapes, table = td3_shapes(args.env_id), []
    for columns, rows in dict.fromkeys([*[(size, size) for size in args.sizes], *shapes]):
        for batch in args.batch_sizes:
            table += rows_of(rivals(columns, rows, batch, patterns, device), (columns, rows), batch, args, device)
    critic = (shapes[1][0], 256, 256, 1)
    for batch in args.batch_sizes:
        table += rows_of(networks(critic, batch, patterns, device), critic, batch, args, device)
    return table


# ---------------------------------------------------------------- results


def show(table: list[dict]) -> None:
    cells = {(row["rival"], row["pattern"], row["product"]): row for row in table}
    print(f"\n{table[0]['layers']}, batch {table[0]['batch']}: microseconds (speed-up over the fastest dense rival)")
    print(f"{'':32}" + "".join(f"{product:>18}" for product in PRODUCTS) + f"{'spread':>9}{'GFLOP/s':>9}{'error':>9}")
    for name, pattern in dict.fromkeys(key[:2] for key in cells):
        row = [cells.get((name, pattern, product)) for product in PRODUCTS]
        text = "".join(f"{cell['us']:10.1f} {cell['speedup']:5.2f}x " if cell else f"{'':18}" for cell in row)
        last = row[-1]
        print(f"{name:24}{pattern:>8}{text}{last['spread']:9.0%}{last['gflops']:9.1f}{last['error']:9.0e}", flush=True)


def plot(table: list[dict], title: str, path: Path) -> None:
    ours = [row for row in table if row["rival"].startswith("ours") and row["product"] == "together"]
    ours = [row for row in ours if row["batch"] == max(r["batch"] for r in ours)]
    ours = [row | {"in": int(row["layers"].split("-")[0])} for row in ours if len(set(row["layers"].split("-"))) == 1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    markers = "osD^vP*X"
    sparsities = sorted({row["sparsity"] for row in ours})
    left.plot(sparsities, sparsities, "k--", lw=1, label="ideal: M/N")
    for axes, x, by, label in ((left, "sparsity", "in", "{0} x {0}"), (right, "in", "pattern", "{}")):
        for i, value in enumerate(dict.fromkeys(row[by] for row in ours)):
            points = sorted((row[x], row["speedup"]) for row in ours if row[by] == value)
            axes.plot(*zip(*points, strict=True), marker=markers[i % 8], label=label.format(value))
    left.set(xscale="log", yscale="log", xlabel="sparsity, M/N", ylabel="speed-up over the fastest dense product")
    left.set_xticks(sparsities, [f"{row:g}" for row in sparsities])
    left.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    sizes = sorted({row["in"] for row in ours})
    right.set(xscale="log", xlabel="neurons in and out", ylim=(0, None))
    right.set_xticks(sizes, sizes)
    for axes in (left, right):
        axes.minorticks_off()
        axes.axhline(1, color="grey", lw=1)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def write(table: list[dict], title: str, args: Args) -> None:
    """Raises OSError."""
    out = Path(args.out)
    with open(out / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(max(table, key=len)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    if any(row["rival"].startswith("ours") for row in table):
        plot(table, f"forward + dX + dW, batch {max(args.batch_sizes)}: {title}", out / "bench.png")
    peak = max(row["gflops"] for row in table if row["pattern"] == "dense")
    print(f"\nbest dense product: {peak:.1f} GFLOP/s; files in {out}/")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def check_args(args: Args) -> None:
    """Raises UsageError."""
    for pattern in args.patterns:
        n, _, m = pattern.partition(":")
        if not (n.isdecimal() and m.isdecimal() and 1 <= int(n) <= int(m)):
            raise UsageError(f"--patterns {pattern}: give N:M with 1 <= N <= M, such as 2:4")
    for name in ("sizes", "batch_sizes", "patterns"):
        if not getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')}: give at least one")
    for name, value in {"sizes": min(args.sizes), "batch-sizes": min(args.batch_sizes)}.items():
        if value < 1:
            raise UsageError(f"--{name}: {value} is too small; give 1 or more")
    if not 1 <= args.threads <= 1024 or args.rounds < 1 or not 0 < args.milliseconds < math.inf:
        raise UsageError("--threads: give 1 to 1024; --rounds: 1 or more; --milliseconds: more than 0")
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed {args.seed}: give 0 or more, below 2^31")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}") from error


def main() -> int:
    """Exit code: 0 done, 1 what was measured could not be written, 2 bad input."""
    args = tyro.cli(Args, description=__doc__)
    try:
        check_args(args)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and (problem := load_kernels()):
            print(f"without our kernels: {problem}", file=sys.stderr)
        name = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name()
        capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
        title = f"{name} {capability}, {args.threads} threads, torch {torch.__version__}"
        print(title)
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        with enough_memory("--sizes or --batch-sizes"):
            table = benchmark(args, device)
        write(table, title, args)
    except (UsageError, OSError) as error:  # OSError: the table is on the screen
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
