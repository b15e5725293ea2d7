"""Claims are judged by the rules that stand in results/reproduction/README.md."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("claims", Path(__file__).parents[1] / "results/reproduction/claims.py")
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)


@pytest.mark.parametrize(
    "claimed, bounds, verdict",
    [
        (1.14, [1.0, 1.3], "confirmed"), (1.14, [1.14, 1.2], "confirmed"), (1.14, [0.9, 1.31], "undecided"),
        (1.14, [1.15, 1.2], "refuted"), (1.14, [0.2, 1.13], "refuted"), (1.14, None, "undecided"),
    ],
)  # fmt: skip
def test_a_number(claimed, bounds, verdict):
    assert claims.number(claimed, bounds) == verdict


@pytest.mark.parametrize(
    "bound, bounds, verdict",
    [(0.8, [0.8, 2], "confirmed"), (0.8, [0.5, 0.79], "refuted"), (0.8, [0.79, 0.9], "undecided"),
     (0.8, [0.5, 0.8], "undecided"), (0.8, None, "undecided")],
)  # fmt: skip
def test_at_least(bound, bounds, verdict):
    assert claims.more(bound, bounds) == verdict


def sweep_of(returns, steps=200):
    """A folder as sweep.py leaves it: by environment, kind and seed, one return at all evaluations, and seconds."""
    plan = {}
    for env, kinds in returns.items():
        for (pattern, variant), runs in kinds.items():
            for seed, (value, seconds) in enumerate(runs, start=1):
                kind = pattern.replace(":", "_") + (f"__{variant}" if variant != "base" else "")
                name = f"{env}__{kind}__{seed}"
                plan[name] = [env, pattern, seed, steps, [] if variant == "base" else ["--init", "linear"], variant]
                folder = Path("study/runs", name)
                folder.mkdir(parents=True)
                config = {"env_id": env, "seed": seed, "total_timesteps": steps, "eval_interval": 10}
                if pattern != "dense":
                    n, m = map(int, pattern.split(":"))
                    config |= {"n": n, "m": m, "mask_update_interval": 1000}
                (folder / "config.json").write_text(json.dumps(config))
                rows = [f"{step},{value},{value},0,{seconds * step / steps}" for step in range(10, steps + 1, 10)]
                (folder / "evaluations.csv").write_text("\n".join(["step,return_1,mean,std,seconds", *rows, ""]))
    Path("study/sweep.json").write_text(json.dumps(plan))
    return Path("study")


def test_the_table():
    dense, sparse = [(100.0, 20), (110.0, 20), (90.0, 20)], [(114.0, 10), (115.0, 10), (113.0, 10)]
    kinds = {("dense", "base"): dense, ("2:4", "base"): sparse, ("1:8", "base"): [(value / 2, 5) for value, _ in dense]}
    folder = sweep_of({"Ant-v5": kinds | {("1:8", "letter"): [(10.0, 5)]}, "HalfCheetah-v5": kinds})
    (folder / "sad").mkdir()
    found = {"runs": 30, "within_groups_spearman": -0.4, "within_groups_interval": [-0.7, -0.1]}
    (folder / "sad/summary.json").write_text(json.dumps({"stability_and_return": {"Ant-v5": found, "Hopper-v5": {}}}))
    rows = {(claim, how, where): rest for claim, how, where, *rest in claims.claims(folder)}
    recipe = "the recipe, 3e-4"
    ours, runs, verdict = rows["2:4 is 1.14 of dense", recipe, "Ant-v5"]
    assert ours.startswith("1.14 [1.0") and (runs, verdict) == ("3", "confirmed")
    assert rows["2:4 is 1.01 of dense", recipe, "HalfCheetah-v5"][-1] == "refuted"
    matches = [
        rows["2:4 matches dense (at least 0.95)", recipe, where] for where in ("Ant-v5", "HalfCheetah-v5", "all")
    ]
    assert [row[2] for row in matches] == ["confirmed"] * 3 and matches[2][1] == "6"
    low, high = (float(bound) for bound in matches[2][0].split("[")[1].rstrip("]").split(", "))
    assert 1.0 < low < 1.14 < high < 1.3 and matches[2][0].startswith("1.14 ")
    assert rows["1:8 competes (at least 0.8)", recipe, "all"][2] == "refuted"
    assert rows["1:8 competes (at least 0.8)", "to the letter", "Ant-v5"] == ["0.10", "1", "undecided"]
    assert rows["2:4 trains faster", "steps per second", "Ant-v5"][0] == "2.00 [2.00, 2.00]"
    assert rows["1:8 trains faster", "steps per second", "HalfCheetah-v5"][::2] == ["4.00 [4.00, 4.00]", "confirmed"]
    assert rows["stable SAD, better return", "rank correlation", "Ant-v5"] == ["-0.40 [-0.70, -0.10]", "30", "refuted"]
    assert not [key for key in rows if key[0].startswith("1:4") or key[2] == "Hopper-v5" or key[1] == "best step sizes"]
    assert np.isfinite([float(row[0].split()[0]) for row in rows.values()]).all()
