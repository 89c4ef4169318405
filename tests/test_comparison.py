"""Verdicts on zoos drawn from the printed numbers, on planted differences, and on runs that lack something."""
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from matplotlib.figure import Figure
from scipy import stats

from zootwins.comparison import (
    BEYOND, CHOSEN, COMPARED, COMPARISON, DISTURBANCES, EQUIVALENT, HALF_POINT, LEVEL, NEAR, POINT, RECORDED_EPOCH,
    SMALL, TESTED, VERDICTS, adjusted, as_designs, as_samples, beside_print, beside_recorded, by_design, calibrated,
    compare, compare_correlations, compare_layer_spread, compare_means, compare_windows, contrasts, distinct_states,
    disturbed_scores, equivalent_at, figure_disturbances, figure_recorded, figure_scorecard, first_rule, grid_mean,
    headline, judge, match, matched_models, moved_verdicts, our_originals, pruning_losses, reached,
    recorded_by_factor, recorded_epochs, records_of, regenerated, scorecard, share_grid, shifted_verdicts,
    side_by_side, smallest_error, within, worst, write_counts,
)
from zootwins.core import UserError
from zootwins.layers import FREQUENCY_COLUMNS, layer_sizes
from zootwins.metrics import LAYERS, METRIC_COLUMNS, with_selectors
from zootwins.reported import (
    ROUNDING, layer_average, printed_models, read_recorded, read_recorded_curves, read_reported, recorded_factors,
    shifted_windows,
)
from zootwins.zoos import FACTORS, ZOOS, get_zoo, model_table

CELLS = read_reported()


def drawn_zoo(zoo="usps_seed", n=200, seed=0, shift=0.0):
    "Metrics whose means and spreads are the printed ones; `shift` moves the twins' accuracies, in standard deviations."
    random, parts = np.random.default_rng(seed), []
    of_zoo = CELLS[CELLS["zoo"] == zoo]

    def add(method, level, epoch, measures, layers):
        values = {name: random.normal(mean, std, n) / 100 for name, (mean, std) in measures.items()}
        rows = pd.DataFrame({"zoo": zoo, "method": method, "level": level, "model": range(n), "epoch": epoch, **values})
        layers = {f"sparsity_{layer}": random.normal(layers.get(layer, 0), 1.0, n) / 100 for layer in LAYERS}
        parts.append(rows.assign(**layers, train_acc=rows["test_acc"] + rows["ggap"], train_loss=1.0, test_loss=1.0))

    pairs = lambda rows: {
        cell.metric: (cell.mean + (shift * cell.std if cell.metric == "test_acc" else 0), cell.std)
        for cell in rows.itertuples()
    }
    for (level, epoch), rows in of_zoo[of_zoo["table"] == 5].groupby(["level", "epoch"]):
        layers = of_zoo[
            (of_zoo["table"] == 8) & np.isclose(of_zoo["level"], level) & (of_zoo["layer"] != "")
        ].set_index("layer")["mean"]
        add("mp", level, epoch, pairs(rows) | {"sparsity": (100 * level, 0), "agreement": (74.3, 17.3)}, layers)
    seven = of_zoo[(of_zoo["table"] == 7)]
    averages = layer_average(of_zoo, 7).set_index("epoch")["mean"]
    for epoch in sorted({*of_zoo.loc[of_zoo["table"] == 6, "epoch"], *seven["epoch"]}):
        rows = pd.concat(
            [
                of_zoo[(of_zoo["table"] == 6) & (of_zoo["epoch"] == epoch)],
                seven[(seven["layer"] == "") & (seven["epoch"] == epoch)],
            ]
        ).drop_duplicates("metric")
        measures = {"sparsity": (averages.get(epoch, 0), 0.6)} | pairs(rows) | {"agreement": (86.6, 1.1)}
        add(
            "vd", np.nan, epoch, measures,
            seven[(seven["layer"] != "") & (seven["epoch"] == epoch)].set_index("layer")["mean"],
        )
    add(
        "original", np.nan, 50,
        {"test_acc": (87.0, 1.7), "ggap": (5.1, 0.6), "sparsity": (0, 0), "agreement": (100, 0)}, {},
    )
    return with_selectors(pd.concat(parts, ignore_index=True))[METRIC_COLUMNS].astype({"epoch": int})


@pytest.fixture(scope="module")
def metrics():
    return drawn_zoo()


@pytest.fixture(scope="module")
def comparison(metrics):
    return compare(metrics)


def pairs(**columns):
    columns = {"ours_std": 1.0, "ours_n": 50, "paper_std": 1.0, "paper_n": 1000} | columns
    return pd.DataFrame(columns, index=range(max(np.size(value) for value in columns.values())))


def test_every_printed_cell_has_one_row(comparison):
    assert list(comparison.columns) == COMPARISON and len(comparison) == CELLS["table"].isin(list(COMPARED)).sum()
    assert set(comparison["verdict"]) <= set(VERDICTS)
    printed = CELLS[CELLS["table"].isin(list(COMPARED))]
    assert (
        comparison[["table", "row", "metric", "layer"]].to_numpy().tolist()
        == printed[["table", "row", "metric", "layer"]].to_numpy().tolist()
    )
    assert np.array_equal(comparison["paper_mean"], printed["mean"], equal_nan=True)


def test_a_zoo_that_follows_the_paper_agrees(comparison):
    known = comparison[comparison["table"].isin([5, 6, 7, 8]) & comparison["verdict"].isin(TESTED)]
    assert (
        len(known) == 24 + 33 + 42 + 21
        and (known["verdict"] == "equivalent").mean() > 0.97
        and (known["first"] == "agrees").mean() > 0.97
    )
    assert known["spread"].dropna().between(0.4, 1.7).all()


def test_a_shifted_zoo_differs():
    found = compare(drawn_zoo(shift=2.0))
    accuracies = found[
        (found["metric"] == "test_acc") & found["table"].isin([5, 6, 7, 8]) & found["verdict"].isin(TESTED)
    ]
    assert len(accuracies) > 30 and set(accuracies["verdict"]) == {"different"}
    others = found[(found["metric"] == "ggap") & found["verdict"].isin(TESTED)]
    assert (others["verdict"] == "equivalent").all()
    least = worst(found, 5)
    assert (
        len(least) == 5
        and not (least["verdict"] == "equivalent").any()
        and least["effect"].abs().is_monotonic_decreasing
    )
    assert (
        least["effect"].abs().min()
        >= found[(found["verdict"] == "different") & ~found.index.isin(least.index)]["effect"].abs().max()
    )


def test_numbers_are_those_of_the_tables(metrics, comparison):
    cell = comparison[
        (comparison["table"] == 6)
        & (comparison["zoo"] == "usps_seed")
        & (comparison["epoch"] == 13)
        & (comparison["metric"] == "ggap")
    ].iloc[0]
    values = 100 * metrics[(metrics["method"] == "vd") & (metrics["epoch"] == 13)]["ggap"]
    assert (cell["ours_mean"], cell["ours_std"], cell["ours_n"]) == (
        pytest.approx(values.mean()),
        pytest.approx(values.std()),
        200,
    )
    assert (cell["paper_mean"], cell["paper_std"], cell["paper_n"]) == (4.7, 1.2, 1000) and cell[
        "difference"
    ] == pytest.approx(values.mean() - 4.7)
    every = comparison[(comparison["table"] == 5) & (comparison["zoo"] == "")]
    assert every["paper_n"].eq(13_120).all() and every["by_design"].all() and every["ours_n"].eq(200).all()


def test_several_zoos_are_matched_each_with_its_own():
    both = compare(pd.concat([drawn_zoo(), drawn_zoo("mnist_seed", seed=1)], ignore_index=True))
    alone = compare(drawn_zoo())
    select = lambda found: found[(found["zoo"] == "usps_seed") & found["table"].isin([5, 6, 7, 8])].reset_index(
        drop=True
    )
    pd.testing.assert_frame_equal(select(both), select(alone))
    assert (
        both[both["zoo"] == "mnist_seed"]["ours_mean"].notna().all()
        and both[(both["table"] == 5) & (both["zoo"] == "")]["ours_n"].eq(400).all()
    )


def of_means(**columns):
    return compare_means(as_samples(pairs(**columns)))


def test_every_table_of_twins_is_compared():
    assert list(COMPARED) == [1, 2, 5, 6, 7, 8, 9] and list(CHOSEN) == [1, 2, 9]
    assert CHOSEN[1] is CHOSEN[9] and CHOSEN[1] is not CHOSEN[2]


def test_an_effect_is_what_rounding_leaves_of_a_difference():
    found = of_means(ours_mean=[80.3, 80.04, 79.7], ours_std=1.0, ours_n=40, paper_mean=80.0, paper_std=1.95)
    assert found["effect"].tolist() == pytest.approx([0.125, 0.0, -0.125])


def test_records_keep_the_order_of_our_zoos():
    random, fixed = (grid_metrics().assign(zoo=zoo) for zoo in ("mnist_random", "mnist_fixed"))
    both = pd.concat([random, fixed], ignore_index=True)
    assert list(beside_recorded(both).index.get_level_values("zoo").unique()) == ["mnist_random", "mnist_fixed"]
    matched = matched_models(both)
    assert list(matched["zoo"].unique()) == ["mnist_random", "mnist_fixed"] and matched.index.is_unique


def test_welch_is_scipys_once_rounding_is_given_away():
    random = np.random.default_rng(3)
    x, y = random.normal(87, 1.7, 40), random.normal(88.2, 1.7, 1000)
    found = of_means(
        ours_mean=x.mean(), ours_std=x.std(ddof=1), ours_n=40, paper_mean=y.mean(), paper_std=y.std(ddof=1)
    )
    exact = stats.ttest_ind(x, y, equal_var=False).pvalue
    assert exact < found["p"][0] < 3 * exact
    assert found["effect"][0] == pytest.approx((x.mean() - y.mean() + 0.05) / (y.std(ddof=1) + 0.05))
    beyond, spread = abs(x.mean() - y.mean()) - ROUNDING, y.std(ddof=1) + ROUNDING
    welch = stats.ttest_ind_from_stats(beyond, x.std(ddof=1), 40, 0, spread, 1000, equal_var=False)
    a, b = x.var(ddof=1) / 40, spread**2 / 1000
    assert found["p"][0] == pytest.approx(welch.pvalue) and found["df"][0] == pytest.approx(
        (a + b) ** 2 / (a**2 / 39 + b**2 / 999)
    )
    assert found["error"][0] == pytest.approx(np.sqrt(x.var(ddof=1) / 40 + spread**2 / 1000) / spread)


@pytest.mark.parametrize("ours, theirs", [(20, 2000), (2000, 20)])
def test_each_side_has_its_own_number_of_models_and_spread(ours, theirs):
    found = of_means(ours_mean=81.0, ours_std=2.0, ours_n=ours, paper_mean=80.0, paper_std=3.0, paper_n=theirs)
    assert found["p"][0] == pytest.approx(
        stats.ttest_ind_from_stats(0.95, 2.0, ours, 0, 3.05, theirs, equal_var=False).pvalue
    )


