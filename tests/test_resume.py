"""A run that was cut off and resumed ends as one that was not, to the bit: here in one process, by signals."""

import csv
import json
import os
import random
import re
import signal
import threading
from pathlib import Path

import environments  # noqa: F401
import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rnm_td3_continuous as rnm
import td3_continuous as td3

SCRIPTS = [rnm, td3]
SMALL = {"env_id": "Scripted-v0", "total_timesteps": 60, "learning_starts": 20, "eval_interval": 0, "batch_size": 8}


def contents(agent, buffer, folder):
    """All that two runs can have in common: everything but wall times."""
    files = {"added": buffer.added, "rows": buffer.rows[: buffer.size].clone()} | agent.state_dict()
    for name in ("episodes.csv", "evaluations.csv"):
        rows = list(csv.DictReader((folder / name).read_text().splitlines()))
        files[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    for path in sorted((folder / "masks").glob("*")):
        with np.load(path) as file:
            files |= {f"{path.name}.{key}": torch.from_numpy(file[key]) for key in ("step", "update", "shapes", "bits")}
    # several event files of one second are not in order
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    for tag in events.Tags()["scalars"]:
        values = sorted((event.step, event.value) for event in events.Scalars(tag))
        files[tag] = [step for step, _ in values] if tag == "charts/SPS" else values
    return files


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if torch.is_tensor(value) else repr(value) == repr(second[name])
        assert same, name


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
    "dense layers": {"dense_layers": "first", "mask_update_interval": 4, "n": 1},
    "overlap": {"overlap": True},
    "buffer that wraps": {"buffer_size": 13, "checkpoint_interval": 5},
    "buffer smaller than the interval": {"buffer_size": 9, "checkpoint_interval": 20},
    "masks never change": {"mask_update_interval": 0},
    "physics": {"env_id": "Hopper-v5", "mask_update_interval": 5},
    "pixels": {"env_id": "ScriptedMatrix-v0"},
}


