"""Sweeps of small real runs: which are started, resumed, skipped or tried again, and the report's statistics."""

import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

import rnm_td3_continuous as rnm
import sad_analysis as sad
import sweep

SCRIPT = Path(sweep.__file__)
TINY = (
    "--learning-starts 50 --batch-size 8 --hidden-sizes 8 --eval-interval 50 --eval-episodes 1 --checkpoint-interval 40"
)
SWEEP = ["--env-ids", "InvertedPendulum-v5", "--patterns", "dense", "2:4", "--seeds", "1-2", "--out", "out"]


def run(*arguments, check=True, **variables):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def tasks(total=200, flags=TINY, **changes):
    settings = {"env_ids": ("InvertedPendulum-v5",), "patterns": ("dense", "2:4"), "seeds": ("1-2",), "out": "out"}
    return sweep.tasks_of(sweep.Args(**{**settings, **changes}, total_timesteps=total, flags=flags))


def test_tasks_and_commands():
    found = tasks(env_ids=("A-v1", "ns/B-v0"), patterns=("dense", "1:8"), seeds=("3", "1-2", "3"))
    assert [task.name for task in found[:4]] == [
        "A-v1__dense__3",
        "A-v1__1_8__3",
        "ns_B-v0__dense__3",
        "ns_B-v0__1_8__3",
    ]
    assert len(found) == 12 and [task.seed for task in found[::4]] == [3, 1, 2]
    again = tasks(env_ids=("A-v1", "ns/B-v0", "A-v1"), patterns=("dense", "1:8", "01:8"), seeds=("3", "1-2", "2"))
    assert again == found  # what is asked for twice is there once
    words = found[1].fresh_command()
    assert words[1].endswith("rnm_td3_continuous.py") and found[0].fresh_command()[1].endswith("/td3_continuous.py")
    assert shlex.join(words[2:12]) == "--env-id A-v1 --seed 3 --total-timesteps 200 --exp-name out__1_8 --n 1"
    assert words[-2:] == ["--checkpoint-interval", "40"]


@pytest.mark.parametrize(
    "flags, message",
    {
        "--seeds 3-1": "--seeds 3-1: give numbers, or ranges such as 1-5",
        "--seeds x": "--seeds x: give numbers",
        "--patterns 4:2": "--patterns 4:2: give `dense` or N:M",
        "--patterns sparse": "--patterns sparse: give `dense`",
        "--total-timesteps 0": "--total-timesteps has to be 1 or more",
        "--retries -1": "--total-timesteps has to be 1 or more, --retries 0 or more",
        "--gpus -1": "--gpus -1: give a whole number, or a share such as 0.25",
        "--gpus 1.5": "--gpus 1.5: give a whole number",
        "--gpus 0.00001": "--gpus 1e-05: give a whole number",
        "--flags='": "--flags, --sparse-flags or --variants: No closing quotation",
        "--flags=--gama=1": "--flags: --gama is a flag of neither script",
        "--variants fast": "--flags, --sparse-flags or --variants: give `base`, or NAME=FLAGS, each name once",
        "--variants base=--tau=1": "--flags, --sparse-flags or --variants: give `base`, or NAME=FLAGS, each name once",
        "--variants 1=--tau=1": "--flags, --sparse-flags or --variants: give `base`, or NAME=FLAGS, each name once and",
        "--variants a=--tau=1 a=--tau=2": "--flags, --sparse-flags or --variants: give `base`, or NAME=FLAGS, each",
        "--variants a=--seed=1": "--flags: --seed is not for all runs",
        "--variants a_b=--tau=1": "--flags, --sparse-flags or --variants: give `base`, or NAME=FLAGS, each name once",
        "--patterns dense --sparse-flags=--n=1": "--flags: --n is not for all runs",
        "--patterns dense --flags=--init=linear": "no runs are left",
        "--env-ids a/b a_b": "--env-ids: a_b and a/b would have the same names",
        "--flags=--seed=3": "--flags: --seed is not for all runs",
        "--flags=--eval-interval=0": "--flags: --eval-interval 0 is not for all runs",
        "--task 99": "--task 99: give a number from 0 to",
        "--report nowhere": "--report nowhere: no finished runs there",
        "--out file/x": "--out file/x: cannot be written: Not a directory",
    }.items(),
)
def test_bad_input_gets_one_line_and_exit_code_2(flags, message, monkeypatch, capsys):
    Path("file").write_text("")
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags.split()])
    assert sweep.main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("left out: dense of base")]
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")


