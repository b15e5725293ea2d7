"""What has ended, and against it the paper's claims and our targets: tables of README.md, best.png, and the table of
results in the README.md of the project.

python results/reproduction/claims.py  # from the root of the project
"""

import csv
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.stats

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

HERE, INTERVALS = Path("results/reproduction"), Path("results/recipe")
SPEED = Path(__file__).parents[1] / "speed/zen4"
ENVS = ("HalfCheetah-v5", "Ant-v5", "Walker2d-v5", "Hopper-v5")
VARIANTS = {"": "the recipe, 3e-4", ", letter": "to the letter", ", best": "best step sizes"}
VARIANTS |= {", critics": "best step sizes, critics of 1:4", ", wide": "best step sizes, wide"}
NETWORKS = "n", "m", "critic_m", "dense_layers", "hidden_sizes"  # what the speed of a run depends on
CHANGES = "SAD of the first projection (%)", "of the last 100 (%)", "never active (%)", "always active (%)"
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


def compare(*pairs: tuple[np.ndarray, np.ndarray]) -> tuple[float, Interval]:
    """Mean of the ratios of means of each pair (ours, theirs), with Welch's interval, which three runs do not fool."""
    values, variances, freedom = [], [], []
    for ours, theirs in pairs:
        values.append(value := sweep.ratio(ours, theirs))
        if min(len(ours), len(theirs)) > 1:
            parts = [ours.var(ddof=1) / len(ours), theirs.var(ddof=1) / len(theirs) * value**2]
            variances += [part / theirs.mean() ** 2 for part in parts]
            freedom += [len(ours) - 1, len(theirs) - 1]
    mean, variance = float(np.mean(values)), sum(variances)
    if len(variances) < 2 * len(pairs):
        return mean, None
    degrees = variance**2 / sum(x**2 / y for x, y in zip(variances, freedom, strict=True)) if variance else 1
    half = scipy.stats.t.ppf(0.975, degrees) * math.sqrt(variance) / len(pairs)
    return mean, [mean - half, mean + half]


def ratios(results: dict, dense: dict[tuple[str, str], str], kind: str, envs=ENVS) -> dict[str, tuple]:
    """By environment, and over all where there are several: ratio of final returns to dense, the same of what is above
    an untrained policy, which on Ant-v5 has much for standing, and the number of runs.

    Left out: environments where a dense run has no positive return, or none above an untrained policy.
    """
    groups = {}
    for env in (env for env in envs if (env, kind) in dense):
        ours, runs = sad.final(results[env, kind]), results[env, dense[env, kind]]
        theirs, before = sad.final(runs), [run.returns[run.steps <= run.config["learning_starts"]] for run in runs]
        untrained = np.concatenate(before).mean()
        if theirs.min() > max(0, untrained):
            groups[env] = [(ours, theirs, untrained)]
    if len(groups) > 1:
        groups[f"mean of {len(groups)} environments"] = [group for (group,) in groups.values()]
    found = {}
    for where, group in groups.items():
        raw, above = compare(*[(a, b) for a, b, _ in group]), compare(*[(a - u, b - u) for a, b, u in group])
        found[where] = raw, above, sum(len(ours) for ours, *_ in group)
    return found


def read(folder: Path) -> tuple[dict, dict[tuple[str, str], str], list[str]]:
    """Results, the dense kind that each is compared with, and what is missing. Raises sweep.UsageError."""
    plan = sweep.read_plan(folder)
    results, missing = sweep.read_results(plan)
    dense = sweep.dense_of(results, plan)
    for env, kind in results:
        if kind.endswith((", best", ", critics", ", wide")):
            dense.pop((env, kind), None)
            best = "dense, best" if env == "HalfCheetah-v5" else "dense"  # on Ant-v5 dense is at its best at 3e-4
            if (env, best) in results:
                dense[env, kind] = best
    return results, dense, missing


def on_one_clock(results: dict) -> dict:
    """Wall times that compare: every run gets the mean time of the runs of the same networks that were made on the
    processor of `sweep.timed`; without any it is left out."""
    networks = lambda run: str([run.config["env_id"], *map(run.config.get, NETWORKS)])  # noqa: E731
    there, found = defaultdict(list), {}
    for runs in sweep.timed(results).values():
        for run in runs:
            there[networks(run)].append(run)
    for key, runs in results.items():
        for run in runs:
            if same := there.get(networks(run)):
                seconds = run.seconds / run.seconds[-1] * np.mean([other.seconds[-1] for other in same])
                config = run.config | {key: same[0].config.get(key) for key in ("cpu", "num_threads")}
                found.setdefault(key, []).append(replace(run, config=config, seconds=seconds))
    return found


