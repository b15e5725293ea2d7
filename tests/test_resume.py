"""A run that was cut off and resumed ends as one that was not, to the bit: here in one process, by signals."""

import csv
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path

import environments  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import needs_gpu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rnm_td3_continuous as rnm
import sad_analysis
import td3_continuous as td3

SCRIPTS = [rnm, td3]
SMALL = {"env_id": "Wander-v0", "total_timesteps": 60, "learning_starts": 20, "eval_interval": 0, "batch_size": 8}


def tensors_of(value, name=""):
    """Every tensor in nested containers, by its path."""
    if torch.is_tensor(value):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {path: tensor for key, item in items for path, tensor in tensors_of(item, f"{name}.{key}").items()}


def logs_of(folder):
    """CSV rows without wall time, masks, TensorBoard scalars as it shows them (of SPS the steps alone)."""
    files = {}
    for name in ("episodes.csv", "evaluations.csv"):
        rows = list(csv.DictReader((folder / name).read_text().splitlines()))
        files[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    for path in folder.glob("masks.bin"):
        files["masks"] = torch.from_numpy(np.fromfile(path, np.uint8))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        files[tag] = [event.step if tag == "charts/SPS" else (event.step, event.value) for event in events.Scalars(tag)]
    return files


def contents(agent, buffer, folder):
    """All that two runs can have in common: everything but wall times."""
    networks = {name: network.state_dict() for name, network in agent.networks.items()}
    optimizers = [agent.actor_optimizer.state_dict(), agent.q_optimizer.state_dict()]
    ours = tensors_of({"networks": networks, "optimizers": optimizers, "actor_loss": agent.actor_loss})
    return {"added": buffer.added, "rows": buffer.rows[: buffer.size].clone()} | ours | logs_of(folder)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if torch.is_tensor(value) else repr(value) == repr(second[name])
        assert same, name


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard reads event files by name, in which the second stands: here many runs fall into one."""
    clock = itertools.count(int(time.time()))
    module = "tensorboard.summary.writer.event_file_writer.time.time"
    monkeypatch.setattr(module, lambda real=time.time: next(clock) if in_writer() else real())


def in_writer():
    return "event_file_writer" in __import__("sys")._getframe(2).f_code.co_filename


def stop_at(script, step, monkeypatch, number=signal.SIGTERM):
    """Send this process a signal when the buffer has got `step` transitions since now."""
    left, add = [step], script.ReplayBuffer.add

    def add_and_stop(self, *transition):
        add(self, *transition)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script.ReplayBuffer, "add", add_and_stop)


def train_in_parts(script, settings, steps, monkeypatch, number=signal.SIGTERM):
    """Stopped by a signal after each number of `steps`, resumed in between and to the end."""
    folder = None
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
            stop_at(script, step, patch, number)
            script.train(script.Args(**settings, resume=folder))
        assert stopped.type is KeyboardInterrupt if number == signal.SIGINT else stopped.value.code == 128 + number
        (folder,) = map(str, Path("runs").glob(f"*__{settings['exp_name']}__*"))
    return script.train(script.Args(**settings, resume=folder))


CASES = {
    "masked": {"backend": "masked", "mask_update_interval": 7},
    "native": {"backend": "native", "mask_update_interval": 3, "n": 1},
    "native, online masks": {"backend": "native", "mask_update_interval": 3, "target_mask": "online"},
    "denser critics": {"mask_update_interval": 3, "n": 1, "m": 8, "critic_m": 4},
    "dense layers": {"dense_layers": "first", "mask_update_interval": 4, "n": 1},
    "overlap": {"overlap": True},
    "rare actor updates": {"policy_frequency": 23},
    "buffer that wraps": {"buffer_size": 13, "checkpoint_interval": 8},
    "buffer smaller than the interval": {"buffer_size": 9, "checkpoint_interval": 20},
    "masks never change": {"mask_update_interval": 0},
    "draws from all generators": {"env_id": "WanderDraws-v0", "mask_update_interval": 5},
    "physics": {"env_id": "Hopper-v5", "mask_update_interval": 5},
}
ON_A_GPU = {
    "on a GPU": {},
    "denser critics on a GPU": {"mask_update_interval": 3, "n": 1, "m": 8, "critic_m": 4},
    "semi_structured": {"backend": "semi_structured", "mask_update_interval": 7},
}
CASES |= {case: settings | {"hidden_sizes": (64, 64)} for case, settings in ON_A_GPU.items()}


@pytest.mark.parametrize(
    "case, steps",
    [
        *(
            pytest.param(case, [5, 31, 3], marks=[pytest.mark.cuda, needs_gpu] if case in ON_A_GPU else ())
            for case in CASES
        ),
        ("masked", [20, 1]),
        ("masked", [25]),
        ("masked", [50]),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(script, case, steps, monkeypatch, capsys):
    settings = {**SMALL, "eval_interval": 15, "eval_episodes": 2, "checkpoint_interval": 10, **CASES[case]}
    if CASES[case].get("backend") == "native" and (problem := rnm.load_kernels()):
        pytest.skip(problem)
    if script is td3:
        settings = {key: value for key, value in settings.items() if key in td3.Args.__dataclass_fields__}
    if case == "physics":  # episodes of some 20 steps
        settings, steps = {**settings, "total_timesteps": 150, "checkpoint_interval": 40}, [30, 50]
    whole = contents(*script.train(script.Args(**settings, exp_name="whole")))
    capsys.readouterr()
    assert whole[".networks.actor.net.0.bias"].is_cuda == (case in ON_A_GPU)
    parts = contents(*train_in_parts(script, {**settings, "exp_name": "parts"}, steps, monkeypatch))
    out, err = capsys.readouterr()
    assert out.count("resumed at step") == len(steps) and "broke off" not in err
    assert err.count("finishing the episode") == 0  # straight to the file descriptor, from a handler of signals
    assert_equal(whole, parts)
    (last,) = Path("runs").glob(f"*whole*/checkpoints/*{settings['total_timesteps']:09d}.pt")
    assert torch.load(last, weights_only=True)["step"] == settings["total_timesteps"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_wait_for_the_end_of_an_episode(script):
    """Interval 10: due at 10, 20, ...; each stands where the episode that ran then has ended."""
    writes, write = [], script.Checkpoints.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Checkpoints, "write", lambda *rest: writes.append(rest[1]) or write(*rest))
        _, _, folder = script.train(script.Args(**{**SMALL, "checkpoint_interval": 10}))
    ends = [int(row["step"]) for row in csv.DictReader((folder / "episodes.csv").read_text().splitlines())]
    expected = [min(end for end in ends if end >= due) for due in (10, 20, 30, 40, 50)]
    assert writes == [*expected, 60] and len(set(expected)) == 5
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        f"{expected[-1]:09d}.pt", "000000060.pt", "replay.f32"
    ]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_episode_that_does_not_end_is_broken_off(script, monkeypatch, capsys):
    settings = {**SMALL, "env_id": "WanderLong-v0", "checkpoint_interval": 10}
    writes, write = [], script.Checkpoints.write
    monkeypatch.setattr(script.Checkpoints, "write", lambda *rest: writes.append(rest[1]) or write(*rest))
    whole = script.train(script.Args(**settings, exp_name="whole"))
    assert writes == [20, 40, 60]  # due at 10, and an interval later it is still running
    assert whole[1].rows[:60, 0].unique().numel() == 60 and "broke off" not in capsys.readouterr().err
    longer = {**settings, "total_timesteps": 80, "exp_name": "whole", "resume": str(whole[2])}
    _, buffer, _ = script.train(script.Args(**longer))
    message = (
        "note: the checkpoint at step 60 broke off an episode: on with a new one, not to the bit what a run without"
    )
    assert message in capsys.readouterr().err
    assert torch.equal(buffer.rows[:60], whole[1].rows[:60])
    assert torch.equal(buffer.rows[59, 4:6], buffer.rows[60, :2]) is False  # a new episode
    # a signal: 10 s after it, here none
    clock, real = itertools.count(), time.monotonic
    monkeypatch.setattr(script.time, "monotonic", lambda: real() + 11 * next(clock))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(script, 33, patch)
        script.train(script.Args(**{**settings, "checkpoint_interval": 1000}, exp_name="signal"))
    assert "interrupted at step 33" in capsys.readouterr().err and writes[-1] == 33


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_within_the_end_of_a_step_costs_no_checkpoint(script, monkeypatch):
    """It comes after the look at it that asks for a checkpoint."""
    looks = itertools.count()
    late = property(lambda run: signal.SIGTERM if run.step >= 33 and next(looks) else 0, lambda *_: None)
    monkeypatch.setattr(getattr(script, "SparseRun", script.Run), "signal", late, raising=False)
    with pytest.raises(SystemExit):
        script.train(script.Args(**{**SMALL, "checkpoint_interval": 1000}, exp_name="late"))
    assert len(list(Path("runs").glob("*__late__*/checkpoints/*.pt"))) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_checkpoints_a_signal_ends_the_run_after_its_step(script, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(script, 33, patch)
        script.train(script.Args(**{**SMALL, "env_id": "WanderLong-v0", "checkpoint_interval": 0}))
    assert "interrupted at step 33" in capsys.readouterr().err and not list(Path("runs").glob("*/checkpoints"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_videos_of_a_resumed_run_stand_beside_those_before(script):
    settings = {**SMALL, "env_id": "Rendered-v0"}
    _, _, folder = script.train(script.Args(**settings))
    videos = []
    for total in (70, 80, 90):  # a flag that may be switched on, and off
        filmed = {"capture_video": total != 80, "total_timesteps": total}
        _, buffer, _ = script.train(script.Args(**settings | filmed, resume=str(folder)))
        videos.append({path: path.read_bytes() for path in (folder / "videos").rglob("*.mp4")})
    assert len(videos[2]) > len(videos[1]) == len(videos[0]) > 0 and videos[0].items() <= videos[2].items()
    assert buffer.added == 90


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_can_be_made_longer(script, monkeypatch, capsys):
    whole = contents(*script.train(script.Args(**{**SMALL, "total_timesteps": 90}, exp_name="whole")))
    ends = [int(row["step"]) for row in whole["episodes.csv"]]
    shorter = next(end for end in ends if end >= 50)  # where an episode ends
    _, _, folder = script.train(script.Args(**{**SMALL, "total_timesteps": shorter}, exp_name="parts"))
    longer = script.Args(**{**SMALL, "total_timesteps": 90}, exp_name="parts", resume=str(folder))
    longer = contents(*script.train(longer))
    for name, value in whole.items():
        if torch.is_tensor(value) or "/" not in name:  # the shorter run logged its last step
            assert_equal({name: value}, {name: longer[name]})
    assert json.loads((folder / "config.json").read_text())["total_timesteps"] == 90
    with pytest.raises(script.UsageError, match="--total-timesteps is 89; the run is at 90 already"):
        script.train(script.Args(**{**SMALL, "total_timesteps": 89}, exp_name="parts", resume=str(folder)))
    capsys.readouterr()
    script.train(script.Args(**{**SMALL, "total_timesteps": 90}, exp_name="parts", resume=str(folder)))
    assert "resumed at step 90" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_change_the_result_are_refused(script, monkeypatch, capsys):
    _, _, folder = script.train(script.Args(**SMALL))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = {"--gamma 0.9": "gamma is 0.9, 0.99 in", "--seed 2": "seed is 2, 1 in", "--tau 0.1": "tau is 0.1, 0.005 in"}
    bad |= {"--hidden-sizes 8 8": "hidden_sizes is (8, 8), (256, 256) in", "--exp-name x": "exp_name is x, "}
    bad |= {"--eval-interval 5": "eval_interval is 5, 0 in", "--env-id Scripted-v0": "env_id is Scripted-v0, Wander-v0"}
    bad |= {"--batch-size 9": "batch_size is 9, 8 in", "--env-id WanderDraws-v0": "env_id is WanderDraws-v0, "}
    bad |= {"--n 1": "n is 1, 2 in", "--no-save-masks": "save_masks is False, True in"} if script is rnm else {}
    for flags, message in bad.items():
        monkeypatch.setattr(script.sys, "argv", ["script", "--resume", str(folder), *flags.split()])
        assert script.main() == 2, flags
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(error) == 1 and f"--resume: {message}" in error[0], error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    flags = "--total-timesteps 70 --profile --save-model --checkpoint-interval 3 --overlap"
    monkeypatch.setattr(script.sys, "argv", ["script", "--resume", str(folder), *flags.split()])
    assert script.main() == 0
    assert "step 70/70" in capsys.readouterr().out and (folder / "model.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_machine_is_said(script, capsys, monkeypatch):
    _, _, folder = script.train(script.Args(**SMALL))
    capsys.readouterr()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    script.train(script.Args(**SMALL, resume=str(folder)))
    assert "note: num_threads is 7, 1 in the run to resume; the last bits" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_an_environment_carries_over_a_reset_begins_anew(script, monkeypatch):
    """Scripted counts its episodes, which no generator knows: a new one begins at 0, and no transition crosses it."""
    settings = {**SMALL, "env_id": "Scripted-v0"}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(script, 31, patch)
        script.train(script.Args(**settings))
    (folder,) = Path("runs").iterdir()
    _, buffer, _ = script.train(script.Args(**settings, resume=str(folder)))
    rows = buffer.rows[:60].numpy()
    assert (rows[:60, :2] + [0, 1] == rows[:60, 5:7]).all()
    assert rows[33].tolist()[:2] == [10, 3] and rows[34].tolist()[:2] == [0, 0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["episodes.csv", "evaluations.csv"])
@pytest.mark.parametrize("left", [None, 0, 1])
def test_rows_that_are_missing_are_said(script, name, left, capsys):
    settings = {**SMALL, "eval_interval": 15, "eval_episodes": 1}
    _, _, folder = script.train(script.Args(**settings))
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).unlink()
    if left is not None:
        (folder / name).write_text("".join(lines[: 1 + left]) + lines[1 + left][:5])  # and a half one
    capsys.readouterr()
    script.train(script.Args(**{**settings, "total_timesteps": 75}, resume=str(folder)))
    message = f"note: {folder}/{name} has {left or 0} of {len(lines) - 1} rows; what is missing stays missing\n"
    assert capsys.readouterr().err.count(message) == 1
    now = (folder / name).read_text().splitlines(keepends=True)
    assert now[: 1 + (left or 0)] == lines[: 1 + (left or 0)] and int(now[-1].split(",")[0]) > 60
    assert all(line.count(",") == lines[0].count(",") for line in now)


def test_a_mask_history_that_is_cut_is_said_and_goes_on_in_a_new_file(capsys):
    settings = {**SMALL, "mask_update_interval": 5, "learning_rate": 1e-2}
    _, _, folder = rnm.train(rnm.Args(**settings))
    whole = (folder / "masks.bin").read_bytes()
    (folder / "masks.bin").write_bytes(whole[:-7])
    capsys.readouterr()
    agent, _, _ = rnm.train(rnm.Args(**{**settings, "total_timesteps": 90}, resume=str(folder)))
    assert f"note: {folder}/masks.bin is missing or cut; the history goes on in a new" in capsys.readouterr().err
    assert (folder / "masks.bin.60").read_bytes() == whole[:-7]
    _, _, rows = sad_analysis.read_masks(folder, 5, notes := [])
    assert [update for _, update, _ in rows] == [45, 50, 55, 60, 65, 70] and not notes
    masks = np.zeros_like(rnm.flat_masks(agent))
    for *_, changed in rows:
        masks[changed] ^= True
    assert (masks == rnm.flat_masks(agent)).all()
    run = sad_analysis.read_run(folder)
    sad_analysis.add_history(run, 10)
    assert "its masks begin late: nothing is said on their stability" in run.notes and run.stability["spread"] is None
    (folder / "masks.bin").unlink()
    rnm.train(rnm.Args(**{**settings, "total_timesteps": 120}, resume=str(folder)))
    assert "masks.bin is missing or cut" in capsys.readouterr().err


@pytest.mark.parametrize("total", [66, 90])  # the new history is then shorter, or longer, than what it follows
def test_a_mask_history_that_is_cut_survives_a_second_crash(total, capsys):
    """Killed before the next checkpoint: that of step 60 still has the size of the history that was cut."""
    settings = {**SMALL, "mask_update_interval": 5, "learning_rate": 1e-2}
    _, _, folder = rnm.train(rnm.Args(**settings))
    whole = (folder / "masks.bin").read_bytes()
    (folder / "masks.bin").write_bytes(whole[:-7])
    for total_timesteps in (total, 75):
        args = rnm.Args(**{**settings, "total_timesteps": total_timesteps}, resume=str(folder))
        agent, _, _ = rnm.train(args)
        for path in folder.glob("checkpoints/*.pt"):
            if path.stem > "000000060":
                path.unlink()
    assert capsys.readouterr().err.count("masks.bin is missing or cut") == 1
    assert (folder / "masks.bin.60").read_bytes() == whole[:-7]
    _, _, rows = sad_analysis.read_masks(folder, 5, notes := [])
    assert [update for _, update, _ in rows] == [45, 50, 55] and not notes
    masks = np.zeros_like(rnm.flat_masks(agent))
    for *_, changed in rows:
        masks[changed] ^= True
    assert (masks == rnm.flat_masks(agent)).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_seconds_are_those_of_training_and_go_on(script, monkeypatch):
    """Evaluations are left out, earlier parts count; steps per second are of the process alone."""
    now = [0.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    evaluate, add = script.evaluate, script.ReplayBuffer.add
    patient = lambda *rest: now.__setitem__(0, now[0] + 1000.0) or evaluate(*rest)  # noqa: E731
    monkeypatch.setattr(script, "evaluate", patient)
    slow = lambda self, *rest: now.__setitem__(0, now[0] + 2.0) or add(self, *rest)  # noqa: E731
    monkeypatch.setattr(script.ReplayBuffer, "add", slow)
    settings = {**SMALL, "eval_interval": 15, "eval_episodes": 1}
    _, _, folder = script.train(script.Args(**settings))
    now[0] = 77_000.0
    script.train(script.Args(**{**settings, "total_timesteps": 110}, resume=str(folder)))
    for name in ("episodes.csv", "evaluations.csv"):
        rows = list(csv.DictReader((folder / name).read_text().splitlines()))
        assert list(rows[0])[-1] == "seconds"
        assert [float(row["seconds"]) for row in rows] == [2.0 * int(row["step"]) for row in rows]
    speeds = EventAccumulator(str(folder)).Reload().Scalars("charts/SPS")
    assert [(event.step, event.value) for event in speeds] == [
        (60, int(60 / (120 + 4000))),
        (100, int(40 / (80 + 2000))),
        (110, int(50 / (100 + 4000))),
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_long_evaluation_breaks_no_episode_off(script, monkeypatch):
    now, evaluate = [0.0], script.evaluate
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])

    def long_evaluation(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 1000.0
        return evaluate(*rest)

    monkeypatch.setattr(script, "evaluate", long_evaluation)
    with pytest.raises(SystemExit):
        script.train(script.Args(**{**SMALL, "eval_interval": 23, "eval_episodes": 1}))
    (path,) = Path("runs").glob("*/checkpoints/*.pt")
    state = torch.load(path, weights_only=True)
    assert state["episode_over"] is True and 23 < state["step"] <= 30


MUJOCO = [
    spec.id
    for spec in gym.registry.values()
    if re.fullmatch(r"gymnasium\.envs\.mujoco.*_v[45]:.*", str(spec.entry_point))
]


@pytest.mark.parametrize("env_id", [*MUJOCO, "Pendulum-v1", "MountainCarContinuous-v0", "Wander-v0"])
def test_between_two_episodes_every_environment_is_its_generators(env_id):
    """In the middle of a run, through a file; then many steps side by side, over resets."""
    try:
        first, second = rnm.make_env(env_id), rnm.make_env(env_id)
    except rnm.UsageError as error:
        pytest.skip(str(error))
    run, other = (object.__new__(rnm.Run) for _ in range(2))
    run.env, other.env = first, second
    first.action_space.seed(3)
    first.reset(seed=5)
    for _ in range(50):
        _, _, terminated, truncated, _ = first.step(first.action_space.sample())
        if terminated or truncated:
            first.reset()
    torch.save([generator.state for generator in run.generators()], "state.pt")
    for generator, state in zip(other.generators(), torch.load("state.pt", weights_only=True), strict=True):
        generator.state = state
    assert (first.reset()[0] == second.reset()[0]).all()
    resets = 0
    for _ in range(1100):
        actions = [env.action_space.sample() for env in (first, second)]
        assert (actions[0] == actions[1]).all()
        (obs, *ours), (copy, *theirs) = (env.step(actions[0])[:4] for env in (first, second))
        assert (obs == copy).all() and ours == theirs
        if ours[1] or ours[2]:
            resets += 1
            assert (first.reset()[0] == second.reset()[0]).all()
    assert resets > 0


def test_a_run_of_the_cpu_kernels_goes_on_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch, capsys):
    if problem := rnm.load_kernels():
        pytest.skip(problem)
    settings = {**SMALL, "n": 1, "checkpoint_interval": 10}
    whole = contents(*rnm.train(rnm.Args(**settings, exp_name="whole")))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(rnm, 30, patch)
        rnm.train(rnm.Args(**settings, exp_name="parts"))
    (folder,) = Path("runs").glob("*__parts__*")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["backend"] == "native"  # what `auto` was there, and what `main` takes as the default
    parts = contents(*rnm.train(rnm.Args(**settings, backend="native", exp_name="parts", resume=str(folder))))
    assert "--backend native: on the CPU, though there is a GPU" in capsys.readouterr().err
    assert rnm.choose_agent(rnm.Args(n=1), 17, 6, torch.device("cuda")) is rnm.TD3
    assert "--backend masked: on the GPU; with small networks, try --no-cuda" in capsys.readouterr().err
    assert_equal(whole, parts)


def test_a_run_of_a_gpu_goes_on_on_a_machine_without_one(capsys):
    """Begun with `masked` here, and made to look as begun on a GPU: what is computed with is not kept."""
    settings = {**SMALL, "backend": "masked", "checkpoint_interval": 10}
    _, _, folder = rnm.train(rnm.Args(**{**settings, "total_timesteps": 30}))
    newest = max((folder / "checkpoints").glob("*.pt"))
    state = torch.load(newest, weights_only=True)
    state["config"] |= {"backend": "semi_structured", "device": "NVIDIA H100"}
    torch.save(state, newest)
    capsys.readouterr()
    agent, _, _ = rnm.train(rnm.Args(**{**settings, "backend": "semi_structured"}, resume=str(folder)))
    err = capsys.readouterr().err
    assert "note: the run to resume had a backend that this machine lacks: --backend semi_structured needs a GPU" in err
    assert "note: device is cpu, NVIDIA H100 in the run to resume; the last bits of the results may differ" in err
    assert "note: backend is " in err and agent.args.backend in ("native", "masked")
    with pytest.raises(rnm.UsageError, match="semi_structured needs a GPU"):
        rnm.train(rnm.Args(**{**settings, "backend": "semi_structured"}))
