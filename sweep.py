"""Many runs: environments x patterns x variants x seeds, as the plain scripts on Ray or Slurm, and their statistics.

Started again with the same arguments it skips runs that are finished and resumes those that are not. `--report` makes
tables and figures. The run folders are in `runs/` of the folder where it was started, what it makes in `--out`.
"""

import ast
import contextlib
import csv
import ctypes
import functools
import glob
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydantic
import scipy.stats
import tyro
from filelock import FileLock, Timeout

import sad_analysis as sad
from sad_analysis import LAST, Failed, Run, UsageError, bootstrap, final, iqm, mean, rounded, with_interval

HERE = Path(__file__).resolve().parent
DENSE = HERE / "td3_continuous.py"


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("HalfCheetah-v4",)  # environments
    patterns: tuple[str, ...] = ("dense", "2:4", "1:4", "1:8")  # `dense` (td3_continuous.py) or N:M
    variants: tuple[str, ...] = ("base",)  # `base`, or "NAME=FLAGS": more flags, and a name for the runs that have them
    seeds: tuple[str, ...] = ("1-3",)  # seeds, or ranges of them
    total_timesteps: int = 1_000_000  # length of each run, in environment steps; a longer one extends what is there
    flags: str = ""  # more flags of all runs, in one string: --flags="--eval-interval 10000"
    sparse_flags: str = ""  # more flags of the N:M runs: --sparse-flags="--mask-update-interval 100"
    out: str = "results/sweep"  # folder of logs, results and report; its name is part of the runs' names
    address: str | None = None  # of a Ray cluster (`auto`, or host:port); otherwise one is started on this machine
    gpus: float = 0.0  # GPUs for each run, or a share of one
    retries: int = 3  # how often a run that failed, or whose node was lost, is tried again; not one with wrong flags
    dry_run: bool = False  # print the commands, do nothing
    list: bool = False  # print the state of each run, do nothing
    slurm: bool = False  # write an array script for Slurm to --out instead
    task: int | None = None  # do this run alone, here: what the array script calls
    report: str | None = None  # folder of a sweep: write report.md, CSV files and figures there, from its results


@dataclass(frozen=True)
class Task:
    """One run. Its name is that of its log and of the folder of its copied results."""

    env_id: str
    pattern: str
    seed: int
    total_timesteps: int
    flags: list[str]
    variant: str = "base"
    out: Path = Path()  # absolute
    work: Path = Path()  # absolute: where `runs/` is

    @property
    def kind(self) -> str:
        return self.pattern.replace(":", "_") + (f"__{self.variant}" if self.variant != "base" else "")

    @property
    def name(self) -> str:
        return f"{self.env_id.replace('/', '_')}__{self.kind}__{self.seed}"

    @property
    def title(self) -> str:
        return self.pattern if self.variant == "base" else f"{self.pattern}, {self.variant}"

    @property
    def log(self) -> Path:
        return self.out / "logs" / f"{self.name}.log"

    @property
    def results(self) -> Path:
        return self.out / "runs" / self.name

    @property
    def script(self) -> Path:
        return DENSE if self.pattern == "dense" else HERE / "rnm_td3_continuous.py"

    @property
    def folder(self) -> Path:
        """Of its run folders the one that has ended, or has the newest checkpoint; else a path where nothing is."""
        name = f"{self.env_id.replace('/', '_')}__{self.out.name}__{self.kind}__{self.seed}__"
        found = [*(self.work / "runs").glob(glob.escape(name) + "*"), self.work / "runs" / name]
        return max(found, key=lambda path: (last_evaluation(path) >= self.total_timesteps, checkpoint(path), str(path)))

    def finished(self) -> bool:
        return last_evaluation(self.results) >= self.total_timesteps or self.ended()

    def ended(self) -> bool:
        """Its run folder has all that was asked for: a kill or a full disk may cost the model, which comes last."""
        model, log = (self.folder / name for name in ("model.pt", "evaluations.csv"))
        if last_evaluation(self.folder) < self.total_timesteps:
            return False
        asked = [name for name in names_in(self.flags) if name.endswith("save-model")]  # the last one counts
        return asked[-1:] != ["save-model"] or (model.exists() and model.stat().st_mtime >= log.stat().st_mtime)

    def fresh_command(self) -> list[str]:
        command = [sys.executable, str(self.script), "--env-id", self.env_id, "--seed", str(self.seed)]
        command += ["--total-timesteps", str(self.total_timesteps), "--exp-name", f"{self.out.name}__{self.kind}"]
        if self.pattern != "dense":
            n, m = self.pattern.split(":")
            command += ["--n", n, "--m", m]
        return [*command, *self.flags]

    @property
    def line(self) -> str:
        """Of `commands.txt`."""
        return shlex.join(["python", self.script.name, *self.fresh_command()[2:]])

    def command(self) -> list[str] | None:
        """What brings the run to its end from where it is. None if it is there. Raises UsageError."""
        if self.finished():
            return None
        if checkpoint(self.folder) >= 0:
            resume = [sys.executable, str(self.script), "--resume", str(self.folder.relative_to(self.work))]
            return [*resume, "--total-timesteps", str(self.total_timesteps), "--env-id", self.env_id]
        if (step := last_evaluation(self.results)) >= 0:
            advice = "it has no checkpoint" if self.folder.exists() else f"bring it back to {self.work}/runs"
            what = f"{self.name} is at step {step}, and its run folder is needed to go on"
            raise UsageError(f"{what}: {advice}, or delete {self.results}")
        return self.fresh_command()


