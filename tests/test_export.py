"""Exported policies act as the models do: C, compiled here by every compiler that there is, and ONNX."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import export_policy
import rnm_td3_continuous as rnm
import td3_continuous as td3

ROOT = Path(__file__).parents[1]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
COMPILERS = {"gcc": ["-std=c99", "-x", "c"], "clang": ["-std=c99", "-x", "c"], "g++": ["-std=c++11", "-x", "c++"]}
OBS, ACT = 17, 6
LOW = -np.linspace(0.4, 2, 1000, dtype=np.float32)
LOW = LOW[(LOW + 1) / 2 - (1 - LOW) / 2 < LOW][
    : 8 * ACT : 8
].copy()  # where middle less half the range is below, by rounding
CASES = {
    "dense": {},
    "dense, small": {"hidden_sizes": (3, 2)},
    "2:4": {"n": 2, "m": 4},
    "1:4, last dense": {"n": 1, "m": 4, "dense_layers": "last"},
    "1:8, first and last dense": {"n": 1, "m": 8, "dense_layers": "first,last"},
    "1:16": {"n": 1, "m": 16, "hidden_sizes": (64, 64)},
    "3:7, odd sizes": {"n": 3, "m": 7, "hidden_sizes": (33, 5, 64)},
    "2:3, small": {"n": 2, "m": 3, "hidden_sizes": (3,)},
    "1:1": {"n": 1, "m": 1, "hidden_sizes": (64, 64)},
    "1:64, more than inputs": {"n": 1, "m": 64, "hidden_sizes": (64, 64)},
    "1:10^30, more than there are numbers for": {"n": 1, "m": 10**30, "hidden_sizes": (8, 9)},
    "5:300, two bytes": {"n": 5, "m": 300, "hidden_sizes": (310, 300)},
}


def make_model(case, path="model.pt", obs=OBS, act=ACT, env_id="HalfCheetah-v5"):
    """A model file whose weights are no longer those of the start, with bounds that differ."""
    script, settings = (rnm, {"backend": "masked"}) if "n" in CASES[case] else (td3, {})
    args = script.Args(env_id=env_id, learning_rate=3e-3, **CASES[case], **settings)
    torch.manual_seed(0)
    agent = script.TD3(obs, LOW[:act], np.ones(act, np.float32), args, torch.device("cpu"))
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    script.save_model(Path(path), agent, args)
    return script.load_actor(path)


@cache
def observations(count=1000):
    """Of HalfCheetah under random actions; then extreme ones: zero, tiny, large, one large among small."""
    env = gym.make("HalfCheetah-v5")
    env.action_space.seed(0)
    rows = [env.reset(seed=0)[0]]
    while len(rows) < count:
        obs, _, _, truncated, _ = env.step(env.action_space.sample())
        rows.append(env.reset()[0] if truncated else obs)
    signs = np.sign(np.random.default_rng(0).normal(size=(8, OBS)))
    sizes = np.array([0, 1e-45, 1e-38, 1e-8, 10, 100, 1e3, 0.1])
    extreme = signs * sizes[:, None]
    extreme[-1, 3] = 1e4
    return np.concatenate([rows, extreme]).astype(np.float32)


def compiled(compiler, *flags, header="policy.h", name="policy", act=ACT):
    """The header as a shared library, called for one observation after the other."""
    library = Path(f"{compiler}{len(os.listdir())}.so").resolve()  # the loader takes a name that it knows for the same
    command = [
        compiler,
        *WARNINGS,
        *flags,
        "-shared",
        "-fPIC",
        f'-D{name.upper()}_API=extern "C"' if compiler == "g++" else f"-D{name.upper()}_API=",
    ]
    result = subprocess.run(
        [*command, *COMPILERS[compiler], header, "-o", library, "-lm"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[:2000]
    function = getattr(ctypes.CDLL(library), f"{name}_act")
    function.argtypes = [np.ctypeslib.ndpointer(np.float32)] * 2

    def act_all(rows):
        actions = np.full((len(rows), act), 9, np.float32)
        for obs, action in zip(rows, actions, strict=True):
            function(obs, action)
        return actions

    return act_all


def levels():
    """Flags for each level of vectors that this machine has: they choose other code."""
    here = ["DEFAULT", "AVX2", "AVX512"].index(torch.backends.cpu.get_cpu_capability().split("_")[0])
    return [[], ["-mavx2", "-mfma"], ["-mavx512f"]][: here + 1]


def compiler_or_skip(name):
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here")
    return name


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export_policy.py", *map(str, arguments)])
    return export_policy.main()


ONCE = ["dense, small", "2:4", "3:7, odd sizes", "1:1"]  # what compilers might warn of
PAIRS = [("gcc", case) for case in CASES] + [(compiler, case) for compiler in ("clang", "g++") for case in ONCE]


@pytest.mark.parametrize("compiler, case", PAIRS)
def test_c_acts_as_the_model_does(compiler, case, monkeypatch):
    """Without a warning, and within the bounds."""
    compiler_or_skip(compiler)
    policy = make_model(case)
    assert export(monkeypatch, "model.pt") == 0
    rows = observations()
    expected, broken = np.stack([policy(obs) for obs in rows]), rows[: OBS + 1].copy()
    assert np.ptp(expected[:1000], axis=0).max() > 1e-2  # it tells observations apart
    broken[range(OBS), range(OBS)] = np.nan
    for flags in levels():
        act_all = compiled(compiler, "-O3" if flags else "-O2", *flags)
        np.testing.assert_allclose(found := act_all(rows), expected, rtol=0, atol=1e-5)
        assert (found >= LOW).all() and (found <= 1).all()
        assert (np.isnan(act_all(broken)).sum(1) == [ACT] * OBS + [0]).all()


@pytest.mark.parametrize(
    "case", ["dense", "3:7, odd sizes", "1:64, more than inputs", "5:300, two bytes", "2:3, small"]
)
def test_c_is_clean_under_sanitizers(case, monkeypatch):
    """Observation and action are as long as they say, on the heap."""
    policy = make_model(case)
    assert export(monkeypatch, "model.pt", "--name", "Walk_2", "--out", "walk.h") == 0
    Path("main.c").write_text(
        """
