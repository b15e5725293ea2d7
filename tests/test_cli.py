"""Bad input: one clear line, exit code 2, and no run folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import environments  # noqa: F401
import pytest
import torch

import rnm_td3_continuous as rnm
import td3_continuous as td3

SCRIPTS = [rnm, td3]
ROOT = Path(__file__).parents[1]

BAD = {
    "--total-timesteps 0": "--total-timesteps is 0; give a number from 1",
    "--total-timesteps -5": "--total-timesteps is -5;",
    "--buffer-size -1": "--buffer-size is -1;",
    "--batch-size 0": "--batch-size is 0;",
    "--batch-size 300 --buffer-size 200": "--batch-size is 300; give a number from 1 to 200 (--buffer-size)",
    "--learning-starts 200 --total-timesteps 100": "--learning-starts is 200; give a number from 0 to 100 (--total-tim",
    "--learning-starts -1": "--learning-starts is -1;",
    "--learning-rate nan": "--learning-rate is nan;",
    "--learning-rate=-1e-3": "--learning-rate is -0.001;",
    "--gamma 1.5": "--gamma is 1.5; give a number from 0 to 1",
    "--tau 2": "--tau is 2",
    "--policy-noise inf": "--policy-noise is inf;",
    "--exploration-noise=-0.1": "--exploration-noise is -0.1;",
    "--noise-clip=-0.1": "--noise-clip is -0.1;",
    "--policy-frequency 0": "--policy-frequency is 0;",
    "--eval-interval -1": "--eval-interval is -1;",
    "--eval-episodes 0": "--eval-episodes is 0;",
    "--seed -1": "--seed is -1;",
    "--hidden-sizes 256 -1": "--hidden-sizes is (256, -1);",
    "--hidden-sizes": "--hidden-sizes is ();",
    "--exp-name a/b": "--exp-name is 'a/b';",
    "--env-id HalfCheeta-v4": "Did you mean: `HalfCheetah`",
    "--env-id Nonsense": "`Nonsense` doesn't exist",
    "--env-id HalfCheetah-v99": "versioned environments",
    "--env-id CartPole-v1": "actions are Discrete(2); TD3 needs a bounded, one-dimensional Box",
    "--env-id IntegerAction-v0": "TD3 needs a bounded, one-dimensional Box of floats",
    "--env-id DictObs-v0": "observations are Dict; TD3 needs a Box that is not empty",
    "--env-id EmptyObs-v0": "observations are Box; TD3 needs a Box that is not empty",
    "--env-id EmptyAction-v0": "TD3 needs a bounded, one-dimensional Box",
    "--env-id LongAction-v0": "TD3 needs a bounded, one-dimensional Box of floats",
    "--env-id Unbounded-v0": "TD3 needs a bounded, one-dimensional Box",
    "--env-id MatrixAction-v0": "TD3 needs a bounded, one-dimensional Box",
    "--env-id Raises-v0": "cannot be made: RuntimeError",
    "--env-id Scripted-v0 --overlap --capture-video": "drop --capture-video",
    "--env-id Scripted-v0 --capture-video": "to render without a screen, try MUJOCO_GL=egl",
    "--env-id Scripted-v0 --buffer-size 1000000000000000": "no memory for --hidden-sizes, --buffer-size or",
    "--env-id Scripted-v0 --buffer-size 1000000000000000000000000": "no memory for --hidden-sizes, --buffer-size or",
    "--env-id Scripted-v0 --hidden-sizes 1000000000000000": "no memory for --hidden-sizes, --buffer-size or",
    "--evaluate model.pt --eval-episodes 0": "--eval-episodes is 0;",
    "--evaluate=": ": cannot be read",
    "--resume=": "--resume : not a run folder of this script",
}
BAD_NM = {
    "--n 0": "--n is 0; give a number from 1 to 4 (--m)",
    "--n 5 --m 4": "--n is 5; give a number from 1 to 4 (--m)",
    "--m 0": "--m is 0;",
    "--n -1 --m -1": "--m is -1;",
    "--hidden-sizes 256 --dense-layers first,last": "--dense-layers first,last leaves nothing sparse",
    "--mask-update-interval -1": "--mask-update-interval is -1;",
    "--critic-m 1": "--critic-m is 1; give a number from 2 to inf, or 0",
    "--critic-m 2 --backend semi_structured": "drop --critic-m, or try auto",
}


@pytest.mark.parametrize(
    "script, arguments, message",
    [(script, *case) for script in SCRIPTS for case in BAD.items()] + [(rnm, *case) for case in BAD_NM.items()],
)
def test_bad_input_gets_one_line_and_exit_code_2(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    assert script.main() == 2
    # gymnasium has lines of its own about old versions and render modes
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and "WARN" not in line and "logger" not in line
    ]
    if "--hidden-sizes 1000" in arguments and script is rnm:  # too large for the kernels, and that is said first
        assert lines.pop(0).startswith("--backend masked: the CPU kernels are for layers of up to 65536 neurons")
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(Path(".").iterdir())


@pytest.mark.parametrize("arguments", ["--target-mask none", "--dense-layers middle", "--n two", "--no-such-flag"])
def test_what_cannot_be_parsed_exits_with_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", *arguments.split()])
    with pytest.raises(SystemExit) as exit_info:
        rnm.main()
    assert exit_info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        script.main()
    assert exit_info.value.code == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in script.Args.__dataclass_fields__:
        flag = name.replace("_", "-")
        value = rf"(?:, --no-{flag}| \{{.*?\}}(?:\|STR)?| \[INT \[INT \.\.\.\]\]| [A-Z]+)"
        entry = re.search(rf"--{flag}{value} (.*?)\(default:", words)
        assert entry and len(entry[1].split()) >= 2, name


def run(arguments, variables=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("script", ["rnm_td3_continuous.py", "td3_continuous.py"])
def test_as_a_command(script):
    process = run([script, "--env-id", "CartPole-v1"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    assert (
        err
        == "error: --env-id CartPole-v1: actions are Discrete(2); TD3 needs a bounded, one-dimensional Box of floats\n"
    )


def test_weights_and_biases_that_cannot_start():
    settings = {"env_id": "InvertedPendulum-v5", "total_timesteps": 50, "learning_starts": 50, "eval_interval": 0}
    _, _, folder = td3.train(td3.Args(**settings))
    flags = [
        "td3_continuous.py",
        "--env-id",
        "InvertedPendulum-v5",
        "--total-timesteps",
        "50",
        "--learning-starts",
        "50",
    ]
    config = (folder / "config.json").read_text()
    for arguments in ([*flags, "--track"], ["td3_continuous.py", "--resume", str(folder), "--track"]):
        process = run(arguments, variables={"WANDB_MODE": "bogus"})
        _, err = process.communicate(timeout=200)
        assert process.returncode == 2
        assert err.splitlines()[-1].startswith("error: --track: ") and "set WANDB_MODE=offline" in err
        assert "Traceback" not in err
    assert list(Path("runs").iterdir()) == [folder] and (folder / "config.json").read_text() == config


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_errors_are_not_called_a_lack_of_memory(script):
    with pytest.raises(RuntimeError, match="no kernel image"), script.enough_memory():
        raise RuntimeError("CUDA error: no kernel image is available")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("std::bad_alloc")):
        with pytest.raises(script.UsageError, match="no memory for"), script.enough_memory():
            raise error


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("profile", [True, False])
def test_a_profile_waits_for_the_gpu(script, profile, monkeypatch):
    """CUDA reads the variable when it is first used, which is in `train`."""
    seen = []
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    monkeypatch.setattr(script, "train", lambda args: seen.append(os.environ["CUDA_LAUNCH_BLOCKING"]))
    monkeypatch.setattr(sys, "argv", ["script", *["--profile"] * profile])
    assert script.main() == 0 and seen == ["1" if profile else "0"]