def test_a_task_is_started_resumed_extended_and_skipped(monkeypatch):
    task = tasks()[1]
    assert sweep.state_of(task) == "waiting" and "--resume" not in task.command()
    command = [word if word != "200" else "100000" for word in task.fresh_command()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while sweep.steps_done(task) < 60:
        assert process.poll() is None
        time.sleep(0.05)
    assert sweep.state_of(task).startswith("running, step ")
    process.kill()
    process.wait()
    task = tasks(total=sweep.steps_done(task) + 200)[1]
    assert sweep.state_of(task).startswith("interrupted, goes on from step ")
    assert task.command()[2] == "--resume"
    assert sweep.run_task(task) == task.name == "InvertedPendulum-v5__2_4__1"
    assert sweep.state_of(task) == "finished" and task.command() is None
    assert len(list(Path("runs").iterdir())) == 1 and "resumed at step" in task.log.read_text()
    before = task.log.read_text()
    sweep.run_task(task)
    assert task.log.read_text() == before
    copied = task.out / "runs" / task.name
    assert (copied / "evaluations.csv").read_bytes() == (task.folder / "evaluations.csv").read_bytes()
    assert json.loads((copied / "config.json").read_text())["seed"] == 1
    shutil.move("runs", "elsewhere")  # what is copied is enough to be finished, not to go on
    assert sweep.state_of(task) == "finished" and task.command() is None and sweep.run_task(task)
    longer = tasks(total=task.total_timesteps + 100)[1]
    needed = f"{task.name} is at step {task.total_timesteps}, and its run folder is needed to go on: bring it back to"
    assert sweep.state_of(longer).startswith(needed)
    with pytest.raises(sweep.UsageError, match=needed):
        sweep.run_task(longer)
    shutil.move("elsewhere", "runs")
    longer = tasks(total=task.total_timesteps + 100)[1]
    assert longer.command()[2] == "--resume" and sweep.run_task(longer) and sweep.state_of(longer) == "finished"


def test_a_failed_task_says_why():
    task = tasks(flags=TINY + " --gamma 7")[0]
    with pytest.raises(sweep.UsageError, match=r"exit code 2: error: --gamma is 7\.0; give a number from 0 to 1"):
        sweep.run_task(task)
    assert sweep.state_of(task) == "failed with exit code 2: error: --gamma is 7.0; give a number from 0 to 1"
    task = tasks(flags=TINY + " --policy-frequency much")[1]
    with pytest.raises(sweep.UsageError, match=r"exit code 2: .*\w"):  # tyro draws a box
        sweep.run_task(task)
    task = tasks(flags=TINY, env_ids=("environments:Faulty-v0",))[1]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(sweep.Failed, match="exit code 1: error: step 70: "):
        patch.setenv("FAULT", "raises at 70")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        sweep.run_task(task)


def test_a_full_disk_is_named_and_the_run_goes_on_later():
    task = tasks(total=100)[1]
    task.log.parent.mkdir(parents=True)
    task.log.symlink_to("/dev/full")
    with pytest.raises(sweep.Failed, match="No space left on device"):
        sweep.run_task(task)
    task.log.unlink()
    assert sweep.run_task(task) and sweep.state_of(task) == "finished"


def test_what_has_ended_counts_first_and_failures_are_tried_again(monkeypatch, capsys):
    """On something that looks like Ray with one core: what waits is done in the order in which it was handed over."""
    plan, order, lines = tasks(), [], []
    monkeypatch.setattr(sweep.Task, "finished", lambda task: task in plan[2:])
    problems = {plan[0].name: [("torn", True), ("", False)], plan[1].name: [("exit code 2", False)]}

    def remote(task):
        order.append(task.name)
        return f"{task.name} {len(order)}"

    def get(reference):
        lines.append(reference.split()[0])
        return problems.get(lines[-1], [("", False)]).pop(0)

    ray = SimpleNamespace(init=lambda *_, **__: None, shutdown=lambda: None, cluster_resources=dict, get=get)
    ray.remote = lambda **_: lambda function: SimpleNamespace(remote=remote)
    ray.wait = lambda waiting, timeout: (waiting[:1], waiting[1:])
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # this process goes on after it
    assert sweep.run_on_ray(plan, sweep.Args(retries=1)) == 1
    names = [task.name for task in plan]
    assert order == lines == [*names[2:], *names[:2], names[0]]
    out = capsys.readouterr().out
    assert f"{names[0]} failed: torn; it is tried again" in out and f"{names[1]} failed: exit code 2\n" in out
    assert out.splitlines()[-1].startswith("3 of 4 done, 0 running, 1 failed")


def test_variants_are_crossed_with_the_rest(capsys):
    found = tasks(variants=("base", "fast=--learning-rate 9e-4", "letter=--init linear --tau=0.1"), seeds=("1", "2"))
    assert [task.name.removeprefix("InvertedPendulum-v5__") for task in found[:5]] == [
        *("dense__1", "2_4__1", "dense__fast__1", "2_4__fast__1", "2_4__letter__1")
    ]
    assert len(found) == 10 and found[4].flags[-3:] == ["--init", "linear", "--tau=0.1"]
    assert "--exp-name out__2_4__letter" in shlex.join(found[4].fresh_command())
    assert "--exp-name out__2_4 " in shlex.join(found[1].fresh_command())  # as without variants
    assert capsys.readouterr().err == "left out: dense of letter: td3_continuous.py has no --init\n"


def test_a_task_is_not_done_twice_at_once(monkeypatch):
    task = tasks()[0]
    task.log.parent.mkdir(parents=True)
    with sweep.FileLock(task.log.with_suffix(".lock")), pytest.raises(sweep.Failed, match="another process is at"):
        sweep.run_task(task)
    assert not Path("runs").exists()


def test_cores_that_are_taken_away_are_not_used(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for cores, expected in (({1, 5}, 2), (set(range(8)), None)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert sweep.usable_cores() == expected


def test_a_later_call_adds_to_the_sweep_and_cannot_change_its_flags(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sweep, "run_on_ray", lambda tasks, args: calls.append(len(tasks)) or 0)
    first = ["sweep.py", "--env-ids", "A-v1", "--patterns", "dense", "2:4", "--out", "out", "--seeds"]
    for flags in ("1-2", "2-3 --env-ids B-v0 A-v1", "9 --sparse-flags=--mask-update-interval=9"):
        monkeypatch.setattr(sys, "argv", [*first, *flags.split()])
        assert sweep.main() == 0
    plan = sweep.read_plan(Path("out"))
    assert calls == [4, 8, 2] and len(plan) == 4 + 6 + 2
    assert plan["A-v1__2_4__9"].flags == ["--mask-update-interval=9"] and plan["A-v1__dense__9"].flags == []
    assert len(Path("out/commands.txt").read_text().splitlines()) == 12
    other = ["sweep.py", "--env-ids", "A-v1", "--patterns", "dense", "--out", "out", "--flags=--gamma 0.5", "--seeds"]
    monkeypatch.setattr(sys, "argv", [*other, "9"])
    assert sweep.main() == 0  # it has not begun
    assert sweep.read_plan(Path("out"))["A-v1__dense__9"].flags == ["--gamma", "0.5"]
    lines = Path("out/commands.txt").read_text().splitlines()
    assert len(lines) == 12 and sum("--gamma 0.5" in line for line in lines) == 1
    plan = sweep.read_plan(Path("out"))
    Path("runs/A-v1__out__dense__1__1").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [*other, "1"])
    assert sweep.main() == 2
    assert "A-v1__dense__1 was started with other flags (none); give those, or a new --out" in capsys.readouterr().err
    assert sweep.read_plan(Path("out")) == plan
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--env-ids", "A-v1", "--seeds", "1", "--out", "out"])
    Path("out/sweep.json").unlink()
    assert sweep.main() == 0  # its command is there
    Path("out/sweep.json").unlink()
    Path("out/commands.txt").unlink()
    assert sweep.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("A-v1__out__dense__1__1 is of another sweep; move it away, or give --out another name")
    shutil.move("runs/A-v1__out__dense__1__1", Path("out/runs").resolve() / "A-v1__2_4__1")
    assert sweep.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("out/runs/A-v1__2_4__1 is of another sweep; move it away, or give --out another name")


def test_runs_of_different_lengths_are_not_compared(monkeypatch):
    monkeypatch.setattr(sweep, "run_on_ray", lambda tasks, args: 0)
    for steps, seeds in ((100, "1-2"), (50, "2-3"), (200, "4")):
        flags = ["--env-ids", "A", "--patterns", "dense", "--seeds", seeds, "--total-timesteps", str(steps)]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *flags, "--out", "out"])
        assert sweep.main() == 0
    assert [task.total_timesteps for task in sweep.read_plan(Path("out")).values()] == [100, 100, 50, 200]
    made_up("out", {("A", "dense"): [1.0, 2.0, 3.0], ("B", "dense"): [5.0]})
    plan = json.loads(Path("out/sweep.json").read_text())
    plan["A__dense__1"][3] = 101
    Path("out/sweep.json").write_text(json.dumps(plan))
    results, missing = sweep.read_results(sweep.read_plan(Path("out")))
    assert [key[0] for key in results] == ["B"]
    assert missing == [f"A__dense__{seed}: at step 100 of 101" for seed in range(3)]
    plan["A__dense__1"][3], plan["B__dense__0"][3] = 100, 99  # was made longer by hand
    Path("out/sweep.json").write_text(json.dumps(plan))
    results, missing = sweep.read_results(sweep.read_plan(Path("out")))
    assert [key[0] for key in results] == ["A"] and missing == ["B__dense__0: at step 100 of 99"]