def test_rounding_alone_is_no_difference():
    found = of_means(ours_mean=[80.05, 79.95, 80.06], ours_std=0.0, paper_mean=80.0, paper_std=0.0)
    assert found["p"].tolist()[:2] == [1, 1] and found["p"][2] < LEVEL


def test_one_model_is_judged_by_the_papers_spread():
    found = of_means(ours_mean=[81.0, 85.0], ours_std=np.nan, ours_n=1, paper_mean=80.0)
    assert found["p"][0] > 0.3 and found["p"][1] < 0.001
    spread = 1 + ROUNDING
    t = 0.95 / (spread * np.sqrt(1 + 1 / 1000))
    assert found["p"][0] == pytest.approx(2 * stats.t.sf(t, found["df"][0])) and found["df"][0] > 990


def test_a_missing_printed_spread_is_replaced_by_ours():
    both = as_samples(pairs(ours_mean=[82.0], ours_std=2.0, paper_mean=80.0, paper_std=np.nan))
    assert both["unit"][0] == 2.0 and compare_means(both)["effect"][0] == pytest.approx(1.95 / 2.05)


@pytest.mark.parametrize("side", [-1, 1])
def test_equivalence_is_two_one_sided_tests_at_its_bound(side):
    """The largest difference that is equivalent is the bound less the reach of the interval, and not a hair more."""
    std, n, paper = 2.0, 50, 3.0
    error = np.sqrt(std**2 / n + (paper + ROUNDING) ** 2 / 1000)
    df = of_means(ours_mean=80.0, ours_std=std, ours_n=n, paper_mean=80.0, paper_std=paper)["df"][0]
    largest = 0.5 * paper + ROUNDING - stats.t.ppf(0.95, df) * error
    inside, outside = (
        of_means(ours_mean=80 + side * (largest + hair), ours_std=std, ours_n=n, paper_mean=80.0, paper_std=paper)
        for hair in (-1e-6, 1e-6)
    )
    assert inside["equivalent"][0] and not outside["equivalent"][0]
    point = 1.0 - stats.t.ppf(0.95, df) * error
    inside, outside = (
        of_means(ours_mean=80 + side * (point + hair), ours_std=std, ours_n=n, paper_mean=80.0, paper_std=paper)
        for hair in (-1e-6, 1e-6)
    )
    assert inside["within_point"][0] and not outside["within_point"][0]


def coefficients(**columns):
    return pd.DataFrame({"metric": "pearson", "ours_n": 100, "paper_n": 1000, "low": np.nan, "high": np.nan} | columns,
        index=range(max(np.size(value) for value in columns.values())))


def around(r, error):
    "Limits of a 95 % interval of r, in %, from the error of its Fisher transform."
    return {
        f"{name}": 100 * np.tanh(np.arctanh(r) + sign * 1.959964 * error) for name, sign in (("low", -1), ("high", 1))
    }


def test_correlations_are_compared_on_fishers_scale_by_our_bootstrap():
    frame = coefficients(ours_mean=[60.0], paper_mean=50.0, **around(0.6, 0.08))
    found = compare_correlations(frame)
    q, error = np.arctanh(0.6) - np.arctanh(0.5005), 0.08 * np.sqrt(1 + 100 / 1000)
    assert found["effect"][0] == pytest.approx(q) and found["error"][0] == pytest.approx(error, rel=1e-4)
    assert found["p"][0] == pytest.approx(2 * stats.norm.sf(q / error), rel=1e-3) and np.isinf(found["df"][0])
    assert compare_correlations(frame.assign(ours_n=1000))["error"][0] == pytest.approx(0.08 * np.sqrt(2), rel=1e-4)


@pytest.mark.parametrize("side", [-1, 1])
def test_equivalence_of_correlations_at_its_bound(side):
    error = 0.03 * np.sqrt(1.1)
    nearest = np.arctanh(0.5 + side * ROUNDING / 100)
    for hair, wanted in ((-1e-5, True), (1e-5, False)):
        r = np.tanh(nearest + side * (0.2 - stats.norm.ppf(0.95) * error + hair))
        found = compare_correlations(coefficients(ours_mean=[100 * r], paper_mean=50.0, **around(r, 0.03)))
        assert found["equivalent"][0] == wanted
    tight = 0.0005
    for hair, wanted in ((-0.01, True), (0.01, False)):
        far = 50 + side * (1 + hair)
        r = np.tanh(np.arctanh(far / 100) - side * stats.norm.ppf(0.95) * tight * np.sqrt(1.1))
        assert (
            compare_correlations(coefficients(ours_mean=[100 * r], paper_mean=50.0, **around(r, tight)))[
                "within_point"
            ][0]
            == wanted
        )


def test_correlations_on_the_bound_itself_are_equivalent(monkeypatch):
    frame = coefficients(ours_mean=[55.0], paper_mean=50.0, **around(0.55, 0.03))
    row = compare_correlations(frame).iloc[0]
    bound = abs(row["effect"]) + stats.norm.ppf(0.95) * row["error"]
    for limit, wanted in ((bound, True), (np.nextafter(bound, 0), False)):
        monkeypatch.setitem(EQUIVALENT, "correlation", limit)
        assert compare_correlations(frame)["equivalent"].tolist() == [wanted]
    half, z = stats.norm.ppf(0.95) * row["error"], np.arctanh(frame["ours_mean"][0] / 100)
    end = max(abs(100 * np.tanh(z + sign * half) - 50.0) for sign in (-1, 1))
    for limit, wanted in ((end, True), (np.nextafter(end, 0), False)):
        monkeypatch.setattr("zootwins.comparison.POINT", limit)
        assert compare_correlations(frame)["within_point"].tolist() == [wanted]


def test_few_models_have_no_test_of_correlation():
    frame = coefficients(
        ours_mean=[50.0, 50.0, 100.0, 60.0], ours_n=[4, 5, 50, 50], paper_mean=90.0, low=[10.0, 10.0, 99.0, 60.0],
        high=[80.0, 80.0, 100.0, 60.0],
    )
    found = compare_correlations(frame)
    assert found["p"].isna().tolist() == [True, False, False, True] and np.isfinite(found["effect"]).all()
    assert not found["equivalent"][0] and not found["within_point"][0]
    assert compare_correlations(frame.assign(ours_mean=90.04, ours_n=400))["p"][:3].eq(1).all()


PLAIN = {
    "kind": "mean", "effect": 0.0, "difference": 0.0, "p_adjusted": 0.001, "equivalent": False, "doubtful": "",
    "by_design": False, "ours_mean": 80.0,
}


@pytest.mark.parametrize(
    "case, verdict",
    [
        ({"equivalent": True}, "equivalent"), ({}, "different"), ({"p_adjusted": np.nan}, "undecided"),
        ({"p_adjusted": LEVEL - 1e-9}, "different"), ({"p_adjusted": LEVEL}, "undecided"),
        ({"equivalent": True, "p_adjusted": 0.9}, "equivalent"), ({"doubtful": "lost", "equivalent": True}, "doubtful"),
        ({"ours_mean": np.nan, "doubtful": "lost"}, "not run"), ({"by_design": True, "equivalent": True}, "by design"),
        ({"by_design": True, "effect": 1.0, "difference": 3.0}, "by design"),
        ({"by_design": True, "effect": 1.01, "difference": 3.0}, "different"),
        ({"by_design": True, "effect": 3.0, "difference": -0.5}, "by design"),
        ({"by_design": True, "effect": -3.0, "difference": -0.51}, "different"),
    ],
)
def test_the_rule(case, verdict):
    assert judge(pd.DataFrame([PLAIN | case])).tolist() == [verdict]


@pytest.mark.parametrize(
    "case, verdict",
    [
        ({}, "agrees"), ({"effect": 0.9, "difference": 3.0, "p_adjusted": 0.2}, "agrees"),
        ({"effect": 0.9, "difference": 3.0}, "near"), ({"effect": 0.2, "difference": 3.0}, "agrees"),
        ({"effect": -0.21, "difference": 3.0}, "near"), ({"effect": 1.0, "difference": 3.0}, "near"),
        ({"effect": -1.01, "difference": 3.0}, "differs"),
        ({"effect": 1.1, "difference": 3.0, "p_adjusted": 0.2}, "differs"),
        ({"effect": 4.0, "difference": HALF_POINT}, "agrees"),
        ({"effect": 4.0, "difference": -HALF_POINT - 0.01}, "differs"),
        ({"effect": 0.1, "kind": "correlation", "difference": 3.0}, "agrees"),
        ({"effect": 0.11, "kind": "correlation", "difference": 3.0}, "near"),
        ({"effect": 0.3, "kind": "correlation", "difference": 3.0}, "near"),
        ({"effect": 0.31, "kind": "correlation", "difference": 3.0, "p_adjusted": 0.9}, "differs"),
        ({"effect": 0.9, "difference": 3.0, "p_adjusted": np.nan}, "agrees"),
        ({"effect": 0.9, "difference": 3.0, "p_adjusted": LEVEL}, "agrees"), ({"verdict": "doubtful"}, "doubtful"),
    ],
)
def test_the_first_rule(case, verdict):
    assert first_rule(pd.DataFrame([PLAIN | {"verdict": "undecided"} | case])).tolist() == [verdict]


def test_the_constants_of_the_rules_are_those_in_words():
    assert (LEVEL, POINT, HALF_POINT, EQUIVALENT, SMALL, NEAR) == (
        0.05,
        1.0,
        0.5,
        {"mean": 0.5, "correlation": 0.2},
        {"mean": 0.2, "correlation": 0.1},
        {"mean": 1.0, "correlation": 0.3},
    )
    frame = pd.DataFrame(
        {"kind": ["mean", "correlation", "mean"], "effect": [0.2, 0.2, 9.0], "difference": [3.0, 3.0, 0.5]}
    )
    assert within(frame, SMALL).tolist() == [True, False, True]


@settings(deadline=None, max_examples=60)
@given(some.floats(0, 30), some.floats(0, 30), some.floats(0.1, 20), some.floats(0.1, 20), some.integers(2, 1000))
def test_a_larger_difference_is_never_judged_better(first, second, ours_std, paper_std, n):
    frame = as_samples(
        pairs(
            ours_mean=80 + np.sort([first, second]), ours_std=ours_std, ours_n=n, paper_mean=80.0, paper_std=paper_std
        )
    )
    found = frame.join(compare_means(frame)).assign(
        kind="mean", doubtful="", by_design=False, difference=lambda rows: rows["ours_mean"] - rows["paper_mean"]
    )
    found["verdict"] = judge(found.assign(p_adjusted=found["p"]))
    assert found["verdict"].map(TESTED.index).is_monotonic_increasing and found["p"][0] >= found["p"][1]
    assert found["within_point"][0] >= found["within_point"][1]
    assert (
        first_rule(found.assign(p_adjusted=found["p"])).map(["agrees", "near", "differs"].index).is_monotonic_increasing
    )


