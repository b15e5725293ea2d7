"""Sparse Architecture Divergence (SAD): what the masks of runs of rnm_td3_continuous.py did, and the returns with it.

SAD between two steps is the number of mask entries that differ (Zhou et al. 2021, arXiv 2102.04010); as a rate, divided
by the number of active entries. Reads finished, unfinished and dense runs; writes sad.csv, summary.json,
sad_matrices.npz and figures.
"""

import csv
import functools
import glob
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro

COHORTS = 10  # times at which an active entry is followed to its end
LAST = 10  # evaluations whose mean is the final return of a run
WINDOWS = 6  # equal parts of the last half of training, over which the SAD is compared to say how stable it is
LEAST_RUNS = 8  # for a correlation
# what two runs may differ in and be seeds of the same: what does not change training, or is compared by itself
ALIKE = {"seed", "exp_name", "track", "wandb_project_name", "wandb_entity", "wandb_id", "capture_video", "save_model"}
ALIKE |= {"evaluate", "resume", "checkpoint_interval", "eval_interval", "eval_episodes", "overlap", "profile", "cuda"}
ALIKE |= {"backend", "save_masks", "device", "cpu", "num_threads", "versions", "n", "m", "mask_update_interval"}
FILES = "[0-9]" * 9 + ".npz"  # of a mask history
RESAMPLES = 10_000  # of the bootstrap


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders, globs of them, or folders of runs
    out: str = "sad"  # folder of what is written
    points: int = 200  # rows per run and name in sad.csv, and points of a curve: more projections are added up
    matrix_size: int = 100  # masks of a run, evenly spaced, that are compared pairwise
    example: bool = False  # first make three small runs (a minute on two cores) in the folder of --out
    seed: int = 1  # of the bootstrap


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line: what is wrong and what to do."""


# ---------------------------------------------------------------- masks


@dataclass
class History:
    """What a mask history amounts to. T projections, the first masks among them; L layers; S of them kept."""

    layers: list[str]  # [L], such as `qf1_target.net.2`
    entries: np.ndarray  # [L]: weights of the dense layer
    active: np.ndarray  # [L]: active entries, the same after each projection
    steps: np.ndarray  # [T] environment steps
    updates: np.ndarray  # [T] critic updates
    sad: np.ndarray  # [T, L] against the projection before; 0 in the first row
    sad_first: np.ndarray  # [T, L] against the first masks
    overlap: np.ndarray  # [T, L] active entries of a layer that its target has active too; 0 for targets
    ever: np.ndarray  # [L] entries that were active at least once
    always: np.ndarray  # [L] entries that were active throughout
    entered: np.ndarray  # [L] how often an entry became active
    returned: np.ndarray  # [L] how often one did that had been active before
    spells: np.ndarray  # [4, any]: layer, first and last update of a spell of activity, and whether it ended then
    kept: np.ndarray  # [S] indices of the projections of `matrix`
    matrix: np.ndarray  # [S, S, L] SAD between each two of them


def popcount(bits: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Ones in each layer of packed masks [..., bytes] that start at the bytes `starts` [L]: int64 [..., L]."""
    return np.add.reduceat(np.bitwise_count(bits), starts, axis=-1, dtype=np.int64)