def checkpoint(folder: Path) -> int:
    """Step of the newest checkpoint of a run folder, -1 if there is none."""
    return max((int(path.stem) for path in folder.glob(f"checkpoints/{'[0-9]' * 9}.pt")), default=-1)


def last_step(path: Path) -> int:
    """In the last whole row of a CSV file; -1 if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, csv.Error):  # not there yet, or damaged
        for row in reversed(sad.csv_rows(path)):
            if all(value not in (None, "") for value in row.values()):
                return int(row["step"])
    return -1


def last_evaluation(folder: Path) -> int:
    return last_step(folder / "evaluations.csv")


@functools.cache
def flags_of(script: Path) -> set[str]:
    """Names of the flags of a script, without reading it into this process: that takes seconds."""
    tree = ast.parse(script.read_text()).body
    (args,) = (node for node in tree if isinstance(node, ast.ClassDef) and node.name == "Args")
    names = {node.target.id.replace("_", "-") for node in args.body if isinstance(node, ast.AnnAssign)}
    return names | {f"no-{name}" for name in names}


def names_in(flags: Sequence[str]) -> list[str]:
    return [word[2:].split("=")[0].replace("_", "-") for word in flags if word.startswith("--")]


def tasks_of(args: Args) -> list[Task]:
    """All runs of a sweep; what is asked for twice is there once. Raises UsageError."""
    seeds, patterns, variants = [], [], {}
    for text in args.seeds:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--seeds {text}: give numbers, or ranges such as 1-5")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    for text in args.patterns:
        match = re.fullmatch(r"dense|(\d+):(\d+)", text)
        if not match or (match[1] and not 1 <= int(match[1]) <= int(match[2])):
            raise UsageError(f"--patterns {text}: give `dense` or N:M with 1 <= N <= M")
        patterns.append(f"{int(match[1])}:{int(match[2])}" if match[1] else text)
    if args.total_timesteps < 1 or args.retries < 0:
        raise UsageError("--total-timesteps has to be 1 or more, --retries 0 or more")
    if args.gpus < 0 or (args.gpus > 1 and args.gpus % 1) or round(args.gpus, 4) != args.gpus:  # Ray's own rules
        raise UsageError(f"--gpus {args.gpus:g}: give a whole number, or a share such as 0.25")
    try:
        flags, sparse_flags = shlex.split(args.flags), shlex.split(args.sparse_flags)
        for text in args.variants:
            match = re.fullmatch(r"base|(?!base=|\d+=)([A-Za-z0-9.-]+)=(.*)", text)  # a number would be read as a seed
            if not match or variants.setdefault(match[1] or "base", more := shlex.split(match[2] or "")) != more:
                raise ValueError(f"give `base`, or NAME=FLAGS, each name once and no number, instead of {text!r}")
    except ValueError as error:
        raise UsageError(f"--flags, --sparse-flags or --variants: {error}") from error
    for words in (flags, sparse_flags, *variants.values()):
        taken = {"env-id", "seed", "exp-name", "total-timesteps", "resume", "evaluate", "n", "m"} & {*names_in(words)}
        if taken or re.search("--eval[-_]interval[ =]0( |$)", " ".join(words)):
            name = min(taken, default="eval-interval 0")
            raise UsageError(f"--flags: --{name} is not for all runs; a sweep sets it, or needs it")
        for name in names_in(words):
            if not any(name in flags_of(script) for script in (DENSE, HERE / "rnm_td3_continuous.py")):
                raise UsageError(f"--flags: --{name} is a flag of neither script")
    out, work, tasks, left_out = Path(args.out).resolve(), Path.cwd(), {}, defaultdict(set)
    for seed, env_id, (variant, more), pattern in itertools.product(seeds, args.env_ids, variants.items(), patterns):
        mine = [*flags, *([] if pattern == "dense" else sparse_flags), *more]
        task = Task(env_id, pattern, seed, args.total_timesteps, mine, variant, out, work)
        if unknown := [name for name in names_in(mine) if name not in flags_of(task.script)]:
            left_out[f"{task.script.name} has no --{unknown[0]}"].add(f"{pattern} of {variant}")
        elif tasks.setdefault(task.name, task) != task:
            raise UsageError(f"--env-ids: {env_id} and {tasks[task.name].env_id} would have the same names")
    for reason, kinds in left_out.items():
        print(f"left out: {', '.join(sorted(kinds))}: {reason}", file=sys.stderr)
    if not tasks:
        raise UsageError("no runs are left")
    return list(tasks.values())


# ---------------------------------------------------------------- one run


def die_with_parent() -> None:
    """In a child: SIGTERM when the process that started it ends, however it does: the run then writes a checkpoint."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_task(task: Task) -> str:
    """Do, resume or skip a run, and copy its results. Returns its name. Raises Failed; UsageError: do not retry."""
    try:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(task.log.with_suffix(".lock"), timeout=0):
            if task.folder.exists():  # the process of a worker that was killed may still write its checkpoint
                FileLock(task.folder / "lock", timeout=60).acquire().lock.release()
            if command := task.command():
                run_command(task, command)
            copy_results(task)
    except Timeout as error:
        raise Failed(f"another process is at {task.name}: {error}") from error
    except OSError as error:  # a disk that is full, say
        raise Failed(f"{error.filename or task.log.parent}: {error.strerror}") from error
    return task.name


