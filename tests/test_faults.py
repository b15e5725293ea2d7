"""What goes wrong around a run: killed processes, full disks, damaged or hostile files, failing environments."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import environments  # noqa: F401
import pytest
import safetensors.torch
import torch
from environments import Faulty
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import SCRIPTS, SMALL, assert_equal, contents

import rnm_td3_continuous as rnm
import td3_continuous as td3

ROOT = Path(__file__).parents[1]
TINY = {**SMALL, "env_id": "InvertedPendulum-v5", "hidden_sizes": (16, 16), "checkpoint_interval": 10}


def start(script, *flags, preexec_fn=None, **variables):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **variables}
    command = [sys.executable, ROOT / f"{script.__name__}.py", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=variables, preexec_fn=preexec_fn, **pipes)


def flags_of(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def folder_of(process):
    return Path(process.stdout.readline().split("run folder ")[1].split(",")[0].strip())


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def main(script, monkeypatch, capsys, *flags):
    """Exit code and errors of a call; warnings of libraries left out."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    capsys.readouterr()
    code = script.main()
    return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "note", "warn"))]


# ---------------------------------------------------------------- signals and kills


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_within_5_seconds_even_while_it_evaluates(script, number, code):
    options = {"total_timesteps": 10**6, "eval_interval": 40, "eval_episodes": 10**6, "checkpoint_interval": 10**6}
    process = start(script, *flags_of({**TINY, **options}))
    folder = folder_of(process)
    time.sleep(1)  # an evaluation of a million episodes takes longer
    started = time.time()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and time.time() - started < 5
    assert err.splitlines()[-1] == (
        f"interrupted at step 40; everything so far is in {folder}; --resume {folder} goes on from step 40"
    )
    assert [path.name for path in (folder / "checkpoints").glob("[0-9]*")] == ["000000040"]


def test_a_second_interrupt_ends_a_run_that_hangs_and_the_checkpoint_is_whole():
    process = start(rnm, *flags_of({**TINY, "env_id": "environments:Faulty-v0"}), FAULT="hangs at 35")
    folder = folder_of(process)
    wait_for((folder / "checkpoints" / "000000030").exists)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT  # a shell makes it 130
    assert rnm.Checkpoints(folder).read()[0]["step"] == 30