def test_more_models_of_the_same_kind_prove_more():
    verdicts = [
        of_means(ours_mean=80.2, ours_std=1.0, ours_n=n, paper_mean=80.0)["equivalent"][0] for n in (4, 16, 64, 256)
    ]
    assert verdicts == sorted(verdicts) and verdicts[0] != verdicts[-1]


def test_p_values_are_adjusted_within_a_zoo():
    p = pd.Series([0.01, np.nan, 0.04, 0.03], index=[5, 6, 7, 8])
    assert adjusted(p).loc[[5, 7, 8]].tolist() == pytest.approx([0.03, 0.04, 0.04]) and np.isnan(adjusted(p)[6])
    assert adjusted(p * np.nan).isna().all()


def test_calibrated_cells_are_adjusted_apart():
    found = compare(drawn_zoo("cifar10_seed", 12, shift=0.4))
    asked = found[found["p_adjusted"].notna()]
    assert asked["calibrated"].nunique() == 2
    for _, group in asked.groupby("calibrated"):
        assert group["p_adjusted"].tolist() == pytest.approx(stats.false_discovery_control(group["p"]).tolist())
    together = stats.false_discovery_control(asked["p"])
    assert not np.allclose(together, asked["p_adjusted"])


def test_all_in_table_5_means_the_papers_zoos(metrics):
    strange = drawn_zoo(n=20).assign(zoo="digits_seed", sparsity=0.123)
    pd.testing.assert_frame_equal(compare(pd.concat([metrics, strange], ignore_index=True)), compare(metrics))


