"""The analysis against brute force on unpacked masks, a history whose figures are known, and folders as they happen."""

import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from itertools import pairwise
from pathlib import Path

import environments  # noqa: F401
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn
from matplotlib.image import imread

import rnm_td3_continuous as rnm
import sad_analysis as sad
import sweep
import td3_continuous as td3

SCRIPT = Path(sad.__file__)
SMALL = {"env_id": "Scripted-v0", "total_timesteps": 300, "learning_starts": 20, "eval_interval": 30, "batch_size": 8}
SMALL |= {"eval_episodes": 1, "hidden_sizes": (16, 16), "learning_rate": 3e-2, "checkpoint_interval": 0}
NETWORKS = ["actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"]


def write_history(folder, masks, interval):
    """`masks`: bool [T, rows, columns] of each layer by name."""
    folder.mkdir(parents=True)
    shapes, before = [mask.shape[1:] for mask in masks.values()], 0
    with open(folder / "masks.bin", "wb") as file:
        file.write(json.dumps({"layers": list(masks), "shapes": shapes}).encode() + b"\n")
        for t in range(len(next(iter(masks.values())))):
            step, update, now = 100 + t * interval, t * interval, [mask[t] for mask in masks.values()]
            flat = np.concatenate([mask.ravel() for mask in now])
            data = zlib.compress(np.diff(np.flatnonzero(flat ^ before), prepend=0).astype("<u4"))
            file.write(struct.pack("<3Q", step, update, len(data)) + data)
            before = flat


def random_masks(t, shape, changes, seed):
    """A random walk of masks."""
    generator = np.random.default_rng(seed)
    masks = [generator.random(shape) < 0.4]
    for _ in range(t - 1):
        masks.append(masks[-1] ^ (generator.random(shape) < changes))
    return np.stack(masks)


def analyse(masks, interval=10, matrix_size=5):
    notes = []
    write_history(Path("run"), masks, interval)
    rows = sad.read_masks(Path("run"), interval, notes)
    assert not notes
    return sad.analyse_masks(*rows, matrix_size)


def test_every_figure_matches_brute_force_on_unpacked_masks():
    shapes = {"actor.net.0": (5, 7), "qf1.net.2": (3, 3), "actor_target.net.0": (5, 7), "qf1_target.net.2": (3, 3)}
    masks = {name: random_masks(23, shape, 0.1, i) for i, (name, shape) in enumerate(shapes.items())}
    history = analyse(masks)
    assert history.layers == list(shapes) and history.entries.tolist() == [35, 9, 35, 9]
    assert history.steps.tolist() == [100 + 10 * t for t in range(23)] and history.updates[-1] == 220
    assert history.kept.tolist() == [0, 6, 11, 16, 22]
    for i, (name, mask) in enumerate(masks.items()):
        flat = mask.reshape(23, -1)
        assert history.active[i] == flat[0].sum()
        assert history.sad[:, i].tolist() == [0] + [(flat[t] != flat[t - 1]).sum() for t in range(1, 23)]
        assert history.sad_first[:, i].tolist() == [(flat[t] != flat[0]).sum() for t in range(23)]
        assert history.ever[i] == flat.any(0).sum() and history.always[i] == flat.all(0).sum()
        entered, returned, spells = 0, 0, []
        for entry in flat.T:
            seen, start = entry[0], 0
            for t in range(1, 23):
                if entry[t] and not entry[t - 1]:
                    entered, returned, seen, start = entered + 1, returned + seen, True, t
                if entry[t - 1] and not entry[t]:
                    spells.append((i, 10 * start, 10 * t, 1))
            if entry[-1]:
                spells.append((i, 10 * start, 220, 0))
        assert (history.entered[i], history.returned[i]) == (entered, returned)
        assert sorted(map(tuple, history.spells.T[history.spells[0] == i].tolist())) == sorted(spells)
        for a, s in enumerate(history.kept):
            for b, t in enumerate(history.kept):
                assert history.matrix[a, b, i] == (flat[s] != flat[t]).sum()
        target = name.replace(".", "_target.", 1)
        both = (mask & masks[target]).sum((1, 2)) if target in masks else np.zeros(23)
        assert (history.overlap[:, i] == both).all()
    groups = sad.members(history)
    assert groups["total"] == [0, 1, 2, 3] and groups["qf1_target"] == [3] and groups["actor.net.0"] == [0]


