"""Runs of both scripts on small environments: transitions, determinism, run folder, masks, interruption."""

import csv
import json
import pstats
import re
import struct
import sys
import threading
import zlib
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from environments import Scripted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_native import HIGH, LOW, random_batch, update

import rnm_td3_continuous as rnm
import sad_analysis
import td3_continuous as td3

SCRIPTS = [rnm, td3]
TRAINED = {rnm: rnm.TD3, td3: td3.FusedTD3}  # what trains with the backend `masked`, and the dense twin on a CPU
SMALL = {"env_id": "Scripted-v0", "total_timesteps": 60, "learning_starts": 20, "eval_interval": 0, "batch_size": 8}


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def parameters(agent):
    return [p for network in agent.networks.values() for p in network.parameters()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_transitions_land_in_the_buffer(script):
    """Only termination marks a transition; no transition crosses a reset; what was done is what is stored."""
    _, buffer, _ = script.train(script.Args(**SMALL))
    obs, action, next_obs, reward, terminated = (
        part.numpy() for part in buffer.rows[: buffer.size].split(buffer.widths, dim=1)
    )
    assert buffer.size == 60
    expected = []
    for episode in range(60):
        length, terminal = [(3, True), (4, False), (2, True)][episode % 3]
        expected += [(episode, step, step + 1, terminal and step + 1 == length) for step in range(length)]
    for i, (episode, step, next_step, terminal) in enumerate(expected[:60]):
        assert obs[i].tolist() == [episode, step]
        assert next_obs[i].tolist() == [episode, next_step]
        assert reward[i] == 10 * episode + next_step
        assert terminated[i] == terminal
        assert gym.make("Scripted-v0").action_space.contains(action[i])
    assert len(np.unique(action[:20], axis=0)) == 20  # the random ones: what comes later may be clipped to a corner


class Careless(gym.Env):
    """Gives the same array every step, a reward in an array, and changes the action that it is given."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, careless=True, dtype=np.float32, bounds=(-1.0, 1.0), shape=()):
        self.careless, self.shape, (low, high) = careless, shape, np.array(bounds, dtype)
        self.action_space = gym.spaces.Box(low, high, (3,), dtype)
        self.place, self.reward = np.zeros(2), np.zeros(shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.place[:] = 0, self.np_random.normal(size=2)
        return self.place if self.careless else self.place.copy(), {}

    def step(self, action):
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action), action
        self.count += 1
        self.place += action[:2]
        self.reward[...] = self.place.sum()
        if not self.careless:
            return self.place.copy(), float(self.place.sum()), False, self.count == 5, {}
        action[:] = 7
        return self.place, self.reward, False, self.count == 5, {}


gym.register("Careless-v0", Careless)
gym.register("CarelessColumn-v0", Careless, kwargs={"shape": (1,)})
gym.register("Careful-v0", Careless, kwargs={"careless": False})
gym.register("Action64-v0", Careless, kwargs={"dtype": np.float64, "bounds": (-1 / 3, 1 / 3)})  # less than in float32
gym.register("Action16-v0", Careless, kwargs={"dtype": np.float16, "bounds": (-0.1, 0.1)})


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("env_id", ["Careless-v0", "CarelessColumn-v0"])
def test_what_is_kept_is_copied(script, env_id, overlap):
    runs = []
    for name in ("Careful-v0", env_id):
        agent, buffer, folder = script.train(script.Args(**{**SMALL, "env_id": name}, overlap=overlap))
        weights = torch.cat([p.flatten() for p in parameters(agent)])
        runs.append((buffer.rows[:60], weights, [row["return"] for row in read_csv(folder / "episodes.csv")]))
    (rows, weights, returns), careful = runs[1], runs[0]
    assert torch.equal(rows, careful[0]) and torch.equal(weights, careful[1]) and returns == careful[2]
    obs, next_obs = rows[:, :2], rows[:, 5:7]
    assert not (obs == next_obs).all(1).any() and (next_obs[:4] == obs[1:5]).all()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("env_id", ["Action64-v0", "Action16-v0"])
def test_actions_stay_within_the_bounds_in_the_type_of_the_space(script, env_id):
    """The environment asserts it; noise puts most actions on a bound."""
    _, buffer, _ = script.train(script.Args(**{**SMALL, "env_id": env_id, "eval_interval": 20}, exploration_noise=10.0))
    high = float(gym.make(env_id).action_space.high[0])
    on_a_bound = buffer.rows[20:60, 2:5].abs() == torch.tensor(high)
    assert buffer.size == 60 and on_a_bound.float().mean() > 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_acting_and_updating(script, monkeypatch):
    """Random actions before learning, noisy ones after; one critic update a step, an actor update every second."""
    calls = []
    agent, act = TRAINED[script], script.Actor.act
    critics, actor, targets = agent.update_critics, agent.update_actor, agent.update_targets
    monkeypatch.setattr(
        agent, "update_critics", lambda self, batch: calls.append(len(batch[0])) or critics(self, batch)
    )
    monkeypatch.setattr(agent, "update_actor", lambda self, obs: calls.append("actor") or actor(self, obs))
    monkeypatch.setattr(agent, "update_targets", lambda self: calls.append("targets") or targets(self))
    if script is rnm:
        project = agent.project
        monkeypatch.setattr(agent, "project", lambda self: calls.append("project") or project(self))
    clean, noises = [], []

    def spy(self, obs, noise=0.0):
        noises.append(noise)
        clean.append(act(self, obs))
        return act(self, obs, noise)

    monkeypatch.setattr(script.Actor, "act", spy)
    changes = {"total_timesteps": 40, "exploration_noise": 0.3}
    changes |= {"backend": "masked", "mask_update_interval": 4} if script is rnm else {}
    _, buffer, _ = script.train(script.Args(**{**SMALL, **changes}))
    space = gym.make("Scripted-v0").action_space
    space.seed(1)
    stored = buffer.rows[:40, 2:5].numpy()
    assert (stored[:20] == np.stack([space.sample() for _ in range(20)])).all()
    two = [8, 8, "actor", "targets"]  # and a projection comes last
    assert calls == (two * 10 if script is td3 else [*two, *two, "project"] * 5)
    assert noises[:20] == [0.3] * 20
    half_range = (space.high - space.low) / 2
    assert 0.05 < ((stored[20:] - np.stack(clean[:20])) / half_range).std() < 0.4


@pytest.mark.parametrize("dense_layers", ["none", "last"])
def test_an_agent_starts_as_its_flag_says(dense_layers):
    """The weights of `nn.Linear`, times a factor for the whole layer or as they are; active are the largest."""
    sizes, agents = {"hidden_sizes": (24, 40), "n": 1, "m": 4, "dense_layers": dense_layers, "backend": "masked"}, {}
    for init in ("linear", "variance"):
        torch.manual_seed(5)
        agents[init] = rnm.TD3(5, -np.ones(3), np.ones(3), rnm.Args(init=init, **sizes), torch.device("cpu"))
    torch.manual_seed(5)
    dense = td3.TD3(5, -np.ones(3), np.ones(3), td3.Args(hidden_sizes=(24, 40)), torch.device("cpu"))
    for name, layer in agents["linear"].nm_layers.items():
        network, number = name.split(".net.")
        start = dense.networks[network].net[int(number)].weight
        kept = start * rnm.nm_mask(start, 1, 4)
        assert torch.equal(layer.master, start) and torch.equal(layer.sparse_weight(), kept)
        factor = start.norm() / kept.norm()
        torch.testing.assert_close(agents["variance"].nm_layers[name].master, start * factor, rtol=1e-6, atol=0)
        assert factor > 1.2
    assert len(agents["linear"].nm_layers) == (18 if dense_layers == "none" else 12)


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluation(script):
    """On an environment of its own, seeded apart and alike each time, with the policy and without noise."""
    Scripted.resets.clear()
    settings = {**SMALL, "env_id": "ScriptedActionReward-v0", "eval_interval": 20, "eval_episodes": 2}
    agent, buffer, folder = script.train(script.Args(**settings))
    (train_env, train_seed), *_ = Scripted.resets
    assert train_seed == 1
    others = [(env, seed) for env, seed in Scripted.resets if env is not train_env]
    assert len({id(env) for env, _ in others}) == 1 and [seed for _, seed in others] == [101, None] * 3
    assert buffer.rows[:60, 0].max() == 19  # training went through its own episodes only
    env, returns = gym.make("ScriptedActionReward-v0"), []
    for _ in range(6):  # the evaluation environment plays its episodes in turn: the last evaluation saw these two last
        obs, _ = env.reset()
        episodic_return, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.actor.act(obs))
            episodic_return, done = episodic_return + reward, terminated or truncated
        returns.append(episodic_return)
    last = read_csv(folder / "evaluations.csv")[-1]
    assert [float(last["return_1"]), float(last["return_2"])] == pytest.approx(returns[4:], rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_target_noise_and_actions_are_scaled_and_clipped_per_dimension(script):
    low, high = np.array([-1.0, 0.0, -30.0], np.float32), np.array([1.0, 0.5, 10.0], np.float32)
    args = script.Args(backend="masked") if script is rnm else script.Args()  # the kernels call no network
    agent = script.TD3(2, low, high, args, torch.device("cpu"))
    seen = []
    agent.qf1_target.forward = lambda obs, action: seen.append(action) or torch.zeros(len(obs))
    rows = 4000
    zeros = [torch.zeros(rows, width).squeeze(1) for width in (2, 3, 2, 1, 1)]
    agent.update_critics(script.Batch(*zeros))
    clean = agent.actor_target(torch.zeros(1, 2)).detach()
    noise = (seen[0] - clean) / torch.tensor([1.0, 0.25, 20.0])  # in half ranges
    assert noise.abs().max() <= 0.5 + 1e-5 and noise.abs().max() > 0.45
    assert noise.std(0) == pytest.approx(np.full(3, 0.2), rel=0.1)
    actions = np.stack([agent.actor.act(np.zeros(2), noise=5.0) for _ in range(200)])
    assert (actions.min(0) == low).all() and (actions.max(0) == high).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_gives_a_bit_identical_run(script):
    settings = {**SMALL, "env_id": "InvertedPendulum-v5", "total_timesteps": 300, "learning_starts": 100}
    settings |= {"eval_interval": 150, "eval_episodes": 2}
    if script is rnm:
        settings["mask_update_interval"] = 20
    first, first_buffer, first_folder = script.train(script.Args(**settings))
    second, second_buffer, second_folder = script.train(script.Args(**settings))
    other, _, _ = script.train(script.Args(**settings, seed=2))
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(other), strict=True))
    assert torch.equal(first_buffer.rows[:300], second_buffer.rows[:300])
    rows = [read_csv(folder / "evaluations.csv") for folder in (first_folder, second_folder)]
    assert len(rows[0]) == 2
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
    if script is rnm:
        assert (first_folder / "masks.bin").read_bytes() == (second_folder / "masks.bin").read_bytes()


@pytest.mark.parametrize("backend, steps, atol", [("masked", 200, 1e-6), ("native", 110, 1e-4)])
def test_n_equal_m_is_the_dense_twin(backend, steps, atol, monkeypatch):
    """`masked` runs the same products, to the rounding; others round differently, which this environment magnifies."""
    if backend == "native" and (problem := rnm.load_kernels()):
        pytest.skip(problem)
    monkeypatch.setattr(td3, "FusedTD3", td3.TD3)
    settings = {"env_id": "HalfCheetah-v5", "total_timesteps": steps, "learning_starts": 100, "eval_interval": 0}
    sparse, sparse_buffer, _ = rnm.train(rnm.Args(**settings, n=4, m=4, mask_update_interval=3, backend=backend))
    dense, dense_buffer, _ = td3.train(td3.Args(**settings))
    assert torch.allclose(sparse_buffer.rows[:steps], dense_buffer.rows[:steps], rtol=0, atol=atol)
    start = td3.TD3(17, np.full(6, -1, np.float32), np.full(6, 1, np.float32), td3.Args(), torch.device("cpu"))
    for ours, theirs, other in zip(parameters(sparse), parameters(dense), parameters(start), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=atol / 4)
        assert not torch.allclose(theirs, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_folder(script):
    settings = {**SMALL, "total_timesteps": 250, "eval_interval": 100, "eval_episodes": 3, "save_model": True}
    agent, _, folder = script.train(script.Args(**settings))
    assert folder.parent.name == "runs" and folder.name.startswith(f"Scripted-v0__{script.__name__}__1__")
    config = json.loads((folder / "config.json").read_text())
    assert config["total_timesteps"] == 250
    version, cuda = config["versions"]["torch"], (torch.version.cuda or "").replace(".", "")
    assert torch.__version__ in (version, f"{version}+cu{cuda}")  # the package of a CUDA build need not name it
    episodes = read_csv(folder / "episodes.csv")
    assert [int(row["step"]) for row in episodes[:4]] == [3, 7, 9, 12]
    assert [float(row["return"]) for row in episodes[:3]] == [1 + 2 + 3, 11 + 12 + 13 + 14, 21 + 22]
    assert [int(row["length"]) for row in episodes[:3]] == [3, 4, 2]
    evaluations = read_csv(folder / "evaluations.csv")
    assert [int(row["step"]) for row in evaluations] == [100, 200, 250]
    for row in evaluations:
        returns = [float(row[f"return_{i}"]) for i in (1, 2, 3)]
        assert float(row["mean"]) == pytest.approx(np.mean(returns)) and float(row["std"]) == pytest.approx(
            np.std(returns)
        )
    info = Path("/proc/cpuinfo").read_text()
    fields = [re.search(rf"^{key}\t*: (.*)$", info, re.MULTILINE)[1] for key in ("vendor_id", "cpu family", "model")]
    assert config["cpu"] == " ".join([*fields, torch.backends.cpu.get_cpu_capability()])
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    common = {f"losses/{name}" for name in ("qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss")}
    assert common | {"charts/SPS", "losses/actor_loss"} <= tags
    for rows, column, tag in (
        (episodes, "return", "charts/episodic_return"), (episodes, "length", "charts/episodic_length"),
        (evaluations, "mean", "eval/episodic_return"), (evaluations, "std", "eval/episodic_return_std"),
    ):  # fmt: skip
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(int(row["step"]), pytest.approx(float(row[column]), rel=1e-6)) for row in rows]
    if script is rnm:
        assert {"density/qf2_target"} <= tags
        assert events.Scalars("density/qf1")[0].value == pytest.approx(rnm.density(agent.qf1))
        layers, last = agent.nm_layers.values(), sum(net.net[-1].weight.numel() for net in agent.networks.values())
        active, whole = (last + sum(getattr(x, name).numel() for x in layers) for name in ("values", "master"))
        assert events.Scalars("density/total")[0].value == pytest.approx(active / whole)
    assert (folder / "model.pt").exists()


@pytest.mark.parametrize("target_mask", ["own", "online"])
def test_mask_history_and_sad(target_mask):
    """The file decodes to the layers' masks, and the logged SAD is a brute-force count on them."""
    settings = {**SMALL, "total_timesteps": 422, "mask_update_interval": 100, "learning_rate": 1e-2, "tau": 0.3}
    agent, _, folder = rnm.train(rnm.Args(**settings, target_mask=target_mask))
    header, data = (folder / "masks.bin").read_bytes().split(b"\n", 1)
    header, bits, history = json.loads(header), [], []
    assert header["layers"] == list(agent.nm_layers)
    entries = [rows * columns for rows, columns in header["shapes"]]
    while data:
        step, update, size = struct.unpack("<3Q", data[:24])
        changed = np.cumsum(np.frombuffer(zlib.decompress(data[24 : 24 + size]), np.uint32))
        bits = bits if history else np.zeros(sum(entries), bool)
        bits = bits ^ np.isin(np.arange(len(bits)), changed)
        parts = np.split(bits, np.cumsum(entries)[:-1])
        layers = zip(header["layers"], header["shapes"], parts, strict=True)
        masks = {name: part.reshape(shape) for name, shape, part in layers}
        history.append((step, update, masks))
        data = data[24 + size :]
    assert [step for step, _, _ in history] == [0, 120, 220, 320, 420]
    assert [update for _, update, _ in history] == [0, 100, 200, 300, 400]
    for name, layer in agent.nm_layers.items():
        assert (history[-1][2][name] == layer.mask().numpy()).all()
    events = EventAccumulator(str(folder)).Reload()
    total = 0
    for (_, _, old), (step, _, new) in pairwise(history):
        for name in new:
            sad = int((old[name] != new[name]).sum())
            total += sad
            logged = {event.step: event.value for event in events.Scalars(f"sad/{name}")}
            rate = {event.step: event.value for event in events.Scalars(f"sad_rate/{name}")}
            assert logged[step] == sad
            assert rate[step] == pytest.approx(sad / new[name].sum())
            if target_mask == "online":
                assert (new[name] == new[name.replace("_target", "")]).all()
    assert total > 0 and sum(event.value for event in events.Scalars("sad/total")) == total
    networks = ["actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"]
    assert sum(event.value for name in networks for event in events.Scalars(f"sad/{name}")) == total


@pytest.mark.parametrize("script", SCRIPTS)
def test_overlap_changes_no_bit_and_every_step_joins_the_next_batch(script, monkeypatch):
    sizes, sample, apart, step = [], script.ReplayBuffer.sample, [], Scripted.step
    in_thread = lambda: threading.current_thread() is not threading.main_thread()  # noqa: E731
    monkeypatch.setattr(Scripted, "step", lambda *rest: apart.append(in_thread()) or step(*rest))
    monkeypatch.setattr(
        script.ReplayBuffer, "sample", lambda self, *rest: sizes.append(self.size) or sample(self, *rest)
    )
    runs = [script.train(script.Args(**SMALL, overlap=overlap)) for overlap in (False, True)]
    assert sizes == [*range(20, 60)] * 2 and apart == [False] * 60 + [True] * 60
    for ours, theirs in zip(*(parameters(agent) for agent, _, _ in runs), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(*(buffer.rows[:60] for _, buffer, _ in runs))  # the rows behind are not initialised


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("overlap", [False, True])
def test_profile(script, overlap, monkeypatch, capsys):
    print_stats = pstats.Stats.print_stats
    monkeypatch.setattr(pstats.Stats, "print_stats", lambda self, *_: print_stats(self))  # not the slowest alone
    script.train(script.Args(**SMALL, overlap=overlap, profile=True))
    table = capsys.readouterr().out.split("Ordered by: cumulative time")[1]
    calls = {line.split("(")[-1].strip(")"): line.split()[0] for line in table.splitlines() if "continuous.py" in line}
    expected = {"sample": "40", "update_critics": "40", "update_actor": "20", "update_targets": "20"}
    expected |= {"end_step": "60"} if sys.version_info < (3, 13) else {}  # where cProfile misses one of them
    expected |= {} if overlap else {"step": "60"}  # in a thread it costs the loop nothing but waiting
    assert expected.items() <= calls.items()


@pytest.mark.parametrize("one_dnn", [False, True])
@pytest.mark.parametrize("sizes", [(33,), (256, 40), (24, 24, 24)])
def test_updates_without_autograd_match_float64_with_it(sizes, one_dnn, monkeypatch):
    """The dense twin's: values, gradients of the first update, parameters after 50; a batch of parts of longer rows."""
    if one_dnn and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(td3, "one_dnn", lambda: one_dnn)
    agents, generator = [], torch.Generator().manual_seed(0)
    for kind, dtype in ((td3.FusedTD3, torch.float32), (td3.TD3, torch.float64)):
        torch.manual_seed(3)
        agents.append(kind(5, LOW, HIGH, td3.Args(hidden_sizes=sizes, policy_noise=1.0), torch.device("cpu")))
        for network in agents[-1].networks.values():
            network.to(dtype)
    for step in range(50):
        results = update(agents, random_batch(generator, 40), step, policy_frequency=1)
        for agent, result in zip(agents, results, strict=True):
            networks = [agent.networks[name] for name in ("qf1", "qf2", "actor")] if step == 0 else []
            result += [p.grad for network in networks for p in network.parameters()]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    for name, network in agents[1].networks.items():
        for ours, theirs in zip(agents[0].networks[name].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_error_of_the_environment_in_its_thread_ends_the_run(script, monkeypatch):
    monkeypatch.setattr(Scripted, "step", lambda self, action: 1 / 0)
    with pytest.raises(script.EnvironmentFault, match="ZeroDivisionError"):
        script.train(script.Args(**SMALL, overlap=True))


def test_sad_is_logged_at_most_once_in_100_updates():
    settings = {**SMALL, "total_timesteps": 270, "mask_update_interval": 30}
    _, _, folder = rnm.train(rnm.Args(**settings))
    assert [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("sad/total")] == [20 + 120, 20 + 210]
    updates = [update for _, update, _ in sad_analysis.read_masks(folder, 30, [])[2]]
    assert updates == [0, *range(30, 250, 30)]


def test_masks_stay_with_interval_zero_and_files_can_be_left_out():
    agent, _, folder = rnm.train(rnm.Args(**SMALL, mask_update_interval=0, learning_rate=1e-2, save_masks=False))
    torch.manual_seed(1)  # the seed of the run: these are its initial masks
    start = rnm.TD3(2, agent.actor.action_low, agent.actor.action_high, rnm.Args(), torch.device("cpu")).nm_layers
    for name, layer in agent.nm_layers.items():
        assert torch.equal(layer.mask(), start[name].mask())
    assert not torch.equal(agent.actor.net[0].values, start["actor.net.0"].values)
    assert not (folder / "masks.bin").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_observations_of_any_shape(script):
    _, buffer, _ = script.train(script.Args(**{**SMALL, "env_id": "ScriptedMatrix-v0"}))
    assert buffer.widths == [6, 3, 6, 1, 1]
    assert buffer.rows[10, :6].tolist() == [3, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_non_finite_values_stop_the_run_and_keep_its_files(script):
    with pytest.raises(FloatingPointError, match=r"step 2[1-9]: not finite: action, networks \['actor', 'qf1'"):
        script.train(script.Args(**{**SMALL, "env_id": "ScriptedHugeReward-v0"}, save_model=True))
    (folder,) = Path("runs").iterdir()
    assert not (folder / "model.pt").exists()
    assert len((folder / "episodes.csv").read_text().splitlines()) > 5


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("changes", [{"total_timesteps": 21}, {"eval_interval": 1}])
def test_a_non_finite_loss_stops_before_the_policy_is_played_or_the_run_ends(script, changes):
    settings = {**SMALL, "env_id": "ScriptedHugeReward-v0", "policy_frequency": 1000, **changes}
    with pytest.raises(FloatingPointError, match="step 21: not finite: losses/qf1_"):
        script.train(script.Args(**settings))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("changes", [{"total_timesteps": 22}, {"eval_interval": 22}])
def test_a_broken_policy_is_not_played(script, changes, monkeypatch):
    """The losses of its update are those before its step; the next update would be too late."""
    monkeypatch.setattr(script.Run, "evaluate", lambda self: pytest.fail("was played"))
    changes = {**changes, "backend": "masked"} if script is rnm else changes
    update_actor = TRAINED[script].update_actor

    def breaks(self, obs):
        update_actor(self, obs)
        next(self.actor.parameters()).data.view(-1)[3] = torch.inf

    monkeypatch.setattr(TRAINED[script], "update_actor", breaks)
    with pytest.raises(FloatingPointError, match=r"step 22: not finite: actor, networks \['actor'"):
        script.train(script.Args(**{**SMALL, **changes}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_broken_critic_does_not_replace_a_whole_checkpoint(script, monkeypatch):
    """The losses are looked at once in 100 updates, and the actor may not have followed yet."""
    changes = {"checkpoint_interval": 10, "policy_frequency": 1000, "eval_interval": 0, "total_timesteps": 100}
    changes |= {"backend": "masked"} if script is rnm else {}
    update_critics = TRAINED[script].update_critics

    def breaks(self, batch):
        values = update_critics(self, batch)
        next(self.qf2.parameters()).data.view(-1)[3] = torch.nan
        return values

    monkeypatch.setattr(TRAINED[script], "update_critics", breaks)
    with pytest.raises(FloatingPointError, match=r"not finite: checkpoint, networks \['qf2'\]") as failure:
        script.train(script.Args(**{**SMALL, **changes}))
    (folder,) = Path("runs").iterdir()
    newest = max(folder.glob("checkpoints/*.pt"))
    assert torch.load(newest)["networks"]["qf2"]["net.0.bias"].isfinite().all() and int(newest.stem) <= 20
    assert f"goes on from step {int(newest.stem)}" in failure.value.__notes__[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_logged_losses(script, monkeypatch):
    """Once in 100 updates, before evaluations and at the end: means of what the updates return, and their errors."""
    seen, actor_losses = {}, {}
    changes = {"total_timesteps": 155, "eval_interval": 50, "eval_episodes": 1}
    changes |= {"backend": "masked"} if script is rnm else {}
    critics, actor = TRAINED[script].update_critics, TRAINED[script].update_actor

    def update_critics(self, batch):
        values = critics(self, batch)
        seen[21 + len(seen)] = [value.clone() for value in values]
        return values

    def update_actor(self, obs):
        actor_losses[20 + len(seen)] = -self.qf1(obs, self.actor(obs)).mean().item()
        actor(self, obs)

    monkeypatch.setattr(TRAINED[script], "update_critics", update_critics)
    monkeypatch.setattr(TRAINED[script], "update_actor", update_actor)
    _, _, folder = script.train(script.Args(**{**SMALL, **changes}))
    events = EventAccumulator(str(folder)).Reload()
    logged = {}
    for name in ("qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss", "actor_loss"):
        for event in events.Scalars(f"losses/{name}"):
            logged.setdefault(event.step, {})[name] = event.value
    assert sorted(logged) == [50, 100, 120, 150, 155]
    for step, values in logged.items():
        qf1, qf2, target = (value.double() for value in seen[step])
        losses = [((qf - target) ** 2).mean().item() for qf in (qf1, qf2)]
        expected = [qf1.mean().item(), qf2.mean().item(), *losses, sum(losses) / 2, actor_losses[step // 2 * 2]]
        assert list(values.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_video_of_training_and_of_evaluation(script):
    _, _, folder = script.train(script.Args(**{**SMALL, "env_id": "Rendered-v0"}, capture_video=True, save_model=True))
    trained = {path.name for path in (folder / "videos").glob("*.mp4")}
    assert "rl-video-episode-0.mp4" in trained
    script.evaluate_model(script.Args(evaluate=str(folder / "model.pt"), eval_episodes=2, capture_video=True))
    videos = {path.name for path in (folder / "videos/evaluation").glob("*.mp4")}
    assert videos == {"rl-video-episode-0.mp4", "rl-video-episode-1.mp4"}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "InvertedPendulum-v5"])
def test_videos_follow_the_agent(env_id, script, monkeypatch):
    """Painted red, it is seen where it starts and 30 m away (the pendulum's model has no camera, and it cannot go)."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    try:
        plain = gym.make(env_id, render_mode="rgb_array")
        plain.reset()
        plain.render()
    except Exception as error:  # whatever a driver raises
        pytest.skip(f"no rendering off-screen here: {error!r}")
    env = script.make_env(env_id, capture_video=True)
    model, data, red = env.unwrapped.model, env.unwrapped.data, []
    model.geom_rgba[model.geom_bodyid > 0], model.geom_matid[model.geom_bodyid > 0] = [1, 0, 0, 1], -1
    for position in (0, 30) if model.ncam else (0,):
        data.qpos[0] = position
        mujoco.mj_forward(model, data)
        picture = env.render().astype(int)
        red.append((picture[..., 0] > 2 * picture[..., 1] + 20).sum())
    env.close()
    assert min(red) > 1000 and max(red) < 2 * min(red), red


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_terminal_there_are_lines(script, capsys):
    _, _, folder = script.train(script.Args(**{**SMALL, "eval_interval": 30, "eval_episodes": 1}))
    evaluation = float(read_csv(folder / "evaluations.csv")[-1]["mean"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Scripted-v0 on cpu, 1 threads, run folder runs/Scripted-v0__")
    assert out[-1].startswith("step 60/60, ") and f" steps/s, return 546.0, evaluation {evaluation:.1f}" in out[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_on_a_terminal_a_line_is_written_over(script, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    script.train(script.Args(**{**SMALL, "total_timesteps": 250}))
    first, last = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("Scripted-v0 on cpu, 1 threads, run folder runs/Scripted-v0__")
    *over, end = re.split(r"(?<=\r)", last)
    assert [line.split(",")[0] for line in (*over, end)] == ["step 100/250", "step 200/250", "step 250/250"]
    assert all(line.endswith("\r") for line in over) and end.count("\n") == 1 and end.endswith("\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_buffer_overwrites_the_oldest_and_is_not_touched_up_front(script):
    buffer = script.ReplayBuffer(4, 1, 1)
    for i in range(6):
        buffer.add(np.array([i]), np.array([0.5]), np.array([i + 1]), float(-i), i == 5)
    assert sorted(buffer.rows[:, 0].tolist()) == [2, 3, 4, 5] and buffer.size == 4
    obs, action, next_obs, reward, terminated = buffer.sample(500, torch.device("cpu"))
    assert obs.shape == (500, 1) and action.shape == (500, 1) and reward.shape == terminated.shape == (500,)
    assert set(obs.flatten().tolist()) == {2, 3, 4, 5}
    assert (
        torch.equal(next_obs, obs + 1)
        and torch.equal(-reward, obs[:, 0])
        and torch.equal(terminated, (reward == -5) * 1.0)
    )
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    before = resident()
    large = script.ReplayBuffer(1_000_000, 100, 20)
    assert large.rows.nbytes > 800e6 and resident() - before < 50e6


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_inverted_pendulum_is_learned(script):
    settings = {"env_id": "InvertedPendulum-v5", "total_timesteps": 35_000, "learning_starts": 5_000}
    settings |= {"hidden_sizes": (64, 64), "learning_rate": 1e-3, "eval_interval": 1_000, "eval_episodes": 5}
    _, _, folder = script.train(script.Args(**settings))
    assert max(float(row["mean"]) for row in read_csv(folder / "evaluations.csv")) >= 900
