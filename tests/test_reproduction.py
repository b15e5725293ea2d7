"""Claims are judged by the rules that stand in results/reproduction/README.md, and numbers in texts are of the data."""

import csv
import importlib.util
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import environments  # noqa: F401
import numpy as np
import pytest
import scipy.stats
import torch

import rnm_td3_continuous as rnm
import sad_analysis as sad
import td3_continuous as td3

ROOT = Path(__file__).parents[1]
BEST = "1:4, best", "1:8, best", "1:8, critics"


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / f"results/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


claims, masks, policies = (script(f"reproduction/{name}") for name in ("claims", "masks", "policies"))


def test_numbers_in_the_texts_are_those_of_the_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    parts = script("recipe/parts")
    made = parts.tables(parts.read()) + Path("results/recipe/report.md").read_text()
    made += claims.summary(*claims.read(claims.HERE)[:2])
    for table in claims.tables(claims.HERE):
        assert table in Path("results/reproduction/README.md").read_text()
        made += table
    for name in ("halfcheetah_2_threads", "halfcheetah_1_thread", "ant"):
        with open(f"results/speed/zen4/{name}.csv") as file:
            rates = [float(row["median"]) for row in csv.DictReader(file)]  # the first row is CleanRL
            made += "".join(f"\n{int(rate + 0.5)} ({rate / rates[0]:.1f}x)" for rate in rates)
    number, counts = r"-?\d+\.\d\d", []
    for form in (rf"{number} \[{number}, {number}\]", r"\b\d+ \+- \d+", r"\b\d+ \(\d\.\dx\)"):
        true = set(re.findall(form, made))
        for text in ("README.md", "results/recipe/README.md"):
            said = re.findall(form, Path(text).read_text().replace("\n", " "))
            assert not set(said) - true, text
            counts.append(len(said))
    assert counts[0] > 10 and counts[1] > 50 and counts[2] > 10 and counts[4] > 10  # intervals, means, speeds


def last_episodes(run):
    """Returns of all episodes of a run's last ten evaluations, read without sad_analysis.py."""
    with open(run / "evaluations.csv") as file:
        return [float(row[f"return_{i}"]) for row in list(csv.DictReader(file))[-10:] for i in range(1, 11)]


def folders(env, kind):
    return claims.HERE.glob(f"runs/{env}__{kind.replace(', ', '__').replace(':', '_')}__[0-9]")


def finals(env, kind):
    """Final returns of its seeds, read without claims.py."""
    return np.array([np.mean(last_episodes(folder)) for folder in folders(env, kind)])


def cpu(folder):
    return json.loads((folder / "config.json").read_text())["cpu"]


def clock(env):
    """The processor with most dense runs, of these that with most kinds; read without sweep.py."""
    kinds = defaultdict(list)
    for folder in claims.HERE.glob(f"runs/{env}__*"):
        kinds[cpu(folder)].append(folder.name.removeprefix(f"{env}__").rpartition("__")[0])
    return max(kinds, key=lambda name: (kinds[name].count("dense"), len(set(kinds[name]))))


def seconds(env, *kinds):
    """Mean of the runs of these kinds, whose networks are the same, on the processor whose times count."""
    found, counted = [], clock(env)
    for folder in [folder for kind in kinds for folder in folders(env, kind)]:
        if cpu(folder) == counted:
            with open(folder / "evaluations.csv") as file:
                found.append(float(list(csv.DictReader(file))[-1]["seconds"]))
    return np.mean(found)


