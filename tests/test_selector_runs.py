"""Several selectors in one store: shared originals, stages of their own, tables and figures that tell them apart."""
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from small import IMAGES, different, in_child, left_over, says, small_plan
from zootwins import blocks, twins
from zootwins.claims import OPEN, all_claims
from zootwins.comparison import compare
from zootwins.core import UserError, project_root
from zootwins.figures import FIGURES, draw_twins, figure_3, of_one_selector
from zootwins.layers import read_frequencies, save_frequencies
from zootwins.metrics import KEYS, one_selector, own_selector, read_metrics, with_selectors
from zootwins.plans import fingerprint, make_plan, make_stages, pruning_stage
from zootwins.population import load_population
from zootwins.publishing import export_zoo, publish
from zootwins.selectors import SELECTORS, empty_layers
from zootwins.states import choose_states
from zootwins.tables import (
    all_tables, empty_counts, selector_text, table_1, table_5, table_8, table_empty, table_partners,
)
from zootwins.twins import (
    load_metrics, load_stage, load_twins, make_twins, partner_agreements, removal_frequencies, run_record, save_metrics,
)
from zootwins.zoos import ZOOS


def run(plan):
    return make_twins(plan, IMAGES, progress=False)


def made(reports):
    return {report.stage: report.made for report in reports}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Four models, pruned by two selectors in one run."
    plan = small_plan(tmp_path_factory.mktemp("both"), n=4, selector="lamp,global")
    run(plan)
    return plan


@pytest.fixture(scope="module")
def metrics(both):
    return load_metrics(both)


def test_a_selector_that_comes_later_shares_originals_and_dropout(tmp_path, both, metrics):
    own = small_plan(tmp_path, n=4)
    assert made(run(own)) == {"original": 4, "mp": 8, "vd": 4}
    before = load_metrics(own)
    plan = small_plan(tmp_path, n=4, selector="global,lamp")
    assert made(run(plan)) == {"original": 0, "mp": 0, "mp_lamp": 8, "vd": 0}
    assert different(plan, both) is None and not left_over(plan)
    pd.testing.assert_frame_equal(own_selector(metrics).reset_index(drop=True), before)
    assert made(run(small_plan(tmp_path, n=4, selector="lamp"))) == {"original": 0, "mp_lamp": 0, "vd": 0}


def test_every_row_says_by_whom_and_is_there_once(metrics):
    assert not metrics.duplicated(KEYS).any()
    assert metrics.groupby("method")["selector"].unique().map(list).to_dict() == {
        "original": [""],
        "mp": ["global", "lamp"],
        "vd": [""],
    }
    pruned = metrics[metrics["level"] == 0.9]
    assert (
        np.allclose(pruned["sparsity"], round(0.9 * 2416) / 2416)
        and pruned.groupby("selector")["sparsity_conv2"].first().nunique() == 2
    )


def test_at_level_0_two_selectors_are_the_same_bits(both):
    one, two = (load_stage(both, stage, level=0.0) for stage in ("mp", "mp_lamp"))
    assert all((one.weights[name] == two.weights[name]).all() for name in one.weights) and one.models.equals(two.models)
    sparse = [load_twins(both, "mp", 0.9, 0, selector) for selector in both.selectors]
    assert any((sparse[0].weights[name] != sparse[1].weights[name]).any() for name in sparse[0].weights)