def run_command(task: Task, command: list[str]) -> None:
    with open(task.log, "a") as log:
        print("$", shlex.join(command), file=log, flush=True)
        options = {"cwd": task.work, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "preexec_fn": die_with_parent}
        # a session of its own: Ctrl-C reaches it once, through `terminate`; a second one would cost its checkpoint
        process = subprocess.Popen(command, **options, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)  # `wait` would not be interrupted by Ray's cancel
        except (KeyboardInterrupt, SystemExit):
            process.terminate()  # the run writes a checkpoint
            process.wait()
            raise
        if code:
            reason = f"exit code {code}: {last_line(task.log)}"
            with contextlib.suppress(OSError):  # if the disk is full, the reason is told all the same
                print("failed with", reason, file=log, flush=True)
            raise (UsageError if code == 2 else Failed)(reason)


def last_line(path: Path) -> str:
    """The last line with words in it: what parses flags draws boxes around its errors."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    words = [line.strip("\u2502 ") for line in lines if re.search(r"\w", line)]
    return words[-1] if words else "no output"


def copy_results(task: Task) -> None:
    """The small files of a run, so that neither a report nor a finished run needs its folder."""
    if not task.finished():
        raise Failed(f"the last evaluation of {task.name}, or its model, is missing below {task.work}/runs")
    if last_evaluation(task.folder) > last_evaluation(task.results):
        task.results.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "evaluations.csv"):
            shutil.copyfile(task.folder / name, task.results / f"{name}.incomplete")
            os.replace(task.results / f"{name}.incomplete", task.results / name)


# ---------------------------------------------------------------- all runs


def steps_done(task: Task) -> int:
    steps = map(last_step, (task.results / "evaluations.csv", *task.folder.glob("e*s.csv")))
    return min(task.total_timesteps, max(0, *steps))


def state_of(task: Task) -> str:
    """Finished, running, failed with the last line of its log, interrupted, or waiting."""
    lock = task.folder / "lock"
    try:
        if lock.exists():
            FileLock(lock, timeout=0).acquire().lock.release()
        line = last_line(task.log)
        if task.finished() or line.startswith("failed with "):
            return "finished" if task.finished() else line
        resumed = "--resume" in task.command()
        return f"interrupted, goes on from step {checkpoint(task.folder)}" if resumed else "waiting"
    except Timeout:
        return f"running, step {steps_done(task)}"
    except UsageError as error:
        return str(error)


def progress(tasks: list[Task], began: tuple[float, int], finished: int, failed: int) -> str:
    """One line for all. began: time and steps done then."""
    seconds, done = time.time() - began[0], sum(map(steps_done, tasks))
    running = sum(state_of(task).startswith("running") for task in tasks)
    line = f"{finished} of {len(tasks)} done, {running} running, {failed} failed"
    if (speed := (done - began[1]) / seconds) > 0:
        left = (sum(task.total_timesteps for task in tasks) - done) / speed
        line += f", {speed:.0f} steps/s in sum, {left / 3600:.1f} h left"
    return line


def usable_cores() -> int | None:
    """Cores that taskset or Slurm left to this process; None, which is Ray's own count, where they took none away."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return None if usable == os.cpu_count() else usable