def test_seeds_of_one_kind_have_the_same_flags():
    made_up("out", {("A", "1:4"): [1.0, 2.0, 3.0], ("B", "1:4"): [5.0]})
    for changes, reason in (({"cpu": "another", "seed": 9}, None), ({"mask_update_interval": 9}, "9, 10"), ({}, None)):
        path = Path("out/runs/A__1_4__1/config.json")
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        results, missing = sweep.read_results(sweep.read_plan(Path("out")))
        assert len(results["A", "1:4"]) == (2 if reason else 3)
        named = [f"A__1_4__1: mask_update_interval is {reason} in A__1_4__0"] if reason else []
        assert missing == named
        path.write_text(before)


def test_a_run_has_not_ended_before_its_model_is_there():
    """As after a full disk, or a kill between the last evaluation and the model."""
    task = tasks(flags=f"{TINY} --save-model")[0]
    sweep.run_task(task)
    assert sweep.state_of(task) == "finished"
    shutil.rmtree(task.results)
    model = task.folder / "model.pt"
    old = model.stat().st_mtime - 100
    os.utime(model, (old, old))  # left by an interruption before the end
    assert sweep.state_of(task) == "interrupted, goes on from step 200"
    model.unlink()
    with pytest.raises(sweep.Failed, match="or its model, is missing below"):
        sweep.copy_results(task)
    sweep.run_task(task)
    assert model.exists() and sweep.state_of(task) == "finished" and task.results.exists()
    shutil.rmtree(task.results)
    model.unlink()
    assert sweep.state_of(dataclasses.replace(task, flags=[*task.flags, "--no-save-model"])) == "finished"


@pytest.mark.slow
def test_an_environment_of_a_module_is_resumed():
    task = tasks(env_ids=("environments:Scripted-v0",), patterns=("2:4",), seeds=("1",), total=100)[0]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    try:
        sweep.run_task(task)
        sweep.run_task(tasks(env_ids=(task.env_id,), patterns=("2:4",), seeds=("1",), total=150)[0])
    finally:
        del os.environ["PYTHONPATH"]
    assert "resumed at step 100" in task.log.read_text()


def test_a_run_ends_with_the_worker_that_started_it():
    """With a checkpoint, since SIGTERM asks for one."""
    code = f"import sweep; sweep.run_task(sweep.tasks_of(sweep.Args(flags={TINY!r}, out='out', patterns=('2:4',),"
    code += " env_ids=('InvertedPendulum-v5',)))[0])"
    worker = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    task = tasks(total=10**6, patterns=("2:4",))[0]
    while sweep.steps_done(task) < 60:
        assert worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    deadline = time.time() + 20
    while not sweep.state_of(task).startswith("interrupted"):
        assert time.time() < deadline
        time.sleep(0.1)
    assert sweep.last_line(task.log).startswith("interrupted at step ")


def test_a_task_that_slurm_ends_writes_its_checkpoint_first():
    arguments = [*SWEEP, "--total-timesteps", 10**6, f"--flags={TINY} --checkpoint-interval 1000000", "--task", 0]
    worker = subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)])
    task = tasks(total=10**6, flags=f"{TINY} --checkpoint-interval 1000000")[0]
    while sweep.steps_done(task) < 60:
        assert worker.poll() is None
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 143 and sweep.checkpoint(task.folder) >= 60


def test_dry_run_and_list_do_nothing():
    printed = run(*SWEEP, "--total-timesteps", 200, f"--flags={TINY}", "--dry-run").stdout.splitlines()
    assert len(printed) == 4 and all("--exp-name out__" in line for line in printed)
    listed = run(*SWEEP, "--list").stdout.splitlines()
    assert len(listed) == 4 and all(line.endswith(" waiting") for line in listed)
    assert not list(Path(".").iterdir())


