"""The table of the parts in README.md, and a figure for each step: from the root of the project.

python results/recipe/parts.py
"""

import sys
from itertools import chain
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

HERE, ENVS = Path("results/recipe"), ("HalfCheetah-v5", "Ant-v5")
PARTS = {  # variant: what it is
    "letter": "to the letter",
    "start": "start",
    "lr9": "start, last dense",
    "first12": "start, last dense, first 1:2",
    "both": "start, first and last dense",
    "factor": "start, last dense, factor",
}
FIRST12 = {"HalfCheetah-v5": 16.3, "Ant-v5": 24.6}  # active weights in per cent: its flag is not one of the scripts


def score(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of ratios to dense: `samples` are runs of a kind and dense ones in turn."""
    return np.mean([sweep.ratio(a, b, axis) for a, b in zip(samples[::2], samples[1::2], strict=True)], axis=0)


def table(results: dict) -> str:
    """Ratios to the best dense runs of each environment, and their means; active weights; seeds."""
    best = {env: sad.final(best_dense(results, env)) for env in ENVS}
    header = ["", *[f"{m}, {where}" for m in ("1:8", "1:4") for where in (*ENVS, "mean")], "mean of all", "active, %"]
    rows = []
    for variant, what in PARTS.items():
        cells, samples = [], []
        for pattern in ("1:8", "1:4"):
            keys = [(env, f"{pattern}, {variant}") for env in ENVS]
            pairs = [[sad.final(results[key]), best[key[0]]] if key in results else [] for key in keys]
            samples.append([*chain(*pairs)] if all(pairs) else [])
            cells += [cell(pair) for pair in (*pairs, samples[-1])]
        active = [sweep.weights(results[env, f"1:8, {variant}"][0].config)["active"] for env in ENVS]
        active = FIRST12.values() if variant == "first12" else active
        everything = cell([*chain(*samples)] if all(samples) else [])
        rows.append([what, *cells, everything, ", ".join(f"{x:.1f}" for x in active)])
    return sad.markdown(header, rows)


def best_dense(results: dict, env: str) -> list[sad.Run]:
    dense = [runs for (each, kind), runs in results.items() if each == env and kind.startswith("dense")]
    return max(dense, key=lambda runs: sad.final(runs).mean())


def cell(samples: list[np.ndarray]) -> str:
    return sad.with_interval(score(*samples), sad.bootstrap(samples, score, 1), ".2f") if samples else ""


if __name__ == "__main__":
    results, _ = sweep.read_results(sweep.read_plan(HERE))
    step_size = {key: runs for key, runs in results.items() if key[1].endswith(("lr3", "lr6", "lr9"))}
    parts = {(env, "dense"): best_dense(results, env) for env in ENVS}
    parts |= {(env, f"1:8 {name}"): results[env, f"1:8, {name}"] for name in PARTS for env in ENVS}
    for name, chosen in {"step_size": step_size, "parts": parts}.items():
        sweep.plot_curves(chosen, list(ENVS), HERE / f"{name}.png")
    print(table(results))