def attempt(task: Task) -> tuple[str, bool]:
    """What went wrong, if anything, and whether to try again. Returned, since Ray prints what is raised."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray's cancel; ignored where a script started the sweep
    try:
        run_task(task)
        return "", False
    except (Failed, UsageError) as error:
        return str(error), isinstance(error, Failed)


def run_on_ray(tasks: list[Task], args: Args) -> int:
    """Returns how many failed. Raises UsageError."""
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
    # max_retries: of lost nodes; a task looks where its run is when it starts
    remote = ray.remote(num_cpus=1, num_gpus=args.gpus, max_retries=args.retries)(attempt)
    in_order = sorted(tasks, key=lambda task: not task.finished())  # what has ended counts from the start
    waiting, finished, failed, tried = {remote.remote(task): task for task in in_order}, 0, 0, Counter()
    began, shown = (time.time(), sum(map(steps_done, tasks))), 0.0
    stopped = []  # since Ray raises KeyboardInterrupt, whatever a handler has raised
    signal.signal(signal.SIGTERM, lambda *event: (stopped.append(event[0]), signal.default_int_handler(*event)))
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=5)
            for reference in ready:
                task = waiting.pop(reference)
                try:
                    reason, again = ray.get(reference)
                except Exception as error:  # Ray's own: the node was lost too often
                    reason, again = str(error).splitlines()[-1], False
                tried[task.name] += 1
                again = again and tried[task.name] <= args.retries
                if reason:
                    print(f"{task.name} failed: {reason}" + "; it is tried again" * again, flush=True)
                if again:
                    waiting[remote.remote(task)] = task
                finished, failed = finished + (not reason), failed + (bool(reason) and not again)
            if time.time() - shown > 30 or not waiting:
                shown = time.time()
                print(progress(tasks, began, finished, failed), flush=True)
    except KeyboardInterrupt:
        print("interrupted: runs write their checkpoints; started again, the sweep goes on from there", flush=True)
        for reference in waiting:
            ray.cancel(reference)  # KeyboardInterrupt in run_task
        ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
        sys.exit(128 + (stopped or [signal.SIGINT])[0])
    finally:
        ray.shutdown()
    return failed


def write_slurm(count: int, out: Path) -> Path:
    """An array script with one task a run. What the user named stands where the shell reads it, not Slurm."""
    words = [sys.executable, str(HERE / "sweep.py"), *[word for word in sys.argv[1:] if word != "--slurm"]]
    (out / "slurm.sh").write_text(f"""#!/usr/bin/env bash