def read_masks(
    folder: Path, interval: int, notes: list[str]
) -> Iterator[tuple[int, int, list, np.ndarray, np.ndarray]]:
    """Step, update, layers, shapes and bits of each file in turn, as they are: XORed with those of the file before.

    Ends where one is missing or cannot be read, and says so in `notes`.
    """
    expected, size = 0, None
    for path in sorted(folder.glob(FILES)):
        if int(path.stem) != expected:
            return notes.append(f"masks/{expected:09d}.npz is missing: masks are used up to there")
        try:
            with np.load(path) as file:
                step, update, bits = int(file["step"]), int(file["update"]), file["bits"]
                if size is None:
                    layers, shapes = file["layers"].tolist(), file["shapes"]
                    size = int((-(-shapes.prod(1) // 8)).sum())
            if update != expected or bits.shape != (size,) or bits.dtype != np.uint8:
                raise ValueError("contents do not fit")
        except Exception as error:  # numpy, zip and zlib each have errors of their own
            return notes.append(f"masks/{path.name} cannot be read ({error}): masks are used up to there")
        yield step, update, layers, shapes, bits
        expected += interval


def analyse_masks(folder: Path, interval: int, matrix_size: int, notes: list[str]) -> History | None:
    """Go through the masks of a run once, on packed bits. Returns None if there are no two projections."""
    files = len(list(folder.glob(FILES)))
    kept = np.unique(np.linspace(0, files - 1, min(files, matrix_size)).round().astype(int))
    rows, snapshots = [], []
    for t, (step, update, layers, shapes, bits) in enumerate(read_masks(folder, interval, notes)):
        if t == 0:
            entries = shapes.prod(1)
            starts = np.concatenate([[0], np.cumsum(-(-entries // 8))[:-1]])
            targets = [name.replace(".", "_target.", 1) for name in layers]
            online = {i: layers.index(target) for i, target in enumerate(targets) if target in layers}
            masks = first = ever = always = bits
            active = popcount(bits, starts)
            entered, returned, bits = np.zeros_like(active), np.zeros_like(active), np.zeros_like(bits)
            since = np.zeros(8 * len(bits), np.int32)  # the update since which an entry is active
            ended: list[tuple] = []
        masks = masks ^ bits
        entering = bits & masks
        entered += popcount(entering, starts)
        returned += popcount(entering & ever, starts)
        ever, always = ever | masks, always & masks

        changed = np.flatnonzero(bits)  # few: their bits are looked at one by one
        where, bit = np.nonzero(np.unpackbits(bits[changed]).reshape(-1, 8))
        entry = changed[where] * 8 + bit
        stays = (masks[changed[where]] >> (7 - bit)) & 1 == 1
        leaving = entry[~stays].astype(np.int32)
        ended.append((leaving, since[leaving], np.full_like(leaving, update)))
        since[entry[stays]] = update

        overlap = np.zeros_like(active)
        for i, j in online.items():
            length = -(-entries[i] // 8)
            both = masks[starts[i] : starts[i] + length] & masks[starts[j] : starts[j] + length]
            overlap[i] = np.bitwise_count(both).sum()
        rows.append((step, update, popcount(bits, starts), popcount(masks ^ first, starts), overlap))
        if t in kept:
            snapshots.append(masks)
    if len(rows) < 2:
        return None
    steps, updates, sad, sad_first, overlap = (np.array(column) for column in zip(*rows, strict=True))
    entry, begin, end = (np.concatenate(column) for column in zip(*ended, strict=True))
    lasting = np.flatnonzero(np.unpackbits(masks))  # of the last masks alone
    entry, begin = np.concatenate([entry, lasting]), np.concatenate([begin, since[lasting]])
    left = np.arange(len(entry)) < len(end)
    end = np.concatenate([end, np.full(len(lasting), update, np.int32)])
    layer = np.searchsorted(starts, entry // 8, side="right") - 1
    spells = np.stack([layer, begin, end, left], dtype=np.int32, casting="unsafe")
    stack = np.stack(snapshots)
    matrix = np.stack([popcount(stack ^ snapshot, starts) for snapshot in stack]).astype(np.int32)
    counts = (popcount(ever, starts), popcount(always, starts), entered, returned, spells, kept[: len(stack)], matrix)
    return History(layers, entries, active, steps, updates, sad, sad_first, overlap, *counts)


def members(history: History) -> dict[str, list[int]]:
    """Names of all layers, networks and `total`, with the indices of their layers."""
    names = {name: [i] for i, name in enumerate(history.layers)}
    for i, name in enumerate(history.layers):
        names.setdefault(name.split(".")[0], []).append(i)
    return names | {"total": list(range(len(history.layers)))}


def half_life(durations: np.ndarray, left: np.ndarray) -> tuple[float | None, bool]:
    """Duration after which half have left (Kaplan-Meier: some had not by the end). If never: the longest, and True."""
    if len(durations) == 0:
        return None, False
    if left.any():
        survival = scipy.stats.ecdf(scipy.stats.CensoredData(durations[left], right=durations[~left])).sf
        half = survival.quantiles[survival.probabilities <= 0.5]
        if len(half):
            return float(half[0]), False
    return float(durations.max()), True


def half_lives(history: History, layers: list[int]) -> dict:
    """In critic updates: of an entry that is active at one of COHORTS evenly spaced times, and of one that just came.

    The first is about what the network is made of, the second about the many entries that come and soon go again.
    """
    layer, begin, end, left = history.spells
    mine = np.isin(layer, layers)
    begin, end, left = begin[mine], end[mine], left[mine].astype(bool)
    times = history.updates[np.linspace(0, len(history.updates) - 1, COHORTS, endpoint=False).astype(int)]
    there = [(begin <= time) & (end > time) for time in times]
    remaining = np.concatenate([end[chosen] - time for chosen, time in zip(there, times, strict=True)])
    result = {"half_life": half_life(remaining, np.concatenate([left[chosen] for chosen in there]))}
    result["newcomer_half_life"] = half_life((end - begin)[begin > 0], left[begin > 0])
    return {key: {"updates": updates, "lower_bound": bound} for key, (updates, bound) in result.items()}


def stability(history: History) -> dict:
    """Spread and slope of the SAD in the last half of training, cut into WINDOWS parts of equally many updates.

    spread: standard deviation over mean of the parts' SAD, 0 = perfectly stable; slope: change from the start to the
    end of the last half (linear fit) over the mean. None with fewer projections than parts.
    """
    last = history.updates[-1]
    edges = np.linspace(last / 2, last, WINDOWS + 1)
    part = np.searchsorted(edges, history.updates, side="left") - 1  # (edge, next edge]
    inside = (part >= 0) & (part < WINDOWS)
    counts = np.bincount(part[inside], minlength=WINDOWS)
    sums = np.bincount(part[inside], history.sad[inside].sum(1), minlength=WINDOWS)
    if counts.min() == 0 or sums.sum() == 0:
        return {"spread": None, "slope": None}
    means = sums / counts  # SAD per projection: parts may differ by one projection
    fit = scipy.stats.linregress(np.linspace(0, 1, WINDOWS), means)
    return {"spread": float(scipy.stats.variation(means)), "slope": float(fit.slope / means.mean())}


def summarise(history: History) -> dict:
    """The figures of a history by layer, network and in total."""
    result = {}
    for name, layers in members(history).items():
        entries, active, entered = (x[layers].sum() for x in (history.entries, history.active, history.entered))
        result[name] = {
            "entries": int(entries),
            "active": int(active),
            "sad": int(history.sad[:, layers].sum()),
            "sad_rate_per_projection": float(history.sad[1:, layers].sum(1).mean() / active),
            "sad_rate_first_to_last": float(history.sad_first[-1, layers].sum() / active),
            **half_lives(history, layers),
            "never_active": float(1 - history.ever[layers].sum() / entries),
            "always_active": float(history.always[layers].sum() / entries),
            "entered": int(entered),
            "returned": int(history.returned[layers].sum()),
        }
        if "_target" not in name and name != "total":
            overlap = history.overlap[:, layers].sum(1) / active
            result[name]["overlap_with_target"] = [float(overlap[0]), float(overlap[-1])]
    return result


# ---------------------------------------------------------------- runs


@dataclass
class Run:
    folder: Path
    config: dict
    steps: np.ndarray  # of the evaluations
    returns: np.ndarray  # means of the evaluations
    history: History | None = None
    sad: dict = field(default_factory=dict)  # of `summarise`
    stability: dict = field(default_factory=dict)  # of `stability`
    notes: list[str] = field(default_factory=list)  # what is missing, and what follows
    name: str = ""
    extra: str = ""  # other flags, where runs of the same environment, pattern and K differ in them

    @property
    def pattern(self) -> str:
        return f"{self.config['n']}:{self.config['m']}" if "n" in self.config else "dense"

    @property
    def interval(self) -> int | None:
        """K, critic updates between projections; 0 = never; None for a dense run."""
        return self.config.get("mask_update_interval")

    @property
    def group(self) -> tuple:
        """Environment, pattern, K, and what else differs: runs that differ by the seed alone."""
        return self.config["env_id"], self.pattern, -1 if self.interval is None else self.interval, self.extra

    @property
    def finished(self) -> bool:
        return len(self.steps) > 0 and self.steps[-1] >= self.config["total_timesteps"]

    @property
    def final_return(self) -> float | None:
        return float(self.returns[-LAST:].mean()) if self.finished else None


def find_runs(paths: tuple[str, ...]) -> list[Path]:
    """Run folders that are given, or lie in given folders. Raises UsageError."""
    found = []
    for path in paths:
        matches = [Path(match).resolve() for match in sorted(glob.glob(path))]
        if not matches:
            raise UsageError(f"{path}: no such folder")
        for match in matches:
            inside = sorted(config.parent for config in match.glob("*/config.json"))
            if (match / "config.json").exists():
                inside = [match]
            elif not inside:
                print(f"{match} is left out: no config.json", file=sys.stderr)
            found += inside
    if not found:
        raise UsageError(f"{' '.join(paths) or 'no folder given'}: no runs there; give run folders, or --example")
    return list(dict.fromkeys(found))


def separate(runs: list[Run]) -> list[Run]:
    """Name the flags that differ between runs of the same environment, pattern and K; of a seed keep the newest run."""
    alike = defaultdict(list)
    for run in runs:
        alike[run.group].append(run)
    for group in alike.values():
        for name in sorted(set().union(*[run.config for run in group]) - ALIKE):
            if len({json.dumps(run.config.get(name)) for run in group}) > 1:
                for run in group:
                    run.extra += f", {name} {run.config.get(name)}"
    newest = {(run.group, run.config["seed"]): run for run in runs}
    for run in runs:
        if newest[run.group, run.config["seed"]] is not run:
            newer = newest[run.group, run.config["seed"]].folder
            print(f"{run.folder} is left out: it has the seed of {newer}", file=sys.stderr)
    return list(newest.values())


def read_evaluations(path: Path) -> np.ndarray:
    """Steps and mean returns, [2, evaluations]; a last line that was cut is left out. Raises one of several errors."""
    with open(path) as file:
        rows = [(int(row["step"]), float(row["mean"])) for row in csv.DictReader(file) if row["std"]]
    return np.array(rows).reshape(-1, 2).T


def read_run(folder: Path, matrix_size: int) -> Run:
    """Raises ValueError, with the reason, for what is no run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        numbers = ["seed", "total_timesteps", *(("n", "m", "mask_update_interval") if "n" in config else ())]
        if not isinstance(config["env_id"], str) or not all(type(config[name]) is int for name in numbers):
            raise TypeError(f"one of env_id, {', '.join(numbers)}")
        interval = config["mask_update_interval"] if "n" in config else None
    except Exception as error:
        raise ValueError(f"config.json is not that of a run ({error!r})") from error
    run = Run(folder, config, np.zeros(0), np.zeros(0), name=folder.name)
    try:
        run.steps, run.returns = read_evaluations(folder / "evaluations.csv")
    except Exception as error:
        run.notes.append(f"evaluations.csv cannot be read ({error!r})")
    if not run.finished:
        at = f"step {run.steps[-1]:.0f}" if len(run.steps) else "no evaluation"
        run.notes.append(f"not finished ({at} of {config['total_timesteps']}): not among the returns")
    if interval is None:
        run.notes.append("dense: no masks")
    elif not config.get("save_masks") or not (folder / "masks").is_dir():
        run.notes.append("no masks saved: leave out --no-save-masks")
    elif interval == 0:
        run.notes.append("its masks never change (--mask-update-interval 0)")
    else:
        run.history = analyse_masks(folder / "masks", interval, matrix_size, run.notes)
        if run.history is None:
            run.notes.append("fewer than two projections")
        else:
            run.sad, run.stability = summarise(run.history), stability(run.history)
            run.history.spells = np.zeros((4, 0))  # summarised, and large
            if run.history.updates[-1] + interval <= config["total_timesteps"] - config.get("learning_starts", 0):
                run.stability = {"spread": None, "slope": None}
                run.notes.append("its masks end early: nothing is said on their stability")
    return run


# ---------------------------------------------------------------- statistics


def bootstrap(samples: list[np.ndarray], statistic: Callable[..., np.ndarray], seed: int, paired: bool = False):
    """95 % percentile bootstrap; `samples` are resampled each for itself (strata), or together (paired).

    `statistic` takes them with an axis, unless they are paired. Returns None where one has fewer than two values.
    """
    if min(map(len, samples)) < 2:
        return None
    options = {"n_resamples": RESAMPLES, "method": "percentile", "paired": paired, "vectorized": not paired}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples that are all alike
        found = scipy.stats.bootstrap(samples, statistic, **options, rng=np.random.default_rng(seed))
    return [float(bound) for bound in found.confidence_interval]


def mean(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.concatenate(strata, axis=axis).mean(axis)


def iqm(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean."""
    return scipy.stats.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """0 where all are equal, and there is no rank."""
    return float(np.nan_to_num(scipy.stats.spearmanr(x, y).statistic)) if np.ptp(x) and np.ptp(y) else 0.0


def estimate(strata: list[np.ndarray], seed: int, scales: Sequence[np.ndarray] = ()) -> dict:
    """Mean and interquartile mean with their intervals; `strata`: one sample per environment.

    `scales`: as many samples, by whose means they are divided; they are resampled, too.
    """
    result = {"runs": sum(map(len, strata))}
    for name, statistic in (("mean", mean), ("iqm", iqm)):

        def scaled(*samples, axis=-1, statistic=statistic):
            ours, theirs = samples[: len(strata)], samples[len(strata) :]
            pairs = zip(ours, theirs, strict=True) if scales else ()
            ratios = [x / y.mean(axis, keepdims=True) for x, y in pairs]
            return statistic(*(ratios or ours), axis=axis)

        everything = [*strata, *scales]
        result[name], result[f"{name}_interval"] = float(scaled(*everything)), bootstrap(everything, scaled, seed)
    return result


def compare_groups(runs: list[Run], seed: int) -> tuple[dict[tuple, dict], dict[tuple, dict]]:
    """Final returns by group; and by pattern and K over all environments, as ratios to the mean of dense.

    The second is empty with one environment, or where one has no dense runs, or such with a mean that is not positive.
    """
    samples: dict[tuple, np.ndarray] = {}
    for group in sorted({run.group for run in runs if run.finished}):
        samples[group] = np.array([run.final_return for run in runs if run.group == group and run.finished])
    groups = {group: estimate([values], seed) for group, values in samples.items()}
    envs = sorted({env for env, *_ in groups})
    dense = [samples.get((env, "dense", -1, ""), np.zeros(1)) for env in envs]
    across = {}
    for key in sorted({group[1:] for group in groups}) if len(envs) > 1 and min(d.mean() for d in dense) > 0 else ():
        if all((env, *key) in samples for env in envs):
            across[key] = estimate([samples[env, *key] for env in envs], seed, dense)
    return groups, across


def correlate(runs: list[Run], seed: int) -> dict[str, dict]:
    """Per environment: Spearman's correlation of stability (minus the spread) and final return over its runs.

    `within_groups`: the same after the means of each group are taken off, since K and N:M move both; over groups of at
    least 3 runs, where LEAST_RUNS and one per group are left. The verdict is about that one if there is one.
    """
    result = {}
    for env in sorted({run.config["env_id"] for run in runs}):
        chosen = [run for run in runs if run.config["env_id"] == env and run.history and run.finished]
        chosen = [run for run in chosen if run.stability["spread"] is not None]
        found = result[env] = {"runs": len(chosen)}
        if len(chosen) < LEAST_RUNS:
            found["verdict"] = f"too few runs to say anything: {len(chosen)}, of {LEAST_RUNS} needed"
            continue
        x, y = np.array([(-run.stability["spread"], run.final_return) for run in chosen]).T
        _, ids, sizes = np.unique([str(run.group) for run in chosen], return_inverse=True, return_counts=True)
        found["spearman"], found["interval"] = spearman(x, y), bootstrap([x, y], spearman, seed, paired=True)
        large, words = sizes[ids] >= 3, "over all runs, with N:M and K mixed"
        if large.sum() - len(np.unique(ids[large])) >= LEAST_RUNS:
            a, b = ((v - (np.bincount(ids, v) / sizes)[ids])[large] for v in (x, y))
            found["within_groups_spearman"] = spearman(a, b)
            found["within_groups_interval"] = bootstrap([a, b], spearman, seed, paired=True)
            words = "among runs of the same N:M and K"
        low, high = found.get("within_groups_interval", found["interval"]) or (-1, 1)
        direction = "better" if low > 0 else "worse"
        clear = f"a more stable SAD goes with a {direction} return {words}"
        found["verdict"] = clear if low > 0 or high < 0 else f"no clear relation {words}"
    return result


# ---------------------------------------------------------------- output


def binned(history: History, points: int) -> dict[str, np.ndarray]:
    """At most `points` rows of one or more projections: their number, their SAD together, and what the last one has."""
    first, last = 1, len(history.steps)
    edges = np.unique(np.linspace(first, last, min(points, last - first) + 1).round().astype(int))
    ends, projections = edges[1:] - 1, np.diff(edges)
    sad = np.add.reduceat(history.sad[: edges[-1]], edges[:-1], axis=0)
    table = {"step": history.steps[ends], "update": history.updates[ends], "projections": projections, "sad": sad}
    return table | {"sad_first": history.sad_first[ends], "overlap": history.overlap[ends]}


def write_csv(path: Path, runs: list[Run], points: int) -> None:
    """One row for each run, point in time, and layer, network or total."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["run", "step", "update", "name", "projections", "active", "sad", "sad_rate_per_projection"]
        writer.writerow([*columns, "sad_first", "sad_rate_first", "overlap_with_target"])
        for run in runs:
            table = binned(run.history, points) if run.history else {"step": []}
            for t in range(len(table["step"])):
                head = [run.name, table["step"][t], table["update"][t]]
                for name, layers in members(run.history).items():
                    active, count = run.history.active[layers].sum(), table["projections"][t]
                    sad, first, both = (table[key][t][layers].sum() for key in ("sad", "sad_first", "overlap"))
                    overlap = f"{both / active:.5f}" if "_target" not in name and name != "total" else ""
                    row = [name, count, active, sad, f"{sad / count / active:.4g}", first, f"{first / active:.4g}"]
                    writer.writerow([*head, *row, overlap])


def label(group: tuple) -> str:
    _, pattern, k, extra = group
    return pattern + (f", K = {k}" if k > 0 else ", masks fixed" if k == 0 else "") + extra


def with_interval(value: float, bounds: list[float] | None, form: str) -> str:
    return f"{value:{form}}" + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")


def show(runs: list[Run], groups: dict, across: dict, correlations: dict) -> None:
    """Print tables of runs and groups, and what the correlation says."""
    header = ("SAD rate", "half-life", "newcomer", "never", "always", "returns", "spread", "return")
    under = ("a proj.", "updates", "updates", "active", "active", "of ent.", "of SAD", f"last {LAST}")
    widths = (9, 10, 10, 7, 7, 8, 7, 9)

    def line(name: str, columns: Sequence[str]) -> None:
        print(f"{name:58}" + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)))

    line("run", header)
    line("", under)
    for run in runs:
        final = "-" if run.final_return is None else f"{run.final_return:.1f}"
        columns = ["-"] * 7
        if run.history:
            total, spread = run.sad["total"], run.stability["spread"]
            lives = [total["half_life"], total["newcomer_half_life"]]
            lives = [f"{'>' * x['lower_bound']}{x['updates']:.0f}" if x["updates"] else "-" for x in lives]
            back = f"{total['returned'] / total['entered']:.1%}" if total["entered"] else "-"
            shares = [f"{total[key]:.1%}" for key in ("never_active", "always_active")]
            columns = [f"{total['sad_rate_per_projection']:.3%}", *lives, *shares, back]
            columns.append("-" if spread is None else f"{spread:.2f}")
        line(run.name, [*columns, final])
        for note in run.notes:
            print(f"    {note}")
    print(f"\nfinal returns (mean of the last {LAST} evaluations; 95 % bootstrap intervals over seeds)")
    for group, result in (groups | {("all, ratio to dense", *key): value for key, value in across.items()}).items():
        parts = [f"{name} {with_interval(result[name], result[f'{name}_interval'], '.4g')}" for name in ("mean", "iqm")]
        print(f"  {group[0]}, {label(group):24}{result['runs']:3} runs  " + "  ".join(parts))
    for env, result in correlations.items():
        print(f"\nstability of SAD and return, {env}, {result['runs']} runs: {result['verdict']}")
        for name, text in (("", "over all runs"), ("within_groups_", "with the means of each pattern and K taken off")):
            if f"{name}spearman" in result:
                found = with_interval(result[f"{name}spearman"], result[f"{name}interval"], "+.2f")
                print(f"  Spearman {found} {text}")


COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]  # Okabe and Ito: for all eyes
LINES, MARKERS = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))], ["o", "s", "^", "D", "v", "P", "X"]


def look_of(i: int) -> dict:
    """Of the curve with the number i."""
    return {"color": COLORS[i % 7], "linestyle": LINES[i % 6], "marker": MARKERS[(i + i // 7) % 7]}


def style(group: tuple, groups: list[tuple]) -> dict:
    return look_of(groups.index(group[1:]))


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Of (steps, returns) of each run: the steps that all have, and the mean return there."""
    steps = functools.reduce(np.intersect1d, [steps for steps, _ in curves])
    return steps, np.mean([returns[np.isin(own, steps)] for own, returns in curves], axis=0)


def plot_over_time(runs: list[Run], points: int, path: Path) -> None:
    """SAD per projection, overlap with the targets' masks, learning curves: one time axis, a column per environment."""
    envs, groups = sorted({run.config["env_id"] for run in runs}), sorted({run.group[1:] for run in runs})
    figure, axes = plt.subplots(3, len(envs), figsize=(6.4 * len(envs), 8), sharex="col", squeeze=False)
    for (top, middle, bottom), env in zip(axes.T, envs, strict=True):
        for group in sorted({run.group for run in runs if run.config["env_id"] == env}):
            chosen, look = [run for run in runs if run.group == group], style(group, groups)
            for i, run in enumerate(run for run in chosen if run.history):
                table, active = binned(run.history, points), run.history.active
                rate = 100 * table["sad"].sum(1) / table["projections"] / active.sum()
                online = table["overlap"].any(0)
                overlap = 100 * table["overlap"].sum(1) / active[online].sum()
                thin = {**look, "markevery": max(1, len(rate) // 8), "ms": 4, "lw": 1, "alpha": 0.8}
                top.plot(table["step"] / 1000, rate, **thin, label=label(group) if i == 0 else None)
                middle.plot(table["step"] / 1000, overlap, **thin)
            curves = [run for run in chosen if len(run.steps)]
            for run in curves:
                faint = {"color": look["color"], "ls": look["linestyle"], "lw": 0.6, "alpha": 0.5}
                bottom.plot(run.steps / 1000, run.returns, **faint)
            if ended := [run for run in chosen if run.finished]:
                steps, average = mean_curve([(run.steps, run.returns) for run in ended])
                thick = {**look, "markevery": max(1, len(steps) // 8), "ms": 4, "lw": 2}
                seeds = f"{label(group)} ({len(ended)} seed{'s' * (len(ended) > 1)})"
                bottom.plot(steps / 1000, average, **thick, label=seeds)
        top.set(yscale="log", ylabel="SAD of a projection\n(% of active entries)", title=env)
        middle.set(ylabel="active entries that are\nactive in the target, too (%)")
        bottom.set(xlabel="environment steps (thousands)", ylabel="evaluation return\n(thick: mean over seeds)")
        for axis in (top, middle, bottom):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    save(figure, path)


def plot_matrices(runs: list[Run], path: Path) -> None:
    """SAD between any two steps, for the first run of each group."""
    first = {run.group: run for run in reversed(runs) if run.history}
    chosen = [first[group] for group in sorted(first)]
    columns = math.isqrt(len(chosen) - 1) + 1
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    for axis, run in zip(axes.flat, chosen, strict=False):
        history = run.history
        rates = 100 * history.matrix.sum(2) / history.active.sum()
        steps = history.steps[history.kept] / 1000
        edges = [*steps, run.config["total_timesteps"] / 1000]  # masks hold until the next projection
        mesh = axis.pcolormesh(edges, edges, rates, cmap="cividis", rasterized=True)
        axis.set(xlabel="step (thousands)", ylabel="step (thousands)", aspect="equal")
        axis.set_title(f"{run.config['env_id']}, {label(run.group)}, seed {run.config['seed']}", fontsize=9)
        figure.colorbar(mesh, ax=axis, label="SAD (% of active entries)", shrink=0.85)
    save(figure, path)


def plot_return_over_k(groups: dict, runs: list[Run], path: Path) -> None:
    """Final returns by K: each run, the mean and its interval."""
    envs = sorted({env for env, *_ in groups})
    figure, axes = plt.subplots(1, len(envs), figsize=(5.2 * len(envs), 4), squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        mine = {group: result for group, result in groups.items() if group[0] == env}
        patterns = sorted({(pattern, extra) for _, pattern, _, extra in mine})
        ks = sorted(
            {k for _, _, k, _ in mine}, key=lambda k: math.inf if k == 0 else k
        )  # dense, rarer and rarer, never
        for i, (pattern, extra) in enumerate(patterns):
            shift = 0.16 * (i - (len(patterns) - 1) / 2)
            look = {"color": COLORS[i % 7], "marker": MARKERS[i % 7]}
            for k in ks:
                if (env, pattern, k, extra) in mine:
                    result, x = mine[env, pattern, k, extra], ks.index(k) + shift
                    values = [
                        run.final_return for run in runs if run.group == (env, pattern, k, extra) and run.finished
                    ]
                    axis.plot([x - 0.05] * len(values), values, ls="", **look, ms=4, mfc="none", alpha=0.8)
                    low, high = result["mean_interval"] or (result["mean"], result["mean"])
                    error = [[result["mean"] - low], [high - result["mean"]]]
                    name = pattern + extra if k == next(j for j in ks if (env, pattern, j, extra) in mine) else None
                    axis.errorbar(x + 0.05, result["mean"], error, **look, ms=8, capsize=4, label=name)
        axis.set_xticks(range(len(ks)), ["dense" if k < 0 else "never" if k == 0 else f"{k}" for k in ks])
        axis.set(
            xlabel="K, critic updates between projections",
            ylabel=f"return (mean of last {LAST} evaluations)",
            title=env,
        )
        axis.grid(alpha=0.3)
        axis.legend(title="open: runs; filled: mean, 95 %", fontsize=8, title_fontsize=8)
    save(figure, path)


def plot_stability(runs: list[Run], correlations: dict, path: Path) -> None:
    """Spread of the SAD against the final return."""
    envs, groups = list(correlations), sorted({run.group[1:] for run in runs})
    figure, axes = plt.subplots(1, len(envs), figsize=(5.2 * len(envs), 4.2), squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        for group in sorted({run.group for run in runs if run.config["env_id"] == env}):
            chosen = [run for run in runs if run.group == group and run.history and run.finished]
            pairs = [(run.stability["spread"], run.final_return) for run in chosen]
            pairs = [pair for pair in pairs if pair[0] is not None]
            if pairs:
                axis.plot(*zip(*pairs, strict=True), **{**style(group, groups), "linestyle": ""}, label=label(group))
        result = correlations[env]
        if "spearman" in result:
            text = f"Spearman of stability and return {with_interval(result['spearman'], result['interval'], '+.2f')}"
        else:
            text = result["verdict"]
        axis.set_title(f"{env}\n{text}", fontsize=9)
        axis.set(xlabel="spread of the SAD over the last half (std / mean); left is stable", ylabel="final return")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=300)
    plt.close(figure)


# ---------------------------------------------------------------- the whole


def make_example(out: Path) -> None:
    """Three small runs in `out`/runs, two at a time. Raises UsageError if one fails."""
    script = Path(__file__).with_name("rnm_td3_continuous.py")
    flags = "--env-id HalfCheetah-v5 --total-timesteps 10000 --learning-starts 2000 --eval-interval 1000"
    flags += " --eval-episodes 2 --checkpoint-interval 0"
    waiting = [[*flags.split(), "--mask-update-interval", str(k)] for k in (10, 50, 250)]
    running: list[tuple] = []
    while waiting or running:
        while waiting and len(running) < 2:
            command = [sys.executable, "-W", "ignore", str(script), *waiting.pop(0)]
            print("python", script.name, *command[4:], flush=True)
            variables = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, cwd=out, env=variables, stdout=subprocess.DEVNULL))
        if running.pop(0).wait():
            raise UsageError("--example: a run failed, as it says above")


def analyse(args: Args) -> dict:
    """Read, compute and write everything. Returns what summary.json holds. Raises UsageError."""
    if args.points < 2 or args.matrix_size < 2 or args.seed < 0:
        raise UsageError("--points and --matrix-size have to be 2 or more, --seed 0 or more")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from error
    if args.example:
        make_example(out)
    runs = []
    for folder in find_runs((*args.runs, *[str(out / "runs")] * args.example)):
        try:
            runs.append(read_run(folder, args.matrix_size))
        except ValueError as error:
            print(f"{folder} is left out: {error}", file=sys.stderr)
    if not runs:
        raise UsageError("no run could be read")
    runs = separate(sorted(runs, key=lambda run: run.name))
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = run.name if names[run.name] == 1 else str(run.folder)
    runs.sort(key=lambda run: (run.group, run.config["seed"]))
    groups, across = compare_groups(runs, args.seed)
    correlations = correlate(runs, args.seed)
    show(runs, groups, across, correlations)

    summary = {"runs": {}, "groups": {}, "stability_and_return": correlations}
    for run in runs:
        entry = {"env_id": run.config["env_id"], "pattern": run.pattern, "mask_update_interval": run.interval}
        entry |= {"seed": run.config["seed"], "final_return": run.final_return, "notes": run.notes}
        if run.history:
            entry |= {"projections": len(run.history.steps) - 1, "stability": run.stability, "sad": run.sad}
        summary["runs"][run.name] = entry
    named = groups | {("all, ratio to dense", *key): value for key, value in across.items()}
    summary["groups"] = {f"{group[0]}, {label(group)}": result for group, result in named.items()}
    with_masks = [run for run in runs if run.history]
    matrices = {}
    for run in with_masks:
        matrices[f"{run.name}/steps"] = run.history.steps[run.history.kept]
        matrices[f"{run.name}/sad"] = run.history.matrix
        matrices[f"{run.name}/layers"] = np.array(run.history.layers)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    if with_masks:
        write_csv(out / "sad.csv", with_masks, args.points)
        np.savez_compressed(out / "sad_matrices.npz", **matrices)
        plot_matrices(runs, out / "heatmap.png")
    plot_over_time(runs, args.points, out / "sad_over_time.png")
    if groups:
        plot_return_over_k(groups, runs, out / "return_over_k.png")
        plot_stability(runs, correlations, out / "stability.png")
    print(f"\nfiles in {out}/")
    return summary


def main() -> int:
    """Exit code: 0 done, 2 bad input, 130 interrupted."""
    args = tyro.cli(Args, description=__doc__)
    try:
        analyse(args)
    except (UsageError, OSError) as error:  # OSError: --out cannot be written
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
