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

HERE, INTERVALS = Path("results/reproduction"), Path("results/recipe")
SPEED = Path(__file__).parents[1] / "speed/zen4"
ENVS = ("HalfCheetah-v5", "Ant-v5", "Walker2d-v5", "Hopper-v5")
VARIANTS = {"": "the recipe, 3e-4", ", letter": "to the letter", ", best": "best step sizes"}
VARIANTS |= {", critics": "best step sizes, critics of 1:4", ", wide": "best step sizes, wide"}
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


def compare(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, Interval]:
    """Ratio of the means."""
    return sweep.ratio(ours, theirs), sad.bootstrap([ours, theirs], sweep.ratio, 1)


def ratios(results: dict, dense: dict, kind: str) -> dict[str, tuple[float, Interval, int]]:
    """Of final returns: by environment, and over all of them where there are several; with the number of runs.

    Left out: environments where a dense run has no positive return, to which a ratio would mean nothing.
    """
    theirs = {(env, kind): results[env, dense[env, kind]] for env in ENVS if (env, kind) in dense}
    theirs = {key: runs for key, runs in theirs.items() if sad.final(runs).min() > 0}
    mine = {key: results[key] for key in theirs}
    found = {key[0]: (*compare(sad.final(mine[key]), sad.final(theirs[key])), len(mine[key])) for key in mine}
    for each in sad.across(mine, theirs, 1)[1].values():
        found[f"mean of {len(mine)} environments"] = each["mean"], each["mean_interval"], each["runs"]
    return found


def claims(folder: Path) -> list[list[str]]:
    """Rows of claim, protocol, where, our figure with its interval, runs, verdict. Raises sweep.UsageError."""
    plan = sweep.read_plan(folder)
    results, missing = sweep.read_results(plan)
    dense, rows = sweep.dense_of(results, plan), []
    for name in ("dense", "dense, best"):  # the second where it is there: on Ant-v5 dense is at its best at 3e-4
        at_best = [key for key in results if key[1].endswith((", best", ", critics", ", wide"))]
        dense |= {key: name for key in at_best if (key[0], name) in results}

    def add(claim: str, how: str, where: str, value: float, bounds: Interval, runs: int, verdict: str) -> None:
        rows.append([claim, how, where, sad.with_interval(value, bounds, ".2f"), str(runs), verdict])

    def add_more(claim: str, how: str, where: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """The claim that the mean of ours is larger."""
        value, bounds = compare(ours, theirs)
        add(claim, how, where, value, bounds, len(ours), more(1, bounds))

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
        pattern, _, variant = kind.partition(", ")
        base = studied.get((env, f"{pattern}, lr9"))  # K = 1 000
        if variant == "K10000" and base and sad.final(base).min() > 0:
            samples = sad.final(studied[env, kind]), sad.final(base)
            add_more(f"{pattern}: rarer mask updates help", "K = 10 000 to K = 1 000", env, *samples)
    for name, where in (("halfcheetah_2_threads", "HalfCheetah-v4"), ("ant", "Ant-v4")):
        with open(SPEED / f"{name}.csv") as file:
            rounds = {
                row["name"]: np.array([float(row[f"run_{i}"]) for i in (1, 2, 3)]) for row in csv.DictReader(file)
            }
        for pattern in ("2:4", "1:4", "1:8"):
            add_more(f"{pattern} trains faster", "two threads, CleanRL", where, rounds[pattern], rounds["CleanRL"])
    for pattern in ("2:4", "1:4", "1:8"):
        for env in ENVS:
            if (env, pattern) in dense:
                samples = sweep.rates(results[env, pattern]), sweep.rates(results[env, dense[env, pattern]])
                add_more(f"{pattern} trains faster", "these runs, our dense twin", env, *samples)
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