def test_signals_that_are_ignored_stay_so(monkeypatch):
    """As `nohup` and a shell's `&` ask for; and a thread, which cannot have handlers, can train."""
    trained = []
    thread = threading.Thread(target=lambda: trained.append(rnm.train(rnm.Args(**TINY))))
    thread.start()
    thread.join()
    assert trained[0][1].size == 60
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signals = rnm.StopSignals()
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signals.close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Killed(BaseException):
    """No handler for errors sees it, as none sees kill -9."""


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_checkpoint_that_is_cut_off_anywhere_leaves_the_one_before(script, error, monkeypatch, capsys):
    """Before and in the middle of every operation on files, one after the other."""
    changes = {"buffer_size": 15, "total_timesteps": 48}  # old parts of the buffer go, too
    whole = contents(*script.train(script.Args(**{**TINY, **changes}, exp_name="whole")))
    operations = [(script, "write_durably"), (script, "sync_folder"), (os, "rename"), (shutil, "rmtree")]
    operations += [(Path, "unlink"), (Path, "mkdir")]

    def cut_off(patch, count):
        left = [count]

        def cut(function):
            def wrapper(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    if function.__name__ == "write_durably":
                        arguments[0].write_bytes(bytes(arguments[1])[: len(arguments[1]) // 2])
                    raise error
                return function(*arguments, **options)

            return wrapper

        for owner, name in operations:
            patch.setattr(owner, name, cut(getattr(owner, name)))

    survived = 0
    for count in range(1, 40):
        name, left = f"cut-{count}", []
        write = script.Checkpoints.write

        def write_and_cut(self, step, *rest, write=write, count=count, left=left):
            with monkeypatch.context() as patch:
                if step == 40:
                    left.append(step)
                    cut_off(patch, count)
                write(self, step, *rest)

        settings = {**TINY, **changes, "exp_name": name}
        with monkeypatch.context() as patch:
            patch.setattr(script.Checkpoints, "write", write_and_cut)
            if isinstance(error, Killed):
                try:
                    script.train(script.Args(**settings))
                except Killed:
                    survived += 1
                else:
                    break  # there are no more operations than that
            else:
                capsys.readouterr()
                script.train(script.Args(**settings))  # goes on
                if (
                    "warning: no checkpoint at step 40, the one before is kept: [Errno 28]"
                    not in capsys.readouterr().err
                ):
                    break
                survived += 1
        (folder,) = Path("runs").glob(f"*__{name}__*")
        if isinstance(error, Killed):
            assert script.Checkpoints(folder).read()[0]["step"] in (30, 40)
        assert_equal(whole, contents(*script.train(script.Args(**settings, resume=str(folder)))))
        assert {path.name for path in (folder / "checkpoints").iterdir()} <= {
            *("000000030", "000000040", "000000048", "replay")
        }
    assert survived >= 10 and count < 39


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(script, monkeypatch):
    """Against loss of power, which a killed process does not show."""
    events, fsync, rename = [], os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source, target):
        events.append(("rename", os.path.realpath(source)))
        inside = [path for path in Path(source).resolve().rglob("*")]
        replay = [path for path in Path(source).resolve().parent.glob("replay/*") if path.name.startswith("000000030")]
        assert len(inside) == 3 and len(replay) == (Path(target).name == "000000040")
        for path in [*inside, *replay, Path(source).resolve(), Path(source).resolve().parent / "replay"]:
            assert ("sync", str(path)) in events, path
        for name in ("episodes.csv", "evaluations.csv"):
            assert ("sync", str(Path(source).resolve().parents[1] / name)) in events
        rename(source, target)
        events.clear()

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    _, _, folder = script.train(script.Args(**{**TINY, "total_timesteps": 40}))
    assert ("sync", str((folder / "checkpoints").resolve())) in events  # and then the name


def kill_and_resume(script, settings, kills, least_seconds):
    """Kill -9 at random moments, and resume, until it survives; returns run folder and how many fell into a write."""
    generator, folder, in_a_write = random.Random(0), None, 0
    for _ in range(kills):
        process = start(script, *(["--resume", folder] if folder else flags_of(settings)))
        folder = folder_of(process)
        wait_for((folder / "checkpoints" / "replay").exists)
        time.sleep(generator.uniform(0, least_seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        in_a_write += (folder / "checkpoints" / "incomplete").exists()
    process = start(script, "--resume", folder, "--checkpoint-interval", 10**6)
    _, err = process.communicate()
    assert process.returncode == 0 and "refused" not in err, err
    return folder, in_a_write


def outcome(script, folder):
    """`contents` of a finished run that another process made."""
    state, tensors = script.Checkpoints(folder).read()
    agent = type("Agent", (), {"state_dict": lambda self: tensors})()
    buffer = script.ReplayBuffer(state["config"]["buffer_size"], 17, 6)
    checkpoints = script.Checkpoints(folder)
    checkpoints.read()
    checkpoints.read_replay(buffer)
    return contents(agent, buffer, folder)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_20_kills_at_random_moments_change_nothing(script, capsys):
    changes = {"env_id": "HalfCheetah-v5", "total_timesteps": 4000, "learning_starts": 200, "eval_interval": 1000}
    changes |= {"eval_episodes": 1, "checkpoint_interval": 1, "hidden_sizes": (64, 64), "buffer_size": 3000}
    changes |= {"mask_update_interval": 50} if script is rnm else {}
    runs = []
    for name in ("whole", "killed"):
        settings = {**SMALL, **changes, "exp_name": name}
        if name == "whole":
            process = start(script, *flags_of({**settings, "checkpoint_interval": 10**6}))
            runs.append(folder_of(process))
            process.communicate()
            assert process.returncode == 0
        else:
            folder, in_a_write = kill_and_resume(script, settings, 20, 1.5)
            runs.append(folder)
    assert in_a_write >= 1
    with capsys.disabled():
        print(f"\n{script.__name__}: 20 kills, {in_a_write} of them in the middle of a checkpoint")
    assert_equal(*(outcome(script, folder) for folder in runs))


# ---------------------------------------------------------------- disks and folders


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_checkpoint_for_which_there_is_no_room_costs_a_line_and_no_run():
    process = start(rnm, *flags_of({**TINY, "hidden_sizes": (128, 128)}), preexec_fn=limit(400_000))
    folder = folder_of(process)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("warning: no checkpoint at step ")]
    assert process.returncode == 0 and "Traceback" not in err and len(lines) == 6
    assert lines[2].startswith("warning: no checkpoint at step 30, the one before is kept: [Errno 27] File too large")
    assert len((folder / "episodes.csv").read_text().splitlines()) > 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["replay"]
    assert not list((folder / "checkpoints" / "replay").iterdir())


@pytest.mark.parametrize(
    "file, size, changes",
    [
        ("events.out", 9_000, {"eval_interval": 1, "eval_episodes": 1}),
        ("masks", 11_000, {"hidden_sizes": (256, 256), "mask_update_interval": 1}),
    ],
)
def test_a_full_disk_stops_a_run_with_a_line_and_it_can_go_on(file, size, changes):
    """The limit holds for each file, so the one that outgrows it is known."""
    settings = {**TINY, "total_timesteps": 400, "checkpoint_interval": 100, **changes}
    _, _, whole_folder = rnm.train(rnm.Args(**settings, exp_name="whole"))
    _, _, folder = rnm.train(rnm.Args(**{**settings, "total_timesteps": 30}, exp_name="parts"))
    process = start(rnm, "--resume", folder, "--total-timesteps", "400", preexec_fn=limit(size))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("error: step ") and "File too large" in err.splitlines()[-1]
    assert f"; --resume {folder} goes on from step " in err.splitlines()[-1]
    rnm.train(rnm.Args(**settings, exp_name="parts", resume=str(folder)))
    name = "checkpoints/000000400/agent.safetensors"
    assert (folder / name).read_bytes() == (whole_folder / name).read_bytes()
    for name in ("episodes.csv", "evaluations.csv"):
        first, second = (
            [line.split(",")[:3] for line in (f / name).read_text().splitlines()] for f in (folder, whole_folder)
        )
        assert first == second


@pytest.mark.parametrize("owner, name, count", [("RunLog", "append", 6), ("SummaryWriter", "add_scalar", 12)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_disk_that_fills_up_while_logging(script, owner, name, count, monkeypatch, capsys):
    whole = contents(*script.train(script.Args(**TINY, exp_name="whole")))
    owner, left = getattr(script, owner), [count]
    write = getattr(owner, name)

    def write_or_not(*arguments):
        left[0] -= 1
        if left[0] == 0:
            write(*arguments)  # half a line counts as well
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, write_or_not)
        code, errors = main(script, monkeypatch, capsys, *flags_of({**TINY, "exp_name": "parts"}))
    (folder,) = Path("runs").glob("*parts*")
    assert code == 1 and len(errors) == 1 and errors[0].startswith("error: step "), errors
    assert "[Errno 28] No space left on device; --resume" in errors[0]
    assert_equal(whole, contents(*script.train(script.Args(**TINY, exp_name="parts", resume=str(folder)))))


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_folders_that_cannot_be_used(script, monkeypatch, capsys):
    os.symlink("/proc/self/fdinfo", "runs")  # where nobody can make a folder, not even root
    code, errors = main(script, monkeypatch, capsys, "--env-id", "Scripted-v0")
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: cannot make the run folder runs/Scripted")
    Path("runs").unlink()
    Path("empty").mkdir()
    for folder in ("missing", "empty"):
        code, errors = main(script, monkeypatch, capsys, "--resume", folder)
        assert (
            code == 2 and len(errors) == 1 and errors[0].startswith(f"error: --resume {folder}: not a run folder of t")
        )
    _, _, folder = script.train(script.Args(**TINY))
    (folder / "lock").unlink()
    (folder / "lock").mkdir()
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and len(errors) == 1 and "the run folder cannot be written" in errors[0]
    _, _, folder = script.train(script.Args(**{**TINY, "checkpoint_interval": 0}))
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and errors == [f"error: --resume {folder}: no checkpoints in it"]
    code, errors = main(script, monkeypatch, capsys, "--resume", folder, "--evaluate", "model.pt")
    assert code == 2 and errors == ["error: --resume trains, --evaluate does not; give one of them"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_do_not_share_a_run_folder(script, monkeypatch, capsys):
    process = start(script, *flags_of({**TINY, "total_timesteps": 10**6}))
    folder = folder_of(process)
    wait_for(lambda: list((folder / "checkpoints").glob("[0-9]*[3-9]0")))
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2
    assert errors == [f"error: {folder}: another process trains in this run folder; wait for it, or stop it"]
    process.kill()
    process.communicate()
    code, errors = main(script, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "20")
    assert code == 2 and "--total-timesteps is 20; the run is at" in errors[0]  # no longer locked


# ---------------------------------------------------------------- damaged and hostile files


@pytest.fixture
def finished(request):
    """A run with checkpoints at steps 50 and 60: script, run folder, outcome."""
    agent, buffer, folder = request.param.train(request.param.Args(**TINY))
    return request.param, folder, contents(agent, buffer, folder)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "longer": lambda data: data + b"\0",
    "missing": None,
}


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", "agent.safetensors", "SHA256SUMS", "../replay/000000050-000000060.f32"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(finished, damage, name, capsys):
    script, folder, whole = finished
    path = folder / "checkpoints" / "000000060" / name
    data = path.read_bytes()
    path.unlink()
    if DAMAGE[damage]:
        path.write_bytes(DAMAGE[damage](data))
    if name == "SHA256SUMS" and damage == "longer":
        path.write_bytes(data + b"0  state.json\n")
    capsys.readouterr()
    assert_equal(whole, contents(*script.train(script.Args(**TINY, resume=str(folder)))))
    out, err = capsys.readouterr()
    assert f"note: checkpoint {folder}/checkpoints/000000060 is refused: " in err and "resumed at step 50" in out
    assert script.Checkpoints(folder).read()[0]["step"] == 60 and "refused" not in capsys.readouterr().err


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
def test_without_any_whole_checkpoint_the_run_is_refused(finished, monkeypatch, capsys):
    script, folder, _ = finished
    (folder / "checkpoints" / "replay" / "000000010-000000020.f32").write_bytes(b"")
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and len(errors) == 3
    assert errors[1] == (
        f"note: checkpoint {folder}/checkpoints/000000050 is refused: ../replay/000000010-000000020.f32 is damaged"
    )
    assert errors[2] == f"error: --resume {folder}: no whole checkpoint in it"


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
def test_a_foreign_checkpoint_is_refused(finished, capsys):
    script, folder, _ = finished
    other = td3 if script is rnm else rnm
    _, _, foreign = other.train(other.Args(**TINY))
    names = ("state.json", "agent.safetensors")
    forge(folder, alone=False, **{name: (foreign / "checkpoints" / "000000060" / name).read_bytes() for name in names})
    capsys.readouterr()
    script.train(script.Args(**TINY, resume=str(folder)))
    message = f"000000060 is refused: {other.CHECKPOINT_FORMAT} is not a checkpoint of this script"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "lie",
    [{"gamma": "x"}, {"hidden_sizes": ["a"]}, {"hidden_sizes": 3}, {"resume": 1}, {"seed": None}, [], {"seed": 1.0}],
)
@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
def test_lies_in_the_configuration_end_in_one_line(finished, lie, monkeypatch, capsys):
    script, folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **lie} if lie else lie))
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and len(errors) == 1 and "not a run folder of this script" in errors[0], errors