def test_slurm_script_runs_its_tasks():
    arguments = [*SWEEP, "--seeds", 1, "--total-timesteps", 200, f"--flags={TINY}"]
    assert run(*arguments, "--slurm").stdout == "sbatch out/slurm.sh\n"
    assert "#SBATCH --array=0-1\n" in Path("out/slurm.sh").read_text()
    for i in range(2):
        subprocess.run(["bash", "out/slurm.sh"], check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(i)})
    shutil.rmtree("runs")  # on another machine, say
    assert {sweep.state_of(task) for task in tasks(seeds=("1",))} == {"finished"}
    assert "| 2:4 | 1 |" in sweep.report(Path("out"))
    for name in ("curves", "returns"):
        assert (Path("out") / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "50%j$HOME", "$(touch x)`id`", "new\nline", "ä;#!*"])
def test_slurm_script_quotes_what_the_user_named(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / name
    flags = [
        "--env-ids",
        "InvertedPendulum-v5",
        "--patterns",
        "2:4",
        "--seeds",
        "1",
        f"--out={out}",
        "--flags=--tau .1",
    ]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flags, "--slurm"])
    assert sweep.main() == 0 and capsys.readouterr().out == shlex.join(["sbatch", f"{out}/slurm.sh"]) + "\n"
    script = (out / "slurm.sh").read_text()
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == 7 and not any(character in "".join(directives) for character in "%$\"'`")
    fake = Path("print_arguments")  # in place of Python
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    fake.chmod(0o755)
    Path("slurm.sh").write_text(script.replace(sys.executable, str(fake.resolve())))
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash", "slurm.sh"], check=True, env=environment)
    words = (out / "slurm-0.log").read_text().split("\0")
    assert words[1:] == [*flags, "--task", "0", ""]
    assert not Path("x").exists()


def test_two_sweeps_into_one_folder_are_refused(monkeypatch, capsys):
    Path("out").mkdir()
    with sweep.FileLock("out/sweep.lock"):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, SWEEP), "--slurm"])
        assert sweep.main() == 2
    assert capsys.readouterr().err.startswith("error: --out out: another sweep is at work there; wait for it, or")
    assert not Path("out/sweep.json").exists()


def made_up(out, values, seconds=None, **more):
    """Results as they are copied. values: (env, pattern) to final returns by seed; seconds: each run's, by pattern."""
    more = {"obs_dim": 3, "action_dim": 1, "hidden_sizes": [8], **more}
    plan = {}
    for (env, pattern), returns in values.items():
        pattern, _, variant = pattern.partition(", ")
        for seed, value in enumerate(returns):
            config = {"env_id": env, "seed": seed, "total_timesteps": 100, **more}
            if pattern != "dense":
                config |= dict(zip("nm", map(int, pattern.split(":")), strict=True)) | {"mask_update_interval": 10}
            flags = ["--tau", variant] if variant else []
            task = sweep.Task(env, pattern, seed, 100, flags, variant or "base", out=Path(out))
            plan[task.name] = [env, pattern, seed, 100, flags, variant or "base"]
            if value is None:
                continue
            task.results.mkdir(parents=True)
            (task.results / "config.json").write_text(json.dumps(config))
            whole = value if np.ndim(value) else [value] * 20
            with open(task.results / "evaluations.csv", "w") as file:
                times = np.linspace(0.05, 1, 20) * (seconds[pattern] if seconds else 50)
                rows = [(5 * i + 5, whole[i], 0, times[i]) for i in range(20)]
                csv.writer(file).writerows([["step", "mean", "std", "seconds"], *rows])
    Path(out).mkdir(exist_ok=True)
    Path(out, "sweep.json").write_text(json.dumps(plan))


def column(text, env, kind, heading):
    """A cell of the tables of an environment."""
    for block in text.split(f"## {env}\n")[1].split("\n## ")[0].split("\n\n"):
        lines = [line.split(" | ") for line in block.strip().splitlines()]
        for line in lines[1:]:
            if line[0] == f"| {kind}" and heading in [name.strip(" |") for name in lines[0]]:
                return line[[name.strip(" |") for name in lines[0]].index(heading)].strip(" |")


def test_report_says_what_an_hour_buys(monkeypatch):
    """And takes no untrained policy for a success, as one of an Ant that stands would be."""
    monkeypatch.setattr(sweep, "LAST", 2)
    monkeypatch.setattr(sweep.sad, "LAST", 2)
    rise = np.linspace(50, 1000, 20)  # by 50 an evaluation
    values = {("A", "dense"): [rise, rise], ("A", "1:4"): [rise / 2, rise * 1.1], ("A", "1:8"): [rise / 4, rise / 4]}
    values = {key: [np.r_[9999, 9999, run[2:]] for run in runs] for key, runs in values.items()}  # untrained
    values |= {("B", kind): [-rise, -rise] for kind in ("dense", "1:8")}
    made_up("out", values, {"dense": 7200, "1:4": 3600, "1:8": 1800}, learning_starts=10)
    text = sweep.report(Path("out"))
    assert column(text, "B", "1:8", "return by 0.50 h").startswith("-975 [")
    assert not column(text, "B", "1:8", "to dense then") and not column(text, "B", "1:8", "hours to 50 %")
    assert column(text, "A", "dense", "hours") == "2.00" and column(text, "A", "1:4", "steps/s") == "0"
    assert column(text, "A", "dense", "return by 0.50 h").startswith("225 [")  # a quarter of its time
    assert column(text, "A", "1:4", "return by 0.50 h") == "380 [237.5, 522.5]"
    assert column(text, "A", "1:4", "to dense then") == "1.69 [1.06, 2.32]"
    assert column(text, "A", "1:8", "return by 0.50 h").startswith("243.8 [")
    assert column(text, "A", "dense", "hours to 50 %") == "1.10 [1.10, 1.10], 2 of 2"
    assert column(text, "A", "1:4", "hours to 50 %") == "0.75 [0.50, 1.00], 2 of 2"
    assert column(text, "A", "1:4", "hours to 90 %") == "never [0.85, never], 1 of 2"
    assert column(text, "A", "1:8", "hours to 50 %") == "never [never, never], 0 of 2"
    rows = list(csv.DictReader(Path("out/summary.csv").read_text().splitlines()))
    (row,) = (row for row in rows if (row["kind"], row["figure"]) == ("1:4", "hours_to_90"))
    assert list(row.values()) == ["A", "1:4", "hours_to_90", "never", "0.85", "never"]
    (row,) = (row for row in rows if (row["kind"], row["figure"]) == ("1:4", "early"))
    assert [row["value"], row["low"], row["high"]] == ["380", "237.5", "522.5"]
    made_up(
        "short", {("A", kind): [rise] for kind in ("dense", "1:8")}, {"dense": 7200, "1:8": 300}, learning_starts=10
    )
    text = sweep.report(Path("short"))  # dense had not begun to learn
    assert column(text, "A", "1:8", "return by 0.08 h") == "975" and not column(text, "A", "1:8", "to dense then")
    assert column(text, "A", "dense", "return by 0.08 h") == "" and "nan" not in text


