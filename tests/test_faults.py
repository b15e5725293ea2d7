"""What goes wrong around a run: killed processes, full disks, damaged or hostile files, failing environments."""

import errno
import fcntl
import io
import json
import os
import pickle
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import zipfile
from pathlib import Path

import environments  # noqa: F401
import pytest
import torch
from environments import Faulty, Rendered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import SCRIPTS, SMALL, assert_equal, contents, event_files_in_order, logs_of, tensors_of  # noqa: F401

import rnm_td3_continuous as rnm
import td3_continuous as td3

ROOT = Path(__file__).parents[1]
TINY = {**SMALL, "hidden_sizes": (16, 16), "checkpoint_interval": 10}  # its episodes are shorter than 10 steps
IMPORTED = {"env_id": "environments:Wander-v0"}  # for another process


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


def checkpoints_of(folder):
    """Steps of the checkpoints in a run folder, oldest first."""
    return sorted(int(path.stem) for path in (Path(folder) / "checkpoints").glob("*.pt"))


def read(script, folder, buffer=None):
    """State and buffer of the newest checkpoint."""
    path = max((Path(folder) / "checkpoints").glob("*.pt"))
    rows = torch.load(path, weights_only=True)["replay"]["rows"]
    size = (path.parent / "replay.f32").stat().st_size // 4 // rows if buffer is None else 0
    buffer = buffer or script.ReplayBuffer(100, (size - 2) // 3, (size - 2) // 3)  # as many observations as actions
    return script.Checkpoints(path.parent).read(path, buffer), buffer


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_evaluation_and_episode(script, number, code):
    """Within a second: an evaluation of 3000 short episodes, then the rest of the episode; the checkpoint is exact."""
    options = {"total_timesteps": 10**6, "eval_interval": 40, "eval_episodes": 3000, "checkpoint_interval": 10**6}
    process = start(script, *flags_of({**TINY, **options, **IMPORTED}), "--save-model")
    folder = folder_of(process)
    wait_for(lambda: len((folder / "episodes.csv").read_text().splitlines()) > 8)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    step = int((folder / "episodes.csv").read_text().splitlines()[-1].split(",")[0])
    assert process.returncode == code and "Traceback" not in err
    lines = [line for line in err.splitlines() if line]
    assert lines[-2:] == [
        "finishing the episode; Ctrl-C again ends at once",
        f"interrupted at step {step}; everything so far is in {folder}; --resume {folder} goes on from step {step}",
    ]
    evaluations = (folder / "evaluations.csv").read_text().splitlines()[1:]
    assert all(row.count(",") == 3003 for row in evaluations) and len(evaluations) == step // 40
    assert checkpoints_of(folder) == [step] and script.load_actor(folder / "model.pt")([0.0, 0.0]).shape == (2,)
    assert torch.load(folder / "checkpoints" / f"{step:09d}.pt", weights_only=True)["episode_over"] is True


def test_a_second_ctrl_c_ends_a_run_that_hangs_and_the_checkpoint_is_whole():
    """A second SIGTERM does not: Slurm sends one to all processes of a job, and a sweep that it ends another."""
    process = start(rnm, *flags_of({**TINY, "env_id": "environments:Faulty-v0"}), FAULT="hangs at 35")
    folder = folder_of(process)
    wait_for(lambda: 30 in checkpoints_of(folder))
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT  # a shell makes it 130
    assert read(rnm, folder, rnm.ReplayBuffer(100, 2, 3))[0]["step"] == 30


def test_a_pager_that_is_closed_costs_nothing():
    process = start(rnm, *flags_of({**TINY, **IMPORTED, "total_timesteps": 100}))
    folder = folder_of(process)
    process.stdout.close()
    assert "error" not in process.stderr.read() and process.wait(timeout=60) in (0, 120)  # 120: Python's own
    assert checkpoints_of(folder)[-1] == 100 and (folder / "episodes.csv").read_text().count("\n") > 12


def test_a_terminal_that_is_closed_costs_nothing():
    leader, terminal = pty.openpty()
    settings = {**TINY, **IMPORTED, "total_timesteps": 10**6}
    command = [sys.executable, ROOT / "rnm_td3_continuous.py", *map(str, flags_of(settings))]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    options = {"start_new_session": True, "env": variables, "stdin": terminal, "stdout": terminal, "stderr": terminal}

    def in_the_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the suite was started by nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen([*command, "--save-model"], **options, preexec_fn=in_the_terminal)
    os.close(terminal)
    wait_for(lambda: [path for path in Path("runs").glob("*/checkpoints/*.pt") if int(path.stem) > 40])
    os.close(leader)
    assert process.wait(timeout=60) == 129
    (folder,) = Path("runs").iterdir()
    last = int((folder / "episodes.csv").read_text().splitlines()[-1].split(",")[0])
    assert checkpoints_of(folder)[-1] == last and (folder / "model.pt").exists()


@pytest.mark.parametrize("damage", [lambda path: shutil.rmtree(path.parent), Path.unlink, lambda path: flatten(path)])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("capacity", [15, 100])
def test_checkpoints_that_are_deleted_while_a_run_goes_on(script, capacity, damage, monkeypatch, capsys):
    """The next one is whole again."""
    settings, add = {**TINY, "total_timesteps": 64, "buffer_size": capacity}, script.ReplayBuffer.add
    whole = contents(*script.train(script.Args(**settings)))

    def add_and_delete(self, *transition):
        add(self, *transition)
        if self.added == 35:
            damage(next(Path("runs").glob("*__other__*")) / "checkpoints/replay.f32")

    with monkeypatch.context() as patch:
        patch.setattr(script.ReplayBuffer, "add", add_and_delete)
        _, _, folder = script.train(script.Args(**settings, exp_name="other"))
    (folder / "checkpoints" / f"{checkpoints_of(folder)[-1]:09d}.pt").unlink()
    before = checkpoints_of(folder)[-1]
    parts = script.train(script.Args(**settings, exp_name="other", resume=str(folder)))
    out, err = capsys.readouterr()
    assert 35 < before < 64 and f"resumed at step {before}" in out and "refused" not in err and "warning" not in err
    assert_equal(whole, contents(*parts))


def flatten(path):
    os.truncate(path, 100)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lack_of_memory_is_bad_input_until_there_is_a_checkpoint(script, monkeypatch, capsys):
    """After that other flags are no remedy: it may pass, and a sweep tries again."""
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 720 bytes")
    kind = rnm.NativeTD3 if script is rnm and rnm.load_kernels() is None else script.TD3
    kind = td3.FusedTD3 if script is td3 else kind
    update, count = kind.update_critics, [0]

    def fail(self, batch):
        count[0] += 1
        if count[0] == last:
            raise full
        return update(self, batch)

    monkeypatch.setattr(kind, "update_critics", fail)
    last = 1
    code, errors = main(script, monkeypatch, capsys, *flags_of({**TINY, "checkpoint_interval": 30}))
    assert code == 2 and errors[0].startswith("error: no memory for --hidden-sizes, --buffer-size or --batch-size; low")
    count[0], last = 0, 30
    with pytest.raises(RuntimeError, match="can't allocate") as error:
        main(script, monkeypatch, capsys, *flags_of(TINY))
    assert "goes on from step" in error.value.__notes__[0]


def test_signals_that_are_ignored_stay_so(monkeypatch):
    """As `nohup` and a shell's `&` ask for; and a thread, which cannot have handlers, can train."""
    trained = []
    thread = threading.Thread(target=lambda: trained.append(rnm.train(rnm.Args(**TINY))))
    thread.start()
    thread.join()
    assert trained[0][1].size == 60
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(rnm, *flags_of({**TINY, **IMPORTED, "total_timesteps": 10**6}))
        folder_of(process)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60) and process.returncode == 143
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_handlers_are_given_back(script):
    before = signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        script.train(script.Args(**TINY))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


