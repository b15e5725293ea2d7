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
PARTS = {  # variant: what it is
    "letter": "to the letter",
    "start": "start",
    "lr9": "start, last dense",
    "first12": "start, last dense, first 1:2",
    "both": "start, first and last dense",
    "factor": "start, last dense, factor",
}
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
INTERVALS = {"K100": "100", "lr9": "1 000", "K10000": "10 000", "K0": "never"}
# active weights in per cent where they come from flags that the scripts do not have
PATCHED = {("HalfCheetah-v5", "first12"): 16.3, ("Ant-v5", "first12"): 24.6}


def parts(results: dict) -> str:
    """Ratios to the best dense runs of each environment, and their means; active weights of 1:8."""
    header = ["", *[f"{m}, {where}" for m in ("1:8", "1:4") for where in (*ENVS, "mean")], "mean of all", "active, %"]
    rows = []
    for variant, what in PARTS.items():
        eighth, fourth = ([(env, f"{pattern}, {variant}") for env in ENVS] for pattern in ("1:8", "1:4"))
        groups = [*[[key] for key in eighth], eighth, *[[key] for key in fourth], fourth, eighth + fourth]
        active = [f"{weights(results, key) / dense_weights(results, key[0]):.1%}" for key in eighth]
        rows.append([what, *[ratio(results, keys) for keys in groups], ", ".join(active)])
    return sad.markdown(header, rows)


def wide(results: dict) -> str:
    """Per step, per second and per active weight; weights in per cent of those of dense 256."""
    header = ["final return to dense", "return when the fastest ended", "steps/s", "active", "return / 1 000 weights"]
    clocks, tables = {env: min(seconds(runs) for (e, _), runs in results.items() if e == env) for env in ENVS}, []
    for env in ENVS:
        rows = []
        for kind in WIDE:
            if runs := best_of(results, env, kind) if kind == "dense" else results.get((env, kind)):
                count, early = weights(results, (env, kind)), sweep.return_at(runs, clocks[env]).mean()
                cells = ratio(results, [(env, kind)]), f"{early:.0f}", f"{sweep.rates(runs).mean():.0f}"
                cells += f"{count / dense_weights(results, env):.1%}", f"{1000 * sad.final(runs).mean() / count:.0f}"
                rows.append([f"{WIDE[kind]} ({len(runs)})", *cells])
        tables.append(sad.markdown([env, *header], rows))
    return "\n".join(tables)


def intervals(results: dict) -> str:
    """Ratios to the interval of 1 000 critic updates, which is the default."""
    header, rows = ["K", *[f"{m}, {where}" for m in ("1:4", "1:8") for where in (*ENVS, "mean")], "mean of all"], []
    for variant, what in INTERVALS.items():
        fourth, eighth = ([(env, f"{pattern}, {variant}") for env in ENVS] for pattern in ("1:4", "1:8"))
        groups = [*[[key] for key in fourth], fourth, *[[key] for key in eighth], eighth, fourth + eighth]
        rows.append([what, *[ratio(results, keys, "lr9") for keys in groups]])
    return sad.markdown(header, rows)


def ratio(results: dict, keys: list[tuple[str, str]], base: str = "dense") -> str:
    """Mean of the ratios to the best dense runs, or to a variant of the same; empty as long as one has no runs."""
    runs = [best_of(results, env, "dense") if kind == "dense" else results.get((env, kind)) for env, kind in keys]
    if not all(runs):
        return ""
    others = [best_of(results, e, base) if base == "dense" else results[e, f"{k[:3]}, {base}"] for e, k in keys]
    if runs == others:
        return "1"
    found = sad.estimate([sad.final(each) for each in runs], 1, [sad.final(each) for each in others])
    return sad.with_interval(found["mean"], found["mean_interval"], ".2f")


def best_of(results: dict, env: str, pattern: str) -> list[sad.Run]:
    """Its runs at the best step size of step 1."""
    return max((results[env, f"{pattern}, lr{x}"] for x in (3, 6, 9)), key=lambda runs: sad.final(runs).mean())


def seconds(runs: list[sad.Run]) -> float:
    return np.mean([run.seconds[-1] for run in runs])


def weights(results: dict, key: tuple[str, str]) -> float:
    """Active weights of one actor and two critics."""
    if key[1] == "dense":
        return dense_weights(results, key[0])
    config = results[key][0].config
    sizes, obs, action = config["hidden_sizes"], config["obs_dim"], config["action_dim"]
    actor, critic = pairwise([obs, *sizes, action]), pairwise([obs + action, *sizes, 1])
    share = PATCHED.get((key[0], key[1].partition(", ")[2]), sweep.weights(config)["active"])
    return share / 100 * sum(x * y for x, y in (*actor, *2 * [*critic]))


def dense_weights(results: dict, env: str) -> float:
    return weights(results, (env, "dense, lr3"))


if __name__ == "__main__":
    results, _ = sweep.read_results(sweep.read_plan(HERE))
    dense = {(env, "dense"): best_of(results, env, "dense") for env in ENVS}
    chosen = {
        "step_size": {key: runs for key, runs in results.items() if key[1].endswith(("lr3", "lr6", "lr9"))},
        "parts": dense | {(env, f"1:8 {name}"): results[env, f"1:8, {name}"] for name in PARTS for env in ENVS},
        "best": {(env, m): best_of(results, env, m) for m in ("dense", "2:4", "1:4", "1:8") for env in ENVS},
        "wide": dense | {(env, WIDE[kind]): results[env, kind] for env, kind in results if kind in WIDE},
    }
    for name, runs in chosen.items():
        sweep.plot_curves(runs, list(ENVS), HERE / f"{name}.png")
    print(parts(results), wide(results), intervals(results), sep="\n")
