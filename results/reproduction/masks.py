"""What the masks of the runs say: kept by run, since run folders do not last, and then drawn and correlated for all.

python results/reproduction/masks.py  # where the run folders are; from the root of the project
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

NETWORKS = ["actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"]


def keep(run: sad.Run, path: Path) -> None:
    """Of each projection, by network: SAD, and active entries that the target has too; and figures of the whole run."""
    history, layers = run.history, sad.members(run.history)
    tables = [[table[:, layers[name]].sum(1) for name in NETWORKS] for table in (history.sad, history.overlap)]
    counts = [[int(table[layers[name]].sum()) for name in NETWORKS] for table in (history.entries, history.active)]
    header = ["step", "update", *[f"{what}_{name}" for what in ("sad", "overlap") for name in NETWORKS]]
    sad.write_csv(
        path.with_suffix(".csv"), header, zip(history.steps, history.updates, *tables[0], *tables[1], strict=True)
    )
    about = {"entries": counts[0], "active": counts[1], "stability": run.stability, "sad": run.sad["total"]}
    (incomplete := path.with_suffix(".incomplete")).write_text(json.dumps(about | {"notes": run.notes}, indent=1))
    incomplete.replace(path.with_suffix(".json"))


def add_kept(run: sad.Run, path: Path) -> None:
    """As `add_history`, from what was kept."""
    about = json.loads(path.with_suffix(".json").read_text())
    steps, updates, *columns = np.loadtxt(path.with_suffix(".csv"), np.int64, delimiter=",", skiprows=1).T
    changed, overlap = np.array(columns).reshape(2, len(NETWORKS), -1).transpose(0, 2, 1)
    nothing = np.zeros((1, len(NETWORKS)), np.int64)
    unused = dict.fromkeys(("ever", "always", "entered", "returned", "spells", "kept", "matrix"), nothing)
    unused["sad_first"] = np.zeros_like(changed)
    counts = np.array(about["entries"]), np.array(about["active"])
    run.history = sad.History(NETWORKS, *counts, steps, updates, changed, overlap=overlap, **unused)
    run.stability, run.sad, run.notes = about["stability"], {"total": about["sad"]}, about["notes"]


def main(folder: Path) -> dict:
    """Write and return `sad/summary.json`: figures by run, and per environment stability against final return."""
    out, runs = folder / "sad", []
    out.mkdir(parents=True, exist_ok=True)
    for task in sweep.read_plan(folder).values():
        if task.pattern == "dense" or sweep.last_evaluation(task.results) < task.total_timesteps:
            continue
        path, reason = out / f"{task.name}.json", "its run folder is gone, and its masks were not kept"
        if not path.exists() and task.folder.exists():
            sad.add_history(run := sad.read_run(task.folder), 2)
            if run.history:
                keep(run, path)
            else:
                reason = run.notes[-1]
        if path.exists():
            runs.append(sad.read_run(task.results))
            add_kept(runs[-1], path)
            runs[-1].extra = "" if task.variant == "base" else f", {task.variant}"
        else:
            print(f"{task.name} is left out: {reason}", file=sys.stderr)
    if not runs:
        sys.exit("no run has ended yet")
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.group, run.config["seed"])):
        groups[run.config["env_id"], sad.label(run.group)].append(run)
    correlations = sad.correlate(runs)
    found = {}
    for run in runs:
        rates = (run.history.sad.sum(1) / run.history.active.sum())[1:]  # of projections: the first record is the start
        about = {"sad_first": rates[0], "sad_last": rates[-100:].mean()}
        found[run.name] = {"notes": run.notes, "stability": run.stability, "sad": run.sad["total"]} | about
    summary = {"runs": found, "stability_and_return": correlations}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    sad.plot_over_time(groups, 100, out / "sad_over_time.png")
    sad.plot_stability(groups, correlations, out / "stability.png")
    return summary


if __name__ == "__main__":
    for env, found in main(Path("results/reproduction"))["stability_and_return"].items():
        print(env, found["verdict"], sep=": ")
