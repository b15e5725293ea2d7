"""Steps per second of training scripts, measured in turn: A B C A B C ..., each from its own TensorBoard file.

    python results/speed/steps_per_second.py --rounds 3 --threads 2 --out results/speed/halfcheetah \\
        "CleanRL=python cleanrl/td3_continuous_action.py --env-id HalfCheetah-v4 --total-timesteps 6000 ..." "1:4=..."

Every command runs in a folder of its own and has to write the scalar `charts/SPS` every 100 steps, as CleanRL does; its
times count from step --first on, so that imports, compilation and the random actions before learning do not. For
Stable-Baselines3, SBX and LeanRL, which do not write it: "SB3=python results/speed/steps_per_second.py --drive sb3 ENV
STEPS"; LeanRL's script is $LEANRL.
"""

import argparse
import csv
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace


def measure(command: str, threads: int, first: int) -> float:
    """Steps per second of one run, from its first logged step after `first` to the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        both = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {both}"
        run = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{command}\n{run.stderr[-2000:]}")
        (events,) = Path(folder).glob("runs/*/events*")
        times = [event for event in EventAccumulator(str(events)).Reload().Scalars("charts/SPS") if event.step > first]
        return (times[-1].step - times[0].step) / (times[-1].wall_time - times[0].wall_time)


def drive(library: str, env_id: str, steps: int) -> dict | None:
    """TD3 of Stable-Baselines3, SBX or LeanRL (CUDA graphs) with our settings."""
    if library == "leanrl":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter("runs/run")
        log = lambda values, step: writer.add_scalar("charts/SPS", values["speed"], step)  # noqa: E731
        sys.modules["wandb"] = SimpleNamespace(init=lambda **_: None, log=log)
        flags = ["--env-id", env_id, "--total-timesteps", str(steps), "--learning-starts", "1000", "--cudagraphs"]
        sys.argv = [os.environ["LEANRL"], *flags]
        return runpy.run_path(os.environ["LEANRL"], run_name="__main__")
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback
    from torch.utils.tensorboard import SummaryWriter

    if library == "sb3":
        from stable_baselines3 import TD3
    else:
        from sbx import TD3

    class Log(BaseCallback):
        def _on_training_start(self) -> None:
            self.writer, self.start = SummaryWriter("runs/run"), time.time()

        def _on_step(self) -> bool:
            if self.num_timesteps % 100 == 0:
                speed = self.num_timesteps / (time.time() - self.start)
                self.writer.add_scalar("charts/SPS", speed, self.num_timesteps)
            return True

        def _on_training_end(self) -> None:
            self.writer.close()

    settings = {"learning_rate": 3e-4, "learning_starts": 1000, "batch_size": 256, "train_freq": 1, "gradient_steps": 1}
    layers = {"net_arch": [256, 256]}
    model = TD3("MlpPolicy", gym.make(env_id), **settings, policy_kwargs=layers, device="cpu")
    model.learn(steps, callback=Log())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="NAME=COMMAND; ratios are to the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--first", type=int, default=2000, help="steps that are not counted")
    parser.add_argument("--out", help="writes OUT.csv, with every run")
    parser.add_argument("--drive", nargs=3, metavar=("LIBRARY", "ENV", "STEPS"), help="run sb3, sbx or leanrl instead")
    args = parser.parse_args()
    if args.drive:
        return drive(args.drive[0], args.drive[1], int(args.drive[2]))
    commands = dict(command.split("=", 1) for command in args.commands)
    speeds = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            speeds[name].append(measure(command, args.threads, args.first))
            print(f"{name:>24}: {speeds[name][-1]:7.1f} steps/s", flush=True)
    base = statistics.median(next(iter(speeds.values())))
    rows = [["name", "threads", "median", "ratio", *(f"run_{i + 1}" for i in range(args.rounds))]]
    for name, runs in speeds.items():
        median = statistics.median(runs)
        rows.append([name, args.threads, round(median, 1), round(median / base, 2), *(round(run, 1) for run in runs)])
        print(f"{name:>24}: {median:7.1f} steps/s, {median / base:5.2f} x")
    if args.out:
        with open(f"{args.out}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
