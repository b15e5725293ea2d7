"""Policies to play: of each environment and pattern the run whose last evaluation is the median of its seeds.

python results/reproduction/policies.py  # where the run folders are; from the root of the project
"""

import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path.cwd()))
import sad_analysis as sad
import sweep

PATTERNS, LIMIT = ("dense", "1:8"), 400_000  # bytes


def without_critics(path: Path) -> bytes:
    """A model file that holds what it takes to act. Raises ValueError if it is too large."""
    model = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in model.items() if key not in ("qf1", "qf2")}, content := io.BytesIO())
    if len(content.getvalue()) > LIMIT:
        raise ValueError(f"{path}: {len(content.getvalue())} bytes without the critics, more than {LIMIT}")
    return content.getvalue()


def choose(folder: Path) -> dict[str, sweep.Task]:
    """By the policy's name, the run. Raises ValueError for an even number of seeds: none is the median."""
    ended: dict[tuple[str, str], list[tuple[float, int, sweep.Task]]] = {}
    for task in sweep.read_plan(folder).values():
        ended_at = sweep.last_evaluation(task.results)
        if task.pattern in PATTERNS and task.variant == "base" and ended_at >= task.total_timesteps:
            last = float(sad.read_run(task.results).returns[-1])
            ended.setdefault((task.env_id, task.kind), []).append((last, task.seed, task))
    for (env, kind), runs in ended.items():
        if len(runs) % 2 == 0:
            raise ValueError(f"{env} {kind}: {len(runs)} seeds, of which none is the median")
    return {f"{env}__{kind}": sorted(runs)[len(runs) // 2][2] for (env, kind), runs in ended.items()}


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, task in choose(folder).items():
        (out / f"{name}.pt").write_bytes(without_critics(task.folder / "model.pt"))
        print(f"{out / name}.pt: seed {task.seed}, {(out / f'{name}.pt').stat().st_size} bytes")


if __name__ == "__main__":
    main(Path("results/reproduction"), Path("results/policies"))