#include <stdio.h>
#include <stdlib.h>
#include "walk.h"
int main(void)
{
    float *obs = malloc(WALK_2_OBS * sizeof *obs), *action = malloc(WALK_2_ACT * sizeof *action);
    while (fread(obs, sizeof *obs, WALK_2_OBS, stdin) == WALK_2_OBS) {
        Walk_2_act(obs, action);
        fwrite(action, sizeof *action, WALK_2_ACT, stdout);
    }
    free(obs), free(action);
    return 0;
}
"""
    )
    rows = observations(50)
    rows = np.concatenate([rows, np.ones_like(rows[:3]) * np.array([[np.nan], [np.inf], [1e38]], np.float32)])
    for vectors in levels():
        flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *vectors]
        command = [compiler_or_skip("gcc"), "-std=c99", *WARNINGS, *flags, "main.c", "-o", "main", "-lm"]
        built = subprocess.run(command, capture_output=True, text=True)
        if "cannot find" in built.stderr:
            pytest.skip("this gcc has no sanitizers")
        assert built.returncode == 0, built.stderr[:2000]
        result = subprocess.run(["./main"], input=rows.tobytes(), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()[:2000]
        found, expected = np.frombuffer(result.stdout, np.float32).reshape(-1, ACT), [policy(obs) for obs in rows[:-3]]
        np.testing.assert_allclose(found[:-3], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["dense", "1:8, first and last dense", "5:300, two bytes"])
def test_head_of_the_header(case, monkeypatch):
    """Facts against the model; bytes of the tables against the compiler's sections."""
    make_model(case)
    assert export(monkeypatch, "model.pt", "--out", "there.h") == 0
    text = Path("there.h").read_text()
    head = dict(re.findall(r"^ \* (\w+): (.*)$", text.split("*/")[0], re.MULTILINE))
    settings = CASES[case]
    hidden = settings.get("hidden_sizes", (256, 256))
    assert head["environment"] == "HalfCheetah-v5"
    assert head["pattern"] == (f"{settings['n']}:{settings['m']}" if "n" in settings else "dense")
    assert head["layers"] == " - ".join(map(str, (OBS, *hidden, ACT)))
    weights, active = 0, 0
    model = torch.load("model.pt", weights_only=True)["actor"]
    for i, (columns, rows) in enumerate(zip((OBS, *hidden), (*hidden, ACT), strict=True)):
        weights += rows * columns
        layer = f"net.{2 * i}"
        active += model[f"{layer}.values" if f"{layer}.values" in model else f"{layer}.weight"].numel()
    assert head["active_weights"] == f"{100 * active / weights:.1f} %"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d by export_policy.py, commit (unknown|[0-9a-f]{7,})", head["exported"])
    assert "SPDX-License-Identifier: 0BSD" in text
    command = [compiler_or_skip("gcc"), "-c", "-O0", "-DPOLICY_API=", "-x", "c", "there.h", "-o", "it.o"]
    subprocess.run(command, check=True)
    sections = subprocess.run(["size", "-A", "it.o"], capture_output=True, text=True, check=True).stdout
    sizes = {name: int(size) for name, size in re.findall(r"^\.(\w+)\S*\s+(\d+)", sections, re.MULTILINE)}
    tables, stack = int(head["flash"].split()[0]), int(head["stack"].split()[0])
    assert tables <= sizes["rodata"] <= tables + 600 and sizes["data"] == sizes["bss"] == 0
    assert 0 <= stack - 2 * 4 * max(OBS, *hidden) <= 2 * 4 * 8


