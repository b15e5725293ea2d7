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


def groups(folder: Path) -> dict[str, list[sweep.Task]]:
    """By the policy's name, its seeds."""
    found: dict[str, list[sweep.Task]] = {}
    for task in sweep.read_plan(folder).values():
        if task.pattern in PATTERNS and task.variant == "base":
            found.setdefault(f"{task.env_id}__{task.kind}", []).append(task)
    return found


def median(tasks: list[sweep.Task]) -> sweep.Task:
    """By the last evaluation. Raises ValueError for an even number of seeds: none is the median."""
    if len(tasks) % 2 == 0:
        raise ValueError(f"{tasks[0].env_id} {tasks[0].kind}: {len(tasks)} seeds, of which none is the median")
    last = lambda task: (float(sad.read_run(task.results).returns[-1]), task.seed)  # noqa: E731
    return sorted(tasks, key=last)[len(tasks) // 2]


def main(folder: Path, out: Path) -> None:
    """Actors of ended runs to `folder/actors`, since run folders do not last; medians of whole groups to `out`."""
    for path in (folder / "actors", out):
        path.mkdir(parents=True, exist_ok=True)
    for name, tasks in groups(folder).items():
        ended = [task for task in tasks if sweep.last_evaluation(task.results) >= task.total_timesteps]
        for task in ended:  # Ctrl-C leaves a model, too
            if (model := task.folder / "model.pt").exists():
                (folder / f"actors/{task.name}.pt").write_bytes(without_critics(model))
        if ended == tasks:
            chosen = median(tasks)
            (out / f"{name}.pt").write_bytes((folder / f"actors/{chosen.name}.pt").read_bytes())
            print(f"{out / name}.pt: seed {chosen.seed}, {(out / f'{name}.pt').stat().st_size} bytes")


if __name__ == "__main__":
    main(Path("results/reproduction"), Path("results/policies"))
