"""Collect the evaluations of the runs below runs/ into CSV files beside this script, and draw them."""

import json
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
LABELS = {"td3_continuous": "dense", "rnm_td3_2_4": "2:4", "rnm_td3_1_4": "1:4", "rnm_td3_1_8": "1:8"}
STYLES = {"dense": ("black", "-"), "2:4": ("#0072B2", "-"), "1:4": ("#E69F00", "--"), "1:8": ("#CC79A7", "-.")}

for folder in sorted(Path(sys.argv[1]).iterdir()) if len(sys.argv) > 1 else []:
    config = json.loads((folder / "config.json").read_text())
    if config["exp_name"] in LABELS:
        shutil.copy(folder / "evaluations.csv", HERE / f"{config['exp_name']}__{config['seed']}.csv")

plt.figure(figsize=(7, 4.2))
for name, label in LABELS.items():
    color, line = STYLES[label]
    seeds = [np.genfromtxt(path, delimiter=",", names=True) for path in sorted(HERE.glob(f"{name}__*.csv"))]
    for seed in seeds:
        plt.plot(seed["step"] / 1000, seed["mean"], color=color, linestyle=line, linewidth=0.7, alpha=0.5)
    mean = np.mean([seed["mean"] for seed in seeds], axis=0)
    plt.plot(seeds[0]["step"] / 1000, mean, color=color, linestyle=line, linewidth=2, label=label)
    finals = [seed["mean"][-1] for seed in seeds]
    print(f"{label}: {', '.join(f'{final:.0f}' for final in finals)}; mean {np.mean(finals):.0f}")
plt.xlabel("environment steps (thousands); random actions up to 25")
plt.ylabel("evaluation return, mean of 10 episodes")
plt.title("HalfCheetah-v4, 2 seeds (thin) and their mean (thick)")
plt.legend()
plt.grid(alpha=0.3)
plt.tight_layout()
plt.savefig(HERE / "first_look.png", dpi=150)