# Each task starts a run, or resumes it; add what your cluster wants (--partition, --account, --time).
#SBATCH --job-name=rnm-td3-sweep
#SBATCH --array=0-{count - 1}
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=/dev/null
cd {shlex.quote(str(Path.cwd()))} || exit 1
log={shlex.quote(str(out))}/slurm-"$SLURM_ARRAY_TASK_ID".log
exec {shlex.join(words)} --task "$SLURM_ARRAY_TASK_ID" >> "$log" 2>&1
""")
    return out / "slurm.sh"


# ---------------------------------------------------------------- report

PLAN = pydantic.TypeAdapter(dict[str, tuple[str, str, int, int, list[str], str]])
NEVER = 1e9  # hours
SEEDS_DIFFER = sad.ALIKE - {"mask_update_interval"} | {"total_timesteps"}  # or may: in no more than these flags


def read_plan(out: Path) -> dict[str, Task]:
    """All runs that were ever asked for in this folder, by name. Raises UsageError."""
    path = out / "sweep.json"
    try:
        plan = PLAN.validate_json(path.read_bytes(), strict=True) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); delete it and start the sweep again: no run is lost") from error
    return {name: Task(*entry, out=out) for name, entry in plan.items()}


def read_results(plan: dict[str, Task]) -> tuple[dict[tuple[str, str], list[Run]], list[str]]:
    """Ended runs by environment and title, in the order of the plan; and what is missing, with the reason."""
    results, missing = defaultdict(list), []
    by_length = sorted(plan.values(), key=lambda task: task.total_timesteps)
    goals = {task.env_id: task.total_timesteps for task in by_length}  # the longest wins
    for name, task in plan.items():
        try:
            if not task.results.exists():
                raise ValueError("not finished yet")
            run, goal = sad.read_run(task.results), goals[task.env_id]
            weights(run.config), while_learning(run)  # raise where its numbers are damaged
            if not len(run.steps) or run.steps[-1] != goal:
                raise ValueError(run.notes[0] if run.notes else f"at step {run.steps[-1]} of {goal}")
            for other in results.get((task.env_id, task.title), [])[:1]:
                for flag in sorted((run.config.keys() & other.config.keys()) - SEEDS_DIFFER):
                    if run.config[flag] != other.config[flag]:  # no seeds of the same
                        raise ValueError(f"{flag} is {run.config[flag]}, {other.config[flag]} in {other.name}")
            results[task.env_id, task.title].append(run)
        except Exception as error:  # no damage to one run may cost the rest
            missing.append(f"{name}: {error if type(error) is ValueError else repr(error)}")
    return results, missing


def dense_of(results: dict, plan: dict[str, Task]) -> dict[tuple[str, str], str]:
    """The dense runs to compare with: of the same variant, or else with the same flags as far as those have them."""
    tasks, found = {(task.env_id, task.title): task for task in plan.values()}, {}
    for env, kind in results:
        known, kept, mine = False, [], tasks[env, kind]
        for word in mine.flags:
            known = names_in([word])[0] in flags_of(DENSE) if word.startswith("--") else known
            kept += [word] * known
        dense = [tasks[key] for key in results if key[0] == env and tasks[key].pattern == "dense"]
        alike = [task.title for task in dense if task.variant == mine.variant]
        alike += [task.title for task in dense if task.flags == kept]
        if alike:
            found[env, kind] = alike[0]
    return found


def while_learning(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and returns of its evaluations: what an untrained policy reaches, an Ant that stands, is no success."""
    learning = run.steps > run.config.get("learning_starts", 0)
    return run.seconds[learning], run.returns[learning]


def return_at(runs: list[Run], clock: float) -> np.ndarray | None:
    """Mean of the last evaluations until then, in seconds; None if a run had none yet."""
    until = [returns[seconds <= clock][-LAST:] for seconds, returns in map(while_learning, runs)]
    return np.array([returns.mean() for returns in until]) if all(map(len, until)) else None


def hours_to(runs: list[Run], goal: float) -> np.ndarray:
    """Until the mean of the last evaluations, as many as count for the final return, reached `goal`, or NEVER."""
    found = []
    for seconds, returns in map(while_learning, runs):
        ends = range(LAST, len(returns) + 1)
        found.append(next((seconds[i - 1] / 3600 for i in ends if returns[i - LAST : i].mean() >= goal), NEVER))
    return np.array(found)


def rates(runs: list[Run]) -> np.ndarray:
    """Environment steps per second of training."""
    return np.array([run.steps[-1] / run.seconds[-1] for run in runs])


def timed(results: dict[tuple[str, str], list[Run]]) -> dict[tuple[str, str], list[Run]]:
    """Of each environment the runs whose hours compare: on one processor, as many threads; of most dense, kinds."""
    found = {}
    for env in dict.fromkeys(env for env, _ in results):
        cpus = defaultdict(lambda: defaultdict(list))
        for key, runs in results.items():
            for run in runs if key[0] == env else []:
                cpus[run.config.get("cpu"), run.config.get("num_threads")][key].append(run)
        found |= max(cpus.values(), key=lambda runs: (len(runs.get((env, "dense"), [])), len(runs)))
    return found


def ratio(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis) / b.mean(axis)


