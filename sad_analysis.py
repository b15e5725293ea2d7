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
import struct
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import scipy.stats
import tyro
from PIL import Image

COHORTS = 10  # times at which an active entry is followed to its end
LAST = 10  # evaluations whose mean is the final return of a run
WINDOWS = 6  # equal parts of the last half of training, over which the SAD is compared to say how stable it is
LEAST_RUNS = 8  # for a correlation
# what two runs may differ in and be seeds of the same: what does not change training, or is compared by itself
ALIKE = {"seed", "exp_name", "track", "wandb_project_name", "wandb_entity", "capture_video", "save_model", "evaluate"}
ALIKE |= {"resume", "checkpoint_interval", "eval_interval", "eval_episodes", "overlap", "profile", "cuda", "backend"}
ALIKE |= {"save_masks", "device", "cpu", "num_threads", "versions"}
ALIKE |= {"n", "m", "mask_update_interval"}
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


class Failed(Exception):
    """Nothing could be done with what is there; the message is one line."""


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
    spells: np.ndarray  # [4, any]: layer, first and last update of a spell, whether it ended then
    kept: np.ndarray  # [S] indices of the projections of `matrix`
    matrix: np.ndarray  # [S, S, L] SAD between each two of them


def masks_of_archive(path: Path) -> Iterator[tuple]:
    """Layers and shapes of a `masks.bin`, then step, update and changed entries of each projection."""
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    yield tuple(json.loads(data[:start])[key] for key in ("layers", "shapes"))
    while start < len(data):
        step, update, size = struct.unpack_from("<3Q", data, start)
        start += 24 + size
        if start > len(data):
            raise ValueError("cut off")
        yield step, update, np.frombuffer(zlib.decompress(data[start - size : start]), "<u4").cumsum()


def read_masks(folder: Path, interval: int, notes: list[str]) -> tuple[list[str], np.ndarray, list[tuple]]:
    """Layers [L], shapes [L, 2], and step, update and changed entries (ascending, in all layers one after the other) of
    each projection; the first ones are all active entries.

    Ends where something is missing or damaged, and says so in `notes`.
    """
    layers, shapes, rows = [], [], []
    try:
        source = masks_of_archive(folder / "masks.bin")
        layers, shapes = next(source)
        size = int(np.prod(shapes, axis=1).sum())
        for step, update, changed in source:
            if rows and update != rows[-1][1] + interval:
                raise ValueError(f"there is one for update {update} instead")
            if len(changed) and (changed[-1] >= size or (changed[1:] <= changed[:-1]).any()):
                raise ValueError("contents do not fit")
            rows.append((step, update, changed.astype(np.int32)))
    except Exception as error:  # numpy, zip and zlib each have errors of their own; StopIteration: there are no files
        expected = f"of update {rows[-1][1] + interval} " if rows else ""
        notes.append(f"the masks {expected}cannot be read ({error or repr(error)}): they are used up to there")
    return layers, np.array(shapes, np.int64), rows