class Hostile:
    def __reduce__(self):
        return Path("touched").touch, ()


def forge(folder, changes=None, alone=True, **files):
    """Rewrite files of the newest checkpoint, and values in its state, with checksums that fit; drop the one before."""
    path = folder / "checkpoints" / "000000060"
    if alone:
        shutil.rmtree(folder / "checkpoints" / "000000050")
    state = json.loads((path / "state.json").read_text())
    for keys, value in (changes or {}).items():
        *parents, last = keys.split("/")
        place = state
        for key in parents:
            place = place[key]
        place[last] = value
    files.setdefault("state.json", json.dumps(state).encode())
    lines = []
    for line in (path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        if name in files:
            (path / name).write_bytes(files[name])
            digest = hashlib.sha256(files[name]).hexdigest()
        lines.append(f"{digest}  {name}\n")
    (path / "SHA256SUMS").write_text("".join(lines))


LIES = {
    "step": "1",
    "step ": -3,
    "step  ": 40.0,
    "added ": 0,
    "evaluation_due": 3,
    "random/torch  ": [0] * 8 + [88, 2, 0, 0] + [1, 0, 0, 0] + [108, 2] + [0] * 5038,
    "log/returns": [0.0],
    "log/seconds ": float("nan"),
    "added": 10**18,
    "episode": ["a", "b"],
    "actor_loss": {},
    "config": [],
    "config/gamma": 0.5,
    "random/numpy/state/pos": 10**9,
    "random/numpy/state/key": [1, 2],
    "random/python": [3, [1, 2], None],
    "random/torch": [0] * 5056,
    "random/torch ": list(range(50)),
    "log": {"seconds": 0, "returns": [0, 0], "wandb": None, "files": {"../../state": 1}},
    "log/seconds": "long",
    "log/files": [],
}


@pytest.mark.parametrize("keys", LIES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_lies_in_the_state_end_in_one_line(script, keys, monkeypatch, capsys):
    _, _, folder = script.train(script.Args(**TINY))
    forge(folder, {keys.strip(): LIES[keys]})
    Path("state").write_text("not of the run")
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    if keys == "added ":  # and no part of the buffer
        sums = folder / "checkpoints" / "000000060" / "SHA256SUMS"
        sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "replay" not in line))
    if keys == "log":
        assert code == 0 and Path("state").read_text() == "not of the run"
    else:
        assert code == 2 and len([line for line in errors if line.startswith("error")]) == 1, errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_wall_time_and_last_returns_go_on(script, capsys):
    _, _, folder = script.train(script.Args(**TINY))
    forge(folder, {"log/seconds": 5000.0, "log/returns": [-7.0, 123.0]})
    capsys.readouterr()
    script.train(script.Args(**{**TINY, "total_timesteps": 61}, resume=str(folder)))
    assert "evaluation 123.0" in capsys.readouterr().out
    script.train(script.Args(**{**TINY, "total_timesteps": 90}, resume=str(folder)))
    assert 5000 < float((folder / "episodes.csv").read_text().splitlines()[-1].split(",")[-1]) < 5100