def test_a_run_killed_between_two_selectors_goes_on_to_the_same_end(tmp_path, both, monkeypatch):
    plan, make_stage = small_plan(tmp_path, n=4, selector="global,lamp"), twins.make_stage

    def killed(stage, *rest):
        if stage.name == "mp_lamp":
            os.kill(os.getpid(), signal.SIGKILL)
        return make_stage(stage, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(twins, "make_stage", killed)
        assert in_child(lambda: run(plan)) == -signal.SIGKILL
    assert made(run(plan)) == {"original": 0, "mp": 0, "mp_lamp": 8, "vd": 4}
    assert different(plan, both) is None and not left_over(plan)


def test_a_run_killed_in_the_middle_of_a_selector_goes_on_to_the_same_end(tmp_path, both, monkeypatch):
    plan, train = small_plan(tmp_path, n=4, selector="global,lamp"), blocks.train_block
    monkeypatch.setattr(blocks, "SAVE_EVERY", 0.0)

    def killed(block, *rest):
        for step in train(block, *rest):
            yield step
            if block.stage.name == "mp_lamp" and step.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(twins, "train_block", killed)
        assert in_child(lambda: run(plan)) == -signal.SIGKILL
    reports = {report.stage: report for report in run(plan)}
    assert reports["mp"].made == 0 and reports["mp_lamp"].model_samples < 8 * 2 * 80
    assert different(plan, both) is None and not left_over(plan)


def test_masks_that_look_at_images_do_not_depend_on_who_is_trained_beside(tmp_path):
    steps = small_plan(tmp_path / "steps", n=2, methods="mp", selector="snip")
    run(steps)
    run(replace(steps, n_models=5))
    whole = small_plan(tmp_path / "whole", n=5, methods="mp", selector="snip")
    run(whole)
    assert different(replace(steps, n_models=5), whole) is None


@pytest.mark.parametrize(
    "selector, told",
    [
        ("lamb", "did you mean 'lamp'"), ("global,erc", "did you mean 'erk'"),
        ("uniform+", "highest possible level is 90.1%"), (len, "by name"), (SELECTORS["lamp"], "by name"),
    ],
)
def test_what_cannot_be_chosen_is_told_before_anything_is_made(tmp_path, selector, told):
    with pytest.raises(UserError, match=told) as error:
        small_plan(tmp_path, levels="50,95", selector=selector)
    assert says(error.value) and not list(tmp_path.iterdir())
    assert selector != "uniform+" or small_plan(tmp_path, levels="50,95", methods="vd", selector=selector)


def test_nothing_is_the_zoos_own(tmp_path):
    for zoo, own in (("digits_seed", "global"), ("svhn_seed", "layerwise")):
        plans = [
            make_plan(zoo, 1, selector=selector, store=str(tmp_path)) for selector in (None, "", own, f"{own},{own}")
        ]
        assert all(
            plan.selectors == (own,) and [stage.name for stage in make_stages(plan)] == ["original", "mp", "vd"]
            for plan in plans
        )
    assert [pruning_stage(ZOOS["svhn_seed"], name) for name in ("layerwise", "global")] == ["mp", "mp_global"]


def test_selectors_are_not_in_the_fingerprint_but_the_zoos_own_is(tmp_path, both):
    one = small_plan(tmp_path, n=4)
    assert (
        fingerprint(one, IMAGES) == fingerprint(both, IMAGES)
        and fingerprint(one, IMAGES)["zoo"]["mp_selector"] == "global"
    )
    other = replace(one, zoo=replace(one.zoo, mp_selector="lamp"))
    assert fingerprint(other, IMAGES) != fingerprint(one, IMAGES)
    assert run_record(both, [], IMAGES)["selectors"] == ["global", "lamp"]


def test_metrics_older_than_the_column_are_of_the_zoos_own(tmp_path, metrics, monkeypatch):
    old = own_selector(metrics).reset_index(drop=True)
    save_metrics(old.drop(columns="selector"), tmp_path / "metrics.parquet")
    pd.testing.assert_frame_equal(read_metrics(tmp_path / "metrics.parquet"), old)
    svhn = old.drop(columns="selector").assign(zoo="svhn_seed")
    assert set(with_selectors(svhn).query("method == 'mp'")["selector"]) == {"layerwise"}
    measure = blocks.measure
    monkeypatch.setattr(blocks, "measure", lambda *given: measure(*given).drop(columns="selector"))
    plan = small_plan(tmp_path / "store", n=4)
    run(plan)
    pd.testing.assert_frame_equal(load_metrics(plan), old)


# --- tables, figures and verdicts

def test_tables_have_a_row_or_a_column_for_every_selector(metrics, both):
    rows = metrics[(metrics["epoch"] == 2) & (metrics["level"] == 0.9)].groupby("selector")["test_acc"].mean()
    five = table_5(metrics)
    assert five.layout.index.names == ["Model Zoo", "Selector", "Metric"] and "global (its own), lamp" in five.caption
    assert five.numbers.query("zoo == 'All' and metric == 'sparsity'").groupby("selector").size().to_dict() == {
        "": 4,
        "lamp": 4,
    }
    shown = five.numbers.query("metric == 'test_acc' and level == 0.9 and epoch == 2").set_index("selector")["mean"]
    assert shown.to_dict() == pytest.approx((100 * rows).to_dict())
    assert table_8(metrics).layout.index.get_level_values("Selector").unique().tolist() == ["global", "lamp"]
    one = table_1(metrics, level=0.9)
    assert (
        one.layout.columns.get_level_values("Method").tolist()
        == ["Magnitude pruning (global)"] * 4 + ["Magnitude pruning (lamp)"] * 4 + ["Variational dropout"] * 4
    )
    partners = table_partners(partner_agreements(both, IMAGES, choose_states(metrics, level=0.9)))
    own = partners.numbers[partners.numbers["partner"] == "its own original"].set_index("selector")["mean"]
    agreed = metrics[(metrics["epoch"] == 2) & (metrics["level"] == 0.9)].groupby("selector")["agreement"].mean()
    assert own[["global", "lamp"]].to_dict() == pytest.approx((100 * agreed).to_dict())
    assert all(
        " lamp" in table.caption or "lamp" in table.to_markdown()
        for table in all_tables(metrics)
        if table.name not in ("table_4", "table_6", "table_7")
    )


def test_tables_of_one_selector_have_the_papers_form_and_say_which(metrics):
    for name, shown in (("global", own_selector(metrics)), ("lamp", metrics[metrics["selector"] != "global"])):
        tables = {table.name: table for table in all_tables(shown)}
        assert (
            tables["table_5"].layout.index.names == ["Model Zoo", "Metric"]
            and tables["table_1"].layout.columns[0][0] == "Magnitude pruning"
        )
        assert all(
            name in tables[each].caption
            for each in ("table_1", "table_2", "table_5", "table_8", "table_9", "table_empty")
        )


def test_zoos_with_different_selectors_share_a_table(metrics):
    own = own_selector(metrics)
    every = pd.concat(
        [own, own.assign(zoo="svhn_seed", selector=own["selector"].replace("global", "layerwise"))], ignore_index=True
    )
    five = table_5(every)
    assert five.layout.index.names == ["Model Zoo", "Metric"] and "SVHN (s) Seed: layerwise (its own)" in five.caption
    assert five.numbers.query("zoo == 'All'")["selector"].unique().tolist() == [""]


def test_models_with_an_empty_layer_are_counted(metrics, both):
    numbers = table_empty(metrics).numbers.set_index(["selector", "level", "layer"])["models"]
    for selector in both.selectors:
        for level in both.levels:
            population = load_twins(both, "mp", level, 0, selector)
            empty = empty_layers(population.weights, population.architecture)
            assert numbers[selector, level, "any"] == empty.any(axis=1).sum()
            assert all(numbers[selector, level, layer] == empty[layer].sum() for layer in empty)
    assert numbers["lamp"].sum() == 0


def test_a_layer_with_one_weight_is_not_empty():
    rows = pd.DataFrame(
        {
            "zoo": "usps_seed", "selector": "global", "level": 0.9, "sparsity_conv1": [1.0, 0.5, 1.0],
            "sparsity_conv2": [1199 / 1200, 1.0, 1.0],
        }
    )
    assert empty_counts(rows).set_index("layer")["models"].to_dict() == {"any": 3, "conv1": 2, "conv2": 2}
    assert empty_counts(rows.head(1).assign(sparsity_conv1=0.0))["models"].sum() == 0
    table = table_empty(rows.assign(method="mp", epoch=15, model=range(3)))
    assert (
        table.layout.loc[("USPS (s) Seed", "global"), "90%"] == "3: conv1 2, conv2 2"
        and selector_text(rows) in table.caption
    )


def test_verdicts_are_about_the_zoos_own_selector(metrics):
    kept = read_metrics(project_root() / "figures/usps_seed/metrics.parquet")
    kept = kept[kept["model"] < 6]
    other = kept[kept["method"] == "mp"].assign(selector="lamp", test_acc=0.5)
    beside = pd.concat([other, kept], ignore_index=True)
    pd.testing.assert_frame_equal(compare(beside), compare(kept))
    pd.testing.assert_frame_equal(all_claims(beside), all_claims(kept))
    without = all_claims(metrics[metrics["selector"] != "global"]).set_index("claim")
    assert without.loc["magnitude pruning is better up to 80 %", "verdict"] == OPEN
    only = beside[(beside["method"] != "mp") | (beside["selector"] == "lamp")]
    judged = compare(only)
    assert set(judged.loc[judged["verdict"] != "not run", "method"]) == {"vd"}


def test_figure_5_has_a_line_for_every_selector_and_others_show_one(metrics):
    lines = lambda rows: {line.get_label(): line.get_ydata() for line in drawn(rows)}

    def drawn(rows):
        fig, ax = plt.subplots()
        draw_twins(ax, rows, band=True)
        plt.close(fig)
        return ax.get_lines()
    shown = lines(metrics)
    assert list(shown) == ["Magnitude pruning, global", "Magnitude pruning, lamp", "Variational dropout"]
    assert len({line.get_color() for line in drawn(metrics)}) == 3
    ends = (
        metrics[(metrics["method"] == "mp") & (metrics["epoch"] == 2)].groupby(["selector", "level"])["test_acc"].mean()
    )
    assert all(np.allclose(shown[f"Magnitude pruning, {name}"], ends[name]) for name in ("global", "lamp"))
    assert list(lines(own_selector(metrics))) == ["Magnitude pruning", "Variational dropout"]
    titles = [
        of_one_selector(rows)[1]["mp"]
        for rows in (metrics, own_selector(metrics), metrics[metrics["selector"] != "global"])
    ]
    assert titles == ["Magnitude pruning (global)", "Magnitude pruning", "Magnitude pruning (lamp)"]
    assert one_selector(metrics)["selector"].unique().tolist() == ["", "global"]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_takes_several_selectors_or_another_one(metrics, name):
    for rows in (metrics, metrics[metrics["selector"] != "global"]):
        assert FIGURES[name](rows)


def test_removal_frequencies_are_of_every_selector(tmp_path, both):
    found = removal_frequencies(both)
    of_one = found[(found["selector"] == "lamp") & np.isclose(found["level"], 0.9)]
    weights = load_twins(both, "mp", 0.9, 0, "lamp").weights
    assert of_one["frequency"].mean() == pytest.approx(1 - 242 / 2416, abs=1e-4) and len(of_one) == 2416
    assert np.allclose(
        of_one.loc[of_one["layer"] == "conv1", "frequency"],
        (weights["module_list.0.weight"] == 0).float().mean(0).flatten(),
    )
    assert figure_3(found)
    old = found[found["selector"] != "lamp"].reset_index(drop=True)
    save_frequencies(old.drop(columns="selector"), tmp_path / "old.parquet")
    again = read_frequencies(tmp_path / "old.parquet")
    assert again.astype(str).equals(old.astype(str)) and list(again) == list(found)


# --- publications

def test_a_publication_knows_the_selectors(tmp_path, both):
    folder = publish(both.folder, tmp_path / "all")
    card = (folder / "README.md").read_text()
    assert (
        "magnitude-pruned twins (global), 90%" in card
        and "magnitude-pruned twins (lamp), 90%" in card
        and card.count('"magnitude-pruning"') == 1
    )
    assert f"by the selector `lamp` ({SELECTORS['lamp'].title})" in card and "rows of `mp_lamp`" in card
    assert set(load_population(folder / "mp_lamp").models["level"]) == {0.0, 0.9}
    assert set(read_metrics(folder / "metrics.parquet")["selector"]) == {"", "global", "lamp"}
    names = {path.name for path in export_zoo(both.folder, tmp_path / "zoos", ["original", "mp_lamp"]).iterdir()}
    assert names == {"original", "mp_lamp_0", "mp_lamp_90"}
    with pytest.raises(UserError, match="mp_lamp"):
        publish(both.folder, tmp_path / "none", ["mp_erk"])
