"""Mean training return over each 10 000 steps: `python episodes.py FILE` with an episodes.csv."""

import csv
import sys

import numpy as np

with open(sys.argv[1]) as file:
    rows = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
for end in range(10_000, rows[-1][0] + 10_000, 10_000):
    returns = [value for step, value in rows if end - 10_000 < step <= end]
    if returns:
        print(f"{end}: {np.mean(returns):.0f}")
random = [value for step, value in rows if step <= 25_000]
print(f"random actions, to 25000: {np.mean(random):.0f}")