ENV_LIES = {
    "obs/array": [1.0],
    "obs/shape": [10**9],
    "obs/dtype": "O",
    "attributes": {},
    "attributes/action_space": {"generator": {"bit_generator": "Hostile"}},
    "attributes/1._elapsed_steps": {"array": [1], "dtype": "S1000000000000", "shape": [1], "scalar": False},
    "attributes/2._has_reset": {"generator": {}},
}


@pytest.mark.parametrize("keys", ENV_LIES)
def test_lies_about_the_environment_end_in_a_new_episode(keys, monkeypatch, capsys):
    _, _, folder = rnm.train(rnm.Args(**TINY))
    forge(folder, {f"env/{keys}": ENV_LIES[keys]})
    code, errors = main(rnm, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "70")
    assert code == 0 and len(errors) == 1 and errors[0].startswith("note: the environment cannot be brought back (")


def tensor_lies():
    lies = {"a pickle": pickle.dumps(Hostile()), "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}"}
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    lies["a tensor of 4 TB"] = struct.pack("<Q", len(header)) + header
    return lies


@pytest.mark.parametrize("name", ["state.json", "agent.safetensors", "../replay/000000050-000000060.f32"])
@pytest.mark.parametrize("lie", tensor_lies())
@pytest.mark.parametrize("script", SCRIPTS)
def test_hostile_files_give_an_error_and_run_nothing(script, lie, name, monkeypatch, capsys):
    _, _, folder = script.train(script.Args(**TINY))
    forge(folder, **{name: tensor_lies()[lie]})
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and errors[-1].startswith("error: --resume ") and "Traceback" not in "".join(errors)
    assert not Path("touched").exists()


