"""Bytes and microseconds an action of exported policies: the tables of README.md, from the root of the project.

python results/export/measure.py  # needs gcc, requirements-export.txt; ziglang, if there, for the sizes on ARM
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path.cwd()))
import rnm_td3_continuous as rnm
import td3_continuous as td3
from export_policy import read_policy
from sad_analysis import markdown

MAIN = """
#include <stdio.h>
#include <time.h>
#include "policy.h"
static float obs[256][POLICY_OBS], action[POLICY_ACT];
int main(void)
{
    struct timespec begin, end;
    if (fread(obs, sizeof obs, 1, stdin) != 1) return 1;
    for (int turn = -1; turn < 20; turn++) {
        if (turn == 0) clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int i = 0; i < 256; i++) {
            policy_act(obs[i], action);
            obs[(i + 1) % 256][0] = action[0];  /* so that none can be left out */
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%.9g\\n", ((double)(end.tv_sec - begin.tv_sec) * 1e6 + (double)(end.tv_nsec - begin.tv_nsec) / 1e3) / 5120);
    return 0;
}
"""
BUILDS = {"C -O2": "-O2", "C -O3": "-O3", "C -O3 -march=native": "-O3 -march=native"}
ROUNDS = 15


def command(*words, **options):
    return subprocess.run(words, check=True, capture_output=True, **options).stdout


def model_of(folder, env_id, pattern):
    """A run of 2 000 steps, and its exports."""
    script = "td3_continuous.py" if pattern == "dense" else "rnm_td3_continuous.py"
    flags = ["--env-id", env_id, "--total-timesteps", "2000", "--learning-starts", "1000", "--eval-interval", "0"]
    if pattern != "dense":
        flags += ["--n", pattern.split(":")[0], "--m", pattern.split(":")[1]]
    root, folder = Path.cwd(), folder / f"{env_id}_{pattern}".replace(":", "_")
    folder.mkdir()
    command(sys.executable, root / script, *flags, "--save-model", "--checkpoint-interval", "0", cwd=folder)
    (model,) = folder.glob("runs/*/model.pt")
    for name in ("policy.h", "policy.onnx"):
        command(sys.executable, root / "export_policy.py", model, "--out", folder / name)
    (folder / "main.c").write_text(MAIN)
    for i, flags in enumerate(BUILDS.values()):
        command("gcc", "-std=gnu99", *flags.split(), "main.c", "-o", f"main{i}", "-lm", cwd=folder)
    return folder, model.rename(folder / "model.pt")


def timed(function, rows):
    for obs in rows[:50]:
        function(obs)
    start = time.perf_counter()
    for obs in rows:
        function(obs)
    return (time.perf_counter() - start) / len(rows) * 1e6


def rivals(folder, model, pattern, rows):
    """Name to a function that gives microseconds an action."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "policy.onnx", options)
    policy, eager = (td3 if pattern == "dense" else rnm).load_actor(model), rnm.on_cpu(read_policy(model)[0]).act
    found = {
        name: lambda i=i: float(command(folder / f"main{i}", input=rows.tobytes())) for i, name in enumerate(BUILDS)
    }
    found["ONNX Runtime"] = lambda: timed(lambda obs: session.run(None, {"observation": obs[None]}), rows)
    found["`load_actor`"] = lambda: timed(policy, rows)
    found["PyTorch eager, dense"] = lambda: timed(eager, rows)
    return found


def sizes(folder):
    """Bytes of the header compiled with -Os for this machine, and for a Cortex-M4 by clang, if there: code, tables."""
    (folder / "one.c").write_text('#define POLICY_API\n#include "policy.h"\n')
    arm = [sys.executable, "-m", "ziglang", "cc", "-target", "thumb-linux-musleabihf", "-mcpu=cortex_m4"]
    found = []
    for compiler in (["gcc"], [*arm, "-fno-sanitize=all"]):
        try:
            command(*compiler, "-std=c99", "-Os", "-c", "one.c", "-o", "one.o", cwd=folder)
            text = command("readelf", "-SW", "one.o", cwd=folder, text=True)
            names = (r" \.text", r" \.rodata")
            found.append([int(re.search(name + r"\s+PROGBITS\s+\S+ \S+ (\S+)", text).group(1), 16) for name in names])
        except subprocess.CalledProcessError:
            found.append(None)
    return found


def main():
    torch.set_num_threads(1)
    bytes_lines, time_lines = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for env_id in ("HalfCheetah-v5", "Ant-v5"):
            times, patterns = {}, ("dense", "2:4", "1:4", "1:8")
            for pattern in patterns:
                folder, model = model_of(Path(temporary), env_id, pattern)
                obs = torch.load(model, weights_only=True)["obs_dim"]
                rows = np.random.default_rng(0).normal(size=(256, obs)).astype(np.float32)
                times[pattern] = rivals(folder, model, pattern, rows)
                here, arm = sizes(folder)
                onnx, pt = ((folder / name).stat().st_size for name in ("policy.onnx", "model.pt"))
                total = sum(arm or here)
                flash = next(2**k for k in range(4, 20) if 2**k * 1024 >= total + 4096)
                arm = "not measured" if arm is None else f"{arm[0]} + {arm[1]}"
                cells = [env_id, pattern, f"{here[0]} + {here[1]}", arm, f"{flash} KB", onnx, pt]
                bytes_lines.append(cells)
            measured = {(pattern, name): [] for pattern in patterns for name in times[pattern]}
            for _ in range(ROUNDS):  # all take turns
                for pattern, name in measured:
                    measured[pattern, name].append(times[pattern][name]())
            names = list(times["dense"])
            for pattern in patterns:
                medians = [statistics.median(measured[pattern, name]) for name in names]
                time_lines.append([env_id, pattern, *(f"{median:.1f}" for median in medians)])
    tables = [
        (["environment", "N:M", "x86-64, gcc -Os: code + tables", "Cortex-M4, clang -Os: code + tables",
          "flash that holds it", "`policy.onnx`", "`model.pt` (with critics)"], bytes_lines),
        (["environment", "N:M", *names], time_lines),
    ]  # fmt: skip
    readme = Path("results/export/README.md")
    text = readme.read_text().split("\n| environment")[0]
    readme.write_text(text + "".join("\n" + markdown(head, lines) for head, lines in tables))


if __name__ == "__main__":
    main()