def returns(results: dict) -> list[list[str]]:
    """Rows of kind, step size and, for each of ENVS, final returns by seed."""
    rows = []
    for kind in dict.fromkeys(kind for _, kind in results):
        found = [results.get((env, kind), []) for env in ENVS]
        (rate,) = {run.config["learning_rate"] for runs in found for run in runs}
        rows.append([kind, f"{rate:g}", *(", ".join(f"{value:.0f}" for value in sad.final(runs)) for runs in found)])
    return rows


def processors(results: dict) -> list[list[str]]:
    """Rows of processor, as in `config.json`, and number of runs in each of ENVS."""
    found = defaultdict(Counter)
    for (env, _), runs in results.items():
        for run in runs:
            found[run.config["cpu"]][env] += 1
    return [[f"`{cpu}`", *(counts[env] for env in ENVS)] for cpu, counts in found.items()]


def changes(folder: Path, results: dict) -> list[list[str]]:
    """Rows of environment, kind, runs, and in per cent the SAD of the first projection and the mean of the last hundred
    (of active entries, all six networks), entries that were never active and those that were always: means of runs.
    """
    rows, kept = [], json.loads((folder / "sad/summary.json").read_text())["runs"]
    for (env, kind), runs in results.items():
        if of := [kept[run.name] for run in runs if run.name in kept]:
            found = [[x["sad_first"], x["sad_last"], x["sad"]["never_active"], x["sad"]["always_active"]] for x in of]
            rows.append([env, kind, str(len(of)), *(f"{100 * value:.3g}" for value in np.mean(found, axis=0))])
    return rows


def targets(folder: Path) -> list[list[str]]:
    """Rows of target, protocol, where, our ratio to dense with its interval, runs, and whether its value is met.

    Final returns in the mean of two environments; in each, returns at the wall time in which dense does a quarter of
    its steps. Raises sweep.UsageError.
    """
    results, dense, _ = read(folder)
    timed, both, rows = on_one_clock(results), "mean of 2 environments", []

    def add(target: str, least: float, how: str, where: str, found: tuple[float, Interval], runs: int) -> None:
        verdict = "met" if found[0] >= least else "missed"
        rows.append([f"{target}, at least {least}", how, where, sad.with_interval(*found, ".2f"), str(runs), verdict])

    for variant, how in VARIANTS.items():
        for pattern, least in (("1:4", 1.0), ("1:8", 0.9)):
            kind = pattern + variant
            if both in (found := ratios(results, dense, kind, ENVS[:2])):
                raw, _, runs = found[both]
                add(f"{pattern}: final return", least, how, both, raw, runs)
            for env in ENVS[:2]:
                if (env, kind) in timed and (theirs := timed.get((env, dense.get((env, kind))))):
                    clock = float(np.mean([run.seconds[run.steps >= run.steps[-1] / 4][0] for run in theirs]))
                    pair = sweep.return_at(timed[env, kind], clock), sweep.return_at(theirs, clock)
                    if all(early is not None for early in pair) and pair[1].min() > 0:
                        target = f"{pattern}: return after a quarter of the steps of dense"
                        add(target, 1.5, how, env, compare(pair), len(pair[0]))
    return rows


