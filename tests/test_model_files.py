"""Save, load, act; and what is refused."""

import pickle
import sys
from pathlib import Path

import environments  # noqa: F401
import numpy as np
import pytest
import torch

import rnm_td3_continuous as rnm
import td3_continuous as td3

SCRIPTS = [rnm, td3]
SMALL = {"env_id": "Scripted-v0", "total_timesteps": 60, "learning_starts": 20, "eval_interval": 0, "batch_size": 8}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("changes", [{}, {"hidden_sizes": (7, 33, 5)}])
def test_loaded_policy_acts_the_same(script, changes):
    if script is rnm:
        changes = {**changes, "n": 1, "m": 4, "dense_layers": "last", "mask_update_interval": 5}
    agent, _, folder = script.train(script.Args(**SMALL, **changes, save_model=True))
    policy = script.load_actor(folder / "model.pt")
    for obs in np.random.default_rng(0).normal(size=(20, 2)):
        assert policy(obs).dtype == np.float32 and (policy(obs) == agent.actor.act(obs)).all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_file_holds_both_critics(script):
    agent, _, folder = script.train(script.Args(**SMALL, save_model=True))
    model = torch.load(folder / "model.pt", weights_only=True)
    for name in ("qf1", "qf2"):
        ours = agent.networks[name].state_dict()
        assert all(torch.equal(tensor, ours[key].to(tensor.dtype)) for key, tensor in model[name].items())


def test_model_file_holds_what_is_active_and_no_more():
    agent, _, folder = rnm.train(rnm.Args(**SMALL, n=1, m=16, save_model=True))
    model = torch.load(folder / "model.pt", weights_only=True)
    layer = agent.actor.net[2]
    assert torch.equal(model["actor"]["net.2.values"], layer.values)
    assert torch.equal(model["actor"]["net.2.index"].long(), layer.index)
    assert model["actor"]["net.2.index"].dtype == torch.int32
    tensors = [tensor for name in ("actor", "qf1", "qf2") for tensor in model[name].values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    _, _, dense_folder = td3.train(td3.Args(**SMALL, save_model=True))
    assert (folder / "model.pt").stat().st_size < 0.25 * (dense_folder / "model.pt").stat().st_size
    assert set(model["actor"]) == {
        *(f"net.{i}.{key}" for i in (0, 2) for key in ("values", "index", "bias")),
        *("net.4.weight", "net.4.bias", "action_low", "action_high", "action_scale", "action_bias"),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate_plays_the_model(script, monkeypatch, capsys):
    settings = {**SMALL, "env_id": "ScriptedActionReward-v0"}  # the return tells policies apart
    agent, _, folder = script.train(script.Args(**settings, save_model=True))
    env = script.make_env("ScriptedActionReward-v0")
    returns = script.evaluate(agent.actor.act, env, 3, seed=1)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script", "--evaluate", str(folder / "model.pt"), "--eval-episodes", "3"])
    assert script.main() == 0
    assert f"returns {np.round(returns, 2).tolist()}, mean {np.mean(returns):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_foreign_files_are_refused_and_run_nothing(script, monkeypatch, capsys):
    class Hostile:
        def __reduce__(self):
            return Path("touched").touch, ()

    Path("hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"format": script.MODEL_FORMAT, "actor": Hostile()}, "hostile_zip.pt")
    torch.save({"format": "something else"}, "other.pt")
    torch.save({"format": script.MODEL_FORMAT}, "incomplete.pt")
    _, _, folder = script.train(script.Args(**SMALL, save_model=True))
    whole = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**whole, "args": {**whole["args"], "env_id": "InvertedPendulum-v5"}}, "wrong_env.pt")
    torch.save({**whole, "obs_dim": 3}, "wrong_size.pt")
    weights = {
        name: tensor + 300 if "index" in name else tensor[:, :1] if "weight" in name else tensor
        for name, tensor in whole["actor"].items()
    }
    torch.save({**whole, "actor": weights}, "wrong_weights.pt")
    del whole["args"]["env_id"]
    torch.save(whole, "no_env.pt")
    Path("text.pt").write_text("no model")
    other = td3 if script is rnm else rnm
    _, _, folder = other.train(other.Args(**SMALL, save_model=True))
    model = (folder / "model.pt").read_bytes()
    Path("truncated.pt").write_bytes(model[: len(model) // 2])
    names = ["hostile.pt", "hostile_zip.pt", "other.pt", "incomplete.pt", "text.pt", "truncated.pt", "missing.pt", "."]
    names += ["wrong_env.pt", "wrong_size.pt", "wrong_weights.pt", "no_env.pt"]
    for path in [*names, str(folder / "model.pt")]:
        monkeypatch.setattr(sys, "argv", ["script", "--evaluate", path])
        capsys.readouterr()
        assert script.main() == 2, path
        lines = [line for line in capsys.readouterr().err.splitlines() if "Warn" not in line and line.strip()]
        assert len(lines) == 1 and lines[0].startswith(f"error: {path}: "), lines
    told = f"its format is {other.MODEL_FORMAT}; {other.__name__}.py plays {other.MODEL_FORMAT}"
    assert told in lines[0]  # of the other script's model, which is the last one
    assert not Path("touched").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_policies_that_do_not_fit_their_environment_are_refused(script, monkeypatch, capsys):
    """Pendulum-v1 has 3 observations and 1 action."""
    for env_id, actions, message in (
        ("Pendulum-v1", 2, "error: model.pt: its inputs and actions are (3, 2), unlike those of Pendulum-v1 here"),
        ("Reacher-v5", 1, "error: model.pt: its inputs and actions are (3, 1), unlike those of Reacher-v5 here"),
        (3, 1, "error: --env-id 3: cannot be made"),
    ):
        bounds = np.ones(actions, np.float32)
        agent = script.TD3(3, -bounds, bounds, args := script.Args(hidden_sizes=(8,)), torch.device("cpu"))
        args.env_id = env_id
        script.save_model(Path("model.pt"), agent, args)
        monkeypatch.setattr(sys, "argv", ["script", "--evaluate", "model.pt"])
        assert script.main() == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
        assert line.startswith(message)
