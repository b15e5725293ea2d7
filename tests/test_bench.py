"""The benchmark: what it writes, that it refuses to time what is wrong, and bad input."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_nm_matmul as bench
from rnm_td3_continuous import NMLinear, UsageError, load_kernels

ROOT = Path(__file__).parents[1]
SMALL = ["--sizes", "16", "24", "--batch-sizes", "1", "9", "--rounds", "2", "--milliseconds", "0.05", "--no-cuda"]
SMALL += ["--env-id", "Pendulum-v1", "--threads", "1"]


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / "bench_nm_matmul.py", *arguments], capture_output=True, text=True)


def test_table_csv_and_plot():
    result = run(*SMALL, "--out", "results/here")
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(Path("results/here/bench.csv").read_text().splitlines()))
    rivals = {"nn.Linear", "oneDNN", "masked", "PyTorch CSR"} | ({"ours (native)"} if load_kernels() is None else set())
    shapes = {"16-16", "24-24", "3-256", "4-256", "256-256", "256-1", "4-256-256-1"}
    assert {row["rival"] for row in rows} == rivals
    assert {row["layers"] for row in rows} == shapes and {row["batch"] for row in rows} == {"1", "9"}
    native = len(rivals) - 4
    assert len(rows) == 2 * (6 * 4 * (2 + 4 * (2 + native)) + 2 * (1 + 4 * (1 + native)))
    for row in rows:
        assert float(row["us"]) > 0 and float(row["gflops"]) > 0 and float(row["error"]) < 1e-4
        dense = [float(r["us"]) for r in rows if r["pattern"] == "dense" and all(r[k] == row[k] for k in SAME)]
        assert float(row["speedup"]) == pytest.approx(min(dense) / float(row["us"]), rel=2e-3)  # four digits each
    assert "16-16, batch 9" in result.stdout
    if load_kernels() is None:
        assert Path("results/here/bench.png").read_bytes().startswith(b"\x89PNG")


SAME = ("layers", "batch", "product")


@pytest.mark.parametrize("product", ["forward", "dX", "dW", "together"])
def test_a_wrong_result_is_seen(product):
    torch.manual_seed(0)
    layer = NMLinear(16, 8, n=1, m=4)
    x, g, b = torch.randn(5, 16), torch.randn(5, 8), layer.bias.detach()
    reference = (x.double(), b.double(), g.double())
    products = bench.masked(layer, x, b, g)
    weight = layer.sparse_weight().detach()
    assert bench.errors(products, weight, layer.index, reference) < 1e-6
    right = products[product]

    def times(factor):
        return lambda: tuple(t * factor for t in right()) if isinstance(right(), tuple) else right() * factor

    products[product] = times(1.001)
    assert bench.errors(products, weight, layer.index, reference) > 5e-4
    for nothing in (math.nan, math.inf):
        products[product] = times(nothing)
        assert not math.isfinite(bench.errors(products, weight, layer.index, reference))
    products["dW"] = lambda: (torch.zeros(8, 4), torch.zeros(9, 8))
    with pytest.raises(AssertionError):
        bench.errors(products, weight, layer.index, reference)


@pytest.mark.parametrize("wrong", [0.01, math.nan])
def test_wrong_rivals_are_not_timed(wrong, monkeypatch):
    right = bench.masked
    monkeypatch.setattr(bench, "masked", lambda layer, x, b, g: right(layer, x, b + wrong, g))
    args = bench.Args(
        sizes=(8,), env_id="Pendulum-v1", batch_sizes=(3,), patterns=("1:4",), rounds=1, milliseconds=0.01
    )
    with pytest.raises(UsageError, match=r"masked 1:4 of 8-8 is wrong by (\d.*|nan); not timed"):
        bench.benchmark(args, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--patterns", "4:2"], "--patterns 4:2: give N:M"),
        (["--patterns", "2-4"], "--patterns 2-4"),
        (["--sizes", "0"], "--sizes: 0 is too small"),
        (["--batch-sizes", "-1"], "--batch-sizes: -1"),
        (["--threads", "0"], "--threads: give 1 to 1024"),
        (["--threads", "9999999999"], "--threads: give 1 to 1024"),
        (["--milliseconds", "inf"], "--milliseconds: more than 0"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--sizes", "9999999"], "no memory for --sizes or --batch-sizes; lower them"),
        (["--env-id", "HalfCheeta-v4"], "Did you mean: `HalfCheetah`"),
        (["--out", "/proc/no"], "--out /proc/no"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_nm_matmul.py", *SMALL, *arguments])
    assert bench.main() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_wrong_network_is_seen(monkeypatch):
    right = NMLinear.forward
    monkeypatch.setattr(NMLinear, "forward", lambda self, x: right(self, x) * 1.01)
    found = bench.networks((4, 8, 8, 1), 3, [(1, 4)], torch.device("cpu"))
    assert found["masked", "1:4"][2] > 1e-3 and found["nn.Linear", "dense"][2] < 1e-5


def test_layers_that_are_too_wide_for_the_kernels_are_compared_without_them():
    found = bench.rivals(70_000, 2, 1, [(1, 4)], torch.device("cpu"))
    assert {name for name, _ in found} >= {"nn.Linear", "masked"} and ("ours (native)", "1:4") not in found
    found = bench.networks((70_000, 2, 1), 1, [(1, 4)], torch.device("cpu"))
    assert ("masked", "1:4") in found and ("ours (native)", "1:4") not in found


def test_what_cannot_be_written_is_one_line_after_the_table(monkeypatch, capsys):
    Path("out/bench.csv").mkdir(parents=True)
    monkeypatch.setattr(bench, "benchmark", lambda args, device: [{"rival": "masked", "pattern": "1:4", "us": 1.0}])
    monkeypatch.setattr(sys, "argv", ["bench_nm_matmul.py", *SMALL, "--out", "out"])
    assert bench.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 21] Is a directory: 'out/bench.csv'"