def test_times_are_those_of_one_processor(monkeypatch):
    """Of each environment, that with most dense runs, then of most kinds; returns are those of all."""
    monkeypatch.setattr(sweep, "LAST", 2)
    monkeypatch.setattr(sad, "LAST", 2)
    rise, figures, kinds = np.linspace(50, 1000, 20), [], ("dense", "1:4", "1:8")
    values = {("A", kind): [rise] * 3 for kind in kinds} | {("A", "dense"): [rise, rise, 1.3 * rise]}
    made_up("out", values, {"dense": 7200, "1:4": 14400, "1:8": 60})

    def move(names, cpu, factor):
        for run in (Path("out/runs", name) for name in names):
            config = json.loads((run / "config.json").read_text())
            (run / "config.json").write_text(json.dumps(config | {"cpu": cpu}))
            header, *rows = csv.reader((run / "evaluations.csv").read_text().splitlines())
            rows = [[*row, float(seconds) * factor] for *row, seconds in rows]
            with open(run / "evaluations.csv", "w") as file:
                csv.writer(file).writerows([header, *rows])

    def cells(fast):
        text, headings = sweep.report(Path("out")), ("seeds", "timed seeds", "hours", "hours to 50 %")
        assert ("Times: of the runs on one processor alone (fast); those on others do not" in text) == fast
        assert column(text, "A", "dense", "mean +- std").startswith("1072 +- ")  # of all three
        return [[column(text, "A", kind, heading) for heading in headings] for kind in kinds]

    monkeypatch.setattr(sad, "save", lambda figure, path: figures.append(figure))
    move(["A__dense__2", "A__1_4__0", "A__1_8__0"], "fast", 0.1)  # of more kinds than those without a name
    move(["A__1_8__1", "A__1_8__2"], "slow", 100)
    assert [row[:3] for row in cells(fast=False)] == [["3", "2", "2.00"], ["3", "2", "4.00"], ["3", "0", ""]]
    figures.clear()
    move(["A__dense__1"], "other", 1)  # as many dense runs as those without a name, of more kinds
    rows = [["3", "1", "0.20", "0.09, 1 of 1"], ["3", "1", "0.40", "0.24, 1 of 1"], ["3", "1", "0.00", "0.00, 1 of 1"]]
    assert cells(fast=True) == rows
    assert max(line.get_xdata()[-1] for line in figures[0].axes[1].lines) == pytest.approx(0.4)
    move(["A__1_8__0"], "slow", 1)  # as many kinds as those without a name, which come first
    assert [row[:3] for row in cells(fast=False)] == [["3", "1", "2.00"], ["3", "2", "4.00"], ["3", "0", ""]]
    move(["A__1_4__1", "A__1_4__2"], "slow", 1)  # as many kinds as the fast one, but no dense one
    assert [row[:3] for row in cells(fast=True)] == [["3", "1", "0.20"], ["3", "1", "0.40"], ["3", "0", ""]]
    config = Path("out/runs/A__1_4__0/config.json")  # as fast a processor, more threads: no longer of two kinds
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_threads": 2}))
    assert [row[:3] for row in cells(fast=False)] == [["3", "1", "2.00"], ["3", "0", ""], ["3", "0", ""]]


def test_report_compares_variants_with_their_dense_runs_and_the_best():
    values = {("A", "dense, .1"): [10.0, 20], ("A", "dense, .2"): [40.0, 20], ("A", "1:4, .1"): [30.0, 30]}
    made_up("out", values | {("A", "1:4, .2"): [30.0, 30], ("A", "1:8, .3"): [30.0, 30]})
    text = sweep.report(Path("out"))
    assert column(text, "A", "1:4, .1", "ratio to dense").startswith("2.00 [")
    assert column(text, "A", "1:4, .2", "ratio to dense").startswith("1.00 [")
    assert column(text, "A", "1:4, .1", "ratio to the best dense").startswith("1.00 [")
    assert column(text, "A", "1:8, .3", "ratio to dense") == ""
    plan = json.loads(Path("out/sweep.json").read_text())
    for name in plan:  # the same but for flags that dense has not: compared with those
        if "1_8" in name:
            plan[name][4] = ["--dense-layers", "last", "--tau", ".1", "--init=linear"]
    Path("out/sweep.json").write_text(json.dumps(plan))
    assert column(sweep.report(Path("out")), "A", "1:8, .3", "ratio to dense").startswith("2.00 [")
    made_up("one", {("A", "dense"): [10.0, 20], ("A", "1:4"): [30.0, 30], ("A", "1:4, .3"): [45.0, 45]})
    text = sweep.report(Path("one"))  # whose flags no dense runs have: compared with the only ones
    assert column(text, "A", "1:4, .3", "ratio to dense") == ""
    assert column(text, "A", "1:4, .3", "ratio to the best dense").startswith("3.00 [")


