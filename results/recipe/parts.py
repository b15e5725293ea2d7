"""The tables of README.md, and a figure for each step: from the root of the project.

python results/recipe/parts.py
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

HERE, ENVS = Path("results/recipe"), ("HalfCheetah-v5", "Ant-v5")
PATTERNS = ("2:4", "1:4", "1:8")
PARTS = {  # variant: what it is
    "letter": "to the letter",
    "start": "start",
    "last": "last dense",
    "lr9": "start, last dense",
    "first12": "start, last dense, first 1:2",
    "both": "start, first and last dense",
    "factor": "start, last dense, factor",
}
AT_3E4 = {"lr3": "start, last dense", "last3": "last dense", "critics14.3e-4": "start, last dense, critics 1:4"}
WIDE = {  # kind: what it is
    "dense": "dense, 256",
    "1:4, lr9": "1:4, 256",
    "1:8, lr9": "1:8, 256",
    "1:4, w512": "1:4, 512",
    "1:8, w512": "1:8, 512",
    "1:16, w1024": "1:16, 1024",
    "1:8, critics14": "1:8, 256, critics 1:4",
    "1:4, critics12": "1:4, 256, critics 1:2",
}
NO_HELP = {"1:8, grow": "1:8, growth", "1:8, tighten": "1:8, tightened", "1:4, tighten": "1:4, tightened"}
INTERVALS = {"K100": "100", "lr9": "1 000", "K10000": "10 000", "K0": "never"}
PATCHED = {"HalfCheetah-v5": 16.3, "Ant-v5": 24.6}  # active weights of `first12` in per cent: no flag of the scripts


def by_pattern(results: dict, patterns: tuple[str, ...], variants: dict[str, str], base: str) -> tuple[list, list]:
    """Header and rows: ratios to `base` for each environment and pattern, and their means."""
    header, rows = [f"{m}, {where}" for m in patterns for where in (*ENVS, "mean")], []
    for variant, what in variants.items():
        keys = [[(env, f"{m}, {variant}") for env in ENVS] for m in patterns]
        groups = [group for both in keys for group in (both[:1], both[1:], both)]
        groups.append([key for both in keys for key in both])
        rows.append([what, *[ratio(results, group, base) for group in groups]])
    return ["", *header, "mean of all"], rows


def parts(results: dict) -> str:
    """Ratios to the best dense runs of each environment, and active weights of 1:8 in per cent."""
    header, rows = by_pattern(results, ("1:8", "1:4"), PARTS, "dense")
    for variant, row in zip(PARTS, rows, strict=True):
        shares = [weights(results[env, f"1:8, {variant}"]) / weights(results[env, "dense"]) for env in ENVS]
        row.append(", ".join(f"{share:.1%}" for share in shares))
    return sad.markdown([*header, "active"], rows)


def wide(results: dict, kinds: dict[str, str]) -> str:
    """Per step, per second and per active weight; weights in per cent of those of dense 256."""
    timed = sweep.timed(results)
    header = ["final return to dense", "return when the fastest ended", "steps/s", "active", "return / 1 000 weights"]
    clocks, tables = {env: min(seconds(runs) for (e, _), runs in timed.items() if e == env) for env in ENVS}, []
    for env in ENVS:
        rows = []
        for kind, what in kinds.items():
            if runs := results.get((env, kind)):
                count, early = weights(runs), sweep.return_at(timed[env, kind], clocks[env]).mean()
                cells = ratio(results, [(env, kind)]), f"{early:.0f}", f"{sweep.rates(timed[env, kind]).mean():.0f}"
                cells += f"{count / weights(results[env, 'dense']):.1%}", f"{1000 * sad.final(runs).mean() / count:.0f}"
                rows.append([f"{what} ({len(runs)})", *cells])
        tables += [sad.markdown([env, *header], rows)] if rows else []
    return "\n".join(tables)


def tables(results: dict) -> str:
    """All of README.md, from `read`."""
    at_3e4 = results | {(env, "dense"): results[env, "dense, lr3"] for env in ENVS}
    at_best = results | {(env, f"{m}, best"): best_of(results, env, m) for env in ENVS for m in PATTERNS}
    compared = [
        by_pattern(at_3e4, PATTERNS, {"lr3": "3e-4 for all"}, "dense"),
        by_pattern(at_best, PATTERNS, {"best": "each at its best"}, "dense"),
        by_pattern(at_3e4, ("1:8", "1:4"), AT_3E4, "dense"),
        by_pattern(results, ("1:8", "1:4"), {"lr9": "with the start to without, 9e-4"}, "last"),
        by_pattern(results, ("1:8", "1:4"), {"lr3": "with the start to without, 3e-4"}, "last3"),
        by_pattern(results, ("1:8",), {"critics14": "critics 1:4, to 1:8 in all"}, "lr9"),
        by_pattern(results, ("1:4", "1:8"), INTERVALS, "lr9"),  # to 1 000 critic updates, the default
    ]
    found = [sad.markdown(*table) for table in compared]
    return "\n".join([*found[:2], parts(results), *found[2:], wide(results, WIDE), wide(results, NO_HELP)])


def ratio(results: dict, keys: list[tuple[str, str]], base: str = "dense") -> str:
    """Mean of the ratios to the dense runs, or to a variant of the same pattern; empty as long as one has no runs.

    Patterns that share the dense runs of an environment are one sample: each seed's mean over them.
    """
    if any(key not in results for key in keys):
        return ""
    groups = {}
    for env, kind in keys:
        to = (env, base if base == "dense" else f"{kind.partition(', ')[0]}, {base}")
        groups.setdefault(to, []).append(sad.final(results[env, kind]))
    if keys == [*groups]:
        return "1"
    if any(len({*map(len, group)}) > 1 for group in groups.values()):  # some seeds have not ended
        return ""
    samples = [np.mean(group, axis=0) for group in groups.values()]
    found = sad.estimate(samples, 1, [sad.final(results[to]) for to in groups])
    return sad.with_interval(found["mean"], found["mean_interval"], ".2f")


def best_of(results: dict, env: str, pattern: str) -> list[sad.Run]:
    """Its runs at the best step size of step 1."""
    return max((results[env, f"{pattern}, lr{x}"] for x in (3, 6, 9)), key=lambda runs: sad.final(runs).mean())


def seconds(runs: list[sad.Run]) -> float:
    return np.mean([run.seconds[-1] for run in runs])


def weights(runs: list[sad.Run]) -> float:
    """Active weights of one actor and two critics."""
    config = runs[0].config
    sizes, obs, action = config["hidden_sizes"], config["obs_dim"], config["action_dim"]
    actor, critic = pairwise([obs, *sizes, action]), pairwise([obs + action, *sizes, 1])
    share = PATCHED[config["env_id"]] if config.get("first_layer") else sweep.weights(config)["active"]
    return share / 100 * sum(x * y for x, y in (*actor, *2 * [*critic]))


def read() -> dict:
    """Ended runs by environment and kind, and the best dense runs of each environment as `dense`."""
    results, _ = sweep.read_results(sweep.read_plan(HERE))
    return results | {(env, "dense"): best_of(results, env, "dense") for env in ENVS}


if __name__ == "__main__":
    results = read()
    dense = {key: runs for key, runs in results.items() if key[1] == "dense"}
    chosen = {
        "step_size": {key: runs for key, runs in results.items() if key[1].endswith(("lr3", "lr6", "lr9"))},
        "parts": dense | {(env, f"1:8 {name}"): results[env, f"1:8, {name}"] for name in PARTS for env in ENVS},
        "best": {(env, m): best_of(results, env, m) for m in ("dense", *PATTERNS) for env in ENVS},
        "wide": dense | {(e, WIDE[kind]): runs for (e, kind), runs in results.items() if kind in [*WIDE][1:]},
    }
    for name, runs in chosen.items():
        sweep.plot_curves(runs, list(ENVS), HERE / f"{name}.png")
    print(tables(results))
