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
    for _ in range(20):
        obs = np.random.default_rng(0).normal(size=2)
        assert policy(obs).dtype == np.float32 and (policy(obs) == agent.actor.act(obs)).all()


def test_model_file_holds_what_is_active_and_no_more():
    agent, _, folder = rnm.train(rnm.Args(**SMALL, n=1, m=16, save_model=True))
    model = torch.load(folder / "model.pt", weights_only=True)
    layer = agent.actor.net[2]
    assert torch.equal(model["actor"]["net.2.values"], layer.values)
    assert torch.equal(model["actor"]["net.2.index"].long(), layer.index)
    assert set(model["actor"]) == {
        *(f"net.{i}.{key}" for i in (0, 2, 4) for key in ("values", "index", "bias")),
        *("action_low", "action_high", "action_scale", "action_bias"),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate_plays_the_model(script, monkeypatch, capsys):
    agent, _, folder = script.train(script.Args(**SMALL, save_model=True))
    env = script.make_env("Scripted-v0")
    returns = script.evaluate(agent.actor.act, env, 3, seed=1)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["script", "--evaluate", str(folder / "model.pt"), "--eval-episodes", "3"])
    assert script.main() == 0
    assert f"Scripted-v0: returns {returns}, mean {np.mean(returns):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_foreign_files_are_refused_and_run_nothing(script, monkeypatch, capsys):
    class Hostile:
        def __reduce__(self):
            return Path("touched").touch, ()

    Path("hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"format": script.MODEL_FORMAT, "actor": Hostile()}, "hostile_zip.pt")
    torch.save({"format": "something else"}, "other.pt")
    torch.save({"format": script.MODEL_FORMAT}, "incomplete.pt")
    Path("text.pt").write_text("no model")
    other = td3 if script is rnm else rnm
    _, _, folder = other.train(other.Args(**SMALL, save_model=True))
    model = (folder / "model.pt").read_bytes()
    Path("truncated.pt").write_bytes(model[: len(model) // 2])
    names = ["hostile.pt", "hostile_zip.pt", "other.pt", "incomplete.pt", "text.pt", "truncated.pt", "missing.pt", "."]
    for path in [*names, str(folder / "model.pt")]:
        monkeypatch.setattr(sys, "argv", ["script", "--evaluate", path])
        capsys.readouterr()
        assert script.main() == 2, path
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {path}: ") and captured.err.count("\n") == 1
    assert not Path("touched").exists()