def test_the_best_dense_runs_are_those_of_each_environment():
    values = {("A", "dense, .1"): [10.0, 20], ("A", "dense, .2"): [40.0, 20], ("A", "1:4, .1"): [30.0, 30]}
    made_up("out", values | {("B", kind): [2 * x for x in many] for (_, kind), many in values.items()})
    text = sweep.report(Path("out"))
    for word, ratio in (("dense", "2.00"), ("the best dense", "1.00")):
        block = text.split(f"## A, B: ratio to the mean of {word}\n")[1].split("\n## ")[0]
        assert f"| 1:4, .1 | 4 | {ratio} [" in block and "Left out" not in block
    made_up("few", values | {("B", kind): [2.0, 3] for kind in ("dense, .1", "dense, .2")})
    assert sweep.report(Path("few")).count("Left out, not in all of these environments: 1:4, .1.\n") == 2


def test_curves_go_over_steps_and_hours(monkeypatch):
    rise, figures = np.linspace(50, 1000, 20), []
    made_up("out", {("A", "dense"): [rise, 3 * rise]}, {"dense": 7200})
    monkeypatch.setattr(sad, "save", lambda figure, path: figures.append(figure))
    sweep.plot_curves(sweep.read_results(sweep.read_plan(Path("out")))[0], ["A"], Path("curves.png"))
    for axis, end in zip(figures[0].axes, (0.1, 2), strict=True):  # a million steps, hours
        ((x, y),) = (line.get_data() for line in axis.lines if line.get_linewidth() == 2)
        assert (x[-1], y[0], y[-1]) == pytest.approx((end, 100, 2000))


def test_of_many_curves_the_color_tells_the_pattern_and_no_two_are_alike():
    kinds = [f"{pattern}{variant}" for variant in ("", ", a", ", b") for pattern in ("dense", "2:4", "1:4")]
    looks = sad.looks({("A", kind): [] for kind in kinds})
    for kind, look in looks.items():
        alike = {other for other, found in looks.items() if found["color"] == look["color"]}
        assert alike == {other for other in kinds if other.split(", ")[0] == kind.split(", ")[0]}
    assert len({str(look) for look in looks.values()}) == len(kinds)
    one_pattern = sad.looks({("A", f"2:4, K = {k}"): [] for k in range(20)})  # a color for each, as far as they go
    assert (
        len({look["color"] for look in one_pattern.values()}) == 7 and len({str(x) for x in one_pattern.values()}) == 20
    )


@pytest.mark.parametrize("number", [20, 40])
def test_a_long_legend_hides_no_curve_and_lies_in_the_figure(number):
    figure, axes = sad.panels(2, 2, 6, 4.2)
    for axis in axes.flat:
        for i in range(number):
            axis.plot([0, 1], [i, i], label=f"1:8, critics14 (3 seeds), {i}")
        sad.dress(axis)
    figure.canvas.draw()
    panels = [axis.bbox for axis in axes.flat]
    for axis in axes.flat:
        legend = axis.get_legend().get_window_extent()
        assert all(figure.bbox.contains(*corner) for corner in (legend.min, legend.max))
        assert not legend.count_overlaps(panels) and axis.bbox.width > figure.bbox.width / 8
        assert axis.bbox.height > figure.bbox.height / 3
    sad.plt.close(figure)


def test_of_several_run_folders_the_one_that_has_gone_furthest_counts():
    task, name = tasks()[1], "InvertedPendulum-v5__out__2_4__1__"
    for started, step in ((1, 120), (2, 40), (3, None)):
        (folder := Path("runs", f"{name}{started}", "checkpoints")).mkdir(parents=True)
        if step:
            (folder / f"{step:09d}.pt").touch()
    assert task.folder.name == f"{name}1" and task.command()[3] == f"runs/{name}1"
    Path("runs", f"{name}2", "evaluations.csv").write_text("step,mean,std\n200,1,0\n")
    assert task.folder.name == f"{name}2" and task.command() is None


def test_a_run_whose_process_still_writes_its_checkpoint_is_waited_for(monkeypatch):
    task, states = tasks()[1], []
    (folder := Path("runs/InvertedPendulum-v5__out__2_4__1__1")).mkdir(parents=True)
    (lock := sweep.FileLock(folder / "lock", thread_local=False)).acquire()
    threading.Timer(0.5, lock.release).start()
    monkeypatch.setattr(sweep, "run_command", lambda *_: states.append(lock.is_locked))
    monkeypatch.setattr(sweep, "copy_results", lambda _: None)
    sweep.run_task(task)
    assert states == [False]


@pytest.mark.parametrize(
    "changes",
    [{"n": 2}, {"n": 4}, {"n": 1, "m": 8, "dense_layers": "last"}, {"critic_m": 3}, {"dense_layers": "first,last"}, {}],
)
def test_weights_are_those_of_the_networks(changes):
    args = rnm.Args(n=changes.get("n", 1), m=4, hidden_sizes=(10, 21))
    args = dataclasses.replace(args, **changes)
    agent = rnm.TD3(5, -np.ones(3), np.ones(3), dataclasses.replace(args, backend="masked"), torch.device("cpu"))
    layers = [layer for net in agent.networks.values() for layer in net.modules() if hasattr(layer, "in_features")]
    count = lambda layer: (layer.values if hasattr(layer, "values") else layer.weight).numel()  # noqa: E731
    found = sweep.weights({**vars(args), "obs_dim": 5, "action_dim": 3})
    whole = sum(layer.in_features * layer.out_features for layer in layers)
    assert found["active"] == pytest.approx(100 * sum(map(count, layers)) / whole)
    assert found["parameters"] == sum(parameter.numel() for parameter in agent.actor.parameters())
    places = sum(layer.values.numel() for layer in agent.actor.modules() if hasattr(layer, "values"))
    assert found["bytes"] == 4 * found["parameters"] + places
    dense = sweep.weights({"hidden_sizes": (10, 21), "obs_dim": 5, "action_dim": 3})
    assert dense["active"] == 100 and dense["bytes"] == 4 * dense["parameters"] == 4 * (5 * 10 + 210 + 63 + 34)