def test_the_table_of_results_in_the_readme(monkeypatch):
    """It is what claims.py makes of the data, and its means, spreads and ratios are those of the files."""
    monkeypatch.chdir(ROOT)
    table = claims.summary(*claims.read(claims.HERE)[:2])
    assert table in Path("README.md").read_text()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    found = {name: cells for name, *cells in found}
    best, pair = ("", "1:4, best", "1:8, best", "1:8, critics"), claims.ENVS[:2]
    groups = {f"{env}, 3e-4 for all": (env, "dense", "2:4", "1:4", "1:8", "") for env in claims.ENVS}
    groups["HalfCheetah-v5, each at its best"] = "HalfCheetah-v5", "dense, best", *best
    groups["Ant-v5, each at its best"] = "Ant-v5", "dense", *best
    ratios = {}
    for name, (env, *kinds) in groups.items():
        samples = [finals(env, kind) for kind in kinds]
        ratios[name] = np.array([values.mean() / samples[0].mean() if values.size else np.nan for values in samples])
        for values, ratio, cell in zip(samples, ratios[name], found[name], strict=True):
            said, expected = cell.replace(":", "").split(), [f"{values.mean():.0f}"] if values.size else []
            if values.size > 1:
                expected += "+-", f"{values.std(ddof=1):.0f}"
            if values.size and values is not samples[0]:
                expected += [f"{ratio:.2f}"]
            assert said[: len(expected)] == expected and bool(said) == bool(expected)
    for how, envs in (("3e-4 for all", claims.ENVS), ("each at its best", pair)):
        means = np.mean([ratios[f"{env}, {how}"] for env in envs], axis=0)[1:]
        said = [cell.split(" ")[0] for cell in found[f"mean of {len(envs)} environments, {how}"][1:]]
        assert said == ["" if np.isnan(mean) else f"{mean:.2f}" for mean in means]
    networks = [("2:4",), ("1:4", "1:4, best"), ("1:8", "1:8, best"), ("1:8, critics",)]
    hours = {env: np.array([seconds(env, *kinds) for kinds in [("dense", "dense, best"), *networks]]) for env in pair}
    shares = np.mean([hours[env] / hours[env][0] for env in pair], axis=0)[1:]
    said = [cell.split(", ")[1] for cell in found["active weights (HalfCheetah-v5); wall time (mean with Ant-v5)"][1:]]
    assert said == [f"{share:.2f}" for share in shares]
    of = ["`{1} {2}`".format(*clock(env).split()) for env in pair]
    of = f"{of[0]}:" if of[0] == of[1] else f"{of[0]} on {pair[0]}, of {of[1]} on {pair[1]}:"
    text = (claims.HERE / "README.md").read_text().replace("\n", " ")
    assert f"Hours, of the figure above and of the second target, are of {of} every run gets" in text


def test_ratios_in_the_readme_are_those_of_the_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    results, dense, _ = claims.read(claims.HERE)
    text, pair = Path("README.md").read_text().replace("\n", " "), claims.ENVS[:2]
    ended = f"{len(list(claims.HERE.glob('runs/*')))} of {len(claims.sweep.read_plan(claims.HERE))}"
    assert f"({ended} runs)" in text
    page = (claims.HERE / "README.md").read_text().replace("\n", " ")
    assert f"{ended} have ended" in page

    def of_dense(quantity, runs, *kinds):
        return [np.mean([quantity(runs[e, kind]) / quantity(runs[e, "dense"]) for e in pair]) for kind in kinds]

    def final(runs):
        return sad.final(runs).mean()

    best = "1:4", "1:8", "1:8 with critics of 1:4"
    means = of_dense(final, claims.at_best(results, dense), *best)
    bounds = [claims.ratios(results, dense, kind, pair)["mean of 2 environments"][0][1] for kind in BEST]
    parts = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, (low, high) in zip(means, bounds, strict=True)]
    assert "1:4 has {} of its return, 1:8 {}, 1:8 with critics of 1:4 {} ".format(*parts) in text
    timed = claims.at_best(claims.on_one_clock(results), dense)
    said = "in {:.1f}, {:.1f}, {:.1f} of its time;"
    assert said.format(*of_dense(lambda runs: runs[0].seconds[-1], timed, *best)) in text
    kinds, said = ("1:8, letter", "1:4, letter", "1:8", "1:4"), "1:8 has {:.2f} of dense and 1:4 {:.2f}, with them "
    said += "{:.2f} and {:.2f} (3e-4, mean of HalfCheetah-v5 and Ant-v5)"
    assert {len(results[env, kind]) for env in pair for kind in kinds if "letter" in kind} == {2}
    assert said.format(*of_dense(final, results, *kinds)) in text
    failed = final(results["Walker2d-v5", "1:8"]) / final(results["Walker2d-v5", "dense"])
    assert f"on Walker2d-v5 1:8 has {failed:.1f}, at 3e-4." in text
    rows = [row for row in claims.targets(claims.HERE) if "quarter" in row[0] and row[1].startswith("best step sizes")]
    ours = [[float(row[3].split()[0]) for row in rows if row[2] == env] for env in pair]
    runs = claims.on_one_clock(results)["Ant-v5", "dense"]
    clock = np.mean([run.seconds[run.steps == 250_000] for run in runs])
    early = np.mean([run.returns[run.seconds <= clock][-10:].mean() for run in runs])
    untrained = np.mean([run.returns[run.steps <= 25_000].mean() for run in runs])
    times = "{:.1f}, {:.1f}, {:.1f} times its return on HalfCheetah-v5".format(*ours[0])
    low, _, high = (f"{round(early * x, -2):_.0f}".replace("_", " ") for x in sorted(ours[1]))
    said = (
        f"After a quarter of its time they have {times}, and on Ant-v5 {low} to {high} to its {round(early, -1):.0f} "
    )
    assert said + f"(an untrained policy: {untrained:.0f})." in text
    assert f"dense has {round(early, -1):.0f} by then, less than an untrained policy ({untrained:.0f})" in page