@pytest.mark.parametrize("backend", ["masked", "native"])
@pytest.mark.parametrize(
    "name, change",
    [
        ("actor.net.0.index", lambda tensor: tensor + 10**6),
        ("qf1.net.2.index", lambda tensor: tensor * 0),
        ("qf1.net.2.index", lambda tensor: tensor - 9),
        ("qf2.net.2.values", lambda tensor: tensor[:, :-1].contiguous()),
        ("qf2.net.2.exp_avg_master", lambda tensor: tensor[:3].contiguous()),
        ("q_optimizer.0.exp_avg", lambda tensor: tensor[:1].contiguous()),
        ("q_optimizer.0.exp_avg_sq", None),
        ("q_optimizer.0.step", lambda tensor: torch.zeros(10**3)),
        ("actor.net.0.bias", None),
        ("q_optimizer.99.exp_avg", lambda tensor: torch.zeros(1)),
        ("somebody.else", lambda tensor: torch.zeros(1)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_a_kernel_sees_them(name, change, backend, monkeypatch, capsys):
    if backend == "native" and (problem := rnm.load_kernels()):
        pytest.skip(problem)
    _, _, folder = rnm.train(rnm.Args(**TINY, backend=backend, mask_update_interval=5))
    tensors = safetensors.torch.load_file(folder / "checkpoints" / "000000060" / "agent.safetensors")
    tensors = {key: value.clone() for key, value in tensors.items()}
    tensor = tensors.pop(name, None)
    if change:
        tensors[name] = change(tensor)
    forge(folder, **{"agent.safetensors": safetensors.torch.save(tensors)})
    code, errors = main(rnm, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "70")
    assert code == 2 and len(errors) == 1 and "damaged checkpoint" in errors[0], errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_code_that_a_file_names_is_not_imported(script, monkeypatch, capsys):
    Path("payload.py").write_text("open('touched', 'w')")
    sys.modules.pop("payload", None)
    monkeypatch.syspath_prepend(".")
    _, _, folder = script.train(script.Args(**TINY, save_model=True))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "env_id": "payload:Scripted-v0"}))
    model = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**model, "args": {**model["args"], "env_id": "payload:Scripted-v0"}}, "model.pt")
    for flag, path in (("--resume", folder), ("--evaluate", "model.pt")):
        code, errors = main(script, monkeypatch, capsys, flag, path)
        assert code == 2 and errors == [
            "error: the environment 'payload:Scripted-v0' imports code; if you trust it, "
            "add --env-id payload:Scripted-v0"
        ]
        assert not Path("touched").exists()
    main(script, monkeypatch, capsys, "--evaluate", "model.pt", "--env-id", "payload:Scripted-v0")
    assert Path("touched").exists()


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
@pytest.mark.parametrize("name", ["episodes.csv", "checkpoints/replay", "masks", "pipe"])
def test_links_out_of_a_run_folder_are_not_followed(finished, name, monkeypatch, capsys):
    script, folder, _ = finished
    Path("outside").mkdir()
    Path("outside/thesis.txt").write_text("my life")
    if name == "pipe":
        os.mkfifo(folder / name)
    else:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(Path("outside/thesis.txt" if "csv" in name else "outside").resolve())
    code, errors = main(script, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "70")
    assert code == 2 and errors == [
        f"error: --resume {folder}: {folder}/{name} is neither a file nor a folder; move it elsewhere"
    ]
    assert Path("outside/thesis.txt").read_text() == "my life"