def claims(folder: Path) -> list[list[str]]:
    """Rows of claim, protocol, where, our figure with its interval, that above an untrained policy, runs, verdict.

    Raises sweep.UsageError.
    """
    results, dense, missing = read(folder)
    rows = []

    def add(claim: str, how: str, where: str, found: tuple[float, Interval], runs: int, verdict: str, above="") -> None:
        rows.append([claim, how, where, sad.with_interval(*found, ".2f"), above, str(runs), verdict])

    def add_more(claim: str, how: str, where: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        """The claim that the mean of ours is larger."""
        found = compare((ours, theirs))
        add(claim, how, where, found, len(ours), more(1, found[1]))

    for variant, how in VARIANTS.items():
        found = {pattern: ratios(results, dense, pattern + variant) for pattern in ("2:4", "1:4", "1:8", "1:16")}
        for env, claimed in (("Ant-v5", 1.14), ("HalfCheetah-v5", 1.01)):
            if env in found["2:4"]:
                raw, above, runs = found["2:4"][env]
                other = sad.with_interval(*above, ".2f")
                add(f"2:4 is {claimed} of dense", how, env, raw, runs, number(claimed, raw[1]), other)
        for pattern, what, least in (
            ("2:4", "2:4 matches dense", 0.95), ("1:4", "1:4 matches dense", 0.95), ("1:8", "1:8 competes", 0.8),
            ("1:16", "1:16 competes", 0.8)  # if it is the best of wide and sparse
        ):  # fmt: skip
            for where, (raw, above, runs) in found[pattern].items():
                verdicts, other = {more(least, raw[1]), more(least, above[1])}, sad.with_interval(*above, ".2f")
                verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
                add(f"{what} (at least {least})", how, where, raw, runs, verdict, other)
    for env, kind in results:
        pattern, _, variant = kind.partition(", ")
        if variant == "letter" and (env, pattern) in results and sad.final(results[env, kind]).min() > 0:
            samples = sad.final(results[env, pattern]), sad.final(results[env, kind])
            add_more(f"{pattern}: the recipe beats the letter", "both at 3e-4", env, *samples)
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
    timed = sweep.timed(results)
    for pattern in ("2:4", "1:4", "1:8"):
        for env in ENVS:
            if (env, pattern) in timed and (env, dense.get((env, pattern))) in timed:
                samples = sweep.rates(timed[env, pattern]), sweep.rates(timed[env, dense[env, pattern]])
                add_more(f"{pattern} trains faster", "these runs, our dense twin", env, *samples)
    if (summary := folder / "sad" / "summary.json").exists():
        for env, found in json.loads(summary.read_text())["stability_and_return"].items():
            if "within_groups_spearman" in found:
                found = found["within_groups_spearman"], found["within_groups_interval"], found["within_groups_runs"]
                add("stable SAD, better return", "rank correlation", env, found[:2], found[2], more(0, found[1]))
    for line in missing:
        print("left out:", line, file=sys.stderr)
    return rows


def tables(folder: Path) -> list[str]:
    """Those of README.md. Raises sweep.UsageError."""
    results, _, _ = read(folder)
    return [
        sad.markdown(["final return, by seed", "step size", *ENVS], returns(results)),
        sad.markdown(["processor, and its runs", *ENVS], processors(results)),
        sad.markdown(["claim", "how", "where", "ours", "above untrained", "runs", "verdict"], claims(folder)),
        sad.markdown(["target", "how", "where", "ours", "runs", "verdict"], targets(folder)),
        sad.markdown(["masks of", "", "runs", *CHANGES], changes(folder, results)),
    ]


def summary(results: dict, dense: dict[tuple[str, str], str]) -> str:
    """The table of the project's README.md: active weights, wall time as a share of that of dense (mean of two
    environments), and final returns, mean +- standard deviation and ratio to dense.
    """
    kinds = ["2:4", "1:4", "1:8", "1:8, critics"]
    hours = {key: runs[0].seconds[-1] for key, runs in on_one_clock(results).items()}
    shares = [np.mean([hours[env, kind] / hours[env, "dense"] for env in ENVS[:2]]) for kind in kinds]
    active = [sweep.weights(results[ENVS[0], kind][0].config)["active"] for kind in kinds]
    costs = [f"{share:.1f} %, {time:.2f}" for share, time in zip(active, shares, strict=True)]
    rows = [["active weights (HalfCheetah-v5); wall time (mean with Ant-v5)", "100 %, 1", *costs]]

    def returns(runs: list[sad.Run]) -> str:
        values = sad.final(runs)
        return f"{values.mean():.0f}" + (f" +- {values.std(ddof=1):.0f}" if len(values) > 1 else "")

    for how, kinds in (
        ("3e-4 for all", ["2:4", "1:4", "1:8", ""]),
        ("each at its best", ["", "1:4, best", "1:8, best", "1:8, critics"]),
    ):
        found = {kind: ratios(results, dense, kind) for kind in kinds}
        for where in found[kinds[2]]:
            one = where in ENVS  # or the mean
            cells = [f"{where}, {how}", returns(results[where, dense[where, kinds[2]]]) if one else "1"]
            for kind in kinds:
                ratio = sad.with_interval(*found[kind][where][0], ".2f") if where in found[kind] else ""
                cells.append(f"{returns(results[where, kind])}: {ratio}" if ratio and one else ratio)
            rows.append(cells)
    return sad.markdown(["1 000 000 steps", "dense", "2:4", "1:4", "1:8", "1:8, `--critic-m 4`"], rows)


def at_best(results: dict, dense: dict[tuple[str, str], str]) -> dict[tuple[str, str], list[sad.Run]]:
    """As `results`, of HalfCheetah-v5 and Ant-v5, each at its best step size: those of a figure that can be read."""
    kinds = {"1:4": "1:4, best", "1:8": "1:8, best", "1:8 with critics of 1:4": "1:8, critics"}
    chosen = {(env, "dense"): results[env, dense[env, "1:8, best"]] for env in ENVS[:2]}
    return chosen | {(env, name): results[env, kind] for env in ENVS[:2] for name, kind in kinds.items()}


if __name__ == "__main__":
    found, dense_of, _ = read(HERE)
    sweep.plot_curves(at_best(on_one_clock(found), dense_of), list(ENVS[:2]), HERE / "best.png")
    print("\n".join([*tables(HERE), summary(found, dense_of)]), end="")