def test_seeds_in_the_readme_are_those_of_the_runs(monkeypatch):
    """Of the groups in its table."""
    monkeypatch.chdir(ROOT)
    results, pair = claims.read(claims.HERE)[0], claims.ENVS[:2]
    assert {len(results[env, kind]) for env in pair for kind in ("dense", "2:4", "1:4", "1:8")} == {5}
    assert {len(results[env, kind]) for env in claims.ENVS[2:] for kind in ("dense", "2:4", "1:4", "1:8")} == {3}
    assert {len(results[env, kind]) for env in pair for kind in BEST} | {len(results[pair[0], "dense, best"])} == {3}
    assert "3 seeds (at 3e-4 on HalfCheetah-v5 and Ant-v5 5). Final" in Path("README.md").read_text().replace("\n", " ")


def test_what_the_page_says_in_short_is_what_its_table_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    found, rows = {"confirmed": set(), "refuted": set(), "undecided": set()}, claims.claims(claims.HERE)
    for claim, how, where, *_, verdict in rows:
        found[verdict].add((claim.split(" (")[0], how, where))
    recipe, letter, critics = "the recipe, 3e-4", "to the letter", "best step sizes, critics of 1:4"
    pair, numbers = claims.ENVS[:2], [("2:4 is 1.01 of dense", recipe, "HalfCheetah-v5")]
    assert ("2:4 is 1.14 of dense", recipe, "Ant-v5") in found["undecided"]
    competes = [("1:8 competes", recipe, "HalfCheetah-v5"), ("1:8 competes", recipe, "Walker2d-v5")]
    competes += [("1:8 competes", letter, where) for where in (*pair, "mean of 2 environments")]
    assert found["refuted"] == {*numbers, *competes, ("1:4 matches dense", letter, "HalfCheetah-v5")}
    expected = {("1:8 competes", critics, where) for where in (*pair, "mean of 2 environments")}
    assert {row for row in found["confirmed"] if "faster" not in row[0] and "letter" not in row[0]} == expected
    assert not [row for row in found["refuted"] if "faster" in row[0]]
    assert not [row for row in rows if ("dense" in row[0] or "competes" in row[0]) and re.search(r" \[[1-9]", row[3])]


def test_when_they_began_to_walk_and_to_hop_is_that_of_the_data(monkeypatch):
    """The first evaluation above 1 500, None if there is none, and the last mean of ten that is not."""
    monkeypatch.chdir(ROOT)
    results, text = claims.read(claims.HERE)[0], (claims.HERE / "README.md").read_text().replace("\n", " ")

    def first(env, kind):
        return [run.steps[run.returns > 1500].min(initial=10**9) for run in results[env, kind]]

    def last(env, kind):
        runs = results[env, kind]
        return [run.steps[9:][np.convolve(run.returns, np.full(10, 0.1), "valid") <= 1500].max() for run in runs]

    def say(form, *steps):
        assert form.format(*(f"{step:_}".replace("_", " ") for step in steps)) in text

    one, two, three = first("Walker2d-v5", "1:8")
    assert one == 10**9
    say("the second and the third are above 1 500 for the first time after {} and {}, and still", two, three)
    *stay, never = (step + 5000 for step in last("Walker2d-v5", "1:4"))
    assert never > 1e6
    say("in the mean of ten evaluations, after {} and {} steps; the third never gets there.", *stay)
    one, two, three = first("Hopper-v5", "1:8")
    assert two == 10**9
    say("On Hopper-v5 the first run of 1:8 is above 1 500 for the first time after {} steps, ", one)
    say("the third after {}, with relapses to {}, and the second never: ", three, last("Hopper-v5", "1:8")[2])
    spans = [f(first("Hopper-v5", kind)) for kind in ("1:4", "2:4", "dense") for f in (min, max)]
    say("first time after {} to {} steps, those of 2:4 after {} to {}, those of dense after {} to {}.", *spans)


def test_returns_and_processors_are_those_of_the_files(monkeypatch):
    """The mean of all episodes of the last ten evaluations, read without sad_analysis.py; no run is lost."""
    monkeypatch.chdir(ROOT)
    results, _, _ = claims.read(claims.HERE)
    table = {row[0]: row[1:] for row in claims.returns(results)}
    expected, count = {}, {}
    for path in sorted(claims.HERE.glob("runs/*")):
        env, *kind, _ = path.name.split("__")
        config = json.loads((path / "config.json").read_text())
        row = expected.setdefault(", ".join(kind).replace("_", ":"), [f"{config['learning_rate']:g}", [], [], [], []])
        row[1 + claims.ENVS.index(env)].append(f"{np.mean(last_episodes(path)):.0f}")
        key = f"`{config['cpu']}`", claims.ENVS.index(env)
        count[key] = count.get(key, 0) + 1
    assert table == {kind: [rate, *map(", ".join, cells)] for kind, (rate, *cells) in expected.items()}
    counts = {(cpu, i): value for cpu, *cells in claims.processors(results) for i, value in enumerate(cells) if value}
    assert counts == count and (total := sum(count.values())) >= 48
    for text in ("README.md", claims.HERE / "README.md"):
        assert re.findall(r"(\d+) of 99", Path(text).read_text()) == [str(total)]