class Killed(BaseException):
    """No handler for errors sees it, as none sees kill -9."""


class CutFile:
    """A file of which a write may fail in its middle, with half of the content on the disk."""

    def __init__(self, file, left, error):
        self.file, self.left, self.error = file, left, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.left[0] -= 1
        if self.left[0] == 0:
            content = memoryview(content).cast("B")
            self.file.write(content[: len(content) // 2])
            raise self.error
        return self.file.write(content)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_checkpoint_that_is_cut_off_anywhere_leaves_the_one_before(script, error, monkeypatch, capsys):
    """Before and in the middle of every operation on files, one after the other."""
    changes = {"buffer_size": 15, "total_timesteps": 48}
    whole = contents(*script.train(script.Args(**{**TINY, **changes}, exp_name="whole")))
    operations = [(os, "fsync"), (os, "replace"), (torch, "save"), (Path, "unlink"), (Path, "mkdir")]
    operations += [(script, "open")]

    def cut_off(patch, count):
        left = [count]

        def cut(function):
            def wrapper(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise error
                result = function(*arguments, **options)
                return CutFile(result, left, error) if function is open else result

            return wrapper

        for owner, name in operations:
            patch.setattr(owner, name, cut(getattr(owner, name, open)), raising=False)

    survived = 0
    for count in range(1, 40):
        name, left = f"cut-{count}", []
        write = script.Checkpoints.write

        def write_and_cut(self, step, *rest, write=write, count=count, left=left):
            with monkeypatch.context() as patch:
                if 40 <= step < 48:
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
                warning = f"warning: no checkpoint at step {left[0]}, the one before is kept: [Errno 28]"
                if warning not in capsys.readouterr().err:
                    break
                survived += 1
        (folder,) = Path("runs").glob(f"*__{name}__*")
        if isinstance(error, Killed):
            state, _ = read(script, folder, script.ReplayBuffer(15, 2, 2))
            assert 30 <= state["step"] <= left[0]
        assert_equal(whole, contents(*script.train(script.Args(**settings, resume=str(folder)))))
        assert len(checkpoints_of(folder)) == 2 and checkpoints_of(folder)[-1] == 48
    assert survived >= 8 and count < 39


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(script, monkeypatch):
    """Against loss of power, which a killed process does not show."""
    synced, fsync, replace, named = [], os.fsync, os.replace, []

    def record_fsync(descriptor):
        synced.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def record_replace(source, target):
        if Path(target).suffix == ".pt":
            replay = Path(target).resolve().with_name("replay.f32")
            for path in (replay, Path(source).resolve()):
                assert (str(path), path.stat().st_size) in synced, path
            named.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    script.train(script.Args(**TINY))
    assert len(named) == 6


def kill_and_resume(script, settings, kills, least_seconds):
    """Kill -9 at random moments, and resume, until it survives; returns run folder and how many fell into a write."""
    generator, folder, in_a_write = random.Random(0), None, 0
    for _ in range(kills):
        resume = ["--resume", folder, "--env-id", settings["env_id"]]
        process = start(script, *(resume if folder else flags_of(settings)))
        folder = folder_of(process)
        wait_for((folder / "checkpoints").exists)
        time.sleep(generator.uniform(0, least_seconds))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        in_a_write += (folder / "checkpoints" / "incomplete").exists()
    process = start(script, *resume, "--checkpoint-interval", 10**6)
    _, err = process.communicate()
    assert process.returncode == 0 and "refused" not in err and "broke off" not in err, err
    return folder, in_a_write


def outcome(script, folder):
    """What can be compared of a finished run that another process made."""
    state, buffer = read(script, folder, script.ReplayBuffer(3000, 17, 6))
    ours = tensors_of({name: state[name] for name in ("networks", "optimizers", "actor_loss", "torch")})
    return {"generators": state["generators"], "rows": buffer.rows[: buffer.size].clone()} | ours | logs_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_20_kills_at_random_moments_change_nothing(script, capsys):
    """HalfCheetah in episodes of 20 steps, a checkpoint after each."""
    changes = {
        "env_id": "environments:ShortCheetah-v0",
        "total_timesteps": 12_000,
        "learning_starts": 200,
        "eval_interval": 1000,
    }
    changes |= {"eval_episodes": 1, "checkpoint_interval": 20, "hidden_sizes": (64, 64), "buffer_size": 3000}
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
            folder, in_a_write = kill_and_resume(script, settings, 20, 0.7)
            runs.append(folder)
    with capsys.disabled():
        print(f"\n{script.__name__}: 20 kills, {in_a_write} of them in the middle of a checkpoint")
    assert_equal(*(outcome(script, folder) for folder in runs))


# ---------------------------------------------------------------- disks and folders


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_checkpoint_for_which_there_is_no_room_costs_a_line_and_no_run():
    process = start(rnm, *flags_of({**TINY, **IMPORTED, "hidden_sizes": (128, 128)}), preexec_fn=limit(400_000))
    folder = folder_of(process)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("warning: no checkpoint at step ")]
    assert process.returncode == 0 and "Traceback" not in err and len(lines) == 6
    assert all("the one before is kept: [Errno 27] File too large" in line for line in lines)
    assert len((folder / "episodes.csv").read_text().splitlines()) > 3
    assert not checkpoints_of(folder)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_after_one_that_failed_has_all_rows(script, monkeypatch, capsys):
    """What the failed one has appended is cut, and appended again."""
    save, left = torch.save, [3]

    def save_or_not(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments)

    monkeypatch.setattr(torch, "save", save_or_not)
    _, buffer, folder = script.train(script.Args(**TINY))
    assert capsys.readouterr().err.count("warning: no checkpoint at step 3") == 1
    _, copy = read(script, folder, script.ReplayBuffer(100, 2, 2))
    assert torch.equal(copy.rows[:60], buffer.rows[:60])
    assert (folder / "checkpoints" / "replay.f32").stat().st_size == 60 * 8 * 4


@pytest.mark.parametrize(
    "file, size, changes",
    [
        ("events.out", 9_000, {"eval_interval": 1, "eval_episodes": 1}),
        ("masks.bin", None, {"hidden_sizes": (64, 64), "mask_update_interval": 1}),
    ],
)
def test_a_full_disk_stops_a_run_with_a_line_and_it_can_go_on(file, size, changes):
    """The limit holds for each file, so the one that outgrows it is known."""
    settings = {**TINY, **IMPORTED, "total_timesteps": 400, "checkpoint_interval": 100, **changes}
    whole = contents(*rnm.train(rnm.Args(**settings, exp_name="whole")))
    stop = next(int(row["step"]) for row in whole["episodes.csv"] if int(row["step"]) >= 30)
    _, _, folder = rnm.train(rnm.Args(**{**settings, "total_timesteps": stop}, exp_name="parts"))
    flags = ["--resume", folder, "--total-timesteps", "400", "--env-id", settings["env_id"]]
    process = start(rnm, *flags, preexec_fn=limit(size or (folder / file).stat().st_size + 1000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("error: step ") and "File too large" in err.splitlines()[-1]
    assert f"; --resume {folder} goes on from step " in err.splitlines()[-1]
    parts = contents(*rnm.train(rnm.Args(**settings, exp_name="parts", resume=str(folder))))
    for name, value in whole.items():  # the shorter run logged its last step
        if torch.is_tensor(value) or "csv" in name:
            assert_equal({name: value}, {name: parts[name]})


@pytest.mark.parametrize("owner, name, count", [("Run", "write_row", 6), ("SummaryWriter", "add_scalar", 25)])
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
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: the run folder runs/Scripted")
    Path("runs").unlink()
    os.symlink("nowhere", "runs")
    code, errors = main(script, monkeypatch, capsys, "--env-id", "Scripted-v0")
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: the run folder runs/Scripted")
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
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: the run folder {folder} cannot be written")
    _, _, folder = script.train(script.Args(**{**TINY, "checkpoint_interval": 0}))
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and errors == [f"error: --resume {folder}: no checkpoints in it"]
    code, errors = main(script, monkeypatch, capsys, "--resume", folder, "--evaluate", "model.pt")
    assert code == 2 and errors == ["error: --resume trains, --evaluate does not; give one of them"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_do_not_share_a_run_folder(script, monkeypatch, capsys):
    process = start(script, *flags_of({**TINY, **IMPORTED, "total_timesteps": 10**6}))
    folder = folder_of(process)
    wait_for(lambda: max(checkpoints_of(folder), default=0) > 30)
    flags = ["--resume", folder, "--env-id", IMPORTED["env_id"]]
    code, errors = main(script, monkeypatch, capsys, *flags)
    assert code == 2
    assert errors == [f"error: {folder}: another process trains in this run folder; wait for it, or stop it"]
    process.kill()
    process.communicate()
    code, errors = main(script, monkeypatch, capsys, *flags, "--total-timesteps", "20")
    assert code == 2 and "--total-timesteps is 20; the run is at" in errors[0]  # no longer locked


# ---------------------------------------------------------------- damaged and hostile files


@pytest.fixture
def finished(request):
    """A run with two checkpoints, the newest at step 60: script, run folder, outcome."""
    agent, buffer, folder = request.param.train(request.param.Args(**TINY))
    return request.param, folder, contents(agent, buffer, folder)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def a_place_that_counts(data):
    """Not in the padding between the files of an archive."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return len(data) // 2
    archive = zipfile.ZipFile(io.BytesIO(data))
    return data.index(archive.read(max(archive.infolist(), key=lambda info: info.file_size))) + 9


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit flipped": lambda data: flip(data, a_place_that_counts(data)),
    "without its end": lambda data: data[:-1],
    "missing": None,
    "no zip file": lambda data: b"x" * len(data),
    "a zip file of something else": lambda data: zipped(),
}


def zipped():
    with zipfile.ZipFile(content := io.BytesIO(), "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"format": 1}))
    return content.getvalue()


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["000000060.pt", "replay.f32"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(finished, damage, name, capsys):
    """Of the rows those are damaged that the newest has added: only it is lost."""
    script, folder, whole = finished
    before, _ = checkpoints_of(folder)
    path = folder / "checkpoints" / name
    data, size = path.read_bytes(), before * 8 * 4 if name == "replay.f32" else 0
    path.unlink()
    if DAMAGE[damage]:
        path.write_bytes(data[:size] + DAMAGE[damage](data[size:]))
    elif size:
        path.write_bytes(data[:size])
    capsys.readouterr()
    parts = script.train(script.Args(**TINY, resume=str(folder)))
    out, err = capsys.readouterr()
    assert f"resumed at step {before}" in out
    missing = damage == "missing" and name.endswith("pt")
    assert (f"note: checkpoint {folder}/checkpoints/000000060.pt is refused: " in err) != missing
    assert_equal(whole, contents(*parts))
    assert read(script, folder, script.ReplayBuffer(100, 2, 2))[0]["step"] == 60


@pytest.mark.parametrize("finished", [rnm], indirect=True)
def test_any_damage_to_a_file_of_a_checkpoint_is_refused_or_harmless(finished):
    """A bit flipped, or all that follows cut off, at a few hundred places: what is read is what was written."""
    script, folder, _ = finished
    newest, tried, refused = folder / "checkpoints" / "000000060.pt", 0, 0
    checkpoints = script.Checkpoints(newest.parent)
    state, buffer = read(script, folder, script.ReplayBuffer(60, 2, 2))
    expected = tensors_of(state), buffer.rows.clone()
    for path in (newest, newest.with_name("replay.f32")):
        whole = path.read_bytes()
        for at in range(0, len(whole), len(whole) // 150):
            for content in (whole[:at], flip(whole, at)):
                path.write_bytes(content)
                tried += 1
                try:
                    found = checkpoints.read(newest, buffer)
                except Exception:
                    refused += 1
                    continue
                assert_equal(tensors_of(found), expected[0])
                assert torch.equal(buffer.rows, expected[1])
        path.write_bytes(whole)
    assert tried >= 600 and refused > 0.9 * tried


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
def test_without_any_whole_checkpoint_the_run_is_refused(finished, monkeypatch, capsys):
    script, folder, _ = finished
    before, _ = checkpoints_of(folder)
    path = folder / "checkpoints" / "replay.f32"
    path.write_bytes(flip(path.read_bytes(), 0))  # a row of both
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and len(errors) == 3
    assert errors[1] == (
        f"note: checkpoint {folder}/checkpoints/{before:09d}.pt is refused: its rows of replay.f32 are damaged"
    )
    assert errors[2] == f"error: --resume {folder}: no whole checkpoint in it"


@pytest.mark.parametrize("finished", SCRIPTS, indirect=True)
def test_a_foreign_checkpoint_is_refused(finished, capsys):
    script, folder, _ = finished
    other = td3 if script is rnm else rnm
    _, _, foreign = other.train(other.Args(**TINY))
    shutil.copy(foreign / "checkpoints" / "000000060.pt", folder / "checkpoints" / "000000060.pt")
    capsys.readouterr()
    script.train(script.Args(**TINY, resume=str(folder)))
    message = f"000000060.pt is refused: {other.CHECKPOINT_FORMAT} is not a checkpoint of this script"
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


def forge(folder, change):
    """Rewrite the newest checkpoint with check sums that fit; drop the one before."""
    before, newest = (folder / "checkpoints" / f"{step:09d}.pt" for step in checkpoints_of(folder))
    before.unlink()
    state = torch.load(newest, weights_only=True)
    change(state)
    torch.save(state, newest)


LIES = {
    "no state": dict.clear,
    "a step of another type": lambda state: state.update(step="x"),
    "no rows": lambda state: state["replay"].update(rows=0),
    "more rows than there are": lambda state: state["replay"].update(rows=10**18),
    "rows of another type": lambda state: state["replay"].update(rows="all"),
    "more transitions than rows": lambda state: state["replay"].update(added=80),
    "a configuration of another type": lambda state: state.update(config=[]),
    "another flag": lambda state: state["config"].update(gamma=0.5),
    "generators that are none": lambda state: state.update(generators="[]"),
    "a generator of another kind": lambda state: state.update(
        generators=state["generators"].replace("PCG64", "MT19937")
    ),
    "a generator of PyTorch that is none": lambda state: state.update(torch=torch.zeros(7, dtype=torch.uint8)),
    "no network": lambda state: state["networks"].pop("qf2"),
    "a network of another shape": lambda state: state["networks"].update(actor=state["networks"]["qf1"]),
    "no optimizer": lambda state: state["optimizers"].pop(),
    "moments of another shape": lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(2)),
    "moments that are too large": lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(4000)),
    "moments that are missing": lambda state: state["optimizers"][0]["state"].pop(0),
    "seconds of another type": lambda state: state.update(seconds="long"),
    "last returns that are none": lambda state: state.update(last=[]),
    "a pickle": lambda state: state.update(format=Hostile()),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_lies_in_a_checkpoint_end_in_one_line(script, lie, monkeypatch, capsys):
    _, _, folder = script.train(script.Args(**TINY))
    forge(folder, LIES[lie])
    code, errors = main(script, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and len([line for line in errors if line.startswith("error: --resume")]) == 1, errors
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "name, change",
    [
        ("actor.net.0.index", lambda tensor: tensor + 10**6),
        ("qf1.net.2.index", lambda tensor: tensor * 0),
        ("qf1.net.2.index", lambda tensor: tensor - 9),
        ("qf2.net.2.values", lambda tensor: tensor[:, :-1].contiguous()),
        ("actor.net.0.bias", None),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_a_kernel_sees_them(name, change, monkeypatch, capsys):
    if problem := rnm.load_kernels():
        pytest.skip(problem)
    _, _, folder = rnm.train(rnm.Args(**TINY, backend="native", mask_update_interval=5))
    network, key = name.split(".", 1)

    def lie(state):
        tensor = state["networks"][network].pop(key)
        if change:
            state["networks"][network][key] = change(tensor)

    forge(folder, lie)
    code, errors = main(rnm, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "70")
    assert code == 2 and errors[-1] == f"error: --resume {folder}: no whole checkpoint in it" and len(errors) == 2


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


def test_what_the_user_keeps_beside_the_checkpoints_stays(monkeypatch, capsys):
    _, _, folder = rnm.train(rnm.Args(**TINY))
    newest = folder / "checkpoints" / "000000060.pt"
    kept = [newest.with_name("best.pt"), newest.with_name("000000060 (copy).pt"), folder / "notes.csv"]
    kept += [folder / "masks (copy).bin"]
    for path in kept:
        path.write_text("mine")
    assert main(rnm, monkeypatch, capsys, "--resume", folder, "--total-timesteps", "90")[0] == 0
    assert all(path.read_text() == "mine" for path in kept)
    assert [path.name for path in newest.parent.glob("[0-9]" * 9 + ".pt")].count("000000060.pt") == 0


@pytest.mark.slow  # W&B waits for ten seconds at the end of a run
def test_nothing_of_the_environment_variables_reaches_the_files():
    key = "0123456789abcdef" * 2 + "deadbeef"
    variables = {**os.environ, "WANDB_API_KEY": key, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "SECRET": key}
    command = [
        sys.executable,
        ROOT / "rnm_td3_continuous.py",
        *flags_of({**TINY, "env_id": "InvertedPendulum-v5"}),
        "--track",
        "--save-model",
    ]
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
    assert len(runs) == 2 and all(path.name.endswith(folder.name) for path in runs)  # the same run goes on
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
        ("returns too much", "the environment failed in step: "),  # for float32, as buffer and networks have it
        ("rewards infinity", "the environment failed in step: ValueError('NaN or infinity in observation or reward')"),
        ("rewards a word", "the environment failed in step: "),
        ("returns a wrong shape", "in step: ValueError('observation of shape (3,) instead of (2,)')"),
        ("returns nothing", "the environment failed in step: "),
        ("returns four", "in step: ValueError('not enough values to unpack (expected 5, got 4)')"),
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
    state, saved = read(script, folder, script.ReplayBuffer(100, 2, 3))
    assert state["step"] in (35, 36) and saved.added in (34, 35, 36)
    monkeypatch.setattr(Faulty, "fault", "none")
    _, buffer, _ = script.train(script.Args(**settings, resume=str(folder)))
    assert "broke off an episode" in capsys.readouterr().err and buffer.added == saved.added + 60 - state["step"]
    assert torch.isfinite(buffer.rows[: buffer.size]).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_environment_of_the_evaluation_costs_nothing_learned(script, monkeypatch, capsys):
    settings = {**TINY, "eval_interval": 25, "eval_episodes": 1}
    step = script.CheckedEnv.step

    def fail(self, action):
        if sys._getframe(1).f_code.co_name == "evaluate":
            raise script.EnvironmentFault("the environment failed in step: gone")
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(script.CheckedEnv, "step", fail)
        code, errors = main(script, monkeypatch, capsys, *flags_of(settings))
    (folder,) = Path("runs").iterdir()
    assert code == 1 and len(errors) == 1 and errors[0].startswith("error: step 25: the environment failed in step")
    assert errors[0].endswith(f"; --resume {folder} goes on from step 25")
    _, buffer, _ = script.train(script.Args(**settings, resume=str(folder)))
    assert buffer.added == 60


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_renderer_that_fails_costs_nothing_learned(script, monkeypatch, capsys):
    monkeypatch.setattr(Rendered, "fails_after", 12)
    code, errors = main(script, monkeypatch, capsys, *flags_of({**TINY, "env_id": "Rendered-v0"}), "--capture-video")
    (folder,) = Path("runs").iterdir()
    assert code == 1 and "the environment failed in step: RuntimeError('context lost')" in errors[-1]
    assert f"; --resume {folder} goes on from step " in errors[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_model_is_written_with_what_is_not_finite(script, monkeypatch, capsys):
    """Nor a checkpoint: the environment fails before the next look at the losses."""
    monkeypatch.setattr(Faulty, "fault", "raises at 35")
    with monkeypatch.context() as patch:
        agent_type = script.TD3 if script is rnm else script.FusedTD3
        update = agent_type.update_targets

        def break_critic(agent):
            update(agent)
            agent.qf2.net[-1].bias.data.fill_(float("nan"))

        patch.setattr(agent_type, "update_targets", break_critic)
        if script is rnm:
            patch.setattr(rnm, "choose_agent", lambda *_: rnm.TD3)
        settings = {**TINY, "env_id": "Faulty-v0", "policy_frequency": 7, "learning_starts": 27}
        settings["checkpoint_interval"] = 1000
        code, errors = main(script, monkeypatch, capsys, *flags_of(settings), "--save-model")
    (folder,) = Path("runs").iterdir()
    assert code == 1 and not (folder / "model.pt").exists() and not (folder / "checkpoints").exists()
    assert errors[1].startswith("warning: at the end: FloatingPointError(") and "model.pt is not written" in errors[1]
    assert errors[-1].startswith("error: step 35: the environment failed in step")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_generator_that_cannot_be_kept_is_said_at_once(script, monkeypatch, capsys):
    flags = flags_of({**TINY, "env_id": "OldGenerator-v0"})
    code, errors = main(script, monkeypatch, capsys, *flags)
    assert code == 1 and len(errors) == 1 and "step 0: its np_random is no NumPy Generator" in errors[0]
    assert main(script, monkeypatch, capsys, *flags, "--checkpoint-interval", 0) == (0, [])


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
