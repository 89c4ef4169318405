"""Questions to a population: the experiments on a few models, and the answers on tables whose answer is known."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small import small_plan
from test_soup_figures import story, sweep

from zootwins import soup_questions
from zootwins.averaging import average, copies, uniform_soup
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.lanes import LANES, why_unavailable
from zootwins.population import Population, sample_population
from zootwins.selectors import prunable, prune
from zootwins.soup_questions import (
    VARIED, Shot, activation_gains, collapse_table, distance_correlations, figure_collapse, figure_distance,
    figure_gaining,
)
from zootwins.soup_questions import figure_gradual, gradual_accuracies
from zootwins.soup_questions import (
    figure_lines, figure_variational, figure_zoo_soups, first_copies, gaining_models, judge, line_table, line_tables,
)
from zootwins.soup_questions import (
    length_shots, make_experiments, middles, one_shot, pair_table, pearson_table, rate_shots, shifted, sparsity_shots,
)
from zootwins.soup_questions import varied_pairs, variational_gains, variational_runs, zeros, zoo_soups
from zootwins.soups import Chain, make_soups, read_candidates, variational_table
from zootwins.training import TORCH
from zootwins.twins import load_stage, make_twins
from zootwins.zoos import get_zoo

ENGINE = TORCH if why_unavailable() else LANES
SHORT = replace(get_zoo("digits_seed"), epochs=2, vd_epochs=2)


@pytest.fixture(scope="module")
def images():
    return subset(load_images("digits"), 80, 50)


@pytest.fixture(scope="module")
def models():
    return sample_population(SHORT, 3)


@pytest.fixture(scope="module")
def shot_table(models, images):
    return one_shot(SHORT, models, images, Shot(0.5, epochs=1, numbers=(2, 3), longer=True, swa=True), ENGINE)


def test_a_shot_has_a_row_for_every_model_and_number(shot_table):
    assert shot_table.groupby("m")["model"].apply(list).to_dict() == {2: [0, 1, 2], 3: [0, 1, 2]}
    assert (shot_table["best candidate"] >= shot_table["mean candidate"]).all() and (
        shot_table["farthest"] >= shot_table["distance"]
    ).all()
    assert (shot_table["kept"] <= shot_table["m"]).all() and (shot_table["spread"] > 0).any()
    assert (shot_table["IMP + SWA"] == shot_table["IMP"]).all()  # of one epoch
    assert {"zoo", "selector", "level", "schedule", "rate", "epochs", "original", "pruned", "empty", "IMP_mx"} <= set(
        shot_table
    )


def test_a_shot_is_the_first_phase_of_a_chain(tmp_path, images):
    plan = small_plan(tmp_path, n=2, epochs=2, levels="0")
    make_twins(plan, images, progress=False, only=["original"])
    chain = Chain(0.6, 1, 2, "uniform", 1, 5e-3, selector="lamp")
    make_soups(plan, images, [chain], progress=False)
    stored = uniform_soup(read_candidates(plan, chain, 1))
    found = one_shot(plan.zoo, load_stage(plan, "original"), images, Shot(0.6, epochs=1, numbers=(2,)), plan.engine)
    assert (judge(stored, images, plan.engine)[1] == found["uniform"]).all() and np.allclose(
        judge(stored, images, plan.engine)[0], found["soup_loss"]
    )


def test_pairs_are_averages_of_two(models, images):
    candidates = copies(models, 3)
    for name, tensor in candidates.weights.items():
        candidates.weights[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    table = pair_table(candidates, images, ENGINE)
    assert len(table) == 9 and set(zip(table["first"], table["second"])) == {(0, 1), (0, 2), (1, 2)}
    two = Population(
        {name: tensor.unflatten(0, (3, 3))[:, [0, 2]].flatten(0, 1) for name, tensor in candidates.weights.items()},
        candidates.models[candidates.models["copy"] != 1].assign(copy=[0, 1] * 3),
        candidates.architecture,
    )
    soup = judge(average(two), images, ENGINE)[1]
    here = table[(table["first"] == 0) & (table["second"] == 2)]
    assert np.allclose(here["soup"], soup) and np.allclose(
        here["better"], judge(two, images, ENGINE)[1].reshape(3, 2).max(1)
    )


def test_all_that_is_varied_is_eight_values_around_the_default(models, images, monkeypatch):
    assert all(len(values) == 8 for factors in VARIED.values() for values in factors.values())
    assert (
        np.isclose(np.median(VARIED["weight decay"]["wd"]), 1.1e-3)
        and 5 in VARIED["length"]["epochs"]
        and 5e-3 in VARIED["learning rate"]["lr"]
    )
    monkeypatch.setattr(
        soup_questions, "VARIED", {"length": {"epochs": (1,) * 8}, "learning rate": {"lr": (1e-3,) * 7 + (0.0,)}}
    )
    table = varied_pairs(SHORT, models[[0]], images, Shot(0.7, epochs=1), ENGINE)
    assert table.groupby("varied").size().to_dict() == {"length": 28, "learning rate": 28}


def test_lines_end_where_the_models_are(models, images):
    other = shifted(models)
    assert other.models["model"].tolist() == [1, 2, 0]
    table = line_table(models, other, images, ENGINE, 3)
    assert np.allclose(table.query("place == 0")["test_acc"], judge(models, images, ENGINE)[1])
    assert np.allclose(table.query("place == 1")["loss"], judge(other, images, ENGINE)[0])
    pruned = prune(models, 0.8)[0]
    assert (
        np.allclose(zeros(pruned), 0.8, atol=1e-3)
        and (line_table(pruned, shifted(pruned), images, ENGINE, 3).query("place == 0.5")["sparsity"] < 0.7).all()
    )


def test_lines_of_all_kinds_and_their_barriers(models, images):
    table = line_tables(replace(SHORT, batch_size=40), models, images, ENGINE)
    counts = table.groupby(["ends", "alignment"], sort=False).size()
    assert len(counts) == 9 and (counts == 33).all()
    rows = middles(table)
    assert (rows["barrier"] >= -1e-9).all() and np.isclose(
        rows.loc[("two twins of one mask", "as they are"), "sparsity"], 0.8, atol=1e-3
    )
    assert rows.loc[("two twins of other masks", "as they are"), "sparsity"] < 0.8
    straight = pd.DataFrame(
        {
            "place": [0.0, 0.5, 1.0], "model": 0, "loss": [1.0, 3.5, 2.0], "test_acc": [0.5, 0.2, 0.7], "sparsity": 0.0,
            "ends": "a", "alignment": "b",
        }
    )
    assert middles(straight).iloc[0][["ends", "middle", "barrier"]].round(6).tolist() == [0.6, 0.2, 2.0]
    assert [line.get_label() for line in figure_lines(table).axes[1].lines] == [
        "as they are",
        "permuted",
        "permuted and flipped",
    ]


def test_the_soup_of_a_zoo_of_one_is_the_model(models, images):
    table = zoo_soups(models, images, ENGINE, (1, 2, 4))
    assert sorted(table["n"].unique()) == [1, 2] and table.groupby("alignment").size().to_dict() == {
        "as they are": 6,
        "permuted": 6,
        "permuted and flipped": 6,
    }
    alone = judge(models, images, ENGINE)[1]
    assert all(np.isclose(row.test_acc, alone[row.reference]) for row in table.query("n == 1").itertuples())
    assert len(figure_zoo_soups(table).axes[0].containers) == 3


def test_variational_runs_and_their_soup(tmp_path, images):
    plan = small_plan(tmp_path, n=3, epochs=2, levels="0")
    plan = replace(plan, zoo=replace(plan.zoo, vd_epochs=3))
    make_twins(plan, images, progress=False, only=["original"])
    table = variational_runs(plan, images, 2)
    assert (
        table.groupby(["epoch", "row"])["model"].apply(list).tolist() == [[0, 1, 2]] * 6
        and table["sparsity"].between(0, 1).all()
    )
    assert table.equals(variational_table(plan, 2, images, (1, 3)))
    rows = variational_gains(table)
    wide = table.query("epoch == 3").pivot(index="model", columns="row", values="test_acc")
    assert np.isclose(rows.loc[3, "accuracy gained"], 100 * (wide["VD soup"] - wide["VD"]).mean())
    assert [line.get_label() for line in figure_variational(table).axes[0].lines] == ["single runs, mean", "their soup"]


def test_first_copies(models):
    some = first_copies(copies(models, 5), 2)
    assert some.models["copy"].tolist() == [0, 1] * 3 and all(
        len(tensor) == 6 for tensor in prunable(some.weights).values()
    )


def test_shots_cover_what_the_figures_need():
    shots = sparsity_shots()
    assert len(set(shots)) == len(shots) == 42 and {shot.schedule for shot in shots} == {
        "constant", "SLR", "CLR", "LLR", "ALLR",
    }
    assert all(shot.longer for shot in length_shots()) and {shot.epochs for shot in length_shots()} == {1, 2, 5, 10, 20}
    assert len({(shot.rate, shot.epochs) for shot in rate_shots()}) == 15


def test_experiments_are_kept_with_what_made_them(tmp_path, images, monkeypatch):
    plan = small_plan(tmp_path, n=2, epochs=2, levels="0")
    monkeypatch.setattr(soup_questions, "load_images", lambda *_: images)
    folder, = make_experiments(plan, ["zoo_soups"])
    record = json.loads((folder / "run.json").read_text())
    assert folder == plan.figures / "zoo_soups" and record["experiment"] == "zoo_soups" and record["n_models"] == 2
    assert set(pd.read_parquet(folder / "results.parquet")["n"]) == {1, 2}
    with pytest.raises(UserError, match="zoo_soup"):
        make_experiments(plan, ["zoo_soup"])


# --- answers

def twin_metrics(n=6):
    "Tidy metrics of originals and of twins right after pruning."
    originals = pd.DataFrame(
        {
            "zoo": "digits_seed", "method": "original", "model": range(n), "epoch": 30, "level": np.nan,
            "test_acc": 0.9 + 0.01 * np.arange(n),
        }
    )
    twins = pd.DataFrame(
        {
            "zoo": "digits_seed", "method": "mp", "model": range(n), "epoch": 0, "level": 0.8,
            "test_acc": 0.5 - 0.01 * np.arange(n),
        }
    )
    return pd.concat([originals, twins])


def test_who_gains():
    results = story()
    results.loc[(results["row"] == "SMS") & (results["phase"] == 2), "test_acc"] += 0.002 * np.arange(6)
    table = gaining_models(results, twin_metrics(), 3)
    assert (
        np.allclose(table["gain"], 2 + 0.2 * np.arange(6))
        and np.allclose(table["spread"], 0.01)
        and np.allclose(table["friendliness"], 0.5 - 0.01 * np.arange(6))
    )
    r = pearson_table(table, "gain", ["original", "friendliness"])
    assert np.allclose(r["r"], [1, -1]) and (r["n"] == 6).all()
    assert figure_gaining(table, "a story").axes[0].get_title(loc="left").startswith("r = 1.00")


def test_distances_and_activations():
    rates = pd.concat(
        [
            sweep(levels=(0.8,), schedules=("constant",), numbers=(5,)).assign(rate=rate, relative=50 * rate)
            for rate in (1e-3, 1e-2)
        ]
    )
    rows = distance_correlations(rates)
    assert (
        rows["rate"].tolist() == [1e-3, 1e-2]
        and np.allclose(rows["gain"], 5)
        and np.allclose(rows["relative"], [0.05, 0.5])
    )
    assert [list(container[0].get_xdata()) for container in figure_distance(rates).axes[1].containers] == [
        [pytest.approx(0.05), pytest.approx(0.5)]
    ]
    table = pd.concat([sweep(levels=(0.7,), numbers=(5,)).assign(activation=name) for name in ("tanh", "relu")])
    told = activation_gains(table)
    assert (
        told.loc[("constant", "relu"), "over mean candidate"] == "+5.00 ± 0.00"
        and told.loc[("LLR", "tanh"), "over best candidate"] == "-1.00 ± 0.00"
    )


def test_collapses_are_counted_from_five_points_on():
    table = sweep(levels=(0.9,), schedules=("constant",), numbers=(5,))
    table["uniform"] = table["mean candidate"] - np.array([0, 0.049, 0.051, 0.2, -0.1, 0.01])
    table.loc[0, "empty"] = 2
    row = collapse_table(table).iloc[0]
    assert row["uniform collapsed"] == 2 and row["greedy collapsed"] == 0 and row["blind"] == 1 and row["models"] == 6
    assert len(figure_collapse(table).axes) == 2


def test_gradual_pruning_is_compared_at_the_end():
    results = story()
    last = results[(results["row"] == "IMP") & (results["phase"] == 2)]
    with pytest.raises(UserError, match="lacks GMP\\+SMS, GMP\\+SMS mean candidate, GMP: make it"):
        gradual_accuracies(results, 3)
    rows = {"GMP": 0.0, "GMP+SMS": 0.01, "GMP+SMS mean candidate": 0.005}
    more = [last.assign(row=row, test_acc=last["test_acc"] + plus) for row, plus in rows.items()]
    table = gradual_accuracies(pd.concat([results, *more, more[0].assign(m=5)]), 3)
    assert list(table) == ["GMP+SMS", "GMP+SMS mean candidate", "GMP", "SMS", "IMP", "IMP_mx"] and len(table) == 6
    assert np.allclose(table["GMP+SMS"] - table["GMP"], 0.01) and np.allclose(table["SMS"] - table["IMP"], 0.015)
    means = [line.get_ydata()[0] for line in figure_gradual(table, "a story").axes[0].lines]
    assert np.allclose(means, table.mean())


def test_every_experiment_is_kept():
    folder = Path(__file__).resolve().parents[1] / "figures" / "soups" / "digits_seed"
    assert set(soup_questions.EXPERIMENTS) <= {path.name for path in folder.iterdir()}