def test_the_figure_shows_each_at_its_best_step_size(monkeypatch):
    monkeypatch.chdir(ROOT)
    chosen = claims.at_best(*claims.read(claims.HERE)[:2])
    sparse = {"1:4": (9e-4, 4, 0), "1:8": (9e-4, 8, 0), "1:8 with critics of 1:4": (9e-4, 8, 4)}
    expected = {(env, kind): {flags} for env in claims.ENVS[:2] for kind, flags in sparse.items()}
    expected |= {("HalfCheetah-v5", "dense"): {(6e-4, None, None)}, ("Ant-v5", "dense"): {(3e-4, None, None)}}
    flags = "learning_rate", "m", "critic_m"
    found = {key: {tuple(map(run.config.get, flags)) for run in runs} for key, runs in chosen.items()}
    assert found == expected


@pytest.mark.parametrize(
    "claimed, bounds, verdict",
    [
        (1.14, [1.0, 1.3], "confirmed"), (1.14, [1.14, 1.2], "confirmed"), (1.14, [0.9, 1.31], "undecided"),
        (1.14, [1.15, 1.2], "refuted"), (1.14, [0.2, 1.13], "refuted"), (1.14, None, "undecided"),
    ],
)  # fmt: skip
def test_a_number(claimed, bounds, verdict):
    assert claims.number(claimed, bounds) == verdict


@pytest.mark.parametrize(
    "bound, bounds, verdict",
    [(0.8, [0.8, 2], "confirmed"), (0.8, [0.5, 0.79], "refuted"), (0.8, [0.79, 0.9], "undecided"),
     (0.8, [0.5, 0.8], "undecided"), (0.8, None, "undecided")],
)  # fmt: skip
def test_at_least(bound, bounds, verdict):
    assert claims.more(bound, bounds) == verdict


def test_intervals_hold_the_truth_as_often_as_they_say():
    """A t interval where dense is known; 95 % of simulated studies, with three and five seeds, one and four ratios."""
    rng = np.random.default_rng(0)
    ours = rng.normal(2, 1, 4)
    value, bounds = claims.compare((ours, np.full(3, 4.0)))
    exact = scipy.stats.ttest_1samp(ours, 0).confidence_interval()
    assert value == ours.mean() / 4 and bounds == pytest.approx([exact.low / 4, exact.high / 4])
    for seeds, truths in ((3, [0.8]), (5, [1.2]), (3, [0.7, 0.9, 1.1, 1.3])):
        held = 0
        for _ in range(1000):
            draws = [(rng.normal(t, 0.2 * t, seeds), rng.normal(1, 0.2, seeds)) for t in truths]
            low, high = claims.compare(*draws)[1]
            held += low <= np.mean(truths) <= high
        assert 930 <= held <= 985
    assert claims.compare((ours, ours), (ours[:1], ours)) == (pytest.approx((1 + ours[0] / ours.mean()) / 2), None)


def sweep_of(returns, steps=200, folder="study", untrained=0.0):
    """A folder as sweep.py leaves it: by environment, kind and seed, one return at all evaluations, and seconds.

    Those of the first 20 steps, before learning, are `untrained`.
    """
    plan = {}
    for env, kinds in returns.items():
        for (pattern, variant), runs in kinds.items():
            for seed, (value, seconds) in enumerate(runs, start=1):
                kind = pattern.replace(":", "_") + (f"__{variant}" if variant != "base" else "")
                name = f"{env}__{kind}__{seed}"
                flags = {"base": [], "best": ["--learning-rate", "9e-4"]}.get(variant, ["--init", "linear"])
                plan[name] = [env, pattern, seed, steps, flags, variant]
                run = Path(folder, "runs", name)
                run.mkdir(parents=True)
                config = {"env_id": env, "seed": seed, "total_timesteps": steps, "eval_interval": 10}
                config["learning_starts"] = 20
                config |= {"obs_dim": 3, "action_dim": 1, "hidden_sizes": [8]}
                if pattern != "dense":
                    n, m = map(int, pattern.split(":"))
                    config |= {"n": n, "m": m, "mask_update_interval": 1000}
                (run / "config.json").write_text(json.dumps(config))
                means = {step: untrained if step <= 20 else value for step in range(10, steps + 1, 10)}
                rows = [f"{step},{mean},{mean},0,{seconds * step / steps}" for step, mean in means.items()]
                (run / "evaluations.csv").write_text("\n".join(["step,return_1,mean,std,seconds", *rows, ""]))
    Path(folder, "sweep.json").write_text(json.dumps(plan))
    return Path(folder)