@pytest.mark.parametrize(
    "case, steps", [*((case, [5, 31, 3]) for case in CASES), ("masked", [20, 1]), ("masked", [59])]
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(script, case, steps, monkeypatch):
    settings = {**SMALL, "eval_interval": 15, "eval_episodes": 2, "checkpoint_interval": 10, **CASES[case]}
    if CASES[case].get("backend") == "native" and (problem := rnm.load_kernels()):
        pytest.skip(problem)
    if script is td3:
        settings = {key: value for key, value in settings.items() if key in td3.Args.__dataclass_fields__}
    if "v0" in settings["env_id"]:  # these count their episodes: an evaluation differs with those before it
        settings["eval_interval"] = 0
    whole = contents(*script.train(script.Args(**settings, exp_name="whole")))
    parts = contents(*train_in_parts(script, {**settings, "exp_name": "parts"}, steps, monkeypatch))
    assert_equal(whole, parts)
    assert [path.name for path in Path("runs").glob("*whole*/checkpoints/*060")] == ["000000060"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_videos_of_a_resumed_run_stand_beside_those_before(script):
    settings = {**SMALL, "env_id": "Rendered-v0"}
    plain = script.train(script.Args(**{**settings, "total_timesteps": 90}, exp_name="plain"))
    agent, buffer, folder = script.train(script.Args(**settings))
    videos = []
    for total in (70, 80, 90):  # a flag that may be switched on, and off
        filmed = {"capture_video": total != 80, "total_timesteps": total}
        agent, buffer, _ = script.train(script.Args(**settings | filmed, resume=str(folder)))
        videos.append({path: path.read_bytes() for path in (folder / "videos").glob("*.mp4")})
    assert len(videos[2]) > len(videos[1]) == len(videos[0]) > 0 and videos[0].items() <= videos[2].items()
    assert torch.equal(buffer.rows[:90], plain[1].rows[:90])
    assert all(torch.equal(value, agent.state_dict()[key]) for key, value in plain[0].state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_evaluation_that_was_cut_off_is_made_up_for(script, number, monkeypatch, capsys):
    settings = {**SMALL, "env_id": "InvertedPendulum-v5", "eval_interval": 25, "eval_episodes": 3}
    whole = contents(*script.train(script.Args(**settings, exp_name="whole")))
    assert [row["step"] for row in whole["evaluations.csv"]] == ["25", "50", "60"]
    evaluate, folder, cut = script.evaluate, None, 0
    for _ in range(3):  # in the first evaluation, as it is made up for, and again

        def evaluate_and_stop(policy, env, *rest):
            def play(obs):
                os.kill(os.getpid(), number)
                return policy(obs)

            return evaluate(play, env, *rest)

        with monkeypatch.context() as patch, pytest.raises((SystemExit, KeyboardInterrupt)):
            patch.setattr(script, "evaluate", evaluate_and_stop)
            script.train(script.Args(**settings, exp_name="parts", resume=folder))
        (folder,) = map(str, Path("runs").glob("*__parts__*"))
        cut += "interrupted at step 25" in capsys.readouterr().err
    assert cut == 3
    assert_equal(whole, contents(*script.train(script.Args(**settings, exp_name="parts", resume=folder))))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_can_be_made_longer(script, capsys):
    settings = {**SMALL, "env_id": "InvertedPendulum-v5"}
    whole = contents(*script.train(script.Args(**{**settings, "total_timesteps": 90}, exp_name="whole")))
    _, _, folder = script.train(script.Args(**settings, exp_name="parts"))
    longer = script.Args(**{**settings, "total_timesteps": 90}, exp_name="parts", resume=str(folder))
    longer = contents(*script.train(longer))
    for name, value in whole.items():
        if torch.is_tensor(value) or "/" not in name:  # the shorter run logged its last step
            assert_equal({name: value}, {name: longer[name]})
    assert json.loads((folder / "config.json").read_text())["total_timesteps"] == 90
    with pytest.raises(script.UsageError, match="--total-timesteps is 89; the run is at 90 already"):
        script.train(script.Args(**{**settings, "total_timesteps": 89}, exp_name="parts", resume=str(folder)))
    capsys.readouterr()
    script.train(script.Args(**{**settings, "total_timesteps": 90}, exp_name="parts", resume=str(folder)))
    assert "resumed at step 90" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_change_the_result_are_refused(script, monkeypatch, capsys):
    _, _, folder = script.train(script.Args(**SMALL))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = {"--gamma 0.9": "gamma is 0.9, 0.99 in", "--seed 2": "seed is 2, 1 in", "--tau 0.1": "tau is 0.1, 0.005 in"}
    bad |= {"--hidden-sizes 8 8": "hidden_sizes is [8, 8], [256, 256] in", "--exp-name x": "exp_name is x, "}
    bad |= {"--eval-interval 5": "eval_interval is 5, 0 in"}
    bad |= {"--batch-size 9": "batch_size is 9, 8 in", "--env-id ScriptedMatrix-v0": "env_id is ScriptedMatrix-v0, "}
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
def test_an_environment_without_a_state_resumes_with_a_new_episode_and_says_so(script, monkeypatch, capsys):
    reset = Scripted.reset

    def reset_with_secret(self, **options):
        self.secret = threading.Lock()
        return reset(self, **options)

    monkeypatch.setattr(Scripted, "reset", reset_with_secret)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(script, 31, patch)
        script.train(script.Args(**SMALL))
    (folder,) = Path("runs").iterdir()
    capsys.readouterr()
    _, buffer, _ = script.train(script.Args(**SMALL, resume=str(folder)))
    message = "the environment cannot be brought back (its secret: lock has no form in JSON): on with a new episode"
    assert message in capsys.readouterr().err
    rows = buffer.rows[:60].numpy()
    assert (rows[:60, :2] + [0, 1] == rows[:60, 5:7]).all()  # no transition crosses a reset
    assert rows[30].tolist()[:2] == [10, 0] and rows[31].tolist()[:2] == [1, 0]
    episodes = list(csv.DictReader((folder / "episodes.csv").read_text().splitlines()))
    after = next(row for row in episodes if int(row["step"]) > 31)
    assert (after["step"], after["return"], after["length"]) == ("35", "50.0", "4")  # the whole of episode 1
    assert not np.array_equal(rows[0, 2:5], rows[31, 2:5])


class Nested(Scripted):
    """State in containers, whose types JSON alone does not keep, and in a table that all environments share."""

    TABLE = np.arange(6.0).reshape(3, 2)

    def __init__(self, view=False, **names):
        super().__init__()
        self.view, self.env, self.counts, self.last, self.path = view, None, {1: 0, (1, 2): 0.5}, None, []

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.env = [self.count, self.env[0] if self.env else 0]  # a name that wrappers have, too
        self.counts[1] += 1
        self.last = (self.episode, [np.float32(reward), np.array([self.count])])
        self.path.append((self.count, self.counts[1]))
        if self.view:
            self.goal = self.TABLE[self.count % 3]
        found = [type(x) for x in (*self.counts, self.last, self.last[1], *self.last[1], self.path[0])]
        assert found == [int, tuple, tuple, list, np.float32, np.ndarray, tuple]
        drawn = random.gauss() + np.random.normal()  # some environments draw from the generators of all
        return obs, self.counts[1] + self.env[0] + len(self.path) + self.last[1][0] + drawn, *rest

    def reset(self, **options):
        if self.view:
            self.goal = self.TABLE[0]
        return super().reset(**options)


gym.register("Nested-v0", Nested)
gym.register("View-v0", Nested, kwargs={"view": True})


@pytest.mark.parametrize("script", SCRIPTS)
def test_attributes_in_containers_and_of_any_name(script, monkeypatch):
    settings = {**SMALL, "env_id": "Nested-v0"}
    whole = contents(*script.train(script.Args(**settings, exp_name="whole")))
    parts = train_in_parts(script, {**settings, "exp_name": "parts"}, [7, 3, 27], monkeypatch)
    assert_equal(whole, contents(*parts))


def test_a_part_of_another_array_is_not_written_through(monkeypatch, capsys):
    settings = {**SMALL, "env_id": "View-v0", "exp_name": "parts"}
    train_in_parts(rnm, settings, [32], monkeypatch)
    message = (
        "note: the environment cannot be brought back (its goal is a part of another array): on with a new episode"
    )
    assert message in capsys.readouterr().err
    assert (np.arange(6.0).reshape(3, 2) == Nested.TABLE).all()


@pytest.mark.parametrize("attribute", ["circle", "data"])
def test_what_cannot_be_captured_is_no_error(attribute, monkeypatch, capsys):
    circle = []
    circle.append(circle)
    physics = rnm.make_env("InvertedPendulum-v5").unwrapped.data  # under a name that hides its model
    monkeypatch.setattr(Scripted, "__init__", lambda self: None)
    monkeypatch.setattr(Scripted, "observation_space", gym.spaces.Box(-np.inf, np.inf, (2,), np.float64), raising=False)
    monkeypatch.setattr(Scripted, "reward", None, raising=False)
    reset = Scripted.reset

    def strange_reset(self, **options):
        self.episode = getattr(self, "episode", -1)
        self.strange = circle if attribute == "circle" else physics
        return reset(self, **options)

    monkeypatch.setattr(Scripted, "reset", strange_reset)
    _, _, folder = rnm.train(rnm.Args(**SMALL))
    rnm.train(rnm.Args(**{**SMALL, "total_timesteps": 70}, resume=str(folder)))
    assert "note: the environment cannot be brought back (its strange: " in capsys.readouterr().err


MUJOCO = [
    spec.id
    for spec in gym.registry.values()
    if re.fullmatch(r"gymnasium\.envs\.mujoco.*_v[45]:.*", str(spec.entry_point))
]


@pytest.mark.parametrize("env_id", [*MUJOCO, "Pendulum-v1", "MountainCarContinuous-v0"])
def test_state_of_every_environment_is_captured_to_the_bit(env_id):
    """In the middle of an episode, and through JSON; then many steps side by side, over resets."""
    try:
        first, second = rnm.make_env(env_id), rnm.make_env(env_id)
    except rnm.UsageError as error:
        pytest.skip(str(error))
    first.action_space.seed(3)
    first.reset(seed=5)
    second.reset(seed=9)
    for _ in range(50):
        obs, _, terminated, truncated, _ = first.step(first.action_space.sample())
        if terminated or truncated:
            obs, _ = first.reset()
    state = json.loads(json.dumps(rnm.get_env_state(first, obs)))
    copied = rnm.set_env_state(second, state)
    assert copied.dtype == obs.dtype and (copied == obs).all()
    resets = 0
    for _ in range(1100):
        actions = [env.action_space.sample() for env in (first, second)]
        assert (actions[0] == actions[1]).all()
        (obs, *ours), (other, *theirs) = (env.step(actions[0])[:4] for env in (first, second))
        assert (obs == other).all() and ours == theirs
        if ours[1] or ours[2]:
            resets += 1
            assert (first.reset()[0] == second.reset()[0]).all()
    assert resets > 0


def test_the_physics_is_captured_with_what_the_next_step_looks_back_at(monkeypatch):
    """`mj_getState` alone is not enough: Ant's reward starts from a position that the last step left behind."""
    first, second = rnm.make_env("Ant-v5"), rnm.make_env("Ant-v5")
    for env in (first, second):
        env.action_space.seed(3)
        env.reset(seed=5)
    obs = first.step(first.action_space.sample())[0]
    state = rnm.get_env_state(first, obs)
    with monkeypatch.context() as patch:
        patch.setattr(rnm, "mujoco_arrays", lambda model: [])
        rnm.set_env_state(second, state)
    action = first.action_space.sample()
    assert first.step(action)[1] != second.step(action)[1]
