"""The paper's claims against what has ended: the table of README.md, made from the root of the project.

python results/reproduction/claims.py
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

HERE, INTERVALS = Path("results/reproduction"), Path("results/recipe/intervals")
SPEED = Path(__file__).parents[1] / "speed/zen4"
ENVS = ("HalfCheetah-v5", "Ant-v5", "Walker2d-v5", "Hopper-v5")
VARIANTS = {"": "the recipe, 3e-4", ", letter": "to the letter", ", best": "best step sizes", ", wide": "wide"}
Interval = list[float] | None  # 95 %; None: of one run


def number(claimed: float, bounds: Interval) -> str:
    """A claim of a number."""
    if bounds is None or bounds[0] <= claimed <= bounds[1]:
        return "confirmed" if bounds and bounds[1] - bounds[0] <= 0.4 else "undecided"
    return "refuted"


def more(bound: float, bounds: Interval) -> str:
    """A claim of at least `bound`."""
    if bounds is None or bounds[0] < bound <= bounds[1]:
        return "undecided"
    return "confirmed" if bounds[0] >= bound else "refuted"


def compare(results: dict, dense: dict, key: tuple[str, str], of=sad.final) -> tuple[float, Interval]:
    """Ratio of the means of what `of` takes from the runs of a kind, and of those of dense."""
    samples = [of(results[key]), of(results[key[0], dense[key]])]
    return sweep.ratio(*samples), sad.bootstrap(samples, sweep.ratio, 1)


def rates(runs: list[sad.Run]) -> np.ndarray:
    """Environment steps per second of training, two runs at once."""
    return np.array([run.steps[-1] / run.seconds[-1] for run in runs])


def ratios(results: dict, dense: dict, kind: str) -> dict[str, tuple[float, Interval, int]]:
    """Of final returns: by environment, and over all of them where there are several; with the number of runs.

    Left out: environments where a dense run has no positive return, to which a ratio would mean nothing.
    """
    keys = [(env, kind) for env in ENVS if (env, kind) in dense]
    keys = [key for key in keys if sad.final(results[key[0], dense[key]]).min() > 0]
    found = {key[0]: (*compare(results, dense, key), len(results[key])) for key in keys}
    mine, theirs = {key: results[key] for key in keys}, {key: results[key[0], dense[key]] for key in keys}
    for each in sad.across(mine, theirs, 1)[1].values():
        found[f"mean of {len(keys)} environments"] = each["mean"], each["mean_interval"], each["runs"]
    return found


def claims(folder: Path) -> list[list[str]]:
    """Rows of claim, protocol, where, our figure with its interval, runs, verdict. Raises sweep.UsageError."""
    plan = sweep.read_plan(folder)
    results, missing = sweep.read_results(plan)
    dense, rows = sweep.dense_of(results, plan), []
    dense |= {key: "dense" for key in results if key[1].endswith(", wide") and (key[0], "dense") in results}

    def add(claim: str, how: str, where: str, value: float, bounds: Interval, runs: int, verdict: str) -> None:
        rows.append([claim, how, where, sad.with_interval(value, bounds, ".2f"), str(runs), verdict])

    for variant, how in VARIANTS.items():
        found = {pattern: ratios(results, dense, pattern + variant) for pattern in ("2:4", "1:4", "1:8")}
        for env, claimed in (("Ant-v5", 1.14), ("HalfCheetah-v5", 1.01)):
            if env in found["2:4"]:
                value, bounds, runs = found["2:4"][env]
                add(f"2:4 is {claimed} of dense", how, env, value, bounds, runs, number(claimed, bounds))
        for pattern, what, least in (
            ("2:4", "2:4 matches dense", 0.95), ("1:4", "1:4 matches dense", 0.95), ("1:8", "1:8 competes", 0.8)
        ):  # fmt: skip
            for where, (value, bounds, runs) in found[pattern].items():
                add(f"{what} (at least {least})", how, where, value, bounds, runs, more(least, bounds))
    studied, more_missing = sweep.read_results(sweep.read_plan(INTERVALS))
    missing += more_missing
    for env, kind in studied:
        pattern = kind.removesuffix(", K10000")
        if pattern != kind and (env, pattern) in studied and sad.final(studied[env, pattern]).min() > 0:
            value, bounds = compare(studied, {(env, kind): pattern}, (env, kind))
            runs, verdict = len(studied[env, kind]), more(1, bounds)
            add(f"{pattern}: rarer mask updates help", "K = 10 000 to K = 1 000", env, value, bounds, runs, verdict)
    for name, where in (("halfcheetah_2_threads", "HalfCheetah-v4"), ("ant", "Ant-v4")):
        with open(SPEED / f"{name}.csv") as file:
            rounds = {
                row["name"]: np.array([float(row[f"run_{i}"]) for i in (1, 2, 3)]) for row in csv.DictReader(file)
            }
        for pattern in ("2:4", "1:4", "1:8"):
            samples = [rounds[pattern], rounds["CleanRL"]]
            value, bounds = sweep.ratio(*samples), sad.bootstrap(samples, sweep.ratio, 1)
            add(f"{pattern} trains faster", "two threads, CleanRL", where, value, bounds, 3, more(1, bounds))
    for pattern in ("2:4", "1:4", "1:8"):
        for env in ENVS:
            if (env, pattern) in dense:
                value, bounds = compare(results, dense, (env, pattern), rates)
                runs, verdict = len(results[env, pattern]), more(1, bounds)
                add(f"{pattern} trains faster", "these runs, our dense twin", env, value, bounds, runs, verdict)
    if (summary := folder / "sad" / "summary.json").exists():
        for env, found in json.loads(summary.read_text())["stability_and_return"].items():
            if "within_groups_spearman" in found:
                value, bounds = found["within_groups_spearman"], found["within_groups_interval"]
                add("stable SAD, better return", "rank correlation", env, value, bounds, found["runs"], more(0, bounds))
    for line in missing:
        print("left out:", line, file=sys.stderr)
    return rows


if __name__ == "__main__":
    print(sad.markdown(["claim", "how", "where", "ours", "runs", "verdict"], claims(HERE)))