def analyse_masks(layers: list[str], shapes: np.ndarray, rows: list[tuple], matrix_size: int) -> History:
    """Count on the events alone, which are few: an entry enters and leaves in turn."""
    steps, updates, changes = zip(*rows, strict=True)
    updates, entries, t_max, l_max = np.array(updates), shapes.prod(1), len(rows), len(layers)
    edges, changed, pointers = np.cumsum([0, *entries]), np.concatenate(changes), np.cumsum([0, *map(len, changes)])
    index = {name: i for i, name in enumerate(layers)}
    origins = [index.get(name.replace("_target.", "."), i) for name, i in index.items()]

    def by_entry(entry: np.ndarray) -> scipy.sparse.csc_array:
        table = (np.zeros(len(entry), np.int8), entry, pointers)
        return scipy.sparse.csr_array(table, shape=(t_max, edges[-1])).tocsc()

    def events(table: scipy.sparse.csc_array, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of layer i, in the order of entry and time: time, number among the entry's events, index of its first one."""
        bounds = table.indptr[edges[i] : edges[i + 1] + 1]
        first = np.repeat(bounds[:-1] - bounds[0], np.diff(bounds))
        return table.indices[bounds[0] : bounds[-1]], np.arange(len(first), dtype=np.int32) - first, first

    def tally(time: np.ndarray, sign: np.ndarray) -> np.ndarray:
        return np.bincount(time, np.where(sign, 1, -1), t_max).astype(np.int64).cumsum()

    sad, sad_first, size, overlap = (np.zeros((t_max, l_max), np.int64) for _ in range(4))
    table, counts, spells = by_entry(changed), [], []
    for i in range(l_max):
        time, nth, first = events(table, i)
        enters, later, last = nth % 2 == 0, time > 0, np.append(nth[1:] == 0, True)[: len(nth)]
        sad[:, i], size[:, i] = np.bincount(time[later], minlength=t_max), tally(time, enters)
        sad_first[:, i] = tally(time[later], (enters ^ (time[first] == 0))[later])
        kinds = (~later, nth == 0, last & ~later, enters & later, enters & later & (nth > 1))
        counts.append([np.count_nonzero(kind) for kind in kinds])
        begin = enters.nonzero()[0]
        end = np.where(last[begin], t_max - 1, np.append(time, 0)[begin + 1])
        columns = np.full(len(begin), i), updates[time[begin]], updates[end], ~last[begin]
        spells.append(np.stack(columns, dtype=np.int32, casting="unsafe"))
    active, ever, always, entered, returned = np.array(counts).T

    # an entry is active in one of a network and its target alone after an odd number of events in both
    shift = np.repeat(edges[:-1] - edges[origins], entries).astype(np.int32)
    table = by_entry(changed - shift[changed])
    for j, i in enumerate(origins):
        if i != j:
            time, nth, _ = events(table, i)
            overlap[:, i] = (size[:, i] + size[:, j] - tally(time, nth % 2 == 0)) // 2

    kept = np.linspace(0, t_max - 1, min(t_max, matrix_size)).round().astype(int)
    masks, matrix = np.zeros((len(kept), edges[-1]), bool), np.empty((len(kept), len(kept), l_max), np.int32)
    for s, (begin, end) in enumerate(pairwise([0, *(kept + 1)])):
        masks[s] = masks[s - 1] ^ np.bincount(changed[pointers[begin] : pointers[end]], minlength=edges[-1]) % 2
    for i, (begin, end) in enumerate(pairwise(edges)):
        part = masks[:, begin:end].astype(np.float32)  # sums are exact below 2^24
        matrix[..., i] = part.sum(1)[:, None] + part.sum(1) - 2 * part @ part.T
    counted = {"ever": ever, "always": always, "entered": entered, "returned": returned}
    counted |= {"spells": np.concatenate(spells, axis=1), "kept": kept, "matrix": matrix}
    return History(layers, entries, active, np.array(steps), updates, sad, sad_first, overlap, **counted)


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
    everyone = np.bincount(durations)
    at_risk = everyone[::-1].cumsum()[::-1]
    survival = np.cumprod(1 - np.bincount(durations[left], minlength=len(everyone)) / at_risk)
    half = np.flatnonzero(survival < 0.5 + 1e-9)
    return (float(half[0]), False) if len(half) else (float(durations.max()), True)


def half_lives(history: History, layers: list[int]) -> dict:
    """In critic updates: of an entry that is active at one of COHORTS evenly spaced times, and of one that just came.

    The first is about what the network is made of, the second about the many entries that come and soon go again.
    """
    begin, end, ended = history.spells[1:, np.isin(history.spells[0], layers)]
    left = ended.astype(bool)
    times = history.updates[np.linspace(0, len(history.updates) - 1, COHORTS, endpoint=False).astype(int)]
    there = [((begin <= time) & (end > time)).nonzero()[0] for time in times]
    remaining = np.concatenate([end[chosen] - time for chosen, time in zip(there, times, strict=True)])
    new = begin > history.updates[0]
    result = {"half_life": half_life(remaining, left[np.concatenate(there)])}
    result["newcomer_half_life"] = half_life((end - begin)[new], left[new])
    return {key: {"updates": updates, "lower_bound": bound} for key, (updates, bound) in result.items()}


def stability(history: History) -> dict:
    """Spread and slope of the SAD in the last half of training, cut into WINDOWS parts of equally many updates.

    spread: standard deviation over mean of the parts' SAD, 0 = perfectly stable; slope: change from the first part to
    the last (linear fit) over the mean. None with fewer projections than parts.
    """
    last = history.updates[-1]
    edges = np.linspace(last / 2, last, WINDOWS + 1)
    part = np.searchsorted(edges, history.updates, side="left") - 1  # (edge, next edge]
    inside = part >= 0
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
    seconds: np.ndarray  # of training until each evaluation
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
        if (newer := newest[run.group, run.config["seed"]]) is not run:
            print(f"{run.folder} is left out: it has the seed of {newer.folder}", file=sys.stderr)
    return list(newest.values())


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Of a file that a run writes, or wrote until its disk was full: without a last line that was cut."""
    lines = path.read_text().splitlines(keepends=True)
    return [*csv.DictReader(line for line in lines if line.endswith("\n"))]


def read_run(folder: Path) -> Run:
    """Configuration and evaluations; what is wrong with the latter stands in its notes. Raises ValueError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        least = {"seed": 0, "total_timesteps": 1}
        if "n" in config:
            least |= {"n": 1, "m": config["n"], "mask_update_interval": 0}
        wrong = [name for name in least if type(config[name]) is not int or config[name] < least[name]]
        if wrong or not isinstance(config["env_id"], str):
            raise ValueError(", ".join(wrong) or "env_id")
    except Exception as error:
        raise ValueError(f"config.json is not that of a run ({error!r})") from error
    run = Run(folder, config, np.zeros(0), np.zeros(0), np.zeros(0), name=folder.name)
    try:
        whole = csv_rows(folder / "evaluations.csv")
        steps = np.array([int(row["step"]) for row in whole])
        returns = np.array([float(row["mean"]) for row in whole])
        seconds = np.array([float(row["seconds"]) for row in whole])
        increases = np.diff([steps, seconds], prepend=0)
        if (increases < [[1], [0]]).any() or not np.isfinite([returns, seconds]).all():
            raise ValueError("its numbers cannot be")
        run.steps, run.returns, run.seconds = steps, returns, seconds
    except Exception as error:
        run.notes.append(f"evaluations.csv cannot be read ({error!r})")
    if not run.finished:
        at = f"step {run.steps[-1]}" if len(run.steps) else "no evaluation"
        run.notes.append(f"not finished ({at} of {config['total_timesteps']}): not among the returns")
    return run


def add_history(run: Run, matrix_size: int) -> None:
    """Read the masks of a run; what is wrong with them stands in its notes."""
    config, interval = run.config, run.interval
    if interval is None:
        run.notes.append("dense: no masks")
    elif not config.get("save_masks") or not (run.folder / "masks.bin").exists():
        run.notes.append("no masks saved: leave out --no-save-masks")
    elif interval == 0:
        run.notes.append("its masks never change (--mask-update-interval 0)")
    else:
        layers, shapes, rows = read_masks(run.folder, interval, run.notes)
        if len(rows) < 2:
            return run.notes.append("fewer than two projections")
        run.history = analyse_masks(layers, shapes, rows, matrix_size)
        run.sad, run.stability = summarise(run.history), stability(run.history)
        run.history.spells = np.zeros((4, 0))  # summarised, and large
        end = config["total_timesteps"] - max(config.get("learning_starts", 0), 1)
        early = "end early" if run.history.updates[-1] + interval <= end else ""
        if problem := early or "begin late" * bool(run.history.updates[0]):
            run.stability = {"spread": None, "slope": None}
            run.notes.append(f"its masks {problem}: nothing is said on their stability")


# ---------------------------------------------------------------- statistics


def bootstrap(samples: list[np.ndarray], statistic: Callable[..., np.ndarray], seed: int) -> list[float] | None:
    """95 % percentile bootstrap; `samples` are resampled each for itself (strata). `statistic` takes them with an axis.

    Returns None where one has fewer than two values. A ratio of three (five) values to as many lies in it in 80 (88) of
    100 cases, a mean in fewer: it cannot reach beyond the values that there are.
    """
    if min(map(len, samples)) < 2:
        return None
    options = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": True}
    found = scipy.stats.bootstrap(samples, statistic, **options, rng=np.random.default_rng(seed))
    return [float(bound) for bound in found.confidence_interval]


def mean(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the means of the strata: an environment with more seeds counts no more than another."""
    return np.mean([stratum.mean(axis) for stratum in strata], axis=0)


def iqm(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean of all runs."""
    return scipy.stats.trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def spearman(x: np.ndarray, y: np.ndarray, groups: int = 1) -> tuple[float, list[float]]:
    """Correlation of ranks, 0 where all are equal, and its 95 % interval; `groups`: whose means were taken off.

    The interval: Fisher's transformation, with the variance that ranks have (Fieller et al. 1957).
    """
    found = float(scipy.stats.spearmanr(x, y).statistic) if np.ptp(x) and np.ptp(y) else 0.0
    z, half = np.arctanh(np.clip(found, 1e-9 - 1, 1 - 1e-9)), 1.96 * math.sqrt(1.06 / (len(x) - groups - 2))
    return found, np.tanh([z - half, z + half]).tolist()


def estimate(strata: list[np.ndarray], seed: int, scales: Sequence[np.ndarray] = ()) -> dict:
    """Mean and interquartile mean with their intervals; `strata`: one sample per environment.

    `scales`: as many samples, by whose means they are divided; they are resampled, too.
    """
    result = {"runs": sum(map(len, strata))}
    for name, statistic in (("mean", mean), ("iqm", iqm)):

        def scaled(*samples, axis=-1, statistic=statistic):
            ours, theirs = samples[: len(strata)], samples[len(strata) :]
            if theirs:
                ours = [x / y.mean(axis, keepdims=True) for x, y in zip(ours, theirs, strict=True)]
            return statistic(*ours, axis=axis)

        everything = [*strata, *scales]
        result[name], result[f"{name}_interval"] = float(scaled(*everything)), bootstrap(everything, scaled, seed)
    return result


def final(runs: list[Run]) -> np.ndarray:
    return np.array([run.returns[-LAST:].mean() for run in runs])


def across(results: dict[tuple, list[Run]], dense: dict[tuple, list[Run]], seed: int) -> tuple[list[str], dict]:
    """Over all environments, as ratios to the mean of dense: those that can be used, and an estimate for each kind.

    Both: environment and kind of run to its runs; dense: what each is compared with. An environment can be used where
    all that is dense is positive; there are no estimates with fewer than two of them.
    """
    least = {env: [final(runs).min() for (e, _), runs in dense.items() if e == env] for env, _ in results}
    envs, found = [env for env, returns in least.items() if returns and min(returns) > 0], {}
    for kind in dict.fromkeys(kind for _, kind in results) if len(envs) > 1 else ():
        keys = [(env, kind) for env in envs]
        if all(key in results and key in dense for key in keys):
            found[kind] = estimate([final(results[key]) for key in keys], seed, [final(dense[key]) for key in keys])
    return envs, found


def correlate(runs: list[Run]) -> dict[str, dict]:
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
        found["spearman"], found["interval"] = spearman(x, y)
        large, words = sizes[ids] >= 3, "over all runs, with N:M and K mixed"
        if large.sum() - (groups := len(np.unique(ids[large]))) >= LEAST_RUNS:
            a, b = ((v - (np.bincount(ids, v) / sizes)[ids])[large] for v in (x, y))
            found["within_groups_spearman"], found["within_groups_interval"] = spearman(a, b, groups)
            found["within_groups_runs"] = int(large.sum())
            words = "among runs of the same N:M and K"
        low, high = found.get("within_groups_interval", found["interval"])
        direction = "better" if low > 0 else "worse"
        clear = f"a more stable SAD goes with a {direction} return {words}"
        found["verdict"] = clear if low > 0 or high < 0 else f"no clear relation {words}"
    return result


# ---------------------------------------------------------------- tables


def binned(history: History, points: int) -> dict[str, np.ndarray]:
    """At most `points` rows of one or more projections: their number, their SAD together, and what the last one has."""
    end = len(history.steps)
    edges = np.linspace(1, end, min(points, end - 1) + 1).round().astype(int)  # at least 1 apart
    ends, projections = edges[1:] - 1, np.diff(edges)
    sad = np.add.reduceat(history.sad[: edges[-1]], edges[:-1], axis=0)
    table = {"step": history.steps[ends], "update": history.updates[ends], "projections": projections, "sad": sad}
    return table | {"sad_first": history.sad_first[ends], "overlap": history.overlap[ends]}


def write_csv(path: Path, header: Sequence[str], rows: Iterator[Sequence]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


SAD_COLUMNS = ["run", "step", "update", "name", "projections", "active", "sad", "sad_rate_per_projection"]
SAD_COLUMNS += ["sad_first", "sad_rate_first", "overlap_with_target"]


def sad_rows(run: Run, points: int) -> Iterator[list]:
    """One for each point in time, and layer, network or total."""
    table = binned(run.history, points)
    for t, step in enumerate(table["step"]):
        for name, layers in members(run.history).items():
            active, count = run.history.active[layers].sum(), table["projections"][t]
            sad, first, both = (table[key][t][layers].sum() for key in ("sad", "sad_first", "overlap"))
            overlap = f"{both / active:.5f}" if "_target" not in name and name != "total" else ""
            row = [name, count, active, sad, f"{sad / count / active:.4g}", first, f"{first / active:.4g}"]
            yield [run.name, step, table["update"][t], *row, overlap]


def label(group: tuple) -> str:
    _, pattern, k, extra = group
    return pattern + (f", K = {k}" if k > 0 else ", masks fixed" if k == 0 else "") + extra


def seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def rounded(value: float, form: str) -> str:
    text = f"{value:{form}}"
    return f"{value:.0f}" if "e+" in text else text  # 10185, not 1.018e+04


def with_interval(value: float, bounds: list[float] | None, form: str) -> str:
    return rounded(value, form) + (f" [{rounded(bounds[0], form)}, {rounded(bounds[1], form)}]" if bounds else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:], ""])


def returns_table(estimates: dict[str, dict], form: str) -> str:
    """Of what `estimate` found."""
    cells = [[with_interval(x[key], x[f"{key}_interval"], form) for key in ("mean", "iqm")] for x in estimates.values()]
    rows = [[name, x["runs"], *cell] for (name, x), cell in zip(estimates.items(), cells, strict=True)]
    return markdown(["", "runs", "mean", "interquartile mean"], rows)


def show(runs: list[Run], estimates: dict[str, dict], correlations: dict) -> None:
    """Print tables of runs and groups, and what the correlation says."""
    header = ["run", "SAD rate of a projection", "half-life, updates", "newcomer", "never active", "always active"]
    header, rows = [*header, "returns of entrances", "spread of SAD", f"return, last {LAST}"], []
    for run in runs:
        columns, spread = ["-"] * 6, run.stability.get("spread")
        if run.history:
            total = run.sad["total"]
            lives = [total["half_life"], total["newcomer_half_life"]]
            lives = [f"{'>' * x['lower_bound']}{x['updates']:.0f}" if x["updates"] else "-" for x in lives]
            back = f"{total['returned'] / total['entered']:.1%}" if total["entered"] else "-"
            shares = [f"{total[key]:.1%}" for key in ("never_active", "always_active")]
            columns = [f"{total['sad_rate_per_projection']:.3%}", *lives, *shares, back]
        ends = ["-" if x is None else f"{x:{form}}" for x, form in ((spread, ".2f"), (run.final_return, ".1f"))]
        rows.append([run.name, *columns, *ends])
    print(markdown(header, rows), *[f"{run.name}: {note}" for run in runs for note in run.notes], sep="\n")
    print(f"\nfinal returns (mean of the last {LAST} evaluations; 95 % bootstrap intervals over seeds)\n")
    print(returns_table(estimates, ".4g"))
    for env, result in correlations.items():
        print(f"stability of SAD and return, {env}, {result['runs']} runs: {result['verdict']}")
        for name, text in (("", "over all runs"), ("within_groups_", "with the means of each pattern and K taken off")):
            if f"{name}spearman" in result:
                found = with_interval(result[f"{name}spearman"], result[f"{name}interval"], "+.2f")
                print(f"  Spearman {found} {text}")


# ---------------------------------------------------------------- figures

COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]  # Okabe and Ito: for all eyes
LINES, MARKERS = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))], ["o", "s", "^", "D", "v", "P", "X"]


