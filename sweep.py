"""Many runs: environments x patterns x seeds, as the plain scripts on Ray or Slurm, and honest statistics of them.

Started again with the same arguments it skips runs that are finished and resumes those that are not. `--report` makes
tables and figures. The run folders are in `runs/` of the folder where it was started, what it makes in `--out`.
"""

import contextlib
import csv
import ctypes
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from filelock import FileLock, Timeout

from sad_analysis import (
    LAST,
    UsageError,
    bootstrap,
    estimate,
    iqm,
    look_of,
    mean,
    mean_curve,
    read_evaluations,
    save,
    with_interval,
)

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4",)  # environments
    patterns: tuple[str, ...] = ("dense", "2:4", "1:4", "1:8")  # `dense` (td3_continuous.py) or N:M
    seeds: tuple[str, ...] = ("1-3",)  # seeds, or ranges of them
    total_timesteps: int = 1_000_000  # length of each run, in environment steps; a longer one extends what is there
    flags: str = ""  # more flags of both scripts, in one string: --flags="--eval-interval 10000"
    sparse_flags: str = ""  # more flags of the N:M runs: --sparse-flags="--mask-update-interval 100"
    out: str = (
        "results/sweep"  # folder of logs, copied results, commands and report; its name is part of the runs' names
    )
    address: str | None = None  # of a Ray cluster (`auto`, or host:port); otherwise one is started on this machine
    gpus: float = 0.0  # GPUs for each run, or a share of one
    retries: int = 3  # how often a run that failed, or whose node was lost, is tried again
    dry_run: bool = False  # print the commands, do nothing
    list: bool = False  # print the state of each run, do nothing
    slurm: bool = False  # write an array script for Slurm to --out instead
    task: int | None = None  # do this run alone, here: what the array script calls
    report: str | None = None  # folder of a sweep: write report.md and figures there, from its copied results


@dataclass(frozen=True)
class Task:
    """One run. Its name is that of its log and of the folder of its copied results."""

    env_id: str
    pattern: str
    seed: int
    total_timesteps: int
    flags: tuple[str, ...]
    out: Path  # absolute
    work: Path  # absolute: where `runs/` is

    @property
    def name(self) -> str:
        return f"{self.env_id.replace('/', '_')}__{self.pattern.replace(':', '_')}__{self.seed}"

    @property
    def exp_name(self) -> str:
        return f"{self.out.name}__{self.pattern.replace(':', '_')}"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def script(self) -> str:
        return str(HERE / ("td3_continuous.py" if self.pattern == "dense" else "rnm_td3_continuous.py"))

    def folders(self) -> list[Path]:
        """Its run folders, the one to go on with last: finished, or with the newest checkpoint."""
        prefix = f"{self.env_id.replace('/', '_')}__{self.exp_name}__{self.seed}__"
        found = (self.work / "runs").glob(glob.escape(prefix) + "*")
        return sorted(found, key=lambda path: (self.finished(path), checkpoint(path), path))

    def finished(self, folder: Path) -> bool:
        return last_evaluation(folder) >= self.total_timesteps

    def fresh_command(self) -> list[str]:
        command = [sys.executable, self.script, "--env-id", self.env_id, "--seed", str(self.seed)]
        command += ["--total-timesteps", str(self.total_timesteps), "--exp-name", self.exp_name]
        if self.pattern != "dense":
            n, m = self.pattern.split(":")
            command += ["--n", n, "--m", m]
        return [*command, *self.flags]

    def command(self) -> list[str] | None:
        """What brings the run to its end from where it is. None if it is there."""
        folders = self.folders()
        if folders and self.finished(folders[-1]):
            return None
        if folders and checkpoint(folders[-1]) >= 0:
            resume = [sys.executable, self.script, "--resume", str(folders[-1].relative_to(self.work))]
            return [*resume, "--total-timesteps", str(self.total_timesteps), "--env-id", self.env_id]
        return self.fresh_command()