DAMAGES = {"config.json": [b"", b"null", b"[]", b"{", b'"a"', b"\xff\xfe", b'{"env_id": 3}', b"7", b"{}"]}
DAMAGES["config.json"] += [b'{"env_id": "A", "seed": 0, "total_timesteps": 100, "obs_dim": 3}']
DAMAGES["evaluations.csv"] = [b"", b"null", b"a,b\n1,2\n", b"\xff\xfe\0", b"step,mean,std\n100,1,1\n", None]
ROWS = [b"", b"5,1,1,1\n", b"100,nan,1,1\n", b"100,1,", b"x,y,z,1\n", b"100,1,1,\n", b"100,1,1,nan\n"]
DAMAGES["evaluations.csv"] += [b"step,mean,std,seconds\n" + row for row in ROWS]


@pytest.mark.parametrize("name, content", [(name, content) for name, many in DAMAGES.items() for content in many])
def test_a_damaged_result_is_named_and_the_others_are_reported(name, content, monkeypatch, capsys):
    monkeypatch.setattr(sweep.sad, "save", lambda figure, path: sweep.sad.plt.close(figure))
    made_up("out", {("A", "dense"): [1.0, 2.0], ("A", "2:4"): [3.0]})
    damaged = Path("out/runs/A__2_4__0") / name
    damaged.write_bytes(content) if content is not None else damaged.unlink()
    text = sweep.report(Path("out"))
    assert "\n- A__2_4__0: " in text and "| dense | 2 |" in text and "| 2:4 |" not in text
    for seed in (0, 1):
        shutil.copy(damaged, f"out/runs/A__dense__{seed}/{name}") if content is not None else Path(
            f"out/runs/A__dense__{seed}/{name}"
        ).unlink()
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--report", "out"])
    assert sweep.main() == 1
    assert capsys.readouterr().err.startswith("error: --report out: no finished runs there (A__dense__0: ")


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b'{"a": 1}', b'{"a": [1, 2]}', b"\xff", b'{"a": null}', None]
)
def test_a_damaged_plan_gets_one_line(content, monkeypatch, capsys):
    made_up("out", {("A", "dense"): [1.0, 2.0]})
    path = Path("out/sweep.json")
    path.write_bytes(content) if content is not None else (path.unlink(), path.mkdir())
    for arguments in (["--report", "out"], ["--env-ids", "A", "--out", "out", "--slurm"]):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
        assert sweep.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: out/sweep.json is damaged (") and line.endswith(
            "start the sweep again: no run is lost"
        )


def test_large_returns_are_written_in_full():
    found = {"seeds": (3, None), "mean": (10185.4, None), "std": (1104.2, None), "iqm": (12345.6, (-10000.0, 99999.5))}
    assert sweep.cell(found, "mean", "") == "10185 +- 1104"
    assert sweep.cell(found, "iqm", ".4g") == "12346 [-10000, 100000]"


def test_report_states_the_statistics_of_the_field():
    dense, sparse = [10.0, 20, 30, 40, 50], [20.0, 30, 40, 50, 90]
    values = {("A", "dense"): dense, ("A", "2:4"): sparse, ("B", "dense"): [100, 200], ("B", "2:4"): [90, 120, None]}
    made_up("out", values | {("C", "dense"): [-9, -11], ("C", "2:4"): [-20, -30]})
    text = sweep.report(Path("out"))
    assert text == Path("out/report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2:4 | 5 |")).split(" | ")
    assert row[2] == f"46 +- {np.std(sparse, ddof=1):.0f}" and row[3].startswith("40 [")
    assert row[4].startswith("1.53 [") and row[6] == "2" and row[7] == "0.01 |"
    pairs = [(x > y) + (x == y) / 2 for x in sparse for y in dense]
    assert row[5].startswith(f"{np.mean(pairs):.2f} [")
    low, high = (float(bound) for bound in row[5].split("[")[1].rstrip("]").split(", "))
    assert 0 < low < np.mean(pairs) < high <= 1
    normalised = next(line for line in text.splitlines() if line.startswith("| 2:4 | 7 |"))
    ratios = [*np.array(sparse) / 30, 90 / 150, 120 / 150]
    of_environments, of_runs = (46 / 30 + 105 / 150) / 2, scipy.stats.trim_mean(ratios, 0.25)
    assert f"| {of_environments:.2f} [" in normalised and f"| {of_runs:.2f} [" in normalised
    rows = [row for row in csv.reader(Path("out/summary.csv").read_text().splitlines()) if row[:2] == ["all", "2:4"]]
    assert [row[2:4] for row in rows] == [
        ["mean_of_ratio", f"{of_environments:.6g}"], ["iqm_of_ratio", f"{of_runs:.6g}"]
    ]  # fmt: skip
    assert all(float(row[4]) < float(row[3]) < float(row[5]) for row in rows)
    assert "- B__2_4__2: not finished yet\n" in text and "A__" not in text.split("Missing:")[1]
    negative = next(line for line in text.splitlines() if line.startswith("| 2:4 | 2 | -25"))
    assert (
        "-25 [-30, -20] | 0.00 [0.00, 0.00] | " in negative
        and "Left out, without dense runs of positive return: C." in text
    )


RAY = pytest.mark.skipif(
    not any((Path(folder) / "ray" / "__init__.py").exists() for folder in sys.path), reason="Ray is not installed"
)