def test_index_types_are_the_smallest_that_fit(monkeypatch):
    for case, kind in (("1:64, more than inputs", "char"), ("5:300, two bytes", "short")):
        make_model(case)
        assert export(monkeypatch, "model.pt") == 0
        assert set(re.findall(r"unsigned (\w+) policy_offset1", Path("policy.h").read_text())) == {kind}
    values = torch.tensor([0.1, -0.0, 1e-45, 3.4028235e38, 1e16, 1 / 3])
    numbers = export_policy.c_table("x", values)[0].split("{")[1].split("}")[0].split(",")
    assert all(number.endswith("f") and re.search("[.e]", number) for number in numbers)
    assert torch.equal(torch.tensor([float(number.strip()[:-1]) for number in numbers]), values)


@pytest.mark.parametrize("case", ["dense", "2:4", "1:8, first and last dense"])
def test_onnx_acts_as_the_model_does(case, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -r requirements-export.txt")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    policy = make_model(case)
    assert export(monkeypatch, "model.pt", "--out", "policy.onnx") == 0
    model = onnx.load("policy.onnx")
    onnx.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["environment"] == "HalfCheetah-v5" and properties["pattern"] == case.split(",")[0]
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    weights = [array for array in weights if array.ndim == 2]
    share = 100 * sum(np.count_nonzero(array) for array in weights) / sum(array.size for array in weights)
    assert properties["active_weights"] == f"{share:.1f} %"
    session, rows = runtime.InferenceSession("policy.onnx"), observations()
    assert [entry.shape for entry in (*session.get_inputs(), *session.get_outputs())] == [["batch", 17], ["batch", 6]]
    expected = np.stack([policy(obs) for obs in rows])
    for batch in (rows, rows[:1]):
        found = session.run(None, {"observation": batch})[0]
        np.testing.assert_allclose(found, expected[: len(batch)], rtol=0, atol=1e-5)
        assert (found >= LOW).all() and (found <= 1).all()


def bad_models():
    """Files that are refused, and a word of why."""
    make_model("2:4", "good.pt")
    whole = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("no model")
    model = torch.load("good.pt", weights_only=True)
    torch.save({**model, "format": "other"}, "other.pt")
    make_model("dense", "dense.pt")
    dense = torch.load("dense.pt", weights_only=True)
    torch.save({**dense, "obs_dim": 5}, "size.pt")
    whole = bytearray(whole)
    whole[len(whole) // 2] ^= 4  # among the weights
    Path("bit.pt").write_bytes(whole)
    index = model["actor"]["net.2.index"]
    index[5, :2] = torch.tensor([1, 5])  # in the first group and in the second
    torch.save(model, "index.pt")
    index[5, :2] = torch.tensor([2, 2])
    torch.save(model, "twice.pt")
    model["actor"]["net.0.bias"][3] = torch.nan
    torch.save(model, "nan.pt")
    indices = "its indices are not 2:4"
    return {"missing.pt": "No such file", "cut.pt": "cut.pt", "text.pt": "text.pt", "other.pt": "format is other",
            ".": "Is a directory", "size.pt": "td3-1", "nan.pt": "NaN or infinity among its weights",
            "bit.pt": "a check sum is wrong", "index.pt": indices, "twice.pt": indices}  # fmt: skip


def test_a_name_may_be_a_word_of_a_tables_type(monkeypatch):
    make_model("1:16")
    assert export(monkeypatch, "model.pt", "--name", "c", "--out", "c.h") == 0
    assert "const unsigned char *k0 = c_offset0;" in Path("c.h").read_text()


def test_bad_input_is_one_line_and_leaves_no_file(monkeypatch, capsys):
    bad = [([path], message) for path, message in bad_models().items()]
    bad += [(["good.pt", "--name", name], "give a name for C") for name in ("2x", "a-b", "", "é", "a b", "x;", "_math")]
    bad += [(["good.pt", "--out", "policy.txt"], "give --format"), (["good.pt", "--out", "no/policy.h"], "in a folder")]
    bad += [(["good.pt", "--out", ".", "--format", "c"], "another file")]
    os.mkfifo("pipe.h")
    bad += [(["good.pt", "--out", out, "--format", "c"], "another file") for out in ("pipe.h", "./good.pt")]
    monkeypatch.setitem(sys.modules, "onnx", None)
    bad += [(["good.pt", "--out", "p.onnx"], "pip install -r requirements-export.txt")]
    before = sorted(os.listdir())
    for arguments, message in bad:
        assert export(monkeypatch, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and message in error, (arguments, error)
    assert sorted(os.listdir()) == before


def test_a_full_disk_keeps_the_file_that_is_there(monkeypatch, capsys):
    make_model("2:4")
    Path("policy.h").write_text("from before")

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert export(monkeypatch, "model.pt") == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["model.pt", "policy.h"] and Path("policy.h").read_text() == "from before"


def test_names_of_files_follow_from_the_format(monkeypatch):
    make_model("2:4")
    monkeypatch.setattr(export_policy, "onnx_model", lambda *_: b"onnx")
    for arguments, name in (([], "policy.h"), (["--format", "onnx"], "policy.onnx"), (["--out", "a.onnx"], "a.onnx")):
        assert export(monkeypatch, "model.pt", *arguments) == 0
        assert Path(name).read_bytes().startswith(b"/*" if name.endswith("h") else b"onnx")
    assert sorted(os.listdir()) == ["a.onnx", "model.pt", "policy.h", "policy.onnx"]


def test_what_a_file_says_cannot_leave_the_comment(monkeypatch):
    make_model("2:4", env_id="x */ int main(void) { return 3; } /* \n#error")
    assert export(monkeypatch, "model.pt") == 0
    head = Path("policy.h").read_text().split("#ifndef")[0]
    assert head.count("*/") == head.count("/*") == 1 and "#" not in head and "environment: x __ int main_void" in head
    compiled(compiler_or_skip("gcc"))
    make_model("2:4", env_id=None)  # no name at all
    assert export(monkeypatch, "model.pt") == 0


def test_the_documented_example(monkeypatch):
    """main.c, and the program that plays an episode: its return is that of --evaluate."""
    gcc = compiler_or_skip("gcc")
    text = (ROOT / "docs" / "export.md").read_text()
    (main,) = (block for block in re.findall(r"```c\n(.*?)```", text, re.DOTALL) if "main" in block)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    env = rnm.make_env("InvertedPendulum-v5")
    args = rnm.Args(env_id="InvertedPendulum-v5", n=1, m=8, backend="masked", eval_episodes=1)
    torch.manual_seed(0)
    agent = rnm.TD3(4, env.action_space.low, env.action_space.high, args, torch.device("cpu"))
    rnm.save_model(Path("model.pt"), agent, args)
    policy = rnm.load_actor("model.pt")
    assert export(monkeypatch, "model.pt") == 0
    Path("main.c").write_text(main)
    assert len([line for line in main.splitlines() if line.strip()]) <= 16
    subprocess.run([gcc, "-std=c99", *WARNINGS, "-O2", "main.c", "-o", "main", "-lm"], check=True)
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    typed = "\n".join(" ".join(map(str, row)) for row in rows)
    answers = subprocess.run(["./main"], input=typed, capture_output=True, text=True, check=True).stdout
    found = np.loadtxt(answers.splitlines(), ndmin=2)
    np.testing.assert_allclose(found, [policy(row) for row in rows], rtol=0, atol=1e-5)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, "text": True, "check": True, "env": environment}
    played = subprocess.run([sys.executable, "-c", program], **options).stdout
    command = [sys.executable, ROOT / "rnm_td3_continuous.py", "--evaluate", "model.pt", "--eval-episodes", "1"]
    evaluated = subprocess.run(command, **options).stdout
    (episode,) = json.loads(played)
    assert f"returns {[round(episode, 2)]}," in evaluated