def test_the_table(monkeypatch):
    dense, sparse = [(100.0, 20), (102.0, 20), (98.0, 20)], [(114.0, 10), (115.0, 10), (113.0, 10)]
    kinds = {("dense", "base"): dense, ("2:4", "base"): sparse, ("1:8", "base"): [(value / 2, 5) for value, _ in dense]}
    folder = sweep_of(
        {
            "Ant-v5": kinds
            | {("1:8", "letter"): [(10.0, 5)], ("1:8", "wide"): [(120.0, 9)], ("1:8", "best"): [(150.0, 9)]},
            "HalfCheetah-v5": kinds
            | {("1:8", "critics"): [(90.0, 9)], ("dense", "best"): [(200.0, 20)], ("1:16", "wide"): [(190.0, 30)]},
        }
    )
    (folder / "sad").mkdir()
    found = {"within_groups_runs": 30, "within_groups_spearman": -0.4, "within_groups_interval": [-0.7, -0.1]}
    (folder / "sad/summary.json").write_text(json.dumps({"stability_and_return": {"Ant-v5": found, "Hopper-v5": {}}}))
    kinds = {("1:8", "lr9"): [(10.0, 1), (10.1, 1)], ("1:8", "K10000"): [(20.0, 1), (20.2, 1)]}
    monkeypatch.setattr(claims, "INTERVALS", sweep_of({"Ant-v5": kinds}, folder="intervals"))
    rows = {(claim, how, where): rest for claim, how, where, *rest in claims.claims(folder)}
    key = "1:8: rarer mask updates help", "K = 10 000 to K = 1 000", "Ant-v5"
    assert rows.pop(key) == ["2.00 [1.94, 2.06]", "", "2", "confirmed"]
    speeds = [rows.pop(key) for key in list(rows) if key[1] == "two threads, CleanRL"]
    assert len(speeds) == 6 and [row[3] for row in speeds] == ["confirmed"] * 6
    assert rows["1:8 competes (at least 0.8)", "best step sizes, wide", "Ant-v5"][::3] == ["1.20", "undecided"]
    assert rows["1:8 competes (at least 0.8)", "best step sizes, critics of 1:4", "HalfCheetah-v5"][0] == "0.45"
    assert rows["1:16 competes (at least 0.8)", "best step sizes, wide", "HalfCheetah-v5"][0] == "0.95"
    best = {key: row[0] for key, row in rows.items() if key[1] == "best step sizes"}
    assert best == {("1:8 competes (at least 0.8)", "best step sizes", "Ant-v5"): "1.50"}
    shutil.rmtree(folder / "runs/HalfCheetah-v5__dense__best__1")
    at_best = [key for key in claims.claims(folder) if key[1].startswith("best step sizes")]
    assert {row[2] for row in at_best} == {"Ant-v5"}  # on HalfCheetah-v5 dense at its best has not ended
    recipe, both = "the recipe, 3e-4", "mean of 2 environments"
    ours, above, runs, verdict = rows["2:4 is 1.14 of dense", recipe, "Ant-v5"]
    assert ours.startswith("1.14 [1.0") and ours == above and (runs, verdict) == ("3", "confirmed")
    assert rows["2:4 is 1.01 of dense", recipe, "HalfCheetah-v5"][-1] == "refuted"
    matches = [rows["2:4 matches dense (at least 0.95)", recipe, where] for where in ("Ant-v5", "HalfCheetah-v5", both)]
    assert [row[3] for row in matches] == ["confirmed"] * 3 and matches[2][2] == "6"
    low, high = (float(bound) for bound in matches[2][0].split("[")[1].rstrip("]").split(", "))
    assert 1.0 < low < 1.14 < high < 1.3 and matches[2][0].startswith("1.14 ")
    assert rows["1:8 competes (at least 0.8)", recipe, both][3] == "refuted"
    assert rows["1:8 competes (at least 0.8)", "to the letter", "Ant-v5"] == ["0.10", "0.10", "1", "undecided"]
    beats = {key[2]: row for key, row in rows.items() if key[0] == "1:8: the recipe beats the letter"}
    assert beats == {"Ant-v5": ["5.00", "", "3", "undecided"]}  # one run to the letter
    assert rows["2:4 trains faster", "these runs, our dense twin", "Ant-v5"][0] == "2.00 [2.00, 2.00]"
    faster = rows["1:8 trains faster", "these runs, our dense twin", "HalfCheetah-v5"]
    assert faster[::3] == ["4.00 [4.00, 4.00]", "confirmed"]
    stable = rows["stable SAD, better return", "rank correlation", "Ant-v5"]
    assert stable == ["-0.40 [-0.70, -0.10]", "", "30", "refuted"]
    assert not [key for key in rows if key[0].startswith("1:4") or key[2] == "Hopper-v5"]
    assert np.isfinite([float(row[0].split()[0]) for row in rows.values()]).all()


