"""The table of the parts in README.md, and a figure for each step: from the root of the project.

python results/recipe/parts.py
"""

import sys
from pathlib import Path

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


def table(results: dict) -> str:
    """Ratios to the best dense runs of each environment, and their means; active weights of 1:8."""
    header = ["", *[f"{m}, {where}" for m in ("1:8", "1:4") for where in (*ENVS, "mean")], "mean of all", "active, %"]
    rows = []
    for variant, what in PARTS.items():
        eighth, fourth = ([(env, f"{pattern}, {variant}") for env in ENVS] for pattern in ("1:8", "1:4"))
        groups = [*[[key] for key in eighth], eighth, *[[key] for key in fourth], fourth, eighth + fourth]
        active = [sweep.weights(results[key][0].config)["active"] for key in eighth]
        active = FIRST12.values() if variant == "first12" else active
        rows.append([what, *[cell(results, keys) for keys in groups], ", ".join(f"{x:.1f}" for x in active)])
    return sad.markdown(header, rows)


def cell(results: dict, keys: list[tuple[str, str]]) -> str:
    """Mean of the ratios, empty as long as there are no runs of one."""
    if any(key not in results for key in keys):
        return ""
    mine = [sad.final(results[key]) for key in keys]
    found = sad.estimate(mine, 1, [sad.final(best_of(results, env, "dense")) for env, _ in keys])
    return sad.with_interval(found["mean"], found["mean_interval"], ".2f")


def best_of(results: dict, env: str, pattern: str) -> list[sad.Run]:
    """Its runs at the best step size of step 1."""
    return max((results[env, f"{pattern}, lr{x}"] for x in (3, 6, 9)), key=lambda runs: sad.final(runs).mean())


if __name__ == "__main__":
    results, _ = sweep.read_results(sweep.read_plan(HERE))
    step_size = {key: runs for key, runs in results.items() if key[1].endswith(("lr3", "lr6", "lr9"))}
    parts = {(env, "dense"): best_of(results, env, "dense") for env in ENVS}
    parts |= {(env, f"1:8 {name}"): results[env, f"1:8, {name}"] for name in PARTS for env in ENVS}
    best = {(env, m): best_of(results, env, m) for m in ("dense", "2:4", "1:4", "1:8") for env in ENVS}
    for name, chosen in {"step_size": step_size, "parts": parts, "best": best}.items():
        sweep.plot_curves(chosen, list(ENVS), HERE / f"{name}.png")
    print(table(results))