def looks(results: dict[tuple, list[Run]]) -> dict[str, dict]:
    """Of the curves of the kinds of runs, the same in all environments. Of many (`1:4, base`), N:M has the color."""
    found, kinds = {}, list(dict.fromkeys(kind for _, kind in results))
    first, second = (list(dict.fromkeys(kind.partition(", ")[part] for kind in kinds)) for part in (0, 2))
    for i, kind in enumerate(kinds):
        pattern, _, rest = kind.partition(", ")
        a, b = (i, i) if 1 in (len(first), len(second)) else (first.index(pattern), second.index(rest))
        found[kind] = {"color": COLORS[a % 7], "linestyle": LINES[b % 6], "marker": MARKERS[(b + b // 7) % 7]}
    return found


def panels(columns: int, rows: int, width: float, height: float, **options) -> tuple[plt.Figure, np.ndarray]:
    """Axes [columns, rows], each of that size."""
    options |= {"figsize": (width * columns, height * rows), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, **options)
    return figure, axes.T


def dress(axis: plt.Axes, **labels) -> None:
    axis.set(**labels)
    axis.grid(alpha=0.3)
    if handles := axis.get_legend_handles_labels()[0]:
        options = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(handles) > 5 else {}  # hides nothing
        options |= {"fontsize": 6, "ncols": 2} if len(handles) > 20 else {"fontsize": 8}
        axis.legend(**options)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=300)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path)  # looks the same in a third of the bytes


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Of (steps, returns) of each run: the steps that all have, and the mean return there."""
    steps = functools.reduce(np.intersect1d, [steps for steps, _ in curves])
    return steps, np.mean([returns[np.isin(own, steps)] for own, returns in curves], axis=0)


def draw_curves(
    axis: plt.Axes, curves: Sequence[tuple], average: tuple | None, look: dict, name: str, count: int
) -> None:
    """Curves (x, returns) of runs, thin, and their average, thick, with the name and the number of its runs."""
    for x, returns in curves:
        axis.plot(x, returns, color=look["color"], ls=look["linestyle"], lw=0.6, alpha=0.5)
    if average:
        marks = {"markevery": max(1, len(average[0]) // 8), "ms": 4}
        axis.plot(*average, **look, **marks, lw=2, label=f"{name} ({seeds(count)})")


def plot_over_time(groups: dict[tuple, list[Run]], points: int, path: Path) -> None:
    """SAD per projection, overlap with the targets' masks, learning curves: one time axis, a column per environment."""
    envs, styles = list(dict.fromkeys(env for env, _ in groups)), looks(groups)
    figure, axes = panels(len(envs), 3, 6.4, 2.7, sharex="col")
    for (env, kind), runs in groups.items():
        (top, middle, bottom), look = axes[envs.index(env)], styles[kind]
        for i, run in enumerate(run for run in runs if run.history):
            table, active = binned(run.history, points), run.history.active
            rate = 100 * table["sad"].sum(1) / table["projections"] / active.sum()
            overlap = 100 * table["overlap"].sum(1) / active[table["overlap"].any(0)].sum()
            thin = {**look, "markevery": max(1, len(rate) // 8), "ms": 4, "lw": 1, "alpha": 0.8}
            top.plot(table["step"] / 1000, rate, **thin, label=kind if i == 0 else None)
            middle.plot(table["step"] / 1000, overlap, **thin)
        curves = [(run.steps / 1000, run.returns) for run in runs if len(run.steps)]
        ended = [(run.steps / 1000, run.returns) for run in runs if run.finished]
        draw_curves(bottom, curves, mean_curve(ended) if ended else None, look, kind, len(ended))
    for (top, middle, bottom), env in zip(axes, envs, strict=True):
        dress(top, yscale="log", ylabel="SAD of a projection\n(% of active entries)", title=env)
        dress(middle, ylabel="active entries that are\nactive in the target, too (%)")
        dress(bottom, xlabel="environment steps (thousands)", ylabel="evaluation return\n(thick: mean over seeds)")
    save(figure, path)


def plot_matrices(groups: dict[tuple, list[Run]], path: Path) -> None:
    """SAD between any two steps, for the first run of each group."""
    first = {key: run for key, runs in groups.items() for run in reversed(runs) if run.history}
    columns = math.isqrt(len(first) - 1) + 1
    figure, axes = panels(columns, -(-len(first) // columns), 4, 3.6)
    for axis in axes.T.flat[len(first) :]:
        axis.remove()
    for axis, ((env, kind), run) in zip(axes.T.flat, first.items(), strict=False):
        history = run.history
        rates = 100 * history.matrix.sum(2) / history.active.sum()
        end = min(history.steps[-1] + run.interval, run.config["total_timesteps"])  # so long the last masks hold
        edges = np.append(history.steps[history.kept], end) / 1000
        mesh = axis.pcolormesh(edges, edges, rates, cmap="cividis", rasterized=True)
        axis.set(xlabel="step (thousands)", ylabel="step (thousands)", aspect="equal")
        axis.set_title(f"{env}, {kind}, seed {run.config['seed']}", fontsize=9)
        figure.colorbar(mesh, ax=axis, label="SAD (% of active entries)", shrink=0.85)
    save(figure, path)


def plot_returns(results: dict[tuple, list[Run]], path: Path, seed: int = 1) -> None:
    """Final returns by kind of run: each run, and beside them the mean with its interval."""
    envs, styles = list(dict.fromkeys(env for env, _ in results)), looks(results)
    figure, axes = panels(len(envs), 1, max(4.5, 0.5 * len(styles)), 4)
    for (axis,), env in zip(axes, envs, strict=True):
        kinds = [kind for kind in styles if (env, kind) in results]
        for x, kind in enumerate(kinds):
            values, look = final(results[env, kind]), {**styles[kind], "linestyle": ""}
            average, (low, high) = values.mean(), bootstrap([values], mean, seed) or [values.mean()] * 2
            axis.plot([x - 0.12] * len(values), values, **look, ms=4, mfc="none")
            axis.errorbar(x + 0.12, average, [[average - low], [high - average]], **look, ms=8, capsize=4)
        few = {"rotation": 0} if len(kinds) < 6 else {"rotation": 90, "fontsize": 7}
        axis.set_xticks(range(len(kinds)), [f"{kind}\n{seeds(len(results[env, kind]))}" for kind in kinds], **few)
        dress(axis, ylabel=f"return, last {LAST} evaluations (filled: mean)", title=env, xlim=(-0.6, len(kinds) - 0.4))
    save(figure, path)


def plot_stability(groups: dict[tuple, list[Run]], correlations: dict, path: Path) -> None:
    """Spread of the SAD against the final return."""
    figure, axes = panels(len(correlations), 1, 5.2, 4.2)
    for (axis,), (env, result) in zip(axes, correlations.items(), strict=True):
        for (e, kind), runs in groups.items():
            pairs = [(run.stability.get("spread"), run.final_return) for run in runs]
            pairs = [pair for pair in pairs if None not in pair and e == env]
            look = {**looks(groups)[kind], "linestyle": "", "label": kind if pairs else None}
            axis.plot([x for x, _ in pairs], [y for _, y in pairs], **look)
        text = result["verdict"]
        if "spearman" in result:
            text = f"Spearman of stability and return {with_interval(result['spearman'], result['interval'], '+.2f')}"
        axis.set_title(f"{env}\n{text}", fontsize=9)
        dress(axis, xlabel="spread of the SAD over the last half\n(std / mean; left is stable)", ylabel="final return")
    save(figure, path)


# ---------------------------------------------------------------- the whole


def make_example(out: Path) -> None:
    """Three small runs in `out`/runs. Raises UsageError if one fails."""
    script, runs = Path(__file__).with_name("rnm_td3_continuous.py"), []
    flags = "--env-id HalfCheetah-v5 --total-timesteps 10000 --learning-starts 2000 --eval-interval 1000"
    flags += " --eval-episodes 2 --checkpoint-interval 0 --mask-update-interval"
    for k in ("10", "50", "250"):
        print("python", script.name, flags, k, flush=True)
        options = {"cwd": out, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
        runs.append(subprocess.Popen([sys.executable, "-W", "ignore", script, *flags.split(), k], **options))
    if any([run.wait() for run in runs]):
        raise UsageError("--example: a run failed, as it says above")


def analyse(args: Args) -> dict:
    """Read, compute and write everything. Returns what summary.json holds. Raises UsageError, Failed."""
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
            run = read_run(folder)
            add_history(run, args.matrix_size)
            runs.append(run)
        except Exception as error:  # what others put there: no damage to one run may cost the rest
            print(f"{folder} is left out: {error if type(error) is ValueError else repr(error)}", file=sys.stderr)
    if not runs:
        raise Failed("no run could be read")
    runs = separate(sorted(runs, key=lambda run: run.name.rpartition("__")[2]))  # by the time in a run folder's name
    names = Counter(run.name for run in runs)
    groups, summary, matrices = defaultdict(list), {"runs": {}}, {}
    for run in sorted(runs, key=lambda run: (run.group, run.config["seed"])):
        run.name = run.name if names[run.name] == 1 else str(run.folder)
        groups[run.config["env_id"], label(run.group)].append(run)
        entry = {"env_id": run.config["env_id"], "pattern": run.pattern, "mask_update_interval": run.interval}
        entry |= {"seed": run.config["seed"], "final_return": run.final_return, "notes": run.notes}
        if history := run.history:
            entry |= {"projections": len(history.steps) - 1, "stability": run.stability, "sad": run.sad}
            matrices[f"{run.name}/steps"] = history.steps[history.kept]
            matrices[f"{run.name}/sad"], matrices[f"{run.name}/layers"] = history.matrix, np.array(history.layers)
        summary["runs"][run.name] = entry
    runs = [run for group in groups.values() for run in group]
    ended = {key: [run for run in group if run.finished] for key, group in groups.items()}
    ended = {key: group for key, group in ended.items() if group}
    length = {key: group[0].config["total_timesteps"] for key, group in ended.items()}
    dense = {}
    for env, kind in ended:
        theirs = [key for key in ended if key[0] == env and key[1].startswith("dense")]
        alike = [ended[key] for key in theirs if length[key] == length[env, kind]]
        if len(alike) == 1:  # of several that differ in a flag, none is the one to compare with
            dense[env, kind] = alike[0]
    estimates = {", ".join(key): estimate([final(group)], args.seed) for key, group in ended.items()}
    estimates |= {f"all, ratio to dense, {k}": found for k, found in across(ended, dense, args.seed)[1].items()}
    summary |= {"groups": estimates, "stability_and_return": correlate(runs)}
    show(runs, estimates, summary["stability_and_return"])
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    if matrices:
        rows = (row for run in runs if run.history for row in sad_rows(run, args.points))
        write_csv(out / "sad.csv", SAD_COLUMNS, rows)
        np.savez_compressed(out / "sad_matrices.npz", **matrices)
        plot_matrices(groups, out / "heatmap.png")
    plot_over_time(groups, args.points, out / "sad_over_time.png")
    if ended:
        plot_returns(ended, out / "return_over_k.png", args.seed)
        plot_stability(ended, summary["stability_and_return"], out / "stability.png")
    print(f"\nfiles in {out}/")
    return summary


def main() -> int:
    """Exit code: 0 done, 1 nothing that could be used, or a full disk, 2 bad input, 130 interrupted."""
    args = tyro.cli(Args, description=__doc__)
    try:
        analyse(args)
    except (UsageError, Failed, OSError) as error:  # OSError: --out cannot be written
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