@pytest.mark.slow
@RAY
def test_a_sweep_on_this_machine_repeats_what_failed_and_is_idempotent(tmp_path):
    arguments = [*SWEEP, "--total-timesteps", 300, f"--flags={TINY}"]
    first = run(*arguments, RAY_ADDRESS="127.0.0.1:1")  # without --address: on this machine, whatever Ray is told
    assert "4 of 4 done, 0 running, 0 failed" in first.stdout
    logs = {path: path.read_text() for path in Path("out/logs").glob("*.log")}
    assert len(logs) == 4
    second = run(*arguments)
    assert "4 of 4 done" in second.stdout and logs == {
        path: path.read_text() for path in Path("out/logs").glob("*.log")
    }
    failing = run(*[*arguments[:-1], f"--flags={TINY} --gamma 7"], "--seeds", 5, "--retries", 1, check=False)
    assert failing.returncode == 1 and "failed: " in failing.stdout and "--gamma is 7.0" in failing.stdout
    log = Path("out/logs/InvertedPendulum-v5__dense__5.log").read_text()
    assert log.count("failed with exit code 2") == 1  # wrong flags are not tried again
    variables = {"FAULT": "raises at 70", "PYTHONPATH": str(Path(__file__).parent)}
    flags = ["--env-ids", "environments:Faulty-v0", "--patterns", "2:4", "--seeds", 6, "--retries", 1, "--out", "out"]
    failing = run(*flags, f"--flags={TINY}", check=False, **variables)
    assert failing.returncode == 1 and "Faulty-v0__2_4__6 failed: exit code 1: " in failing.stdout
    log = Path("out/logs/environments:Faulty-v0__2_4__6.log").read_text()
    assert log.count("failed with exit code 1") == 2  # tried again once
    if not torch.cuda.is_available():
        refused = run(*arguments, "--gpus", 1, check=False)
        assert refused.returncode == 2
        assert refused.stderr == "error: --gpus 1: Ray finds 0 GPUs on this machine; leave it out for CPUs\n"
    unreachable = run(*arguments, "--address", "127.0.0.1:1", check=False)
    assert unreachable.returncode == 2
    assert unreachable.stderr.splitlines()[-1].startswith("error: --address 127.0.0.1:1: Failed to connect")


@pytest.mark.slow
@RAY
@pytest.mark.parametrize("number, cores", [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_sweep_that_is_interrupted_loses_nothing(number, cores):
    """And runs no more at once than there are cores left to it."""
    usable = sorted(os.sched_getaffinity(0))[:cores]
    arguments = [*SWEEP, "--total-timesteps", 10**6, f"--flags={TINY} --checkpoint-interval 1000000"]
    command = [sys.executable, SCRIPT, *map(str, arguments)]

    def begin():
        os.sched_setaffinity(0, usable)
        if number == signal.SIGTERM:  # as where a script started it in the background
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    options = {"preexec_fn": begin}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, **options)
    plan = tasks(total=10**6, flags=f"{TINY} --checkpoint-interval 1000000")
    while sum(sweep.steps_done(task) > 200 for task in plan) < len(usable):
        assert driver.poll() is None
        time.sleep(0.1)
    done = [sweep.steps_done(task) for task in plan]
    assert sum(steps > 0 for steps in done) == len(usable)
    # Ctrl-C in a terminal goes to all processes of the driver's group; a batch system sends SIGTERM to the driver alone
    os.killpg(driver.pid, number) if number == signal.SIGINT else driver.send_signal(number)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number and "interrupted: runs write their checkpoints" in out
    for task, steps in zip(plan, done, strict=True):
        assert sweep.state_of(task).startswith("interrupted, goes on from step " if steps else "waiting")
        assert not steps or sweep.checkpoint(task.folder) >= steps


@pytest.mark.slow
@RAY
def test_runs_share_gpus_as_they_are_asked_to(monkeypatch):
    """Ray believes what it is told about GPUs: two cores and one GPU, of which each run wants the whole."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # where it is empty, Ray refuses to believe
    arguments = ["--env-ids", "InvertedPendulum-v5", "--patterns", "dense", "2:4", "--seeds", 1, "--out", "out"]
    arguments += ["--total-timesteps", 3000, f"--flags={TINY} --no-cuda"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    try:
        command = [sys.executable, SCRIPT, *map(str, arguments), "--address", cluster.address, "--gpus", "1"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        seen = []  # GPUs that the runs were given, at each look
        while driver.poll() is None:
            seen.append([])
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"--exp-name\0out__" in (process / "cmdline").read_bytes():
                        seen[-1] += re.findall(
                            rb"\0CUDA_VISIBLE_DEVICES=([^\0]*)\0", (process / "environ").read_bytes()
                        )
            time.sleep(0.1)
        assert "2 of 2 done" in driver.stdout.read()
    finally:
        cluster.shutdown()
    assert max(seen) == [b"0"] and max(map(len, seen)) == 1


@pytest.mark.slow
@RAY
def test_a_node_that_is_killed_costs_no_finished_run_and_little_of_the_others():
    """Two real nodes on loopback; the second is killed with its workers while it trains."""
    from ray.cluster_utils import Cluster

    flags = TINY.replace("--checkpoint-interval 40", "--checkpoint-interval 200")
    arguments = ["--env-ids", "InvertedPendulum-v5", "--patterns", "2:4", "--seeds", "1-4", "--out", "out"]
    arguments += ["--total-timesteps", 6000, f"--flags={flags}"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    try:
        command = [sys.executable, SCRIPT, *map(str, arguments), "--address", cluster.address]
        driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        plan = tasks(total=6000, flags=flags, patterns=("2:4",), seeds=("1-4",))
        deadline = time.time() + 120
        while sum(sweep.checkpoint(task.folder) > 1000 for task in plan) < 2:
            assert time.time() < deadline and driver.poll() is None
            time.sleep(0.1)
        before = {task.name: sweep.checkpoint(task.folder) for task in plan}
        cluster.remove_node(second, allow_graceful=False)
        out, _ = driver.communicate(timeout=400)
        assert driver.returncode == 0 and "4 of 4 done" in out, out
    finally:
        cluster.shutdown()
    assert all(sweep.state_of(task) == "finished" for task in plan)
    assert len(list(Path("runs").iterdir())) == 4  # none began anew
    resumed = [task for task in plan if "resumed at step " in task.log.read_text()]
    assert resumed
    for task in resumed:
        step = int(task.log.read_text().split("resumed at step ")[1].split()[0])
        assert step >= before[task.name]