def test_another_bound_is_the_rule_scaled(comparison):
    tested = comparison[comparison["verdict"].isin(TESTED)]
    assert equivalent_at(tested, EQUIVALENT["mean"]).equals(tested["verdict"] == "equivalent")
    counts = [equivalent_at(tested, multiple).sum() for multiple in (0.1, 0.25, 0.5, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    rounding = [equivalent_at(tested, 0.5, points).sum() for points in (-ROUNDING, 0, ROUNDING, 1)]
    assert rounding == sorted(rounding) and rounding[0] < rounding[-1]
    one = pd.DataFrame({"difference": [0.54, 0.56], "unit": 1.0, "error": 0.0, "df": 1e9, "effect": [0.1, 0.1]})
    assert equivalent_at(one, 0.5).tolist() == [True, False]
    assert equivalent_at(one, 0.5, 0).tolist() == [False, False] and equivalent_at(one, 0.6, 0).all()
    q = pd.DataFrame({"difference": 9.0, "unit": np.nan, "error": 0.0, "df": np.inf, "effect": [0.2, 0.21, -0.21]})
    assert equivalent_at(q, 0.5).tolist() == [True, False, False] and equivalent_at(q, 0.55).all()
    wide = one.assign(difference=0.5, error=[0.0288, 0.03])  # errors of 1.05 points: 0.5498 and 0.5518 in all
    assert equivalent_at(wide, 0.5).tolist() == [True, False]
    assert equivalent_at(q.assign(error=0.01, effect=[0.18, 0.19, -0.19]), 0.5).tolist() == [True, False, False]


def test_losses_are_measured_model_by_model():
    """Models differ by points and lose the same: the loss is exact, where the means are not."""
    n, base = 40, np.random.default_rng(0).normal(0.9, 0.03, 40)
    wiggle = np.where(np.arange(n) % 2, 0.001, -0.001)
    parts = [
        pd.DataFrame({"zoo": "usps_seed", "method": "mp", "level": np.float32(level), "model": range(n), "epoch": epoch,
                      "test_acc": base - lost + wiggle * (level > 0)})
        for level, lost in ((0, 0), (0.5, 0.02), (0.8, 0.025)) for epoch in (0, 15)
    ]
    rows = with_selectors(pd.concat(parts, ignore_index=True))
    rows.loc[rows["epoch"] == 0, "test_acc"] = 0.1  # before fine-tuning: not looked at
    found = pruning_losses(rows, CELLS).set_index("level")
    printed = CELLS.query("table == 5 and zoo == 'usps_seed' and metric == 'test_acc' and epoch == 15").set_index(
        "level")["mean"]
    assert found.index.tolist() == [0.5, 0.8] and found["ours"].tolist() == pytest.approx([2.0, 2.5])
    assert found["printed"].tolist() == pytest.approx([printed[0.0] - printed[0.5], printed[0.0] - printed[0.8]])
    spread = 0.1 * np.sqrt(n / (n - 1))
    error = np.hypot(spread / np.sqrt(n), spread / np.sqrt(1000))  # in points; the paper has 1,000 models
    assert found["error"].tolist() == pytest.approx([error] * 2)
    beyond = abs(2.0 - (printed[0.0] - printed[0.5])) - 2 * ROUNDING
    assert found.loc[0.5, "z"] == pytest.approx(beyond / error) and abs(found.loc[0.8, "z"]) < 1e-6
    without = pruning_losses(rows[rows["level"] > 0], CELLS)
    assert without.empty and pruning_losses(rows.assign(method="vd"), CELLS).empty
    both = pruning_losses(pd.concat([rows, rows.assign(zoo="mnist_seed")], ignore_index=True))
    assert both["zoo"].tolist() == ["usps_seed"] * 2 + ["mnist_seed"] * 2  # as they come
    pd.testing.assert_frame_equal(both[:2].set_index("level"), found)
    assert both["error"][2:].tolist() == pytest.approx([error] * 2, rel=1e-9)  # Table 5 has all 1,000, Table 6 996
    assert printed_models(6, "mnist_seed") == 996
    assert both["z"][2] > 0 > both["z"][3]  # MNIST is printed to lose 1.2 and 10.8 points


def test_settings_are_not_findings(comparison):
    design = comparison[comparison["by_design"]]
    assert set(design["metric"]) == {"sparsity"} and not ((design["table"] == 6) | (design["table"] == 7)).any()
    assert set(design.loc[design["layer"] != "", "zoo"]) == {"svhn_seed"}
    assert by_design(comparison).equals(comparison["by_design"])
    wrong = compare(drawn_zoo().assign(sparsity=lambda rows: rows["sparsity"] * 0.9))
    assert (wrong[(wrong["table"] == 5) & (wrong["zoo"] == "") & (wrong["level"] > 0)]["verdict"] == "different").all()


def test_what_was_not_run_is_a_gap(metrics):
    pruned = compare(metrics[metrics["method"] != "vd"])
    assert (pruned[pruned["method"] == "vd"]["verdict"] == "not run").all() and pruned[
        (pruned["table"] == 8) & (pruned["zoo"] == "usps_seed")
    ]["ours_mean"].notna().all()
    dropped = compare(metrics[metrics["method"] != "mp"])
    assert (dropped[dropped["method"] == "mp"]["verdict"] == "not run").all() and dropped[
        (dropped["table"] == 7) & (dropped["zoo"] == "usps_seed")
    ]["ours_mean"].notna().all()
    early = compare(metrics[(metrics["method"] != "vd") | (metrics["epoch"] <= 4)])
    states = early[early["table"].isin([1, 2, 9]) & (early["method"] == "vd")]
    assert (states["verdict"] == "not run").all() and (early[early["table"] == 6]["verdict"] != "not run").sum() == 9
    short = compare(metrics[(metrics["method"] != "mp") | (metrics["epoch"] == 0)])
    assert (short[short["table"] == 8]["verdict"] == "not run").all()
    level = compare(metrics[metrics["level"].isna() | (metrics["level"] < 0.75)])
    assert (level[(level["table"].isin([1, 2])) & (level["method"] == "mp")]["verdict"] == "not run").all()


def test_a_zoo_that_the_paper_does_not_have_leaves_everything_open(metrics):
    ours = compare(metrics.assign(zoo="digits_seed").query("method != 'mp'"))
    assert (ours["verdict"] == "not run").all()
    score = scorecard(ours)
    assert (
        score.loc["all", [*TESTED, "predicted", "calibrated", "distinct"]].eq(0).all()
        and len(figure_scorecard(ours).axes) == 2
    )
    assert len(side_by_side(ours).layout) == 0 and worst(ours).empty


def test_doubtful_cells_are_not_judged(comparison):
    doubtful = comparison[comparison["doubtful"] != ""]
    assert (
        set(doubtful["verdict"]) == {"doubtful", "not run"}
        and doubtful[doubtful["zoo"] == "usps_seed"]["verdict"].eq("doubtful").all()
    )
    assert doubtful["p_adjusted"].isna().all()


COUNTS = ["not run", "by design", "doubtful", "calibrated", *TESTED]


@pytest.mark.parametrize("by", ["table", "zoo", "metric"])
def test_scores_add_up(comparison, by):
    score = scorecard(comparison, by)
    assert (score["printed"] == score[COUNTS].sum(axis=1)).all() and (
        score["predicted"] == score[TESTED].sum(axis=1)
    ).all()
    parts, total = score.drop(index="all"), score.loc["all"]
    adds = ["printed", *COUNTS, "of these equivalent", "predicted", "within a point", "agrees (first rule)"]
    assert (
        (parts[adds].sum() == total[adds]).all()
        and (score["distinct"] <= score["predicted"]).all()
        and score["calibrated"].eq(0).all()
    )
    assert total["within a point"] == comparison[comparison["verdict"].isin(TESTED)]["within_point"].sum()
    assert total["agrees (first rule)"] == (comparison["first"] == "agrees").sum()


def test_distinct_states_of_all_zoos_are_those_of_each():
    both = compare(pd.concat([drawn_zoo(n=40), drawn_zoo("mnist_seed", n=40)], ignore_index=True))
    score = scorecard(both[both["zoo"] != ""], "zoo")
    assert (
        score.loc["all", "distinct"] == score.loc["usps_seed", "distinct"] + score.loc["mnist_seed", "distinct"] > 200
    )


def test_what_was_fitted_is_counted_apart():
    comparison = compare(drawn_zoo("cifar10_seed"))
    fitted = comparison[comparison["calibrated"]]
    assert set(fitted["method"]) == {"vd"} and (fitted["epoch"] > 0).all() and set(fitted["zoo"]) == {"cifar10_seed"}
    assert calibrated(comparison).equals(comparison["calibrated"])
    score = scorecard(comparison[comparison["zoo"] == "cifar10_seed"]).loc["all"]
    judged = fitted[fitted["verdict"].isin(TESTED)]
    assert (
        score["calibrated"] == len(judged) > 60
        and score["of these equivalent"] == (judged["verdict"] == "equivalent").sum()
    )
    assert (
        score["predicted"] + score["calibrated"]
        == (comparison["verdict"].isin(TESTED) & (comparison["zoo"] != "")).sum()
    )
    assert (
        ", calibrated" in " ".join(side_by_side(comparison).layout["Verdict"])
        and not compare(drawn_zoo())["calibrated"].any()
    )


def test_one_state_counts_once(comparison):
    of = lambda **state: comparison[
        np.logical_and.reduce([comparison[name].eq(value) for name, value in state.items()])
    ]
    assert (
        distinct_states(of(zoo="usps_seed", metric="test_acc", level=0.9, epoch=15))
        == 1
        < len(of(zoo="usps_seed", metric="test_acc", level=0.9, epoch=15))
    )
    start = comparison[
        (comparison["zoo"] == "usps_seed")
        & (comparison["metric"] == "test_acc")
        & (comparison["epoch"] == 0)
        & ~(comparison["level"] > 0)
    ]
    assert len(start) == 3 and distinct_states(start) == 1
    pruned = of(zoo="usps_seed", metric="test_acc", level=0.5, epoch=0)
    assert (
        distinct_states(pd.concat([start, pruned])) == 2
        and distinct_states(of(zoo="usps_seed", metric="test_acc", level=0.0)) == 2
    )


def test_heat_map_shows_every_zoo(comparison):
    fig, grid = figure_scorecard(comparison), share_grid(comparison)
    ax = fig.axes[0]
    assert (
        len(ax.get_yticks()) == sum(zoo.in_paper for zoo in ZOOS.values()) and len(ax.get_xticks()) == len(COMPARED) + 1
    )
    texts = [text.get_text() for text in ax.texts]
    assert sum(" of " in text for text in texts) == (grid["tested"] > 0).sum() < len(grid)
    assert texts.count("not run") == ((grid["tested"] == 0) & (grid["printed"] > 0)).sum() > 0
    assert grid["share"].dropna().between(0, 1).all()


def test_side_by_side_can_be_saved(comparison, tmp_path):
    table = side_by_side(comparison)
    assert len(table.layout) == comparison["ours_mean"].notna().sum() and "USPS (s) Seed: 200 models." in table.caption
    row = table.layout.loc[("5", "USPS (s) Seed", "pruned by 50%, epoch 15", "Acc")]
    assert row["Paper"] == "90.1 (1.0)" and row["Verdict"] == "equivalent"
    assert table.to_markdown().count("\n") == 4 + len(table.layout) and r"\%" in table.to_latex()


@pytest.mark.parametrize("number", COMPARED)
def test_a_table_beside_the_printed_one_has_every_cell_once(comparison, number):
    table = beside_print(comparison, number)
    cells = comparison[(comparison["table"] == number) & comparison["ours_mean"].notna() & (comparison["zoo"] != "")]
    texts = [text for row in table.layout.to_numpy() for text in row if text]
    assert len(texts) == len(cells) > 0 and all(" / " in text for text in texts)
    for verdict in ("undecided", "different", "doubtful"):
        assert sum(text.endswith(f", {verdict}") for text in texts) == (cells["verdict"] == verdict).sum()


def test_layer_spread_is_brought_to_the_papers_number_of_models():
    random, n, weights, std = np.random.default_rng(0), 40, 20_000, 0.13
    shares = (0.55 + std * random.uniform(-(3**0.5), 3**0.5, weights)).clip(0, 1)
    counted = random.binomial(n, shares) / n
    frame = pd.DataFrame(
        {
            "zoo": "usps_seed", "method": "vd", "selector": "", "level": np.nan, "epoch": 5, "layer": "conv1",
            "weight": range(weights), "frequency": counted, "models": n,
        }
    )
    found = compare_layer_spread(frame[FREQUENCY_COLUMNS])
    assert found[["table", "epoch", "paper_mean", "paper_std", "n"]].to_numpy().tolist() == [[7, 5, 55.4, 13.0, n]]
    assert found["ours_std"][0] == pytest.approx(100 * std, abs=0.3) and 100 * counted.std() > found["ours_std"][0] + 1
    pruned = compare_layer_spread(frame.assign(method="mp", level=np.float32(0.7), epoch=15)[FREQUENCY_COLUMNS])
    assert pruned[["table", "level", "paper_std"]].to_numpy().tolist() == [[8, 0.7, 11.1]]


def test_regenerated_cells_are_in_printed_form(metrics):
    ours = regenerated(metrics)
    assert set(ours["table"]) == set(COMPARED) and set(ours["zoo"]) == {"", "usps_seed"}
    assert set(zip(ours["table"], ours["metric"])) <= set(zip(CELLS["table"], CELLS["metric"]))
    assert len(match(metrics, CELLS)) == CELLS["table"].isin(list(COMPARED)).sum()


# --- grids

def grid_draw(n, seed, noise=1.0):
    "Factors and values of a draw from mnist_fixed with known effects, and the mean of the balanced grid."
    random, factors = np.random.default_rng(seed), model_table(get_zoo("mnist_fixed")).sample(n, random_state=seed)
    effect = lambda rows: (
        80
        - 30 * (rows["optimizer"] == "sgd")
        + 8 * (rows["activation"] == "tanh")
        - 12 * ((rows["dropout"] == 0.5) & (rows["init"] == "normal"))
    )
    return factors, effect(factors) + noise * random.normal(size=n), effect(model_table(get_zoo("mnist_fixed"))).mean()


def test_the_mean_of_a_grid_is_exact_without_noise():
    factors, values, truth = grid_draw(128, 0, noise=0.0)
    mean, error, df, residual = grid_mean(values.to_numpy(), factors, "mnist_fixed")
    assert (
        mean == pytest.approx(truth)
        and error < 1e-6
        and df == 128 - 50
        and residual < 1e-6
        and abs(values.mean() - truth) > 0.3
    )


@pytest.mark.parametrize("n, coefficients", [(100, 50), (99, 11), (22, 11), (21, 1), (2, 1)])
def test_a_grid_is_fitted_with_two_models_for_every_coefficient(n, coefficients):
    factors, values, _ = grid_draw(n, 3)
    mean, error, df, _ = grid_mean(values.to_numpy(), factors, "mnist_fixed")
    assert df == n - coefficients
    if coefficients == 1:
        assert mean == pytest.approx(values.mean()) and error == pytest.approx(values.std() / np.sqrt(n), rel=1e-6)


def test_the_scorecard_s_picture_says_where_nothing_was_tried_and_is_bold_where_something_is_off():
    ax = Figure().add_subplot()
    wide = {
        "equivalent": [[3, 2, 0, 0]], "tested": [[3, 3, 0, 0]], "printed": [[3, 3, 1, 0]], "calibrated": [[0, 1, 0, 0]],
    }
    write_counts(ax, {name: pd.DataFrame(numbers) for name, numbers in wide.items()})
    assert [text.get_text() for text in ax.texts] == ["3 of 3", "2 of 3 †", "not run"]
    assert [text.get_fontweight() for text in ax.texts[:2]] == ["normal", "bold"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (1, 0), (2, 0)]


def test_contrasts_sum_to_zero_over_the_grid():
    whole = model_table(get_zoo("mnist_fixed"))
    for order, columns in ((0, 1), (1, 11), (2, 50)):
        x = contrasts(whole, "mnist_fixed", order)
        assert x.shape == (2560, columns) and np.allclose(x[:, 1:].sum(axis=0), 0) and (x[:, 0] == 1).all()
    assert np.abs(x[:, 1:11]).max() == 0.75 and np.abs(x[:, 11:]).max() == pytest.approx(0.75**2)
    assert np.allclose(x[:, 11], x[:, 1] * x[:, 4])  # the first activation by the first initialisation
    assert contrasts(model_table(get_zoo("cifar10_large_fixed")), "cifar10_large_fixed", 1).shape[1] == 10


def test_a_level_that_was_not_drawn_leaves_a_sample():
    factors, values, _ = grid_draw(128, 1)
    without = factors["activation"] != "tanh"
    mean, _, df, _ = grid_mean(values[without].to_numpy(), factors[without], "mnist_fixed")
    assert df == without.sum() - 1 and mean == pytest.approx(values[without].mean())


def test_intervals_of_a_real_grid_hold_its_mean():
    records, factors, held = (
        read_recorded().query("zoo == 'mnist_fixed'")["test_acc"].to_numpy(),
        recorded_factors("mnist_fixed"),
        [],
    )
    random = np.random.default_rng(1)
    for _ in range(150):
        drawn = random.choice(2560, 128, replace=False)
        mean, error, df, _ = grid_mean(records[drawn], factors.iloc[drawn], "mnist_fixed")
        held.append(abs(mean - records.mean()) < stats.t.ppf(0.95, df) * error)
    assert 0.83 < np.mean(held) < 0.97


def grid_metrics(n=128):
    "A run of MNIST (s) Fixed whose original accuracies are the recorded ones of models with the same factors."
    table, records = model_table(get_zoo("mnist_fixed")).head(n), recorded_factors("mnist_fixed")
    records["test_acc"] = read_recorded().query("zoo == 'mnist_fixed'")["test_acc"].to_numpy()
    drawn = table.merge(records[records["seed_place"] == 3], on=list(FACTORS))
    rows = pd.DataFrame(
        {
            "zoo": "mnist_fixed", "model": drawn["model"], "test_acc": drawn["test_acc"],
            "train_acc": drawn["test_acc"], "ggap": 0.0, "train_loss": 1.0, "test_loss": 1.0, "sparsity": 0.0,
            "agreement": 1.0,
        }
    )
    rows = rows.assign(**{f"sparsity_{layer}": 0.0 for layer in LAYERS})
    parts = [rows.assign(method="original", level=np.nan, epoch=epoch) for epoch in (10, 49, 50)]
    parts += [rows.assign(method="mp", level=0.5, epoch=epoch) for epoch in (0, 15)] + [
        rows.assign(method="vd", level=np.nan, epoch=epoch) for epoch in (0, 2)
    ]
    return with_selectors(pd.concat(parts, ignore_index=True))[METRIC_COLUMNS]


def test_grids_are_judged_by_their_design():
    metrics = grid_metrics()
    found = compare(metrics)
    cell = found[
        (found["table"] == 6)
        & (found["zoo"] == "mnist_fixed")
        & (found["epoch"] == 2)
        & (found["metric"] == "test_acc")
    ].iloc[0]
    values = 100 * metrics[(metrics["method"] == "vd") & (metrics["epoch"] == 2)].set_index("model")["test_acc"]
    mean, error, df, residual = grid_mean(
        values.to_numpy(), model_table(get_zoo("mnist_fixed")).set_index("model").loc[values.index], "mnist_fixed"
    )
    assert (
        cell["ours_mean"] == pytest.approx(values.mean())
        and cell["estimate"] == pytest.approx(mean)
        and cell["difference"] == pytest.approx(mean - cell["paper_mean"])
    )
    theirs = (residual + ROUNDING) / np.sqrt(2493)
    assert cell["error"] == pytest.approx(np.hypot(error, theirs) / (cell["unit"] + ROUNDING)) and cell[
        "error"
    ] < 0.8 * values.std() / np.sqrt(128) / (cell["unit"] + ROUNDING)
    unnumbered = metrics.assign(model=metrics["model"] + 5000)
    both = as_samples(match(unnumbered, CELLS))
    pd.testing.assert_frame_equal(as_designs(both, unnumbered), both)


# --- what the score would catch

def test_a_shift_turns_verdicts(comparison):
    tested = comparison[
        (comparison["zoo"] == "usps_seed") & comparison["verdict"].isin(TESTED) & np.isfinite(comparison["df"])
    ]
    assert (shifted_verdicts(tested, 0.0) == tested["verdict"]).mean() > 0.97
    assert (shifted_verdicts(tested, 3.0) == "different").all() and (
        shifted_verdicts(tested, -3.0) == "different"
    ).all()
    power = smallest_error(comparison).loc["usps_seed"]
    multiple = power["standard deviations"]
    share = lambda shift: min((shifted_verdicts(tested, sign * shift) == "different").mean() for sign in (-1, 1))
    assert share(multiple) >= 0.8 > share(multiple - 0.05) and power["cells"] == len(tested)
    assert power["points of accuracy"] == pytest.approx(
        multiple * tested.loc[tested["metric"] == "test_acc", "unit"].median()
    )
    few = compare(drawn_zoo(n=6))
    assert smallest_error(few).loc["usps_seed", "standard deviations"] > 2 * multiple
    assert smallest_error(comparison[comparison["verdict"] == "not run"]).empty


def test_a_shift_is_judged_as_the_rule_would(comparison):
    tested = comparison[
        (comparison["zoo"] == "usps_seed") & comparison["verdict"].isin(TESTED) & np.isfinite(comparison["df"])
    ]
    moved = as_samples(
        tested.assign(
            ours_mean=tested["ours_mean"] + 0.45 * tested["unit"],
            paper_std=tested["paper_std"].where(tested["layer"] == ""),
        )
    )
    found = compare_means(moved)
    found = found.assign(
        p_adjusted=adjusted(found["p"]), kind="mean", difference=moved["ours_mean"] - moved["paper_mean"], doubtful="",
        by_design=False, ours_mean=1.0,
    )
    assert judge(found).equals(shifted_verdicts(tested, 0.45).rename(None))


def test_errors_are_made_in_registered_zoos():
    with pytest.raises(UserError, match="my_zoo.*usps_seed"):
        disturbed_scores(drawn_zoo(n=2).assign(zoo="my_zoo"))


def test_every_deliberate_error_shows():
    runs = pd.concat([drawn_zoo(n=60), grid_metrics(60)], ignore_index=True)
    scores = disturbed_scores(runs).set_index(["zoo", "disturbance"])
    usps = scores.loc["usps_seed"]
    assert (
        list(usps.index) == list(DISTURBANCES)
        and (usps[TESTED].sum(axis=1) == usps["tested"]).all()
        and usps.loc["as it is", "lost"] == 0
    )
    for name in (
        "dropout one epoch late", "levels 70 and 80 % swapped", "accuracy half a std too high",
        "training for test accuracy", "an eighth of the models",
    ):
        assert usps.loc[name, "equivalent"] < usps.loc["as it is", "equivalent"] and usps.loc[name, "lost"] > 0
    assert (
        usps.loc["one activation left out"].drop("applies").equals(usps.loc["as it is"].drop("applies"))
        and (usps["within a point"] <= usps["tested"]).all()
    )
    assert usps.loc["as it is", "within a point"] > usps.loc["an eighth of the models", "within a point"]
    assert usps["applies"].tolist() == [name != "one activation left out" for name in DISTURBANCES]
    drawn = figure_disturbances(scores.reset_index()).axes
    said = [text.get_text() for text in drawn[0].texts]
    assert len(drawn) == 2 and said[list(DISTURBANCES).index("one activation left out")] == "does not apply"
    assert said.count("does not apply") == 1 and said[0].endswith(f" of {usps.loc['as it is', 'tested']}")


def test_deliberate_errors_are_what_they_say():
    rows = drawn_zoo(n=24)
    at = lambda frame, level: frame["level"].isna() if level is None else np.isclose(frame["level"], level)
    state = lambda frame, method, epoch, level=None: (
        frame[(frame["method"] == method) & (frame["epoch"] == epoch) & at(frame, level)]
        .set_index("model")
        .sort_index()
    )
    late = DISTURBANCES["dropout one epoch late"](rows)
    epochs = sorted(rows.loc[rows["method"] == "vd", "epoch"].unique())
    assert state(late, "vd", 4)["test_acc"].equals(state(rows, "vd", 5)["test_acc"]) and state(late, "vd", 0)[
        "test_acc"
    ].equals(state(rows, "vd", 0)["test_acc"])
    assert state(late, "vd", epochs[-1])["test_acc"].equals(state(rows, "vd", epochs[-1])["test_acc"]) and len(
        late[late["method"] != "vd"]
    ) == len(rows[rows["method"] != "vd"])
    swapped = DISTURBANCES["levels 70 and 80 % swapped"](rows)
    assert state(swapped, "mp", 15, 0.7)["test_acc"].equals(state(rows, "mp", 15, 0.8)["test_acc"]) and state(
        swapped, "mp", 15, 0.8
    )["test_acc"].equals(state(rows, "mp", 15, 0.7)["test_acc"])
    assert state(swapped, "mp", 15, 0.7)["sparsity"].equals(state(rows, "mp", 15, 0.7)["sparsity"]) and state(
        swapped, "vd", 4
    )["test_acc"].equals(state(rows, "vd", 4)["test_acc"])
    raised = DISTURBANCES["accuracy half a std too high"](rows)
    before = state(rows, "mp", 15, 0.5)["test_acc"]
    assert np.allclose(state(raised, "mp", 15, 0.5)["test_acc"] - before, before.std() / 2)
    longer = pd.concat([rows, rows[(rows["method"] == "mp") & (rows["epoch"] == 0)].assign(epoch=5)])
    short = DISTURBANCES["a third of the fine-tuning"](longer)
    assert state(short, "mp", 15, 0.5)["test_acc"].equals(state(rows, "mp", 0, 0.5)["test_acc"]) and state(
        short, "mp", 0, 0.5
    )["test_acc"].equals(state(rows, "mp", 0, 0.5)["test_acc"])
    assert DISTURBANCES["training for test accuracy"](rows)["test_acc"].equals(rows["train_acc"].rename("test_acc"))
    assert DISTURBANCES["an eighth of the models"](rows)["model"].nunique() == 3
    grid = grid_metrics(40)
    left = DISTURBANCES["one activation left out"](grid)["model"].unique()
    assert (
        set(model_table(get_zoo("mnist_fixed")).set_index("model").loc[left, "activation"])
        == {"relu", "sigmoid", "gelu"}
        and 0 < len(left) < 40
    )


# --- shifted windows and recorded models

def test_windows_are_cut_from_the_flat_weights():
    sizes = layer_sizes("cnn_small_3ch")
    shares = np.random.default_rng(0).uniform(size=sum(sizes.values()))
    layers = np.repeat(list(sizes), list(sizes.values()))
    frame = pd.DataFrame(
        {
            "zoo": "cifar10_seed", "method": "mp", "selector": "global", "level": np.float32(0.7), "epoch": 15,
            "layer": layers, "weight": range(len(shares)), "frequency": shares, "models": 10**9,
        }
    )
    found = compare_windows(frame[FREQUENCY_COLUMNS]).set_index("layer")
    assert found.index.tolist() == list(sizes) and (found["level"] == 0.7).all()
    for layer, (first, last) in shifted_windows("cnn_small_3ch").items():
        own = 100 * shares[layers == layer]
        assert found.loc[layer, "window_mean"] == pytest.approx(100 * shares[first:last].mean()) and found.loc[
            layer, "layer_mean"
        ] == pytest.approx(own.mean())
        share = shares[first:last].mean()
        assert found.loc[layer, "window_std"] == pytest.approx(
            100 * np.sqrt(shares[first:last].var(ddof=1) + share * (1 - share) / 1000), rel=1e-4
        )
    assert found.loc["fc2", "window_difference"] == pytest.approx(found.loc["fc2", "window_mean"] - 68.1) and found.loc[
        "conv1", "layer_difference"
    ] == pytest.approx(found.loc["conv1", "layer_mean"] - 61.2)
    others = [frame.assign(method="vd", frequency=0.0), frame.assign(zoo="usps_seed", frequency=0.0)]
    among = compare_windows(pd.concat([*others, frame], ignore_index=True)[FREQUENCY_COLUMNS]).set_index("layer")
    assert among["window_mean"].tolist() == found["window_mean"].tolist()
    ten = compare_windows(frame[FREQUENCY_COLUMNS].assign(models=10)).set_index("layer")
    share = found.loc["conv1", "window_mean"] / 100
    assert ten.loc["conv1", "window_std"] == pytest.approx(
        100 * np.sqrt(max(0, shares[:400].var(ddof=1) - share * (1 - share) / 10) + share * (1 - share) / 1000),
        rel=1e-6,
    )
    assert (
        compare_windows(frame[FREQUENCY_COLUMNS].assign(zoo="usps_seed")).empty
        and compare_windows(frame[FREQUENCY_COLUMNS].assign(epoch=0)).empty
    )


def test_recorded_distributions_are_beside_ours():
    metrics = grid_metrics()
    found = beside_recorded(metrics)
    values = metrics[(metrics["method"] == "original") & (metrics["epoch"] == 49)]["test_acc"]
    real = read_recorded().query("zoo == 'mnist_fixed'")["test_acc"]
    ours = found.loc[("mnist_fixed", "ours")]
    assert (
        ours["models"] == 128
        and ours["mean"] == pytest.approx(100 * values.mean())
        and ours["50%"] == pytest.approx(100 * values.median())
    )
    assert (
        ours["failed"] == pytest.approx(100 * (values < 0.2).mean())
        and (values < 0.2).any()
        and ours["p"] == pytest.approx(stats.ks_2samp(values, real).pvalue)
    )
    assert found.loc[("mnist_fixed", "real"), "mean"] == pytest.approx(100 * real.mean()) and found.loc[
        ("mnist_fixed", "real"), "std"
    ] == pytest.approx(100 * real.std())
    assert beside_recorded(metrics.assign(zoo="usps_seed")).empty
    finer = metrics.assign(test_acc=metrics["test_acc"] + 0.0009)
    assert np.allclose(our_originals(finer)["test_acc"], our_originals(metrics)["test_acc"]) and set(
        our_originals(metrics, 50)["model"]
    ) == set(range(128))


def test_records_of_other_zoos_can_be_handed_over():
    metrics = grid_metrics()
    theirs = read_recorded().query("zoo == 'mnist_fixed'")
    others = theirs.assign(zoo="usps_fixed", test_acc=theirs["test_acc"] / 2 + 0.0009).sample(frac=1, random_state=0)
    moved = metrics.assign(zoo="usps_fixed", test_acc=metrics["test_acc"] / (1 + (metrics["epoch"] == 50)))
    found = beside_recorded(moved, recorded=others)
    assert list(found.index) == [("usps_fixed", "ours"), ("usps_fixed", "real")]
    cut = np.floor(1000 * theirs["test_acc"].to_numpy() / 2 + 0.9 + 1e-6) / 10
    assert found.loc[("usps_fixed", "real"), "mean"] == pytest.approx(cut.mean(), abs=1e-9)
    last = moved.loc[(moved["method"] == "original") & (moved["epoch"] == 50), "test_acc"]
    at_50 = beside_recorded(moved, 50, others).loc[("usps_fixed", "ours"), "mean"]
    assert at_50 == pytest.approx(100 * np.floor(1000 * last + 1e-6).mean() / 1000) and at_50 != found["mean"].iloc[0]
    assert beside_recorded(metrics, recorded=others).empty


def test_records_in_any_order_or_with_gaps_match_the_same_models():
    metrics = grid_metrics()
    theirs = read_recorded().query("zoo == 'mnist_fixed'")
    whole = matched_models(metrics)
    mixed = matched_models(metrics, recorded=theirs.sample(frac=1, random_state=0))
    assert np.allclose(mixed["real"], whole["real"]) and len(mixed) == 128
    row = whole.iloc[17]
    grid = recorded_factors("mnist_fixed")
    same = np.logical_and.reduce([grid[factor] == row[factor] for factor in FACTORS])
    half = theirs[~same | (grid["seed_place"].to_numpy() < 5)]
    few = matched_models(metrics, recorded=half).set_index("model")
    kept = theirs[same & (grid["seed_place"].to_numpy() < 5)]
    assert len(kept) == 5 and few.loc[row["model"], "real"] == pytest.approx(100 * kept["test_acc"].mean())
    assert row["model"] not in set(matched_models(metrics, recorded=theirs[~same])["model"])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda table: table.rename(columns={"test_acc": "acc"}), "these lack test_acc. Rename yours."),
        (lambda table: table.drop(columns=["zoo", "trial"]), "these lack zoo, trial."),
        (lambda table: table.assign(test_acc=100 * table["test_acc"]), "a fraction from 0 to 1; these have others."),
        (lambda table: table.assign(test_acc=1.001), "a fraction from 0 to 1; these have others."),
        (lambda table: table.assign(test_acc=-table["test_acc"]), "a fraction from 0 to 1; these have others."),
        (lambda table: table.assign(test_acc=np.nan), "a fraction from 0 to 1; these have others."),
        (lambda table: pd.concat([table, table.iloc[:3]]), "these repeat 3. Keep one epoch."),
    ],
)
def test_records_that_are_none_are_refused(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        records_of(change(read_recorded()))


def test_records_may_reach_both_ends_of_the_scale():
    ends = pd.DataFrame({"zoo": "usps_seed", "trial": [0, 1], "test_acc": [0.0, 1.0]})
    assert list(records_of(ends)["test_acc"]) == [0, 1]


def test_models_are_matched_by_their_factors():
    metrics = grid_metrics()
    matched = matched_models(metrics)
    records = recorded_factors("mnist_fixed").assign(
        test_acc=read_recorded().query("zoo == 'mnist_fixed'")["test_acc"].to_numpy()
    )
    row = matched.iloc[17]
    same = records[np.logical_and.reduce([records[factor] == row[factor] for factor in FACTORS])]
    assert (
        len(same) == 10
        and row["real"] == pytest.approx(100 * same["test_acc"].mean())
        and row["difference"] == pytest.approx(row["ours"] - row["real"])
    )
    assert row["ours"] == pytest.approx(100 * same.loc[same["seed_place"] == 3, "test_acc"].item())
    by_factor = recorded_by_factor(matched)
    whole = by_factor.loc[("mnist_fixed", "all", "")]
    assert (
        whole["difference"] == pytest.approx(matched["difference"].mean())
        and whole["error"] == pytest.approx(matched["difference"].sem())
        and whole["models"] == 128
    )
    assert by_factor.loc[("mnist_fixed", "optimizer", "adam"), "ours"] == pytest.approx(
        matched.loc[matched["optimizer"] == "adam", "ours"].mean()
    )
    assert (
        matched_models(drawn_zoo("mnist_seed", n=5)).empty and recorded_by_factor(matched_models(drawn_zoo(n=5))).empty
    )


def test_curves_are_beside_the_recorded_ones():
    metrics = grid_metrics()
    found, real = (
        recorded_epochs(metrics),
        read_recorded_curves().query("zoo == 'mnist_fixed' and epoch == 10")["test_acc"],
    )
    assert (
        found.loc[("mnist_fixed", 10), ("real", "mean")] == pytest.approx(100 * real.mean())
        and found.loc[("mnist_fixed", 10), ("real", "models")] == 50
    )
    values = metrics[(metrics["method"] == "original") & (metrics["epoch"] == 10)]["test_acc"]
    assert found.loc[("mnist_fixed", 10), ("ours", "25%")] == pytest.approx(100 * values.quantile(0.25)) and found.loc[
        ("mnist_fixed", 10), ("ours", "75%")
    ] == pytest.approx(100 * values.quantile(0.75))
    assert len(figure_recorded(metrics).axes) == 2


def test_table_2_needs_the_printed_sparsity(metrics):
    most = metrics[metrics["method"] == "vd"].groupby("epoch")["sparsity"].mean().max()
    assert reached(metrics, 2, "usps_seed") and not reached(
        metrics.assign(sparsity=metrics["sparsity"] * 0.8849 / most), 2, "usps_seed"
    )
    assert reached(metrics.assign(sparsity=metrics["sparsity"] * 0.88501 / most), 2, "usps_seed")


def test_table_6_counts_the_twins_that_exist(comparison):
    found = compare(grid_metrics())
    of = found[(found["zoo"] == "mnist_fixed")].groupby("table")["paper_n"].first()
    assert of[6] == 2493 and of[5] == of[8] == 2560


def test_shares_of_the_heat_map(comparison):
    grid = share_grid(comparison).set_index(["zoo", "table"])
    cells = comparison[(comparison["zoo"] == "usps_seed") & (comparison["table"] == 6)]
    row = grid.loc[("usps_seed", 6)]
    assert (row["printed"], row["tested"], row["equivalent"]) == (33, cells["verdict"].isin(TESTED).sum(),
        (cells["verdict"] == "equivalent").sum()) and row["share"] == row["equivalent"] / row["tested"]
    assert row["calibrated"] == 0 and grid.loc[("usps_seed", "all"), "printed"] > row["printed"]
    one = comparison["table"].eq(6) & comparison["zoo"].eq("usps_seed") & comparison["calibrated"].eq(False)
    some = share_grid(comparison.assign(calibrated=one & comparison["epoch"].gt(20))).set_index(["zoo", "table"])
    late = cells[(cells["epoch"] > 20) & cells["verdict"].isin(TESTED)]
    assert some.loc[("usps_seed", 6), "calibrated"] == len(late) == some.loc[("usps_seed", "all"), "calibrated"] > 0
    assert some.loc[("usps_seed", 5), "calibrated"] == 0


def test_equivalent_cells_beyond_chance_are_counted():
    cells = pd.DataFrame({
        "zoo": "usps_seed", "table": 6, "method": "vd", "level": np.nan, "epoch": range(6), "layer": "",
        "metric": "ggap", "verdict": ["equivalent", "equivalent", "equivalent", "different", "undecided", "equivalent"],
        "p_adjusted": [LEVEL - 1e-9, LEVEL, np.nan, 0.001, 0.001, 0.001], "calibrated": [False] * 5 + [True],
        "within_point": False, "first": "agrees",
    })
    assert scorecard(cells).loc["all", BEYOND] == 1


def test_moved_verdicts_are_those_without_the_same_word():
    words = [
        ("agrees", "equivalent", None), ("agrees", "undecided", "against us"), ("agrees", "different", "against us"),
        ("near", "equivalent", "in our favour"), ("near", "undecided", "in our favour"),
        ("near", "different", "against us"), ("differs", "different", None), ("differs", "undecided", "in our favour"),
        ("doubtful", "doubtful", None), ("not run", "not run", None),
    ]
    cells = pd.DataFrame({
        "zoo": "usps_seed", "table": 6, "method": "vd", "level": np.nan, "epoch": range(len(words)), "layer": "",
        "metric": "ggap", "ours_mean": 1.0, "ours_std": 1.0, "paper_mean": 1.0, "paper_std": 1.0, "calibrated": False,
        "first": [word[0] for word in words], "verdict": [word[1] for word in words],
    })
    moved = moved_verdicts(cells)
    assert [tuple(row) for row in moved[["First", "Now", "Moved"]].to_numpy()] == [word for word in words if word[2]]
    assert (moved["Calibrated"] == "").all() and moved.index.tolist() == list(range(len(moved)))
    assert list(moved) == [
        "Table", "Zoo", "State", "Measure", "Ours", "Paper", "Calibrated", "First", "Now", "Moved",
    ]
    assert (moved_verdicts(cells.assign(calibrated=True))["Calibrated"] == "yes").all()


def test_originals_alone_are_compared_with_nothing():
    alone = compare(
        pd.DataFrame({"zoo": "usps_seed", "method": "original", "level": np.nan, "model": [0, 1], "epoch": 50})
    )
    assert alone.empty and list(alone.columns) == COMPARISON


# --- by hand: each rule on a few rows of its own

def test_a_bound_itself_is_within_it():
    """With 10**40 models errors vanish beside the bound: half of a std of 2 and the rounding, and one point."""
    exact = {"ours_std": 0.0, "ours_n": 1e40, "paper_n": 1e40, "paper_mean": 0.0}
    found = of_means(**exact, paper_std=2.0, ours_mean=[1.05, np.nextafter(1.05, 2)])
    assert found["equivalent"].tolist() == [True, False]
    assert of_means(**exact, paper_std=0.0, ours_mean=[1.0, np.nextafter(1, 2)])["within_point"].tolist() == [True,
        False]


@pytest.mark.parametrize("n", [60, 120])
def test_the_error_of_a_grids_mean_is_hc2(n):
    """The sandwich of the pseudo-inverse with residuals weighted by their leverage, as White's HC2 is defined."""
    factors, values, _ = grid_draw(n, 5)
    x = contrasts(factors, "mnist_fixed", 2 if n >= 100 else 1)
    pseudo, y = np.linalg.pinv(x), values.to_numpy()
    left = y - x @ (pseudo @ y)
    covariance = pseudo @ np.diag(left**2 / (1 - np.diag(x @ pseudo))) @ pseudo.T
    mean, error, df, residual = grid_mean(y, factors, "mnist_fixed")
    assert (mean, error) == pytest.approx(((pseudo @ y)[0], covariance[0, 0] ** 0.5)) and df == n - x.shape[1]
    assert residual == pytest.approx((left @ left / df) ** 0.5)
    assert np.isnan(grid_mean(y[:1], factors.head(1), "mnist_fixed")[3])


def grid_cells():
    "Cells of a grid and of a seed zoo as they come from `as_samples`, with marks in place of estimates."
    keys = ["zoo", "method", "level", "epoch", "layer", "metric", "ours_mean", "paper_n"]
    cells = [
        ("mnist_fixed", "mp", 0.7, 15, "", "test_acc", 1.0, 2560), ("mnist_fixed", "vd", np.nan, 2, "", "ggap", 1.0,
            2493),
        ("mnist_fixed", "mp", 0.7, 15, "fc1", "sparsity", 1.0, 2560),
        ("mnist_fixed", "mp", 0.9, 15, "", "test_acc", np.nan, 2560), ("usps_seed", "mp", 0.7, 15, "", "test_acc",
            1.0, 1000),
        ("", "mp", 0.7, 15, "", "test_acc", 1.0, 13120),
    ]
    marks = {"estimate": -1.0, "own_error": -2.0, "own_df": -3.0, "their_error": -4.0}
    return pd.DataFrame(cells, columns=keys).assign(**marks)


@pytest.mark.parametrize("models", [1, 2, 60])
def test_every_cell_of_a_grid_is_estimated_from_its_own_models(models):
    """Cells of seed zoos and of all zoos, cells without a number, and a single model stay as they are."""
    table, random = model_table(get_zoo("mnist_fixed")).head(models), np.random.default_rng(0)
    states, parts = [("mp", 0.7, 15), ("mp", 0.5, 15), ("vd", np.nan, 2), ("vd", np.nan, 4)], []
    for zoo, (method, level, epoch) in [("usps_seed", states[0]), *(("mnist_fixed", state) for state in states)]:
        values = {name: random.uniform(size=models) for name in ("test_acc", "ggap", "sparsity_fc1")}
        keys = {"zoo": zoo, "method": method, "level": level, "epoch": epoch, "model": table["model"]}
        parts.append(pd.DataFrame(keys | values))
    cells, metrics = grid_cells(), pd.concat(parts, ignore_index=True)
    found, columns = as_designs(cells, metrics), ["estimate", "own_error", "own_df", "their_error"]
    for place, (part, name, n) in {0: (1, "test_acc", 2560), 1: (3, "ggap", 2493), 2: (1, "sparsity_fc1",
        2560)}.items():
        mean, error, df, residual = grid_mean(100 * parts[part][name].to_numpy(), table, "mnist_fixed")
        wanted = [mean, error, df, (residual + 0.05) / n**0.5] if models > 1 else [-1, -2, -3, -4]
        assert found.loc[place, columns].tolist() == pytest.approx(wanted)
    pd.testing.assert_frame_equal(found.iloc[3:], cells.iloc[3:])


@pytest.mark.parametrize(
    "zoo, method, layer, metric, table, setting",
    [
        ("usps_seed", "mp", "", "sparsity", 5, True), ("usps_seed", "mp", "fc1", "sparsity", 8, False),
        ("svhn_seed", "mp", "fc1", "sparsity", 8, True), ("usps_seed", "mp", "", "test_acc", 5, False),
        ("usps_seed", "vd", "", "sparsity", 6, False), ("usps_seed", "vd", "", "sparsity", 1, True),
        ("usps_seed", "vd", "", "sparsity", 2, True), ("usps_seed", "vd", "", "sparsity", 9, True),
        ("usps_seed", "vd", "", "sparsity", 7, False), ("svhn_seed", "vd", "fc1", "sparsity", 7, False),
        ("usps_seed", "vd", "", "test_acc", 1, False),
    ],
)
def test_a_sparsity_is_a_setting_where_somebody_chose_it(zoo, method, layer, metric, table, setting):
    cell = {"zoo": zoo, "method": method, "layer": layer, "metric": metric, "table": table}
    assert by_design(pd.DataFrame([cell])).tolist() == [setting]


def test_only_twins_of_the_fitted_recipe_are_calibrated():
    cells = pd.DataFrame(
        [("cifar10_seed", "vd", 0), ("cifar10_seed", "vd", 1), ("cifar10_seed", "mp", 1), ("usps_seed", "vd", 1)],
        columns=["zoo", "method", "epoch"],
    )
    assert calibrated(cells).tolist() == [False, True, False, False]


def test_the_printed_sparsity_is_reached_at_its_very_value():
    at = CHOSEN[2]["usps_seed"][1]
    rows = pd.DataFrame(
        [("usps_seed", "vd", 1, at), ("usps_seed", "vd", 2, 0.1), ("usps_seed", "mp", 1, 0.99), ("svhn_seed", "vd", 1,
            0.99)],
        columns=["zoo", "method", "epoch", "sparsity"],
    )
    assert reached(rows, 2, "usps_seed") and not reached(rows.assign(sparsity=rows["sparsity"] - 1e-12), 2, "usps_seed")


def test_twins_that_never_got_so_sparse_are_not_those_of_the_paper():
    few = drawn_zoo(n=5)
    early = few[(few["method"] != "vd") | (few["epoch"] <= 2)]
    cells = CELLS[(CELLS["zoo"] == "usps_seed") & CELLS["table"].isin(list(CHOSEN))]
    found = match(early, cells).groupby("method")["ours_mean"]
    assert found.get_group("vd").isna().all() and found.get_group("mp").notna().any()
    assert match(few, cells).groupby("method")["ours_mean"].get_group("vd").notna().any()
    assert regenerated(early).index.is_unique


def test_p_values_are_adjusted_over_what_is_tested_and_spreads_are_ratios(comparison):
    of = comparison[comparison["zoo"] == "usps_seed"]
    judged = of[of["verdict"].isin(TESTED) & of["p"].notna()]
    assert judged["p_adjusted"].tolist() == pytest.approx(stats.false_discovery_control(judged["p"]).tolist())
    assert of.loc[~of["verdict"].isin(TESTED), "p_adjusted"].isna().all()
    measured = (of["layer"] == "") & (of["paper_std"] > 0) & of["ours_std"].notna()
    assert of["spread"].notna().equals(measured) and of.loc[measured, "paper_std"].between(0.1, 0.9).any()
    assert of.loc[measured, "spread"].tolist() == pytest.approx((of["ours_std"] / of["paper_std"])[measured].tolist())


def test_a_printed_spread_of_zero_has_no_ratio(metrics):
    cells = CELLS[(CELLS["zoo"] == "usps_seed") & (CELLS["table"] == 5)]
    none = compare(metrics, cells.assign(std=0.0)).set_index("metric")
    assert none["ours_std"].notna().any() and none["spread"].isna().all()


def test_tables_of_text_have_their_name_numbers_and_words(comparison):
    both, beside = side_by_side(comparison), beside_print(comparison, 2)
    assert (both.name, beside.name) == ("comparison", "table_2_beside")
    assert list(both.numbers) == list(beside.numbers) == COMPARISON
    r = comparison[
        (comparison["table"] == 2) & (comparison["zoo"] == "usps_seed") & (comparison["metric"] == "pearson")
    ].set_index("method").loc["mp"]
    row = both.layout.loc[("2", "USPS (s) Seed", f"pruned by {r['level']:.0%}, epoch 15", "Pearson's r")]
    assert (row["Ours"], row["Paper"]) == (f"{r['ours_mean']:.1f}", f"{r['paper_mean']:.1f}")
    assert ("7", "USPS (s) Seed", "variational dropout, epoch 5", "conv1") in both.layout.index
    assert set(both.layout.index.get_level_values("Zoo")) == {"USPS (s) Seed", "All"}


def test_the_worst_cells_come_first():
    verdicts = ["different", "undecided", "equivalent", "different", "not run"]
    cells = pd.DataFrame({"effect": [1.0, -3.0, 9.0, 2.0, 8.0], "verdict": verdicts})
    assert worst(cells, 2)["effect"].tolist() == [-3, 2] and len(worst(pd.concat([cells] * 5))) == 10


@pytest.mark.parametrize("by, order", [("zoo", ["z", "a"]), ("table", [6, 5])])
def test_a_score_keeps_the_order_of_the_cells(by, order):
    columns = ["zoo", "table", "method", "level", "epoch", "layer", "metric", "verdict", "first", "calibrated",
        "within_point", "p_adjusted"]
    cells = pd.DataFrame(
        [
            ("z", 6, "vd", np.nan, 1, "", "ggap", "equivalent", "agrees", True, True, 0.5),
            ("z", 6, "vd", np.nan, 1, "", "test_acc", "equivalent", "agrees", False, True, 0.5),
            ("a", 5, "mp", 0.5, 1, "", "ggap", "different", "near", False, False, 0.01),
            ("a", 5, "mp", 0.5, 1, "", "test_acc", "not run", "not run", False, False, np.nan),
        ],
        columns=columns,
    )
    score = scorecard(cells, by)
    assert score.index.tolist() == [*order, "all"]
    counted = [
        "printed", "not run", "calibrated", "of these equivalent", "predicted", "distinct", "equivalent", "different",
        "within a point", "agrees (first rule)",
    ]
    assert score[counted].to_numpy().tolist() == [
        [2, 0, 1, 1, 1, 1, 1, 0, 1, 1], [2, 1, 0, 0, 1, 1, 0, 1, 0, 0], [4, 1, 1, 1, 2, 2, 1, 1, 1, 1],
    ]
    shares = share_grid(cells)
    assert shares["zoo"].tolist() == ["z", "a"] * 2 and shares["table"].tolist() == [6, 5, "all", "all"]
    assert shares["share"].tolist() == [1, 0, 1, 0] and shares["tested"].tolist() == [2, 1] * 2


@pytest.mark.parametrize("shift", [-2.0, -0.9, -0.55, -0.3, 0.0, 0.3, 0.55, 0.9, 2.0])
def test_a_shifted_verdict_is_that_of_shifted_means(shift):
    """Precise and poor cells of several spreads: judged anew by the rules for means, with the shift in the estimate."""
    unit, error, start = (grid.ravel() for grid in np.meshgrid([0.4, 1.0, 3.0], [0.02, 0.15, 0.5], [-0.4, 0.0, 0.3]))
    both = pd.DataFrame({
        "unit": unit, "estimate": 80 + start, "paper_mean": 80.0, "own_error": error, "own_df": 30.0,
        "their_error": 0.01, "paper_n": 1000,
    })
    first = compare_means(both).join(both[["unit"]]).assign(difference=start)
    moved = compare_means(both.assign(estimate=both["estimate"] + shift * unit))
    words = ["equivalent" if same else "different" if p < 0.05 else "undecided"
             for same, p in zip(moved["equivalent"], stats.false_discovery_control(moved["p"]))]
    assert shifted_verdicts(first, shift).tolist() == words


def test_the_smallest_error_is_read_from_the_bounds_of_the_rule():
    """By hand, with spreads of 1: a precise cell is lost beyond 0.55, a poor one at 1.96 errors, where p is 0.05.

    Zoo z starts 0.3 above print and y 0.3 below, so that the other direction is caught last, at 0.85; in x one cell of
    five is never caught; d is caught from the first; w is caught at 5.0, and v beyond, which is too late."""
    rows = lambda zoo, difference, error, metric="ggap", unit=1.0, n=1: [
        (zoo, "undecided", difference, unit, error / (unit + 0.05), 1e9, metric)
    ] * n
    cells = pd.DataFrame(
        rows("z", 0.3, 0.01, "test_acc") + rows("y", -0.3, 0.01) + rows("x", 0, 0.01, n=2)
        + rows("x", 0, 0.01, "test_acc", 2.0, 2) + rows("x", 0, 100) + rows("d", 4.5, 0.01)
        + rows("w", 0, 4.925 / 1.96) + rows("v", 0, 4.975 / 1.96),
        columns=["zoo", "verdict", "difference", "unit", "error", "df", "metric"],
    )
    cells["calibrated"] = False
    apart = [
        cells.iloc[:1].assign(df=np.inf), cells.iloc[:1].assign(verdict="doubtful"), cells.iloc[:1].assign(
            calibrated=True, error=100.0),
    ]
    found = smallest_error(pd.concat([cells, *apart], ignore_index=True))
    assert found.index.tolist() == ["z", "y", "x", "d", "w", "v"] and found["cells"].tolist() == [1, 1, 5, 1, 1, 1]
    assert found["standard deviations"].tolist() == pytest.approx([0.85, 0.85, 0.55, 0.05, 5.0, np.inf])
    assert found.loc[["z", "x"], "points of accuracy"].tolist() == pytest.approx([0.85, 1.1])


def test_the_headline_counts_zoos_that_were_run(comparison):
    found, cells = headline(comparison), comparison[comparison["zoo"] == "usps_seed"]
    assert found.index.tolist() == ["usps_seed", "all"] and list(found)[0] == "models"
    assert found["models"].tolist() == ["200", ""]
    tested = cells[cells["verdict"].isin(TESTED)]
    assert found["predicted"].tolist() == [str(len(tested))] * 2
    assert found["equivalent"].tolist() == [str((tested["verdict"] == "equivalent").sum())] * 2
    least = smallest_error(cells).loc["usps_seed"]
    text = f"{least['standard deviations']:.2f} ({least['points of accuracy']:.1f})"
    assert found.iloc[:, -1].tolist() == [text, ""]


def test_deliberate_errors_by_hand():
    """Every state's accuracy is a number of its own, so that a wrong row shows."""
    frame = lambda rows: pd.DataFrame(rows, columns=["method", "level", "epoch", "model", "test_acc",
        "sparsity"]).assign(
        zoo="usps_seed"
    )
    of = lambda found, method: found[found["method"] == method].sort_values(["level", "epoch"])["test_acc"].tolist()
    dropped = frame([("vd", np.nan, epoch, 0, epoch / 10, 0.0) for epoch in range(4)] + [("mp", 0.5, 2, 0, 0.9, 0.5)])
    late = DISTURBANCES["dropout one epoch late"](dropped)
    assert of(late, "vd") == [0, 0.2, 0.3, 0.3] and of(late, "mp") == [0.9] and late.index.tolist() == list(range(5))
    pruned = frame([("mp", level, epoch, 0, level + epoch / 100, level) for level in (0.5, 0.7, 0.8) for epoch in (0,
        3, 4, 5, 15)]
                   + [("vd", np.nan, 5, 0, 0.99, 0.0), ("vd", np.nan, 15, 0, 0.98, 0.0)])
    short = DISTURBANCES["a third of the fine-tuning"](pruned)
    assert of(short, "mp")[:5] == pytest.approx([0.5, 0.53, 0.54, 0.55, 0.55]) and of(short, "vd") == [0.99, 0.98]
    assert short.index.tolist() == list(range(len(pruned)))
    swapped = DISTURBANCES["levels 70 and 80 % swapped"](pruned)
    assert of(swapped, "mp") == pytest.approx(of(pruned, "mp")[:5] + of(pruned, "mp")[10:] + of(pruned, "mp")[5:10])
    assert of(swapped, "vd") == [0.99, 0.98] and swapped.query("method == 'mp'")["sparsity"].equals(
        swapped.query("method == 'mp'")["level"].rename("sparsity")
    )
    two = pd.concat([dropped, dropped.assign(model=1, test_acc=dropped["test_acc"] + 2**0.5 / 10)])
    raised = DISTURBANCES["accuracy half a std too high"](two)["test_acc"]
    assert (raised - two["test_acc"]).tolist() == pytest.approx([0.05] * 10)
    assert DISTURBANCES["one activation left out"](pruned).equals(pruned)
    for n, left in ((24, 3), (31, 3), (32, 4)):
        assert len(DISTURBANCES["an eighth of the models"](pd.DataFrame({"model": range(n)}))) == left


def test_scores_of_a_disturbed_run_are_counts_of_its_verdicts(monkeypatch):
    errors = {name: DISTURBANCES[name] for name in ("as it is", "training for test accuracy")}
    monkeypatch.setattr("zootwins.comparison.DISTURBANCES", errors)
    cells = CELLS[CELLS["zoo"].isin(["usps_seed", ""]) & CELLS["table"].isin([5, 6])]
    run = drawn_zoo(n=12).query("epoch in [0, 2, 15, 50] and not 0.55 < level < 0.85")
    scores = disturbed_scores(run, cells)
    before, after = (compare(error(run), cells).query("zoo != ''") for error in errors.values())
    for row, found in zip(scores.to_dict("records"), (before, after)):
        judged = found[found["verdict"].isin(TESTED)]
        assert row["tested"] == len(judged) > 10 and row["within a point"] == judged["within_point"].sum()
        assert [row[verdict] for verdict in TESTED] == [(judged["verdict"] == verdict).sum() for verdict in TESTED]
    lost = {*before.index[before["verdict"] == "equivalent"]} - {*after.index[after["verdict"] == "equivalent"]}
    assert scores["lost"].tolist() == [0, len(lost)] and lost


@pytest.mark.parametrize("shares", [[0.25, 0.5, 0.75, 0.5], [0.5, 0.5, 0.5, 0.5]])
def test_the_spread_of_a_layer_without_our_chance_and_with_theirs(shares):
    """Variance of the shares less what 16 models scatter, never below 0, and what the paper's 1000 would scatter."""
    frame = pd.DataFrame({
        "zoo": "usps_seed", "method": "mp", "selector": "global", "level": np.float32(0.9), "epoch": 15, "layer": "fc1",
        "weight": range(4), "frequency": shares, "models": 16,
    })
    other = [frame.assign(epoch=0, frequency=0.9), frame.assign(layer="conv1", frequency=0.9)]
    found = compare_layer_spread(pd.concat([frame, *other])[FREQUENCY_COLUMNS]).set_index("layer").loc["fc1"]
    lasting = max(0, np.var(shares, ddof=1) - 0.25 / 16)
    assert found["ours_mean"] == pytest.approx(50) and found["n"] == 16
    assert found["ours_std"] == pytest.approx(100 * np.sqrt(lasting + 0.25 / 1000))


def test_windows_are_of_pruned_models_after_fine_tuning():
    """Equal shares scatter less than chance: nothing lasting is left. Other zoos, methods and epochs do not count."""
    size = sum(layer_sizes("cnn_small_3ch").values())
    layers = np.repeat(list(layer_sizes("cnn_small_3ch")), list(layer_sizes("cnn_small_3ch").values()))
    frame = pd.DataFrame({
        "zoo": "cifar10_seed", "method": "mp", "selector": "global", "level": np.float32(0.7), "epoch": 15,
        "layer": layers, "weight": range(size), "frequency": 0.36, "models": 10,
    })
    others = [frame.assign(method="vd", frequency=0.1), frame.assign(epoch=0, frequency=0.1),
              frame.assign(zoo="usps_seed", frequency=0.1), frame.assign(level=np.float32(0.123), frequency=0.1)]
    found = compare_windows(pd.concat([frame, *others])[FREQUENCY_COLUMNS])
    assert len(found) == 5 and set(found["zoo"]) == {"cifar10_seed"}
    assert found[["window_mean", "layer_mean"]].to_numpy() == pytest.approx(36)
    assert found["window_std"].tolist() == pytest.approx([100 * (0.36 * 0.64 / 1000) ** 0.5] * 5)


def originals_by_hand():
    "Two recorded grids and a zoo without records; an accuracy is failed below 0.2, and records hold three decimals."
    accuracies = np.array([0.1999, 0.2, 0.4567, 0.8, 0.9])
    rows = [(zoo, "original", epoch, model, accuracy - (epoch == 50) * 0.1)
            for zoo in ("mnist_fixed", "cifar10_large_fixed", "digits_seed") for epoch in (5, 10, 49, 50)
            for model, accuracy in enumerate(accuracies)]
    rows += [("mnist_fixed", "vd", 49, 0, 0.3), ("mnist_fixed", "mp", 10, 0, 0.3)]
    return pd.DataFrame(rows, columns=["zoo", "method", "epoch", "model", "test_acc"])


def test_recorded_originals_by_hand():
    metrics, kept = originals_by_hand(), [0.199, 0.2, 0.456, 0.8, 0.9]
    zoos = [zoo for zoo in ("mnist_fixed", "cifar10_large_fixed") if zoo in set(read_recorded()["zoo"])]
    ours = our_originals(metrics)
    assert RECORDED_EPOCH == 49 and ours["zoo"].unique().tolist() == zoos
    assert ours["test_acc"].tolist() == kept * len(zoos)
    found = beside_recorded(metrics)
    assert found.index.tolist() == [(zoo, side) for zoo in zoos for side in ("ours", "real")]
    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    names = ["models", "mean", "std", *(f"{share:.0%}" for share in shares), "failed"]
    assert list(found) == [*names, "ks", "p"]
    for side, values in (("ours", np.array(kept)), ("real", read_recorded().query("zoo == 'mnist_fixed'")["test_acc"])):
        wanted = [values.mean(), values.std(ddof=1), *np.quantile(values, shares), (values < 0.2).mean()]
        assert found.loc[("mnist_fixed", side), names].tolist() == pytest.approx([len(values),
            *(100 * np.array(wanted))])
    test = stats.ks_2samp(kept, read_recorded().query("zoo == 'mnist_fixed'")["test_acc"])
    assert found.loc[("mnist_fixed", "ours"), ["ks", "p"]].tolist() == pytest.approx([test.statistic, test.pvalue])
    assert found.loc[("mnist_fixed", "real"), ["ks", "p"]].isna().all()


def test_recorded_curves_hold_recorded_zoos_and_epochs_of_originals():
    metrics, theirs = originals_by_hand(), read_recorded_curves()
    found = recorded_epochs(metrics)
    wanted = {(zoo, epoch) for zoo, epoch in zip(theirs["zoo"], theirs["epoch"]) if zoo in set(metrics["zoo"])}
    assert set(found.index) == wanted | {(zoo, epoch) for zoo, _ in wanted for epoch in (5, 10, 49, 50)
                                         if epoch in set(theirs["epoch"])}
    values = metrics.query("zoo == 'mnist_fixed' and epoch == 10 and method == 'original'")["test_acc"]
    assert found.loc[("mnist_fixed", 10), "ours"].tolist() == pytest.approx(
        [5, *(100 * np.array([values.mean(), *np.quantile(values, [0.25, 0.5, 0.75])]))]
    )


def test_matched_models_keep_the_order_of_zoos_and_levels():
    metrics = originals_by_hand()
    matched = matched_models(metrics)
    assert matched["zoo"].unique().tolist() == our_originals(metrics)["zoo"].unique().tolist()
    assert matched.index.tolist() == list(range(len(matched)))
    two = pd.concat([matched.assign(zoo="z"), matched.assign(zoo="a")])
    found = recorded_by_factor(two)
    assert found.index.get_level_values("zoo").unique().tolist() == ["z", "a"]
    assert [key[0] for key in found.index if key[1] == "all"] == ["z", "a"]