def test_a_history_whose_figures_are_known():
    """Of 8 entries, 4 stay for ever, 2 alternate, 1 never comes, 1 leaves at the fourth projection and stays away."""
    steps = np.zeros((9, 1, 8), bool)
    steps[:, 0, :4] = True
    steps[::2, 0, 4], steps[1::2, 0, 5] = True, True
    steps[:4, 0, 7] = True
    history = analyse({"actor.net.0": steps, "actor_target.net.0": np.ones((9, 1, 8), bool)}, interval=100)
    figures = sad.summarise(history)["actor"]
    assert figures["sad"] == 2 * 8 + 1 and figures["entries"] == 8 and figures["active"] == 6
    assert figures["never_active"] == 1 / 8 and figures["always_active"] == 4 / 8
    assert figures["entered"] == 4 + 4 and figures["returned"] == 4 + 3
    assert figures["sad_rate_per_projection"] == pytest.approx(17 / 8 / 6)
    assert figures["sad_rate_first_to_last"] == pytest.approx(1 / 6)
    assert figures["overlap_with_target"] == [1, pytest.approx(5 / 6)]
    assert figures["half_life"] == {"updates": 800, "lower_bound": True}  # 4 of 6 never leave
    assert figures["newcomer_half_life"] == {"updates": 100, "lower_bound": False}
    still = sad.summarise(history)["actor_target"]
    assert still["sad"] == 0 and still["half_life"]["lower_bound"]
    assert still["newcomer_half_life"] == {"updates": None, "lower_bound": False}  # there is none


def test_the_bound_of_a_half_life_is_how_long_anything_was_followed():
    steps = np.zeros((11, 1, 8), bool)
    steps[:, 0, 0], steps[9:, 0, 1] = True, True
    figures = sad.summarise(analyse({"actor.net.0": steps}, interval=100))["actor"]
    assert figures["newcomer_half_life"] == {"updates": 100, "lower_bound": True}