def test_targets():
    """Dense does a quarter of its steps in 5 s; then a run twice as fast is at step 100, one four times as fast at 200.

    On Ant-v5 all have half of their return before step 110.
    """
    dense, half = [(100.0, 20)] * 2, [(200.0, 10)] * 2
    kinds = {("dense", "base"): dense, ("1:4", "base"): half}
    folder = sweep_of(
        {
            "Ant-v5": kinds | {("1:8", "base"): [(90.0, 5)] * 2, ("1:8", "best"): [(95.0, 5)]},
            "HalfCheetah-v5": kinds | {("1:8", "base"): [(80.0, 5)] * 2},
            "Hopper-v5": {("dense", "base"): dense, ("1:8", "base"): [(1000.0, 5)] * 2},
        }
    )
    for path in folder.glob("runs/Ant-v5__*/evaluations.csv"):
        early = re.compile(r"^(\d0|100),([\d.]+),[\d.]+", re.MULTILINE)
        path.write_text(early.sub(lambda row: f"{row[1]},{float(row[2]) / 2},{float(row[2]) / 2}", path.read_text()))
    rows = {(target, how, where): rest for target, how, where, *rest in claims.targets(folder)}
    recipe, both, late = "the recipe, 3e-4", "mean of 2 environments", "return after a quarter of the steps of dense"
    assert rows.pop(("1:4: final return, at least 1.0", recipe, both)) == ["2.00 [2.00, 2.00]", "4", "met"]
    assert rows.pop(("1:8: final return, at least 0.9", recipe, both)) == ["0.85 [0.85, 0.85]", "4", "missed"]
    early = {(target[:3], how, where): rest for (target, how, where), rest in rows.items() if late in target}
    assert len(early) == len(rows) and all(target.endswith(f"{late}, at least 1.5") for target, *_ in rows)
    assert early == {
        ("1:4", recipe, "HalfCheetah-v5"): ["2.00 [2.00, 2.00]", "2", "met"],
        ("1:4", recipe, "Ant-v5"): ["2.00 [2.00, 2.00]", "2", "met"],
        ("1:8", recipe, "HalfCheetah-v5"): ["0.80 [0.80, 0.80]", "2", "missed"],
        ("1:8", recipe, "Ant-v5"): ["1.80 [1.80, 1.80]", "2", "met"],
        ("1:8", "best step sizes", "Ant-v5"): ["1.90", "1", "met"],
    }


def test_speeds_of_several_processors_are_not_compared():
    dense, sparse = [(100.0, 20)] * 3, [(100.0, 10), (100.0, 10), (100.0, 80)]
    folder = sweep_of({"Ant-v5": {("dense", "base"): dense, ("2:4", "base"): sparse}})
    config = folder / "runs/Ant-v5__2_4__3/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cpu": "slow"}))
    ((*_, ours, _, runs, _),) = [row for row in claims.claims(folder) if row[1] == "these runs, our dense twin"]
    assert (ours, runs) == ("2.00 [2.00, 2.00]", "2")


def test_all_runs_are_on_the_clock_of_one_processor():
    """That of three kinds of networks; no wide one was made there, and the step size costs no time."""
    kinds = {("dense", "base"): [(1.0, 20), (1.0, 22), (1.0, 80)], ("1:8", "base"): [(1.0, 10)]}
    kinds |= {("1:4", "base"): [(1.0, 30)], ("1:8", "best"): [(1.0, 90)], ("1:4", "wide"): [(1.0, 70)]}
    folder = sweep_of({"Ant-v5": kinds})
    for name, changes in (("dense__3", {}), ("1_8__best__1", {}), ("1_4__wide__1", {"hidden_sizes": [16]})):
        config = folder / f"runs/Ant-v5__{name}/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"cpu": "slow"} | changes))
    found = claims.on_one_clock(claims.read(folder)[0])
    seconds = {kind: [run.seconds[-1] for run in runs] for (_, kind), runs in found.items()}
    assert seconds == {"dense": [pytest.approx(21)] * 3, "1:8": [10], "1:4": [30], "1:8, best": [pytest.approx(10)]}
    assert found["Ant-v5", "dense"][2].seconds[:2].tolist() == pytest.approx([21 / 20, 21 / 10])
    assert set(map(len, claims.sweep.timed(found).values())) == {1, 3}  # of one processor, for the figure