def improvement(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a run of a is better than one of b (ties count half): Mann and Whitney's U over all pairs."""
    return scipy.stats.mannwhitneyu(a, b, axis=axis, method="asymptotic").statistic / (a.shape[axis] * b.shape[axis])


def weights(config: dict) -> dict[str, float]:
    """Active weights of all six networks in per cent; parameters of the actor that are active, biases too, and bytes:
    4 for each, and 1 for the place of an N:M weight in its group."""
    n, actor_m, dense = config.get("n", 1), config.get("m", 1), config.get("dense_layers", "none")
    obs, action, networks = config["obs_dim"], config["action_dim"], []
    for inputs, outputs, m in ((obs, action, actor_m), (obs + action, 1, config.get("critic_m") or actor_m)):
        sizes = np.array([*pairwise([inputs, *config["hidden_sizes"], outputs])])
        active = sizes[:, 1] * (sizes[:, 0] // m * n + np.minimum(n, sizes[:, 0] % m))
        thin = [0] * ("first" in dense) + [-1] * ("last" in dense)
        indices = active.sum() - active[thin].sum() if "n" in config else 0
        active[thin] = sizes[thin].prod(1)
        networks.append((active.sum(), sizes.prod(1).sum(), sizes[:, 1].sum(), indices))
    (actor, whole, biases, indices), (critic, whole_critic, *_) = networks
    share = 100 * (actor + 2 * critic) / (whole + 2 * whole_critic)
    return {"active": share, "parameters": actor + biases, "bytes": 4 * (actor + biases) + indices}


def estimated(statistic: Callable, *samples: np.ndarray) -> tuple[float, list[float] | None]:
    return float(statistic(*samples)), bootstrap(list(samples), statistic, 1)


def figures(runs: list[Run], dense: list[Run] | None, best: list[Run] | None) -> dict[str, tuple]:
    """Name to value and interval. dense: what to compare with; best: the best dense runs."""
    found = {"seeds": (len(runs), None)} | {name: (value, None) for name, value in weights(runs[0].config).items()}
    found["mean"], found["iqm"] = estimated(mean, values := final(runs)), estimated(iqm, values)
    found["std"] = values.std(ddof=min(1, len(values) - 1)), None
    for name, other in (("ratio", dense), ("ratio_to_best", best)):
        if other and other is not runs and final(other).min() > 0:  # a ratio to what may be zero or less means nothing
            found[name] = estimated(ratio, values, final(other))
    if dense and dense is not runs:
        found["better"] = estimated(improvement, values, final(dense))
    return found


def times(runs: list[Run], dense: list[Run] | None, all_dense: list[Run] | None, clock: float) -> dict[str, tuple]:
    """As `figures`, of those whose hours compare, and the final return of all dense runs. clock: seconds."""
    found = {"steps_per_second": (rates(runs).mean(), None)}
    found["hours"] = np.mean([run.seconds[-1] for run in runs]) / 3600, None
    if (early := return_at(runs, clock)) is not None:
        found["early"] = estimated(mean, early)
        theirs = return_at(dense, clock) if dense and dense is not runs else None
        if theirs is not None and theirs.min() > 0:
            found["early_ratio"] = estimated(ratio, early, theirs)
    positive = all_dense and final(all_dense).min() > 0
    enough = positive and min(len(while_learning(run)[1]) for run in (*runs, *all_dense)) >= LAST
    for share in (50, 90, 100) if enough else ():
        hours = hours_to(runs, share / 100 * final(all_dense).mean())
        found[f"hours_to_{share}"] = estimated(np.median, hours)
        found[f"reached_{share}"] = int((hours < NEVER).sum()), None
    return found


def number(name: str, value: float, form: str) -> str:
    return "never" if name.startswith("hours_to") and value > NEVER / 1000 else rounded(value, form)


def cell(found: dict[str, tuple], name: str, form: str) -> str:
    """Empty where there is no such figure."""
    if name == "mean":
        spread = rounded(found["std"][0], ".3g") if found["seeds"][0] > 1 else "-"
        return f"{rounded(found[name][0], '.4g')} +- {spread}"
    numbers = [number(name, x, form) for x in (found[name][0], *(found[name][1] or ()))] if name in found else [""]
    text = with_interval(numbers[0], numbers[1:], "")
    reached = found.get(name.replace("hours_to", "reached")) if "hours_to" in name else None
    return f"{text}, {reached[0]} of {found.get('timed', found['seeds'])[0]}" if reached else text


HEAD = f"""\
Final return: mean of the last {LAST} evaluations of a run. Brackets and bars: 95 % bootstrap intervals over seeds. With
few of them they are too narrow, since they cannot reach beyond the runs that there are: a ratio of three runs (five) to
as many lies in them in 80 (88) of 100 cases; and the interquartile mean of fewer than four is the mean. Steps/s and
hours are means over runs, evaluations left out. Return by a time: mean of the last {LAST} evaluations until the fastest
kind of run ended. Hours to a share of the final return of dense: median of the times at which the mean of {LAST}
evaluations first was there; `2 of 3`: so many seeds ever were, the others count as later than any. Both: of evaluations
since learning began. Active weights: of all six networks, dense layers with them, biases not. Bytes of the actor: 4 for
a weight or a bias, 1 more for the place of an N:M weight in its group.
"""
FIRST = [("seeds", "seeds", ".0f"), ("mean", "mean +- std", ""), ("iqm", "interquartile mean", ".4g")]
FIRST += [("ratio", "ratio to dense", ".2f"), ("ratio_to_best", "ratio to the best dense", ".2f")]
FIRST += [("better", "P(better than dense)", ".2f"), ("timed", "timed seeds", ".0f")]
FIRST += [("steps_per_second", "steps/s", ".0f"), ("hours", "hours", ".2f")]
SECOND = [("seeds", "seeds", ".0f"), ("active", "active weights, %", ".1f"), ("parameters", "actor: parameters", ".0f")]
SECOND += [("bytes", "bytes", ".0f"), ("early", "return by {:.2f} h", ".4g"), ("early_ratio", "to dense then", ".2f")]
SECOND += [(f"hours_to_{share}", f"hours to {share} %", ".2f") for share in (50, 90, 100)]


def table(columns: list[tuple[str, str, str]], rows: dict[str, dict], clock: float) -> str:
    """Of the columns for which there is anything."""
    there = [column for column in columns if any(column[0] in found for found in rows.values())]
    cells = [[kind, *[cell(found, name, form) for name, _, form in there]] for kind, found in rows.items()]
    return sad.markdown(["", *[heading.format(clock / 3600) for _, heading, _ in there]], cells)


def report(out: Path) -> str:
    """Write report.md, summary.csv and figures; returns the text. Raises UsageError, Failed."""
    plan = read_plan(out)
    results, missing = read_results(plan)
    if not results:
        kind, reason = (Failed, f" ({missing[0]}, ...)") if missing else (UsageError, "")
        raise kind(f"--report {out}: no finished runs there{reason}")
    parts, rows, references = [f"# {out.resolve().name}\n", HEAD], [], dense_of(results, plan)
    envs = list(dict.fromkeys(env for env, _ in results))
    dense = {env: [kind for e, kind in results if e == env and kind.startswith("dense")] for env in envs}
    best = {env: max(kinds, key=lambda kind: final(results[env, kind]).mean()) for env, kinds in dense.items() if kinds}
    compared = timed(results)
    for env in envs:
        mine, clocked = ({kind: runs for (e, kind), runs in of.items() if e == env} for of in (results, compared))
        found = {}
        several = sum(map(len, mine.values())) > sum(map(len, clocked.values()))
        clock = min(np.mean([run.seconds[-1] for run in runs]) for runs in clocked.values())
        needed = len(dense[env]) > 1 or any((env, kind) not in references for kind in mine)
        for kind, runs in mine.items():
            others = references.get((env, kind)), best.get(env) if needed else None
            found[kind] = figures(runs, *[mine.get(other) for other in others])
            if kind in clocked:
                found[kind] |= times(clocked[kind], clocked.get(others[0]), mine.get(others[0]), clock)
            if several:
                found[kind]["timed"] = len(clocked.get(kind, ())), None
            for name, (value, bounds) in found[kind].items():
                numbers = [number(name, x, ".6g") for x in (value, *(bounds or ()))]
                rows.append([env, kind, name, *numbers, *["", ""][len(numbers) - 1 :]])
        parts += [f"## {env}\n", table(FIRST, found, clock), table(SECOND, found, clock)]
        if several:
            cpu = next(iter(clocked.values()))[0].config.get("cpu")
            parts += [f"Times: of the runs on one processor alone ({cpu}); those on others do not compare.\n"]
    by_best = {key: best[key[0]] for key in results if key[0] in best}
    words = {"dense": (references, "ratio")}
    words |= {"the best dense": (by_best, "ratio_to_best")} if by_best != references else {}
    for word, (kinds, name) in words.items():
        usable, estimates = sad.across(results, {key: results[key[0], kind] for key, kind in kinds.items()}, 1)
        if not estimates:
            continue
        parts += [f"## {', '.join(usable)}: ratio to the mean of {word}\n", sad.returns_table(estimates, ".2f")]
        parts += ["Mean: of the environments' means; interquartile mean: of all runs. Intervals are resampled within"]
        parts += ["each environment (stratified), dense too."]
        left_out = ", ".join(env for env in envs if env not in usable)
        parts += [f"Left out, without dense runs of positive return: {left_out}.\n" if left_out else ""]
        absent = "; ".join(dict.fromkeys(kind for env, kind in results if env in usable and kind not in estimates))
        parts += [f"Left out, not in all of these environments: {absent}.\n" if absent else ""]
        for kind, found in estimates.items():
            for average in ("mean", "iqm"):
                numbers = [f"{x:.6g}" for x in (found[average], *(found[f"{average}_interval"] or ()))]
                rows.append(["all", kind, f"{average}_of_{name}", *numbers, *["", ""][len(numbers) - 1 :]])
    parts += ["![learning curves](curves.png)\n\n![final returns](returns.png)\n"]
    parts += ["Missing: " + ("none." if not missing else ""), *[f"- {line}" for line in missing], ""]
    plot_curves(results, envs, out / "curves.png")
    sad.plot_returns(results, out / "returns.png")
    sad.write_csv(out / "summary.csv", ["env_id", "kind", "figure", "value", "low", "high"], rows)
    (out / "report.md").write_text("\n".join(parts))
    return "\n".join(parts)


def plot_curves(results: dict, envs: list[str], path: Path) -> None:
    """Over steps, and over hours, these of runs that compare."""
    clocked = timed(results)
    figure, axes = sad.panels(2, len(envs), 6, 4.2, sharey="row")
    for (env, kind), runs in results.items():
        left, right = axes[:, envs.index(env)]
        look, curves = sad.looks(results)[kind], [(run.steps / 1e3, run.returns) for run in runs]
        sad.draw_curves(left, curves, sad.mean_curve(curves), look, kind, len(runs))
        if not (runs := clocked.get((env, kind))):
            continue
        curves = [(run.seconds / 3600, run.returns) for run in runs]
        hours = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        average = hours, np.mean([np.interp(hours, x, y) for x, y in curves], axis=0)
        sad.draw_curves(right, curves, average, look, kind, len(runs))
    for env, row in zip(envs, axes.T, strict=True):
        for axis, label in zip(row, ("environment steps (thousands)", "hours of training"), strict=True):
            sad.dress(axis, xlabel=label, ylabel="evaluation return (thick: mean)", title=env)
    sad.save(figure, path)


# ---------------------------------------------------------------- the whole


def plan_sweep(tasks: list[Task], out: Path) -> None:
    """Add the runs to `sweep.json` and `commands.txt`. Raises UsageError."""
    plan, lines = read_plan(out), []
    with contextlib.suppress(FileNotFoundError):
        lines = (out / "commands.txt").read_text(errors="replace").splitlines()
    for task in tasks:
        there = [path for path in (task.folder, task.results) if path.exists()]
        before = plan.get(task.name, task)
        if before.flags != task.flags:
            if there:
                which = f"{task.name} was started with other flags ({shlex.join(before.flags) or 'none'})"
                raise UsageError(f"--out {out}: {which}; give those, or a new --out")
            lines, before = [line for line in lines if line != before.line], task
        if there and task.name not in plan and task.line not in lines:  # perhaps with other flags
            raise UsageError(f"{there[0]} is of another sweep; move it away, or give --out another name")
        lines.append(task.line)
        plan[task.name] = max(before, task, key=lambda each: each.total_timesteps)
    entries = {name: astuple(task)[:6] for name, task in plan.items()}
    (out / "sweep.incomplete").write_text(json.dumps(entries, indent=1))
    os.replace(out / "sweep.incomplete", out / "sweep.json")
    (out / "commands.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")


def sweep(args: Args) -> int:
    """Returns the exit code. Raises UsageError, Failed."""
    if args.report is not None:
        print(report(Path(args.report)))
        return 0
    tasks, out = tasks_of(args), Path(args.out)
    if args.task is not None:
        if not 0 <= args.task < len(tasks):
            raise UsageError(f"--task {args.task}: give a number from 0 to {len(tasks) - 1}")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # Slurm's: the run writes a checkpoint
        run_task(tasks[args.task])
        return 0
    if args.list:
        for task in tasks:
            print(f"{task.name:50} {state_of(task)}")
        return 0
    if args.dry_run:
        for task in tasks:
            try:
                print(shlex.join(task.command() or ["#", task.name, "is finished"]))
            except UsageError as error:
                print("#", error)
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "sweep.lock", timeout=0).acquire()
        plan_sweep(tasks, out)
        script = write_slurm(len(tasks), out) if args.slurm else None
    except Timeout as error:
        raise UsageError(f"--out {out}: another sweep is at work there; wait for it, or give another --out") from error
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror}") from error
    with lock:
        if script:
            print(shlex.join(["sbatch", str(script)]))
            return 0
        print(f"{len(tasks)} runs; each can be repeated by its line in {out / 'commands.txt'}", flush=True)
        began = time.time()
        failed = run_on_ray(tasks, args)
    print(f"{(time.time() - began) / 3600:.2f} h; python sweep.py --report {shlex.quote(str(out))}")
    return 1 if failed else 0


def main() -> int:
    """Exit code: 0 done, 1 a run failed, 2 bad input, 130 or 143 interrupted: started again, it goes on."""
    args = tyro.cli(Args, description=__doc__)
    try:
        return sweep(args)
    except (UsageError, Failed, OSError) as error:  # OSError: a disk that is full, say
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