def test_half_life_is_that_of_exponential_decay_with_censoring():
    """Each entry leaves with probability 0.02 at a projection: half of them after ln 2 / 0.02 = 34.3 of 60."""
    generator = np.random.default_rng(0)
    lives = generator.geometric(0.02, size=(40, 50))
    masks = np.stack([lives > t for t in range(60)])
    history = analyse({"qf1.net.0": masks}, interval=7)
    durations = np.minimum(lives, 59).ravel() * 7
    ours, bound = sad.half_life(durations, lives.ravel() < 60)
    assert ours == pytest.approx(34.3 * 7, rel=0.08) and not bound
    assert ours == np.sort(durations)[len(durations) // 2 - 1]
    whole = sad.summarise(history)["qf1"]["half_life"]
    assert whole["updates"] == pytest.approx(34.3 * 7, rel=0.15) and not whole["lower_bound"]  # memoryless: any time


def history_with(sad_per_projection):
    """A history in which that many entries change at each projection."""
    changes, size = np.asarray(sad_per_projection), int(max(sad_per_projection))
    masks = np.zeros((len(changes) + 1, 1, 2 * size), bool)
    masks[0, 0, :size] = True
    for t, change in enumerate(changes):
        masks[t + 1] = masks[t]
        masks[t + 1, 0, :change] ^= True
    shutil.rmtree("run", ignore_errors=True)
    return analyse({"actor.net.0": masks})


def test_stability_looks_at_the_last_half_in_equal_parts():
    assert sad.stability(history_with([90] * 60 + [20] * 60)) == {"spread": 0, "slope": pytest.approx(0, abs=1e-12)}
    falling = sad.stability(history_with([90] * 12 + [60, 60, 50, 50, 40, 40, 30, 30, 20, 20, 10, 10]))
    assert falling["spread"] == pytest.approx(np.std([60, 50, 40, 30, 20, 10]) / 35)
    assert falling["slope"] == pytest.approx(-50 / 35)
    assert sad.stability(history_with([5] * 10)) == {"spread": None, "slope": None}  # five projections, six parts


def run_of(env, k, seed, value, spread=None):
    config = {"env_id": env, "seed": seed, "total_timesteps": 100, "n": 2, "m": 4, "mask_update_interval": k}
    numbers = np.arange(10, 110, 10), np.full(10, float(value)), np.arange(10.0)
    run = sad.Run(Path(f"{env}-{k}-{seed}"), config, *numbers)
    if spread is not None:
        run.history, run.stability = object(), {"spread": spread}
    return run


def grouped(runs):
    groups = {}
    for run in runs:
        groups.setdefault((run.config["env_id"], sad.label(run.group)), []).append(run)
    return groups


def test_estimates_are_those_of_resampling_by_hand():
    found = sad.estimate([np.array([1.0, 2, 3, 10])], seed=1)
    assert found["runs"] == 4 and found["mean"] == 4 and found["iqm"] == 2.5
    resamples = np.random.default_rng(0).choice([1, 2, 3, 10], (20_000, 4)).mean(1)
    assert found["mean_interval"] == pytest.approx(np.quantile(resamples, [0.025, 0.975]), abs=0.3)
    assert sad.estimate([np.array([3.0])], seed=1)["mean_interval"] is None


def test_environments_are_compared_by_ratios_to_dense():
    values = {("A", 1): [1, 2, 3, 10], ("A", 100): [4, 5, 6, 7], ("B", 1): [100, 300], ("B", 100): [200, 600]}
    runs = [run_of(env, k, seed, v) for (env, k), many in values.items() for seed, v in enumerate(many)]
    assert sad.across(grouped(runs), {}, seed=1) == ([], {})  # nothing to compare environments by
    for env, many in {"A": [2, 4], "B": [100, 100]}.items():
        for seed, value in enumerate(many):
            runs.append(run_of(env, 1, seed, value))
            for name in ("n", "m", "mask_update_interval"):
                del runs[-1].config[name]
    groups = grouped(runs)
    dense = {key: groups[key[0], "dense"] for key in groups}
    envs, across = sad.across(groups, dense, seed=1)
    assert envs == ["A", "B"]
    ratios = [4 / 3, 5 / 3, 6 / 3, 7 / 3], [2, 6]
    assert across["2:4, K = 100"]["mean"] == pytest.approx(np.mean([np.mean(each) for each in ratios]))
    assert across["2:4, K = 100"]["iqm"] == pytest.approx(np.mean([5 / 3, 6 / 3, 6 / 3, 7 / 3]))
    assert across["2:4, K = 1"]["runs"] == 6 and across["dense"]["mean"] == 1
    assert across["dense"]["mean_interval"] == [0.75, 1.5]  # A: [2, 4] over means of [2, 4]; B: 1
    runs[-1].returns -= 1000
    assert sad.across(groups, dense, seed=1) == (["A"], {})  # ratios to what is not positive mean nothing


def test_runs_that_differ_in_other_flags_are_no_seeds_of_one_another(capsys):
    runs = [run_of("A", 10, seed, 5) for seed in (1, 2, 3, 1)]
    runs[1].config["tau"], runs[2].config["tau"] = 0.1, 0.2
    runs[0].config["checkpoint_interval"] = 7
    runs[3].folder = Path("newer")
    kept = sad.separate(runs)
    assert [run.group[3] for run in kept] == [", tau None", ", tau 0.1", ", tau 0.2"] and kept[0] is runs[3]
    assert "A-10-1 is left out: it has the seed of newer" in capsys.readouterr().err


def test_correlation_of_stability_and_return():
    generator = np.random.default_rng(0)
    spreads = generator.random(12)
    runs = [run_of("A", 10, i, 100 - 50 * s, spread=s) for i, s in enumerate(spreads)]
    result = sad.correlate(runs)["A"]
    assert result["runs"] == 12 and result["spearman"] == pytest.approx(1)
    assert result["verdict"] == "a more stable SAD goes with a better return among runs of the same N:M and K"
    noisy = [run_of("A", 10, i, generator.random(), spread=s) for i, s in enumerate(spreads)]
    result = sad.correlate(noisy)["A"]
    expected = scipy.stats.spearmanr([-s for s in spreads], [run.final_return for run in noisy]).statistic
    assert result["spearman"] == pytest.approx(expected) and result["verdict"].startswith("no clear relation")
    assert result["interval"][0] < expected < result["interval"][1]
    few = sad.correlate(runs[:7])["A"]
    assert few["verdict"] == "too few runs to say anything: 7, of 8 needed" and "spearman" not in few
    # K moves both: within each K there is no relation at all
    confounded = [
        run_of("A", k, i, k + i % 2, spread=(10 - k) / 10 + 0.01 * (i // 2)) for k in (1, 5, 9) for i in range(4)
    ]
    result = sad.correlate(confounded)["A"]
    assert result["spearman"] > 0.8 and abs(result["within_groups_spearman"]) < 0.1
    assert result["verdict"] == "no clear relation among runs of the same N:M and K"
    one_each = [run_of("A", k, 1, k, spread=1 / k) for k in range(1, 10)]  # a sweep of K: no group to look within
    result = sad.correlate(one_each)["A"]
    assert "within_groups_spearman" not in result and result["verdict"].endswith("over all runs, with N:M and K mixed")
    inverse = sad.correlate([run_of("A", 10, i, 100 + 50 * s, spread=s) for i, s in enumerate(spreads)])["A"]
    assert inverse["verdict"] == "a more stable SAD goes with a worse return among runs of the same N:M and K"
    pairs = [run_of("A", k, i, k + i, spread=1 / k) for k in range(1, 10) for i in range(2)]
    assert "within_groups_spearman" not in sad.correlate(pairs)["A"]
    alike = sad.correlate([run_of("A", 10, i, 5, spread=0.5) for i in range(9)])["A"]
    assert alike["spearman"] == 0 and json.dumps(alike, allow_nan=False)


@pytest.mark.parametrize("sizes", [[12], [5, 5, 5, 3, 3, 3, 3]])
def test_a_correlation_that_is_not_there_is_found_in_five_of_a_hundred(sizes):
    """Also where the means of groups are taken off, after which the rest is no longer independent."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(500):
        runs = [run_of("A", k, i, rng.normal(), spread=rng.random()) for k, n in enumerate(sizes, 1) for i in range(n)]
        found += not sad.correlate(runs)["A"]["verdict"].startswith("no clear relation")
    assert 10 <= found <= 40


def test_a_row_that_was_cut_counts_for_nothing_wherever_it_was_cut():
    run, whole = Path("run"), "step,return_1,mean,std,seconds\n100,2.5,2.5,0.25,1.5\n200,3.5,3.5,0.25,3.125\n"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"env_id": "A", "seed": 1, "total_timesteps": 200}))
    for length in range(whole.index("200"), len(whole)):
        (run / "evaluations.csv").write_text(whole[:length])
        assert sad.read_run(run).returns.tolist() == [2.5] and sweep.last_evaluation(run) == 100
    (run / "evaluations.csv").write_text(whole)
    assert sad.read_run(run).seconds.tolist() == [1.5, 3.125] and sweep.last_evaluation(run) == 200


def test_the_final_return_is_the_mean_of_the_last_ten_evaluations():
    run = run_of("A", 1, 1, 0)
    run.steps, run.returns = np.arange(5, 105, 5), np.arange(20.0)
    assert run.final_return == sad.final([run])[0] == 14.5


def test_a_half_life_is_taken_over_ten_points_in_time():
    mask, lives = random_masks(41, (8, 9), 0.04, 1).reshape(41, -1), []
    mask[1:] &= mask[:1] | (np.arange(41) > 4)[1:, None]
    found = sad.summarise(analyse({"actor.net.0": mask.reshape(41, 8, 9)}))["actor"]["half_life"]
    for start in range(0, 40, 4):
        for entry in mask[start:, mask[start]].T:
            gone = np.flatnonzero(~entry)
            lives.append((10 * (gone[0] if len(gone) else 40 - start), len(gone) > 0))
    durations, left = map(np.array, zip(*lives, strict=True))
    assert (found["updates"], found["lower_bound"]) == sad.half_life(durations, left)


def test_curves_and_bars_are_means(monkeypatch):
    steps, returns = sad.mean_curve(
        [(np.arange(1, 4), np.array([1.0, 2, 3])), (np.arange(2, 5), np.array([4.0, 8, 9]))]
    )
    assert steps.tolist() == [2, 3] and returns.tolist() == [3.0, 5.5]
    figures = []
    monkeypatch.setattr(sad, "save", lambda figure, path: figures.append(figure))
    sad.plot_returns(grouped([run_of("A", 10, seed, value) for seed, value in enumerate([1, 2, 9])]), Path("x.png"))
    (bar,) = figures[0].axes[0].containers
    assert bar.lines[0].get_ydata() == [4]
    (segment,) = bar.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx(sad.bootstrap([np.array([1.0, 2, 9])], sad.mean, 1))


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """Small real runs: two of K = 20, one of K = 100, fixed masks, no masks saved, dense."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("real"))
    try:
        torch.set_num_threads(1)
        folders = [
            rnm.train(rnm.Args(**SMALL, mask_update_interval=k, seed=s))[2] for k, s in ((20, 1), (20, 2), (100, 1))
        ]
        folders.append(rnm.train(rnm.Args(**SMALL, mask_update_interval=0))[2])
        folders.append(rnm.train(rnm.Args(**SMALL, save_masks=False))[2])
        folders.append(td3.train(td3.Args(**SMALL))[2])
        return [folder.resolve() for folder in folders]
    finally:
        os.chdir(before)


def test_real_runs_from_the_files_to_the_pictures(real_runs, capsys):
    summary = sad.analyse(sad.Args((str(real_runs[0].parent),), out="out", points=5))
    out = capsys.readouterr().out
    assert "no masks saved: leave out --no-save-masks" in out and "dense: no masks" in out
    assert "its masks never change" in out and "too few runs to say anything: 2, of 8 needed" in out
    assert json.loads(Path("out/summary.json").read_text()) == json.loads(json.dumps(summary))
    assert len(summary["runs"]) == 6 and summary["groups"]["Scripted-v0, 2:4, K = 20"]["runs"] == 2
    for name in ("heatmap", "sad_over_time", "return_over_k", "stability"):
        picture = imread(f"out/{name}.png")
        assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05
    rows = list(csv.DictReader(Path("out/sad.csv").read_text().splitlines()))
    run = real_runs[0].name
    layers, shapes, changes = sad.read_masks(real_runs[0], 20, [])
    masks = [np.zeros(sum(rows * columns for rows, columns in shapes), bool)]
    for *_, changed in changes:
        masks.append(masks[-1].copy())
        masks[-1][changed] ^= True
    masks = masks[1:]
    total = [row for row in rows if row["run"] == run and row["name"] == "total"]
    assert sum(int(row["sad"]) for row in total) == sum((a != b).sum() for a, b in pairwise(masks)) > 0
    assert [int(row["projections"]) for row in total] == [3, 3, 2, 3, 3] and int(total[-1]["step"]) == 300
    assert int(total[-1]["sad_first"]) == (masks[0] != masks[-1]).sum()
    active, count = masks[0].sum(), int(total[0]["projections"])
    assert float(total[0]["sad_rate_per_projection"]) == pytest.approx(int(total[0]["sad"]) / count / active, rel=1e-3)
    assert float(total[-1]["sad_rate_first"]) == pytest.approx(int(total[-1]["sad_first"]) / active, rel=1e-3)
    ends, half = np.cumsum([rows * columns for rows, columns in shapes]), len(shapes) // 2  # online ones, then targets
    online, target = (np.split(masks[-1], ends[:-1])[i] for i in (0, half))
    (last,) = (row for row in rows if row["run"] == run and row["name"] == "actor.net.0" and row["step"] == "300")
    assert float(last["overlap_with_target"]) == pytest.approx((online & target).sum() / online.sum(), abs=1e-5)
    assert total[0]["overlap_with_target"] == ""
    matrices = np.load("out/sad_matrices.npz")
    assert matrices[f"{run}/sad"][0, -1].sum() == (masks[0] != masks[-1]).sum()
    assert {row["name"] for row in rows} >= {*NETWORKS, "total", "qf2_target.net.2"}
    assert [int(row["update"]) for row in total] == [int(row["step"]) - 20 for row in total]
    assert {int(row["active"]) for row in total} == {active}
    assert matrices[f"{run}/steps"].tolist() == [step for step, *_ in changes]
    assert matrices[f"{run}/layers"].tolist() == layers


def test_masks_of_a_run_that_learns_from_its_first_step_do_not_end_early():
    """Its first update is that of step 2, its last projection that of update 280 of 299."""
    folder = rnm.train(rnm.Args(**{**SMALL, "learning_starts": 0}, mask_update_interval=20))[2]
    run = sad.analyse(sad.Args((str(folder),), out="out"))["runs"][folder.name]
    assert run["stability"]["spread"] >= 0 and not any("end early" in note for note in run["notes"])


def test_figures_show_what_sad_csv_has(real_runs, monkeypatch):
    """And two runs whose folders have one name are kept apart."""
    figures, runs = {}, (str(real_runs[0]), str(Path(shutil.copytree(real_runs[0], f"twin/{real_runs[0].name}"))))
    config = Path(runs[1], "config.json")
    config.write_text(config.read_text().replace('"tau": 0.005', '"tau": 0.1'))
    monkeypatch.setattr(sad, "save", lambda figure, path: figures.update({path.stem: figure}))
    assert set(sad.analyse(sad.Args(runs, out="out"))["runs"]) == {runs[0], str(Path(runs[1]).resolve())}
    sad.analyse(sad.Args(runs[:1], out="out", points=5))
    rows = list(csv.DictReader(Path("out/sad.csv").read_text().splitlines()))
    total = [row for row in rows if row["name"] == "total"]
    top, middle, _ = figures["sad_over_time"].axes
    steps, rates = top.lines[0].get_data()
    assert steps.tolist() == [int(row["step"]) / 1000 for row in total]
    np.testing.assert_allclose(rates, [100 * float(row["sad_rate_per_projection"]) for row in total], rtol=1e-3)
    last = [row for row in rows if "." in row["name"] and row["overlap_with_target"] and row["step"] == "300"]
    weights, overlaps = zip(*((int(row["active"]), float(row["overlap_with_target"])) for row in last), strict=True)
    assert middle.lines[0].get_ydata()[-1] == pytest.approx(100 * np.average(overlaps, weights=weights), rel=1e-3)
    mesh = figures["heatmap"].axes[0].collections[0].get_array()
    assert mesh[0, -1] == pytest.approx(100 * float(total[-1]["sad_rate_first"]), rel=1e-3)


def test_of_two_runs_with_a_seed_the_newer_counts_and_dense_ones_are_as_long(real_runs, capsys, monkeypatch):
    """Newer by the time in its name, whatever stands before that."""
    monkeypatch.setattr(sad, "save", lambda figure, path: sad.plt.close(figure))
    for name in ("zebra__1__1600000000", "apple__1__1900000000"):
        shutil.copytree(real_runs[0], f"runs/Scripted-v0__{name}")
    for env in ("A", "B"):
        for pattern, length in (("dense", 100), ("2:4", 100 if env == "A" else 200)):
            config = {"env_id": env, "seed": 1, "total_timesteps": length}
            config |= {"n": 2, "m": 4, "mask_update_interval": 0} if pattern != "dense" else {}
            (folder := Path("runs", env + pattern)).mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "evaluations.csv").write_text(f"step,mean,std,seconds\n{length},7,0,1\n")
    summary = sad.analyse(sad.Args(("runs",), out="out"))
    assert "zebra__1__1600000000 is left out: it has the seed of " in capsys.readouterr().err
    assert "Scripted-v0__apple__1__1900000000" in summary["runs"] and len(summary["runs"]) == 5
    assert "all, ratio to dense, 2:4, masks fixed" not in summary["groups"]  # B's dense run is half as long
    shutil.copytree("runs/A2:4", "runs/B2:4", dirs_exist_ok=True)
    config = Path("runs/B2:4/config.json")
    config.write_text(config.read_text().replace('"A"', '"B"'))
    summary = sad.analyse(sad.Args(("runs",), out="out"))
    assert summary["groups"]["all, ratio to dense, 2:4, masks fixed"]["mean"] == 1
    shutil.copytree("runs/Adense", "runs/longer")
    for file in ("config.json", "evaluations.csv"):
        path = Path("runs/longer", file)
        path.write_text(path.read_text().replace("100", "200"))
    summary = sad.analyse(sad.Args(("runs",), out="out"))
    assert "A, dense, total_timesteps 200" in summary["groups"]  # does not hide the one of the same length
    assert summary["groups"]["all, ratio to dense, 2:4, masks fixed"]["mean"] == 1


def test_the_heat_map_of_an_unfinished_run_ends_with_its_last_masks(real_runs, monkeypatch):
    shutil.copytree(real_runs[0], "run")
    config = Path("run/config.json")
    config.write_text(config.read_text().replace('"total_timesteps": 300', '"total_timesteps": 9000'))
    figures = []
    monkeypatch.setattr(sad, "save", lambda figure, path: figures.append(figure) if path.stem == "heatmap" else None)
    for folder, end in (("run", 320), (str(real_runs[0]), 300)):
        sad.analyse(sad.Args((folder,), out="out"))
        assert figures.pop().axes[0].get_xlim()[1] == pytest.approx(end / 1000)


def records(data):
    """Where the records of a `masks.bin` begin, and its end."""
    starts = [data.index(b"\n") + 1]
    while starts[-1] < len(data):
        starts.append(starts[-1] + 24 + struct.unpack_from("<3Q", data, starts[-1])[2])
    return starts


def damage(folder, kind):
    path, evaluations = folder / "masks.bin", folder / "evaluations.csv"
    data = path.read_bytes()
    starts = records(data)
    lines = evaluations.read_text().splitlines(keepends=True)
    fourth = slice(starts[4], starts[5])
    changes = {
        "a record is missing": data[: fourth.start] + data[fourth.stop :],
        "a record is cut": data[: fourth.start + 30],
        "a head is cut": data[: fourth.start + 10],
        "a byte is wrong": data[: fourth.start + 30]
        + bytes([data[fourth.start + 30] ^ 255])
        + data[fourth.start + 31 :],
        "a size is huge": data[: fourth.start + 16] + b"\xff" * 8 + data[fourth.start + 24 :],
        "one projection": data[: starts[1]],
        "no projection": data[: starts[0]],
        "an empty file": b"",
        "no line break": b"{" * 999,
        "a header of something else": b"[1, 2]\n" + data[starts[0] :],
        "a null header": b"null\n" + data[starts[0] :],
        "other shapes": data[: starts[0]].replace(b"16", b"3") + data[starts[0] :],
        "huge shapes": data[: starts[0]].replace(b"16", b"16000000000") + data[starts[0] :],
        "names that do not fit": data[: starts[0]].replace(b'"actor.net.0", ', b"") + data[starts[0] :],
    }
    if kind in changes:
        path.write_bytes(changes[kind])
    elif kind == "a folder instead":
        path.unlink()
        path.mkdir()
    elif kind == "cut off":
        evaluations.write_text("".join(lines[:4]) + lines[4][:5])
    elif kind == "no evaluations":
        evaluations.unlink()
    elif kind.startswith("evaluations: "):
        rows = {
            "words": b"much,more,most,7\n", "NaN": b"300,nan,1,7\n", "infinite": b"300,inf,1,7\n",
            "backwards": b"200,1,1,7\n100,1,1,8\n", "time runs back": b"200,1,1,9\n300,1,1,8\n",
            "huge": b"9" * 5000 + b",1,1,7\n", "time is infinite": b"300,1,1,inf\n", "no time": b"300,1,1,\n",
            "null bytes": b"\0\0\0",
        }  # fmt: skip
        whole = {"empty": b"", "other columns": b"a,b\n1,2\n", "bytes": bytes(range(256)), "JSON": b"null"}
        whole |= {what: b"step,mean,std,seconds\n" + row for what, row in rows.items()}
        evaluations.write_bytes(whole[kind.removeprefix("evaluations: ")])
    elif kind.startswith("config: "):
        config = json.loads((folder / "config.json").read_text())
        text = {
            "cut": '{"env_id": ', "null": "null", "empty": "", "a list": "[]", "a number": "7", "no object": '"env_id"',
            "bytes": "\udcff", "deep": "[" * 100_000,
        }.get(kind.removeprefix("config: "))  # fmt: skip
        if text is None:
            name, value = kind.removeprefix("config: ").split("=")
            text = json.dumps({**config, name: json.loads(value)})
        (folder / "config.json").write_text(text, errors="surrogateescape")


WHOLE = {  # the run is used as far as it goes
    "a record is missing": "the masks of update 80 cannot be read (there is one for update 100 instead)",
    "a record is cut": "the masks of update 80 cannot be read (cut off)",
    "a head is cut": "the masks of update 80 cannot be read",
    "a byte is wrong": "the masks of update 80 cannot be read",
    "a size is huge": "the masks of update 80 cannot be read (cut off)",
    "one projection": "fewer than two projections",
    "no projection": "fewer than two projections",
    "an empty file": "the masks cannot be read",
    "no line break": "the masks cannot be read",
    "a header of something else": "the masks cannot be read",
    "a null header": "the masks cannot be read",
    "a folder instead": "the masks cannot be read",
    "other shapes": "the masks cannot be read (contents do not fit)",
    "cut off": "not finished (step 90 of 300): not among the returns",
    "no evaluations": "evaluations.csv cannot be read",
}
BROKEN = [
    "no time",
    "time is infinite",
    "empty",
    "words",
    "NaN",
    "infinite",
    "other columns",
    "bytes",
    "backwards",
    "time runs back",
    "null bytes",
    "JSON",
]
WHOLE |= {f"evaluations: {kind}": "not finished (no evaluation of 300)" for kind in [*BROKEN, "huge"]}
GONE = ["cut", "null", "empty", "a list", "a number", "no object", "bytes", "deep"]  # the run is left out
GONE += ["env_id=null", "env_id=7", "seed=null", 'seed="1"', "seed=-1", "seed=true", "total_timesteps=0", "n=0", "m=1"]
GONE += ["n=null", "mask_update_interval=-1", "mask_update_interval=0.5", "total_timesteps=null"]


@pytest.mark.parametrize(
    "kind", [*WHOLE, *[f"config: {kind}" for kind in GONE], "huge shapes", "names that do not fit"]
)
def test_broken_runs_are_named_and_used_as_far_as_they_go(real_runs, kind, capsys, monkeypatch):
    monkeypatch.setattr(sad, "save", lambda figure, path: sad.plt.close(figure))  # pictures have tests of their own
    shutil.copytree(real_runs[0], "runs/a")
    shutil.copytree(real_runs[2], "runs/b")
    damage(Path("runs/a"), kind)
    code, errors = main(monkeypatch, capsys, "runs", "--out", "out")
    summary = json.loads(Path("out/summary.json").read_text())
    assert code == 0 and "b" in summary["runs"]
    if kind not in WHOLE:
        where, reason = errors[-1].split("a is left out: ")
        assert where.endswith("runs/") and ("config.json is not that of a run" in reason or "config" not in kind)
        assert "a" not in summary["runs"]
        assert main(monkeypatch, capsys, "runs/a", "--out", "out") == (1, [errors[-1], "error: no run could be read"])
        return
    run = summary["runs"]["a"]
    assert any(note.startswith(WHOLE[kind]) for note in run["notes"]), run["notes"]
    if "of update 80" in WHOLE[kind]:
        assert run["projections"] == 3 and run["stability"] == {"spread": None, "slope": None}
    assert (run["final_return"] is None) == ("evaluation" in kind or kind == "cut off")


def main(monkeypatch, capsys, *arguments):
    """Exit code, and the lines of standard error."""
    monkeypatch.setattr(sys, "argv", ["sad_analysis.py", *map(str, arguments)])
    code = sad.main()
    return code, capsys.readouterr().err.splitlines()


def test_bad_input_gets_one_line_and_exit_code_2(monkeypatch, capsys, real_runs):
    Path("empty").mkdir()
    Path("file").write_text("")
    cases = {
        (): "error: no folder given: no runs there; give run folders, or --example",
        ("nowhere/*",): "error: nowhere/*: no such folder",
        ("empty",): "error: empty: no runs there",
        (real_runs[0], "--points", "1"): "error: --points and --matrix-size have to be 2 or more",
        (real_runs[0], "--seed", "-1"): "error: --points and --matrix-size have to be 2 or more, --seed 0 or more",
        (real_runs[0], "--out", "file"): "error: --out file: cannot be made: File exists",
    }
    for arguments, message in cases.items():
        code, errors = main(monkeypatch, capsys, *arguments)
        assert code == 2 and errors[-1].startswith(message) and "Traceback" not in "".join(errors), errors


def test_only_dense_or_unfinished_runs_have_pictures_too(real_runs, monkeypatch, capsys):
    code, _ = main(monkeypatch, capsys, real_runs[5], "--out", "dense")
    assert code == 0 and {path.name for path in Path("dense").iterdir()} == {
        *("summary.json", "sad_over_time.png", "return_over_k.png", "stability.png")
    }
    shutil.copytree(real_runs[0], "a")
    damage(Path("a"), "cut off")
    code, _ = main(monkeypatch, capsys, "a", "--out", "cut")
    assert code == 0 and {path.name for path in Path("cut").iterdir()} == {
        *("summary.json", "sad.csv", "sad_matrices.npz", "sad_over_time.png", "heatmap.png")
    }


@pytest.mark.slow
def test_a_thousand_projections_in_500_mb():
    """All six networks of HalfCheetah, 2:4, 256 x 256; 1 % of the entries change at each projection."""
    actor, critic = [(256, 17), (256, 256), (6, 256)], [(256, 23), (256, 256), (1, 256)]
    masks = {}
    for network in NETWORKS:
        for i, shape in enumerate(actor if "actor" in network else critic):
            linear = nn.Linear(shape[1], shape[0])
            masks[f"{network}.net.{2 * i}"] = rnm.nm_mask(linear.weight, 2, 4).numpy()
    generator, history = np.random.default_rng(0), {name: [] for name in masks}
    for _ in range(1001):
        for name, mask in masks.items():
            history[name].append(mask.copy())
            mask ^= generator.random(mask.shape) < 0.01
    folder = Path("runs/large/masks")
    write_history(folder.parent, {name: np.stack(many) for name, many in history.items()}, 1000)
    config = {"env_id": "HalfCheetah-v4", "seed": 1, "total_timesteps": 10**6, "n": 2, "m": 4, "save_masks": True}
    (folder.parent / "config.json").write_text(json.dumps({**config, "mask_update_interval": 1000}))
    (folder.parent / "evaluations.csv").write_text("step,mean,std,seconds\n1000000,5000.0,1.0,7\n")
    started = time.time()
    code = "import sad_analysis; assert sad_analysis.main() == 0; print(open('/proc/self/status').read())"
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "-c", code, "runs"]
    printed = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    ).stdout
    # not getrusage, whose maximum a process takes over from the one that started it
    seconds, peak = time.time() - started, int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1]) / 1e3
    print(f"{seconds:.1f} s, {peak:.0f} MB")
    assert peak < 500


@pytest.mark.slow
def test_example(monkeypatch, capsys):
    code, errors = main(monkeypatch, capsys, "--example", "--out", "example")
    assert code == 0, errors
    pictures = {path.name for path in Path("example").glob("*.png")}
    assert pictures == {"heatmap.png", "sad_over_time.png", "return_over_k.png", "stability.png"}
    summary = json.loads(Path("example/summary.json").read_text())
    assert sorted(run["mask_update_interval"] for run in summary["runs"].values()) == [10, 50, 250]