def checkpoint(folder: Path) -> int:
    """Step of the newest checkpoint of a run folder, -1 if there is none."""
    return max((int(path.stem) for path in folder.glob(f"checkpoints/{'[0-9]' * 9}.pt")), default=-1)


def last_row(path: Path) -> dict[str, str]:
    """The last complete row of a CSV file; empty if there is none."""
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return next((row for row in reversed(rows) if all(value not in (None, "") for value in row.values())), {})
    except (OSError, ValueError, csv.Error):  # not there yet, or damaged
        return {}


def last_evaluation(folder: Path) -> int:
    return int(last_row(folder / "evaluations.csv").get("step", -1))


def tasks_of(args: Args) -> list[Task]:
    """All runs of a sweep. Raises UsageError."""
    seeds = []
    for text in args.seeds:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--seeds {text}: give numbers, or ranges such as 1-5")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    for pattern in args.patterns:
        match = re.fullmatch(r"dense|(\d+):(\d+)", pattern)
        if not match or (match[1] and not 1 <= int(match[1]) <= int(match[2])):
            raise UsageError(f"--patterns {pattern}: give `dense` or N:M with 1 <= N <= M")
    if args.total_timesteps < 1 or args.retries < 0:
        raise UsageError("--total-timesteps has to be 1 or more, --retries 0 or more")
    if args.gpus < 0 or (args.gpus > 1 and args.gpus % 1) or round(args.gpus, 4) != args.gpus:  # Ray's own rules
        raise UsageError(f"--gpus {args.gpus:g}: give a whole number, or a share such as 0.25")
    try:
        flags, sparse_flags = tuple(shlex.split(args.flags)), tuple(shlex.split(args.sparse_flags))
    except ValueError as error:
        raise UsageError(f"--flags or --sparse-flags: {error}") from error
    words = " ".join([*flags, *sparse_flags]).replace("=", " ")
    for name in ("env-id", "seed", "exp-name", "total-timesteps", "resume", "evaluate", "n", "m", "eval-interval 0"):
        if re.search(rf"--{name}( |$)", words.replace("_", "-")):
            raise UsageError(f"--flags: --{name} is not for all runs; a sweep sets it, or needs it")
    out, work, tasks = Path(args.out).resolve(), Path.cwd(), []
    for seed in dict.fromkeys(seeds):
        for env_id in args.env_ids:
            for pattern in args.patterns:
                mine = flags if pattern == "dense" else flags + sparse_flags
                tasks.append(Task(env_id, pattern, seed, args.total_timesteps, mine, out, work))
    return tasks


# ---------------------------------------------------------------- one run


class RunFailed(Exception):
    """A run ended with an error; the message is the last line of its log."""


def die_with_parent() -> None:
    """In a child: SIGTERM when the process that started it ends, however it does: the run then writes a checkpoint."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_task(task: Task) -> str:
    """Do, resume or skip a run, and copy its results. Returns its name. Raises RunFailed."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(task.log.with_suffix(".lock"), timeout=0):
            for folder in task.folders()[-1:]:  # the process of a worker that was killed may still write its checkpoint
                with contextlib.suppress(FileNotFoundError), FileLock(folder / "lock", timeout=60):
                    pass
            command = task.command()
            if command is not None:
                run_command(task, command)
    except Timeout as error:
        raise RunFailed(f"another process is at {task.name}: {error}") from error
    copy_results(task)
    return task.name


