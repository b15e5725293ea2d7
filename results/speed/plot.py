"""speed.png from the CSV files of a folder: steps per second against the rivals, and time per step over hidden size."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / sys.argv[1]


def medians(name: str) -> dict[str, float]:
    with open(FOLDER / f"{name}.csv") as file:
        return {row["name"]: float(row["median"]) for row in csv.DictReader(file)}


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
speeds = medians("halfcheetah_2_threads")
colors = ["#0072b2" if name[0].isdigit() or name == "dense" else "#999999" for name in speeds]
bars = left.barh(list(speeds), list(speeds.values()), color=colors)
left.bar_label(bars, fmt="%.0f", padding=3)
left.invert_yaxis()
left.set(
    xlabel="environment steps per second", title="HalfCheetah-v4, two cores", xlim=(0, 1.12 * max(speeds.values()))
)

sizes = [256, 512, 1024, 2048]
for name, style in (("dense", "o--"), ("1:8", "s-")):
    times = [1000 / medians(f"hidden_{size}")[name] for size in sizes]
    right.plot(sizes, times, style, label=name, color="#d55e00" if name == "dense" else "#0072b2")
right.set(
    xscale="log", yscale="log", xlabel="neurons of each hidden layer", ylabel="ms per step", title="Growth with size"
)
right.set_xticks(sizes, sizes)
right.minorticks_off()
right.grid(alpha=0.3)
right.legend()
figure.savefig(FOLDER / "speed.png", dpi=150)