def test_what_an_untrained_policy_gets_is_no_merit():
    """Standing still, 60 of 100, would be 0.85 of dense; above it the ratio is 0.62, and the verdict says neither."""
    dense, sparse = [(100.0, 1), (101.0, 1), (99.0, 1)], [(85.0, 1), (86.0, 1), (84.0, 1)]
    folder = sweep_of({"Ant-v5": {("dense", "base"): dense, ("1:8", "base"): sparse}}, untrained=60.0)
    (row,) = [row for row in claims.claims(folder) if row[0].startswith("1:8 competes")]
    assert row[3].startswith("0.85 [0.8") and row[4].startswith("0.62 [0.") and row[-1] == "undecided"
    worse = sweep_of({"Ant-v5": {("dense", "base"): [(50.0, 1)] * 3, ("1:8", "base"): sparse}}, 200, "worse", 60.0)
    assert not [row for row in claims.claims(worse) if row[0].startswith("1:8 competes")]


def test_no_ratio_to_what_is_not_positive_and_no_run_lost_without_a_word(capsys):
    low, lower = [(-100.0, 1)] * 2, [(-300.0, 1)] * 2
    kinds = {("dense", "base"): low, ("1:8", "base"): lower}
    folder = sweep_of({"Ant-v5": kinds, "HalfCheetah-v5": kinds})
    assert not claims.targets(folder)
    shutil.rmtree(folder)
    folder = sweep_of({"Ant-v5": kinds})
    (folder / "runs/Ant-v5__1_8__2/evaluations.csv").write_text("step,mean,std\n")
    rows = [row for row in claims.claims(folder) if row[1] != "two threads, CleanRL"]
    assert [row[0] for row in rows] == ["1:8 trains faster"]
    assert capsys.readouterr().err.startswith("left out: Ant-v5__1_8__2: ")


def test_what_masks_say_outlives_the_run_folders(capsys):
    """And is what the masks themselves say; a run whose masks are lost is named."""
    folder = sweep_of({"Scripted-v0": {("2:4", "base"): [(1.0, 1)] * 3}}, steps=300)
    small = {
        "env_id": "Scripted-v0",
        "total_timesteps": 300,
        "learning_starts": 20,
        "batch_size": 8,
        "eval_interval": 10,
    }
    whole = []
    for seed in (1, 2):
        args = rnm.Args(**small, mask_update_interval=20, seed=seed, exp_name="study__2_4", hidden_sizes=(8, 8))
        _, _, run = rnm.train(args)
        for name in ("config.json", "evaluations.csv"):
            shutil.copy(run / name, folder / f"runs/Scripted-v0__2_4__{seed}/{name}")
        whole.append(sad.read_run(run))
        sad.add_history(whole[-1], 10)
    rnm.train(rnm.Args(**small, mask_update_interval=0, seed=3, exp_name="study__2_4", hidden_sizes=(8, 8)))
    before = masks.main(folder)
    assert "Scripted-v0__2_4__3 is left out: its masks never change" in capsys.readouterr().err
    shutil.rmtree("runs")
    assert masks.main(folder) == before == json.loads((folder / "sad/summary.json").read_text())
    assert "Scripted-v0__2_4__3 is left out: its run folder is gone" in capsys.readouterr().err
    for seed, run in enumerate(whole, start=1):
        found = before["runs"][f"Scripted-v0__2_4__{seed}"]
        assert found["stability"] == run.stability and found["sad"] == run.sad["total"] and run.stability["spread"] > 0
        kept = sad.read_run(folder / f"runs/Scripted-v0__2_4__{seed}")
        masks.add_kept(kept, folder / f"sad/Scripted-v0__2_4__{seed}")
        for i, name in enumerate(masks.NETWORKS):
            layers = sad.members(run.history)[name]
            np.testing.assert_array_equal(kept.history.sad[:, i], run.history.sad[:, layers].sum(1))
            np.testing.assert_array_equal(kept.history.overlap[:, i], run.history.overlap[:, layers].sum(1))
        assert kept.history.steps.tolist() == run.history.steps.tolist() and kept.history.sad.sum() > 0
    assert before["stability_and_return"] == sad.correlate(whole)
    ((*about, first, last, never, always),) = claims.changes(folder, claims.read(folder)[0])
    assert about == ["Scripted-v0", "2:4", "2"]
    rates = np.array([run.history.sad.sum(1) / run.history.active.sum() for run in whole])
    expected = [rates[:, 1].mean(), rates[:, 1:].mean()]
    expected += [np.mean([run.sad["total"][f"{when}_active"] for run in whole]) for when in ("never", "always")]
    np.testing.assert_allclose([float(x) for x in (first, last, never, always)], np.multiply(100, expected), rtol=5e-3)