def run_command(task: Task, command: list[str]) -> None:
    with open(task.log, "a") as log:
        print("$", shlex.join(command), file=log, flush=True)
        options = {"cwd": task.work, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        process = subprocess.Popen(command, **options, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)  # `wait` would not be interrupted by Ray's cancel
        except KeyboardInterrupt:
            process.terminate()  # the run writes a checkpoint
            process.wait()
            raise
        if code:
            reason = last_line(task.log)
            print(f"failed with exit code {code}: {reason}", file=log)
            raise RunFailed(f"exit code {code}: {reason}")


def last_line(path: Path) -> str:
    """The last line with words in it: what parses flags draws boxes around its errors."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    words = [line.strip("\u2502 ") for line in lines if re.search(r"\w", line)]
    return words[-1] if words else "no output"


def copy_results(task: Task) -> None:
    """The small files of a run, so that a report needs no run folder."""
    folders = task.folders()
    if not folders or last_evaluation(folders[-1]) < 0:
        raise RunFailed(f"no evaluation of {task.name} below {task.work}/runs")
    target = task.out / "runs" / task.name
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "evaluations.csv"):
        shutil.copyfile(folders[-1] / name, target / name)
    episode = last_row(folders[-1] / "episodes.csv")
    speed = {"step": int(episode.get("step", 0)), "seconds": float(episode.get("seconds", 0))}
    (target / "speed.json").write_text(json.dumps(speed))


# ---------------------------------------------------------------- all runs


def steps_done(task: Task) -> int:
    folders = task.folders()
    if not folders:
        return 0
    done = last_row(folders[-1] / "episodes.csv").get("step", 0)
    return min(task.total_timesteps, max(int(done), last_evaluation(folders[-1])))


def state_of(task: Task) -> str:
    """Finished, running, failed with the last line of its log, interrupted, or waiting."""
    folders = task.folders()
    if folders and task.finished(folders[-1]):
        return "finished"
    if folders and (folders[-1] / "lock").exists():
        try:
            FileLock(folders[-1] / "lock", timeout=0).acquire().lock.release()
        except Timeout:
            return f"running, step {steps_done(task)}"
    if task.log.exists() and (line := last_line(task.log)).startswith("failed with "):
        return line
    if folders and checkpoint(folders[-1]) >= 0:
        return f"interrupted, goes on from step {checkpoint(folders[-1])}"
    return "waiting"


def progress(tasks: list[Task], finished: int, failed: int, history: list[tuple[float, int]]) -> str:
    """One line for all. `history`: (time, steps done by all) of the calls before; the speed is that of five minutes."""
    done = sum(map(steps_done, tasks))
    history.append((time.time(), done))
    while history[-1][0] - history[0][0] > 300:
        history.pop(0)
    seconds, steps = history[-1][0] - history[0][0], history[-1][1] - history[0][1]
    running = sum(state_of(task).startswith("running") for task in tasks)
    line = f"{finished} of {len(tasks)} done, {running} running, {failed} failed"
    if steps > 0:
        left = (sum(task.total_timesteps for task in tasks) - done) / (steps / seconds)
        line += f", {steps / seconds:.0f} steps/s in sum, {left / 3600:.1f} h left"
    return line


def usable_cores() -> int | None:
    """Cores that taskset or Slurm left to this process; None, which is Ray's own count, where they took none away."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return None if usable == os.cpu_count() else usable


def run_on_ray(tasks: list[Task], args: Args) -> int:
    """Returns how many failed."""
    if args.address:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # a try takes 40 s; Ray's 20 would hide a wrong address
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is missing: pip install -r requirements-sweep.txt, or see --slurm") from error

    options = {} if args.address else {"num_cpus": usable_cores(), "include_dashboard": False}
    try:
        ray.init(args.address or "local", **options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        where = f"--address {args.address}" if args.address else "Ray could not be started on this machine"
        raise UsageError(f"{where}: {error}") from error
    there = ray.cluster_resources().get("GPU", 0)
    if there < args.gpus:
        if not args.address:
            raise UsageError(f"--gpus {args.gpus:g}: Ray finds {there:g} GPUs on this machine; leave it out for CPUs")
        print(f"--gpus {args.gpus:g}: the cluster has {there:g} GPUs now; runs wait until it has more", flush=True)
    # max_retries counts lost nodes and failed runs alike; a task looks where its run is when it starts
    remote = ray.remote(num_cpus=1, num_gpus=args.gpus, max_retries=args.retries, retry_exceptions=True)(run_task)
    waiting, finished, failed, history = {remote.remote(task): task for task in tasks}, 0, 0, []
    shown = 0.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=5)
            for reference in ready:
                task = waiting.pop(reference)
                try:
                    ray.get(reference)
                    finished += 1
                except Exception as error:  # RunFailed, or Ray's own
                    failed += 1
                    reason = str(getattr(error, "cause", None) or error).splitlines()[-1]
                    print(f"{task.name} failed: {reason}", flush=True)
            if time.time() - shown > 30 or not waiting:
                shown = time.time()
                print(progress(tasks, finished, failed, history), flush=True)
    except KeyboardInterrupt:
        print("interrupted: runs write their checkpoints; started again, the sweep goes on from there", flush=True)
        for reference in waiting:
            ray.cancel(reference)  # KeyboardInterrupt in run_command
        ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
        raise
    finally:
        ray.shutdown()
    return failed


def write_slurm(tasks: list[Task], args: Args) -> Path:
    """An array script with one task a run."""
    out = Path(args.out)
    words = ["--env-ids", *args.env_ids, "--patterns", *args.patterns, "--seeds", *args.seeds]
    words += ["--total-timesteps", str(args.total_timesteps), "--out", str(out.resolve())]
    words += [f"--flags={args.flags}", f"--sparse-flags={args.sparse_flags}"]
    script = f"""#!/usr/bin/env bash
# Each task starts a run, or resumes it; add what your cluster wants (--partition, --account, --time).
#SBATCH --job-name={out.name}
#SBATCH --array=0-{len(tasks) - 1}
#SBATCH --cpus-per-task=1
#SBATCH --mem=2G
#SBATCH --requeue
#SBATCH --output={out.resolve()}/slurm-%a.log
cd {shlex.quote(str(Path.cwd()))}
exec {shlex.join([sys.executable, str(HERE / "sweep.py"), *words])} --task "$SLURM_ARRAY_TASK_ID"
"""
    out.mkdir(parents=True, exist_ok=True)
    (out / "slurm.sh").write_text(script)
    return out / "slurm.sh"


# ---------------------------------------------------------------- report


def read_plan(out: Path) -> dict[str, list]:
    """All runs that were ever asked for in this folder: name to environment, pattern, seed, steps and flags."""
    try:
        return json.loads((out / "sweep.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{out / 'sweep.json'} is damaged ({error}); delete it and start the sweep again") from error


def read_results(out: Path) -> tuple[dict, list[str]]:
    """(environment, pattern) to a list of (seed, steps, means, speed) of its ended runs; and what is missing."""
    results, missing = defaultdict(list), []
    for name, (env_id, pattern, seed, total, _) in read_plan(out).items():
        folder = out / "runs" / name
        try:
            steps, means = read_evaluations(folder / "evaluations.csv")
            if steps[-1] < total:
                missing.append(f"{name}: at step {steps[-1]:.0f} of {total}")
                continue
            results[env_id, pattern].append((seed, steps, means, json.loads((folder / "speed.json").read_text())))
        except Exception as error:
            missing.append(f"{name}: {error if isinstance(error, OSError) else repr(error)}")
    return results, missing


def final(runs: list[tuple]) -> np.ndarray:
    return np.array([means[-LAST:].mean() for _, _, means, _ in runs])


def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis) / b.mean(axis)


def improvement(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a run of a is better than one of b (ties count half): Mann and Whitney's U over all pairs."""
    return scipy.stats.mannwhitneyu(a, b, axis=axis, method="asymptotic").statistic / (a.shape[axis] * b.shape[axis])


def across(results: dict, envs: list[str]) -> list[str]:
    """Table over all environments: returns as ratios to the mean of dense, where that is positive."""
    usable = [env for env in envs if (env, "dense") in results and final(results[env, "dense"]).min() > 0]
    if len(usable) < 2:
        return []
    lines = [f"## {', '.join(usable)}: ratio to the mean of dense", ""]
    lines += ["| | runs | mean | interquartile mean |", "|---|---|---|---|"]
    dense = [final(results[env, "dense"]) for env in usable]
    for pattern in dict.fromkeys(pattern for _, pattern in results):
        if all((env, pattern) in results for env in usable):
            found = estimate([final(results[env, pattern]) for env in usable], 1, dense)
            cells = [with_interval(found[name], found[f"{name}_interval"], ".2f") for name in ("mean", "iqm")]
            lines.append(f"| {pattern} | {found['runs']} | {cells[0]} | {cells[1]} |")
    left_out = [env for env in envs if env not in usable]
    lines += ["", "Intervals are resampled within each environment (stratified), dense too."]
    return [*lines, *[f"Left out, without dense runs of positive return: {', '.join(left_out)}."] * bool(left_out), ""]


HEAD = f"""\
Final return: mean of the last {LAST} evaluations of a run. Brackets and bars: 95 % bootstrap intervals over seeds; with
two or three seeds they mean little, since they cannot reach beyond the runs that there are, and the interquartile mean
of fewer than four is the mean. Steps/s and hours are means over runs, evaluations included."""


def report(out: Path) -> str:
    """Write report.md and its figures; returns its text. Raises UsageError."""
    results, missing = read_results(out)
    if not results:
        raise UsageError(f"--report {out}: no finished runs there" + (f" ({missing[0]}, ...)" if missing else ""))
    lines = [f"# {out.name}", "", HEAD, ""]
    envs = list(dict.fromkeys(env for env, _ in results))
    header = "| | seeds | mean +- std | interquartile mean | ratio to dense | P(better than dense) | steps/s | hours |"
    for env in envs:
        lines += [f"## {env}", "", header, "|---|---|---|---|---|---|---|---|"]
        dense = final(results[env, "dense"]) if (env, "dense") in results else None
        for pattern in [pattern for e, pattern in results if e == env]:
            runs, values = results[env, pattern], final(results[env, pattern])
            std = f"{values.std(ddof=1):.3g}" if len(values) > 1 else "-"
            cells = [pattern, f"{len(values)}", f"{values.mean():.4g} +- {std}"]
            cells.append(with_interval(iqm(values), bootstrap([values], iqm, 1), ".4g"))
            if dense is not None and pattern != "dense":
                positive = dense.min() > 0  # a ratio to what may be zero or less means nothing
                ratios = (ratio(values, dense), bootstrap([values, dense], ratio, 1)) if positive else ()
                cells.append(with_interval(*ratios, ".2f") if positive else "-")
                better = improvement(values, dense), bootstrap([values, dense], improvement, 1)
                cells.append(with_interval(*better, ".2f"))
            else:
                cells += ["", ""]
            speeds = [speed["step"] / speed["seconds"] for *_, speed in runs if speed["seconds"]]
            cells += [f"{np.mean(speeds):.0f}" if speeds else "-"]
            cells += [f"{np.mean([speed['seconds'] for *_, speed in runs]) / 3600:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += across(results, envs)
    lines += ["![learning curves](curves.png)", "", "![final returns](returns.png)", ""]
    lines += ["Missing: " + ("none." if not missing else ""), *[f"- {line}" for line in missing], ""]
    plot_curves(results, envs, out / "curves.png")
    plot_returns(results, envs, out / "returns.png")
    (out / "report.md").write_text("\n".join(lines))
    return "\n".join(lines)


def looks(results: dict) -> dict[str, dict]:
    patterns = sorted({pattern for _, pattern in results}, key=lambda x: (x != "dense", -active_share(x), x))
    return {pattern: look_of(i) for i, pattern in enumerate(patterns)}


def active_share(pattern: str) -> float:
    n, m = (1, 1) if pattern == "dense" else map(int, pattern.split(":"))
    return n / m


def plot_curves(results: dict, envs: list[str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(envs), figsize=(6 * len(envs), 4.2), squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        for pattern, look in looks(results).items():
            runs = results.get((env, pattern), [])
            if not runs:
                continue
            steps, average = mean_curve([(steps, means) for _, steps, means, _ in runs])
            label = f"{pattern} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            axis.plot(steps / 1e3, average, **look, markevery=max(1, len(steps) // 8), ms=4, lw=2, label=label)
            for _, steps, means, _ in runs:
                axis.plot(steps / 1e3, means, color=look["color"], ls=look["linestyle"], lw=0.6, alpha=0.5)
        axis.set(xlabel="environment steps (thousands)", ylabel="evaluation return (thick: mean)", title=env)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save(figure, path)


def plot_returns(results: dict, envs: list[str], path: Path) -> None:
    figure, axes = plt.subplots(1, len(envs), figsize=(4.5 * len(envs), 4), squeeze=False)
    for axis, env in zip(axes[0], envs, strict=True):
        patterns = [pattern for pattern in looks(results) if (env, pattern) in results]
        for x, pattern in enumerate(patterns):
            look, values = {**looks(results)[pattern], "linestyle": ""}, final(results[env, pattern])
            low, high = bootstrap([values], mean, 1) or (values.mean(), values.mean())
            axis.plot([x - 0.12] * len(values), values, **look, ms=4, mfc="none")
            axis.errorbar(
                x + 0.12, values.mean(), [[values.mean() - low], [high - values.mean()]], **look, ms=8, capsize=4
            )
        axis.set_xticks(range(len(patterns)), [f"{p}\n{len(results[env, p])} seeds" for p in patterns])
        axis.set(ylabel=f"return, last {LAST} evaluations (filled: mean)", title=env, xlim=(-0.6, len(patterns) - 0.4))
        axis.grid(alpha=0.3)
    save(figure, path)


# ---------------------------------------------------------------- the whole


def sweep(args: Args) -> int:
    """Returns the exit code. Raises UsageError."""
    if args.report is not None:
        print(report(Path(args.report)))
        return 0
    tasks = tasks_of(args)
    if args.task is not None:
        if not 0 <= args.task < len(tasks):
            raise UsageError(f"--task {args.task}: give a number from 0 to {len(tasks) - 1}")
        run_task(tasks[args.task])
        return 0
    if args.dry_run:
        for task in tasks:
            print(shlex.join(task.command() or ["#", task.name, "is finished"]))
        return 0
    if args.list:
        for task in tasks:
            print(f"{task.name:50} {state_of(task)}")
        return 0
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        plan, asked = read_plan(out), {}
        for task in tasks:
            asked[task.name] = [task.env_id, task.pattern, task.seed, task.total_timesteps, list(task.flags)]
            before = plan.get(task.name, asked[task.name])
            if before[4] != asked[task.name][4]:
                flags = shlex.join(before[4]) or "none"
                raise UsageError(
                    f"--out {out}: {task.name} was started with other flags ({flags}); give those, or a new --out"
                )
        (out / "sweep.incomplete").write_text(json.dumps(plan | asked, indent=1))
        os.replace(out / "sweep.incomplete", out / "sweep.json")
        lines = (out / "commands.txt").read_text().splitlines() if (out / "commands.txt").exists() else []
        lines += [shlex.join(["python", Path(task.script).name, *task.fresh_command()[2:]]) for task in tasks]
        (out / "commands.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror}") from error
    if args.slurm:
        print(f"sbatch {write_slurm(tasks, args)}")
        return 0
    print(f"{len(tasks)} runs; each can be repeated by its line in {out / 'commands.txt'}", flush=True)
    began = time.time()
    failed = run_on_ray(tasks, args)
    print(f"{(time.time() - began) / 3600:.2f} h; python sweep.py --report {out}")
    return 1 if failed else 0


def main() -> int:
    """Exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted: start it again and it goes on."""
    args = tyro.cli(Args, description=__doc__)
    try:
        return sweep(args)
    except (UsageError, RunFailed, OSError) as error:  # OSError: a disk that is full, say
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