def test_what_the_user_keeps_beside_the_checkpoints_stays(monkeypatch, capsys):
    _, _, folder = rnm.train(rnm.Args(**TINY))
    shutil.copytree(folder / "checkpoints" / "000000050", folder / "checkpoints" / "best")
    shutil.copy(folder / "masks" / "000000000.npz", folder / "masks" / "000000000 (copy).npz")
    (folder / "notes.csv").write_text("mine")
    (folder / "checkpoints" / "replay" / "notes").write_text("mine")
    assert main(rnm, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "90") == (0, [])
    for name in ("checkpoints/best/state.json", "masks/000000000 (copy).npz", "notes.csv", "checkpoints/replay/notes"):
        assert (folder / name).exists()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"000000080", "000000090", "best", "replay"}


def test_nothing_of_the_environment_variables_reaches_the_files():
    key = "0123456789abcdef" * 2 + "deadbeef"
    variables = {**os.environ, "WANDB_API_KEY": key, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "SECRET": key}
    command = [sys.executable, ROOT / "rnm_td3_continuous.py", *flags_of(TINY), "--track", "--save-model"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    (run,) = Path("wandb").glob("offline-run-*")
    command = [sys.executable, ROOT / "rnm_td3_continuous.py", "--resume", folder, "--total-timesteps", "70"]
    resumed = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    (file,) = run.glob("run-*.wandb")
    for name in (b"losses/qf1_loss", b"charts/episodic_return", b"density/actor", b"rnm-td3"):
        assert name in file.read_bytes()
    runs = list(Path("wandb").glob("offline-run-*"))
    assert {path.name.split("-")[-1] for path in runs} == {run.name.split("-")[-1]}  # the same run goes on
    texts = [result.stdout, result.stderr, resumed.stdout, resumed.stderr]
    files = [path for path in Path(".").rglob("*") if path.is_file()]
    assert len(files) > 15 and not any(key in text for text in texts)
    assert not [path for path in files if key.encode() in path.read_bytes()]


# ---------------------------------------------------------------- environments


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "fault, message",
    [
        ("raises", "the environment failed in step: ZeroDivisionError()"),
        ("returns NaN", "the environment failed in step: ValueError('NaN or infinity in observation or reward')"),
        ("rewards infinity", "the environment failed in step: ValueError('NaN or infinity in observation or reward')"),
        ("rewards a word", "the environment failed in step: "),
        ("returns a wrong shape", "in step: ValueError('observation of shape (3,) instead of (2,)')"),
        ("returns nothing", "the environment failed in step: "),
        ("raises in reset", "the environment failed in reset: ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_environment_ends_in_one_line_and_nothing_learned_is_lost(
    script, fault, message, overlap, monkeypatch, capsys
):
    settings = {**TINY, "env_id": "Faulty-v0", "exp_name": fault, "checkpoint_interval": 1000}
    flags = [*flags_of(settings), *["--overlap"] * overlap]
    monkeypatch.setattr(Faulty, "fault", f"{fault} at 35")
    code, errors = main(script, monkeypatch, capsys, *flags)
    (folder,) = Path("runs").iterdir()
    assert code == 1 and len(errors) == 1 and message in errors[0], errors
    assert errors[0].startswith("error: step 3") and f"; --resume {folder} goes on from step 3" in errors[0]
    state, _ = script.Checkpoints(folder).read()
    assert state["step"] in (35, 36) and state["added"] in (34, 35, 36)
    monkeypatch.setattr(Faulty, "fault", "none")
    _, buffer, _ = script.train(script.Args(**settings, resume=str(folder)))
    assert "on with a new episode" in capsys.readouterr().err and buffer.added == state["added"] + 60 - state["step"]
    assert torch.isfinite(buffer.rows[: buffer.size]).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_environment_of_the_evaluation_costs_nothing(script, monkeypatch, capsys):
    settings = {**TINY, "eval_interval": 25, "eval_episodes": 1}
    whole = contents(*script.train(script.Args(**settings, exp_name="whole")))
    step = script.CheckedEnv.step

    def fail(self, action):
        if sys._getframe(1).f_code.co_name == "evaluate":
            raise script.EnvironmentFault("the environment failed in step: gone", self)
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(script.CheckedEnv, "step", fail)
        code, errors = main(script, monkeypatch, capsys, *flags_of({**settings, "exp_name": "parts"}))
        (folder,) = Path("runs").glob("*__parts__*")
        assert code == 1 and len(errors) == 1 and errors[0].startswith("error: step 25: the environment failed in step")
        assert errors[0].endswith(f"; --resume {folder} goes on from step 25")
        assert main(script, monkeypatch, capsys, "--resume", folder)[0] == 1  # as it is made up for
    parts = contents(*script.train(script.Args(**settings, exp_name="parts", resume=str(folder))))
    assert "new episode" not in capsys.readouterr().err
    assert_equal(whole, parts)


def test_an_environment_that_fails_in_its_first_step(monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "fault", "raises at 1")
    flags = flags_of({**TINY, "env_id": "Faulty-v0", "learning_starts": 0})
    code, errors = main(rnm, monkeypatch, capsys, *flags)
    assert code == 1 and len(errors) == 1 and errors[0].endswith("; there is no checkpoint")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_fails_at_the_end_is_a_warning_and_the_rest_is_closed(script, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "fault", "raises at 35")
    monkeypatch.setattr(Faulty, "close", lambda self: 1 / 0)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(script, "save_model", lambda *_: (_ for _ in ()).throw(full))
    code, errors = main(script, monkeypatch, capsys, *flags_of({**TINY, "env_id": "Faulty-v0"}), "--save-model")
    assert (
        code == 1 and "ZeroDivisionError" in errors[-1] and errors[-1].startswith("error: step 35: the environment fai")
    )
    assert errors[0] == "warning: at the end: OSError(28, 'No space left on device')"
    assert errors[1:3] == ["warning: at the end: ZeroDivisionError('division by zero')"] * 2
    (folder,) = Path("runs").iterdir()
    script.FileLock(folder / "lock", timeout=0).acquire()  # it was released


# ---------------------------------------------------------------- flags

NUMBERS = [1, 2, 3, 7, 16, 40, 1, 2, 3, 7, 16, 40, 0, 50, 51, -1, 10**9, 10**30]
FLOATS = [0.0, 1e-3, 0.1, 0.5, 1.0, 0.0, 1e-3, 0.1, 0.5, 1.0, 2.0, -0.1, 1e30, float("inf"), float("nan")]
FLAGS = {
    **dict.fromkeys(["--learning-starts", "--batch-size", "--buffer-size", "--policy-frequency"], NUMBERS),
    **dict.fromkeys(["--eval-interval", "--mask-update-interval", "--checkpoint-interval", "--n", "--m"], NUMBERS),
    **dict.fromkeys(["--learning-rate", "--gamma", "--tau", "--policy-noise", "--exploration-noise"], FLOATS),
    "--noise-clip": FLOATS,
    "--seed": [0, 1, 2**31, 2**31 + 1, -1, 10**20],
    "--eval-episodes": [1, 2, 0, -3],
    "--hidden-sizes": ["8", "8 8", "1", "16 4 16", "0", "8 -1", "", "70000 2"],
    "--env-id": [
        *("Scripted-v0", "ScriptedMatrix-v0", "Rendered-v0", "InvertedPendulum-v5", "Pendulum-v1", "CartPole-v1"),
        *("DictObs-v0", "Unbounded-v0", "Raises-v0", "Nonsense", "", "nobody:Nothing-v0", "Faulty-v0"),
    ],
    "--exp-name": ["a", "a b", "ä", "a/b", "", "..", "x" * 300, "a\nb", "-"],
    "--dense-layers": ["none", "first", "last", "first,last", "middle"],
    "--target-mask": ["own", "online", "none"],
    "--backend": ["auto", "masked", "native", "semi_structured", "fast"],
    "--semi-structured-dtype": ["bfloat16", "float16", "float32"],
    "--total-timesteps": [50, 50, 50, 0, -1],
    "--resume": ["nowhere", "."],
    "--evaluate": ["nowhere.pt", "."],
}
SWITCHES = ["--overlap", "--no-overlap", "--profile", "--save-model", "--no-save-masks", "--save-masks", "--no-cuda"]
FLAGS |= {name: [""] for name in [*SWITCHES, "--no-torch-deterministic", "--capture-video"]}


@pytest.mark.slow
def test_any_flags_end_in_a_run_or_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "fault", "raises at 25")
    outcomes = {0: 0, 1: 0, 2: 0}

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SCRIPTS), st.data())
    def run(script, data):
        flags = ["--env-id", "Scripted-v0", "--total-timesteps", "50", "--learning-starts", "20", "--batch-size", "8"]
        flags += ["--hidden-sizes", "8", "--eval-interval", "0"]
        for name in data.draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=4, unique=True)):
            value = str(data.draw(st.sampled_from(FLAGS[name])))
            flags += [f"{name}={value}"] if name in ("--exp-name", "--env-id") else [name, *value.split()]
        monkeypatch.setattr(sys, "argv", ["script", *flags])
        capsys.readouterr()
        try:
            code = script.main()
        except SystemExit as parsing:  # tyro's, with a text of its own
            code = parsing.code
            assert code == 2, flags
        else:
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(errors) == (code != 0), (flags, errors)
        outcomes[code] += 1

    run()
    with capsys.disabled():
        print(f"\n300 combinations of flags: {outcomes[0]} ran, {outcomes[1]} met a fault, {outcomes[2]} were refused")
    assert outcomes[0] > 50 and outcomes[2] > 50