def test_policies_are_of_median_seeds_and_play(monkeypatch):
    """InvertedPendulum-v5; of five seeds the third best, told apart by their actions."""
    returns = [(30.0, 1), (10.0, 1), (20.0, 1), (50.0, 1), (40.0, 1)]
    folder = sweep_of({"InvertedPendulum-v5": {("dense", "base"): returns, ("1:8", "base"): returns[:3]}})
    obs, expected = np.array([0.1, -0.2, 0.3, 0.4]), {}
    for pattern, module in (("dense", td3), ("1:8", rnm)):
        for seed in range(1, 6):
            args = module.Args(env_id="InvertedPendulum-v5", seed=seed, **({"n": 1, "m": 8} if module is rnm else {}))
            torch.manual_seed(seed)
            agent = module.TD3(4, np.full(1, -3, np.float32), np.full(1, 3, np.float32), args, torch.device("cpu"))
            run = Path(f"runs/InvertedPendulum-v5__study__{pattern.replace(':', '_')}__{seed}__1")
            run.mkdir(parents=True)
            module.save_model(run / "model.pt", agent, args)
            expected[pattern, seed] = agent.actor.act(obs)
    policies.main(folder, Path("policies"))
    assert {path.name for path in Path("policies").iterdir()} == {
        "InvertedPendulum-v5__dense.pt", "InvertedPendulum-v5__1_8.pt"
    }  # fmt: skip
    np.testing.assert_allclose(td3.load_actor("policies/InvertedPendulum-v5__dense.pt")(obs), expected["dense", 1])
    np.testing.assert_allclose(
        rnm.load_actor("policies/InvertedPendulum-v5__1_8.pt")(obs), expected["1:8", 3], rtol=1e-5
    )
    assert len({action.item() for action in expected.values()}) == 10
    rnm.evaluate_model(rnm.Args(evaluate="policies/InvertedPendulum-v5__1_8.pt", eval_episodes=1))
    with monkeypatch.context() as changed, pytest.raises(ValueError, match="more than 40000"):
        changed.setattr(policies, "LIMIT", 40_000)
        policies.main(folder, Path("policies"))
    shutil.move("runs", "moved")
    shutil.rmtree("policies")
    policies.main(folder, Path("policies"))  # from the actors that were kept
    assert len(list(Path("policies").iterdir())) == 2
    evaluations = folder / "runs/InvertedPendulum-v5__1_8__2/evaluations.csv"
    evaluations.write_text("\n".join(evaluations.read_text().splitlines()[:-1]))
    shutil.rmtree("policies")
    shutil.rmtree(folder / "actors")
    shutil.move("moved", "runs")
    policies.main(folder, Path("policies"))  # one run has not ended: its model is of an interruption
    actors = {path.stem for path in (folder / "actors").iterdir()}
    assert len(actors) == 7 and "InvertedPendulum-v5__1_8__2" not in actors
    assert [path.name for path in Path("policies").iterdir()] == ["InvertedPendulum-v5__dense.pt"]


def test_the_policies_that_lie_there_are_those_and_play_as_in_their_runs(capsys):
    """Of every group of seeds that has ended, and of no other; one episode of each is none of the worst of its run."""
    policies.main(ROOT / claims.HERE, Path("policies"))
    made, kept = (
        {path.name: path.read_bytes() for path in Path(root, "policies").glob("*.pt")}
        for root in ("", ROOT / "results")
    )
    assert made == kept
    chosen = re.findall(r"(\S+)\.pt: seed (\d)", capsys.readouterr().out.replace("policies/", ""))
    assert {f"{name}.pt" for name, _ in chosen} == set(kept)
    for name, seed in chosen:
        module = td3 if name.endswith("dense") else rnm
        module.evaluate_model(module.Args(evaluate=f"policies/{name}.pt", eval_episodes=1))
        (played,) = re.findall(r"mean (-?[\d.]+)", capsys.readouterr().out)
        assert float(played) > min(last_episodes(ROOT / claims.HERE / f"runs/{name}__{seed}")) / 2, name


def test_an_even_number_of_seeds_has_no_median():
    with pytest.raises(ValueError, match="4 seeds, of which none is the median"):
        policies.main(sweep_of({"Ant-v5": {("1:8", "base"): [(1.0, 1)] * 4}}), Path("policies"))
