"""Verdicts on zoos drawn from the printed numbers, on planted differences, and on runs that lack something."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from zootwins.comparison import (
    COMPARED, COMPARISON, LEVEL, POINTS, TESTED, VERDICTS, adjusted, by_design, compare, compare_correlations, compare_layer_spread, compare_means,
    beside_print, figure_scorecard, judge, match, regenerated, scorecard, share_grid, side_by_side, worst,
)
from zootwins.layers import FREQUENCY_COLUMNS
from zootwins.metrics import LAYERS, METRIC_COLUMNS
from zootwins.reported import layer_average, read_reported
from zootwins.zoos import ZOOS

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

    pairs = lambda rows: {cell.metric: (cell.mean + (shift * cell.std if cell.metric == "test_acc" else 0), cell.std) for cell in rows.itertuples()}
    for (level, epoch), rows in of_zoo[of_zoo["table"] == 5].groupby(["level", "epoch"]):
        layers = of_zoo[(of_zoo["table"] == 8) & np.isclose(of_zoo["level"], level) & (of_zoo["layer"] != "")].set_index("layer")["mean"]
        add("mp", level, epoch, pairs(rows) | {"sparsity": (100 * level, 0), "agreement": (74.3, 17.3)}, layers)
    seven = of_zoo[(of_zoo["table"] == 7)]
    averages = layer_average(of_zoo, 7).set_index("epoch")["mean"]
    for epoch in sorted({*of_zoo.loc[of_zoo["table"] == 6, "epoch"], *seven["epoch"]}):
        rows = pd.concat([of_zoo[(of_zoo["table"] == 6) & (of_zoo["epoch"] == epoch)], seven[(seven["layer"] == "") & (seven["epoch"] == epoch)]]).drop_duplicates("metric")
        measures = {"sparsity": (averages.get(epoch, 0), 0.6)} | pairs(rows) | {"agreement": (86.6, 1.1)}
        add("vd", np.nan, epoch, measures, seven[(seven["layer"] != "") & (seven["epoch"] == epoch)].set_index("layer")["mean"])
    add("original", np.nan, 50, {"test_acc": (87.0, 1.7), "ggap": (5.1, 0.6), "sparsity": (0, 0), "agreement": (100, 0)}, {})
    return pd.concat(parts, ignore_index=True)[METRIC_COLUMNS].astype({"epoch": int})


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
    assert comparison[["table", "row", "metric", "layer"]].to_numpy().tolist() == printed[["table", "row", "metric", "layer"]].to_numpy().tolist()
    assert np.array_equal(comparison["paper_mean"], printed["mean"], equal_nan=True)


def test_a_zoo_that_follows_the_paper_agrees(comparison):
    known = comparison[comparison["table"].isin([5, 6, 7, 8]) & comparison["verdict"].isin(TESTED)]
    assert len(known) == 24 + 33 + 42 + 21 and (known["verdict"] == "agrees").mean() > 0.97
    assert known["equivalent"].mean() > 0.9 and known["spread"].dropna().between(0.4, 1.7).all()


def test_a_shifted_zoo_differs():
    found = compare(drawn_zoo(shift=2.0))
    accuracies = found[(found["metric"] == "test_acc") & found["table"].isin([5, 6, 7, 8]) & found["verdict"].isin(TESTED)]
    assert len(accuracies) > 30 and set(accuracies["verdict"]) == {"differs"}
    others = found[(found["metric"] == "ggap") & found["verdict"].isin(TESTED)]
    assert (others["verdict"] == "agrees").all()
    least = worst(found, 5)
    assert len(least) == 5 and not (least["verdict"] == "agrees").any() and least["effect"].abs().is_monotonic_decreasing
    assert least["effect"].abs().min() >= found[(found["verdict"] == "differs") & ~found.index.isin(least.index)]["effect"].abs().max()


def test_numbers_are_those_of_the_tables(metrics, comparison):
    cell = comparison[(comparison["table"] == 6) & (comparison["zoo"] == "usps_seed") & (comparison["epoch"] == 13) & (comparison["metric"] == "ggap")].iloc[0]
    values = 100 * metrics[(metrics["method"] == "vd") & (metrics["epoch"] == 13)]["ggap"]
    assert (cell["ours_mean"], cell["ours_std"], cell["ours_n"]) == (pytest.approx(values.mean()), pytest.approx(values.std()), 200)
    assert (cell["paper_mean"], cell["paper_std"], cell["paper_n"]) == (4.7, 1.2, 1000) and cell["difference"] == pytest.approx(values.mean() - 4.7)
    every = comparison[(comparison["table"] == 5) & (comparison["zoo"] == "")]
    assert every["paper_n"].eq(13_120).all() and every["by_design"].all() and every["ours_n"].eq(200).all()


def test_several_zoos_are_matched_each_with_its_own():
    both = compare(pd.concat([drawn_zoo(), drawn_zoo("mnist_seed", seed=1)], ignore_index=True))
    alone = compare(drawn_zoo())
    select = lambda found: found[(found["zoo"] == "usps_seed") & found["table"].isin([5, 6, 7, 8])].reset_index(drop=True)
    pd.testing.assert_frame_equal(select(both), select(alone))
    assert both[both["zoo"] == "mnist_seed"]["ours_mean"].notna().all() and both[(both["table"] == 5) & (both["zoo"] == "")]["ours_n"].eq(400).all()


def test_welch_is_scipys_once_rounding_is_given_away():
    random = np.random.default_rng(3)
    x, y = random.normal(87, 1.7, 40), random.normal(88.2, 1.7, 1000)
    found = compare_means(pairs(ours_mean=x.mean(), ours_std=x.std(ddof=1), ours_n=40, paper_mean=y.mean(), paper_std=y.std(ddof=1)))
    exact = stats.ttest_ind(x, y, equal_var=False).pvalue
    assert exact < found["p"][0] < 3 * exact
    assert found["effect"][0] == pytest.approx((x.mean() - y.mean() + 0.05) / (y.std(ddof=1) + 0.05))


def test_rounding_alone_is_no_difference():
    found = compare_means(pairs(ours_mean=[80.05, 79.95, 80.06], ours_std=0.0, paper_mean=80.0, paper_std=0.0))
    assert found["p"].tolist()[:2] == [1, 1] and found["p"][2] < LEVEL


def test_one_model_is_judged_by_the_papers_spread():
    found = compare_means(pairs(ours_mean=[81.0, 85.0], ours_std=np.nan, ours_n=1, paper_mean=80.0))
    assert found["p"][0] > 0.3 and found["p"][1] < 0.001


def test_a_missing_printed_spread_is_replaced_by_ours():
    found = compare_means(pairs(ours_mean=[82.0], ours_std=2.0, paper_mean=80.0, paper_std=np.nan))
    assert found["unit"][0] == 2.0 and found["effect"][0] == pytest.approx(1.95 / 2.05)


def test_few_models_have_no_test_of_correlation():
    frame = pd.DataFrame({"metric": ["pearson", "kendall", "pearson"], "ours_mean": [50.0, 50.0, 100.0], "ours_n": [3, 4, 50], "paper_mean": 90.0, "paper_n": 1000})
    found = compare_correlations(frame)
    assert found["p"].isna().tolist() == [True, True, False] and np.isfinite(found["effect"]).all()
    assert compare_correlations(frame.assign(ours_mean=90.04, ours_n=400))["p"].eq(1).all()


@pytest.mark.parametrize("case, verdict", [
    ({}, "agrees"), ({"effect": 0.9, "difference": 3.0, "p_adjusted": 0.2}, "agrees"), ({"effect": 0.9, "difference": 3.0}, "near"),
    ({"effect": 1.1, "difference": 3.0}, "differs"), ({"effect": 1.1, "difference": 3.0, "p_adjusted": 0.2}, "differs"),
    ({"effect": 4.0, "difference": POINTS}, "agrees"), ({"effect": 0.25, "kind": "correlation", "difference": 3.0}, "near"),
    ({"effect": 0.35, "kind": "correlation", "difference": 3.0, "p_adjusted": 0.9}, "differs"), ({"effect": 0.9, "difference": 3.0, "p_adjusted": np.nan}, "agrees"),
    ({"doubtful": "lost"}, "doubtful"), ({"ours_mean": np.nan, "doubtful": "lost"}, "not run"), ({"by_design": True}, "by design"),
    ({"by_design": True, "effect": 3.0, "difference": 2.0}, "differs"),
])
def test_the_rule(case, verdict):
    plain = {"kind": "mean", "effect": 0.0, "difference": 0.0, "p_adjusted": 0.001, "doubtful": "", "by_design": False, "ours_mean": 80.0}
    assert judge(pd.DataFrame([plain | case])).tolist() == [verdict]


@settings(deadline=None, max_examples=60)
@given(some.floats(0, 30), some.floats(0, 30), some.floats(0.1, 20), some.floats(0.1, 20), some.integers(2, 1000))
def test_a_larger_difference_is_never_judged_better(first, second, ours_std, paper_std, n):
    frame = pairs(ours_mean=80 + np.sort([first, second]), ours_std=ours_std, ours_n=n, paper_mean=80.0, paper_std=paper_std)
    found = frame.join(compare_means(frame)).assign(kind="mean", doubtful="", by_design=False, difference=lambda rows: rows["ours_mean"] - rows["paper_mean"])
    ranks = judge(found.assign(p_adjusted=found["p"])).map(TESTED.index)
    assert ranks[0] <= ranks[1] and found["p"][0] >= found["p"][1]


def test_p_values_are_adjusted_within_a_zoo():
    p = pd.Series([0.01, np.nan, 0.04, 0.03], index=[5, 6, 7, 8])
    assert adjusted(p).loc[[5, 7, 8]].tolist() == pytest.approx([0.03, 0.04, 0.04]) and np.isnan(adjusted(p)[6])
    assert adjusted(p * np.nan).isna().all()


def test_settings_are_not_findings(comparison):
    design = comparison[comparison["by_design"]]
    assert set(design["metric"]) == {"sparsity"} and not ((design["table"] == 6) | (design["table"] == 7)).any()
    assert set(design.loc[design["layer"] != "", "zoo"]) == {"svhn_seed"}
    assert by_design(comparison).equals(comparison["by_design"])
    wrong = compare(drawn_zoo().assign(sparsity=lambda rows: rows["sparsity"] * 0.9))
    assert (wrong[(wrong["table"] == 5) & (wrong["zoo"] == "") & (wrong["level"] > 0)]["verdict"] == "differs").all()


def test_what_was_not_run_is_a_gap(metrics):
    pruned = compare(metrics[metrics["method"] != "vd"])
    assert (pruned[pruned["method"] == "vd"]["verdict"] == "not run").all() and pruned[(pruned["table"] == 8) & (pruned["zoo"] == "usps_seed")]["ours_mean"].notna().all()
    dropped = compare(metrics[metrics["method"] != "mp"])
    assert (dropped[dropped["method"] == "mp"]["verdict"] == "not run").all() and dropped[(dropped["table"] == 7) & (dropped["zoo"] == "usps_seed")]["ours_mean"].notna().all()
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
    assert score.loc["all", "tested"] == 0 and score["share"].isna().all() and len(figure_scorecard(ours).axes) == 2
    assert len(side_by_side(ours).layout) == 0 and worst(ours).empty


def test_doubtful_cells_are_not_judged(comparison):
    doubtful = comparison[comparison["doubtful"] != ""]
    assert set(doubtful["verdict"]) == {"doubtful", "not run"} and doubtful[doubtful["zoo"] == "usps_seed"]["verdict"].eq("doubtful").all()
    assert doubtful["p_adjusted"].isna().all()


@pytest.mark.parametrize("by", ["table", "zoo", "metric"])
def test_scores_add_up(comparison, by):
    score = scorecard(comparison, by)
    assert (score["printed"] == score[VERDICTS].sum(axis=1)).all() and (score["regenerated"] == score["printed"] - score["not run"]).all()
    parts, total = score.drop(index="all"), score.loc["all"]
    assert (parts[["printed", "regenerated", *VERDICTS, "tested"]].sum() == total[["printed", "regenerated", *VERDICTS, "tested"]]).all()
    assert total["share"] == total["agrees"] / total["tested"] and score["equivalent"].dropna().between(0, 1).all()


def test_heat_map_shows_every_zoo(comparison):
    fig, grid = figure_scorecard(comparison), share_grid(comparison)
    ax = fig.axes[0]
    assert len(ax.get_yticks()) == sum(zoo.in_paper for zoo in ZOOS.values()) and len(ax.get_xticks()) == len(COMPARED) + 1
    assert len(ax.texts) == (grid["tested"] > 0).sum() and len(ax.patches) == (grid["tested"] == 0).sum()
    assert grid["share"].dropna().between(0, 1).all()


def test_side_by_side_can_be_saved(comparison, tmp_path):
    table = side_by_side(comparison)
    assert len(table.layout) == comparison["ours_mean"].notna().sum() and "USPS (s) Seed: 200 models." in table.caption
    row = table.layout.loc[("5", "USPS (s) Seed", "pruned by 50%, epoch 15", "Acc")]
    assert row["Paper"] == "90.1 (1.0)" and row["Verdict"] == "agrees"
    assert table.to_markdown().count("\n") == 4 + len(table.layout) and r"\%" in table.to_latex()


@pytest.mark.parametrize("number", COMPARED)
def test_a_table_beside_the_printed_one_has_every_cell_once(comparison, number):
    table = beside_print(comparison, number)
    cells = comparison[(comparison["table"] == number) & comparison["ours_mean"].notna() & (comparison["zoo"] != "")]
    texts = [text for row in table.layout.to_numpy() for text in row if text]
    assert len(texts) == len(cells) > 0 and all(" / " in text for text in texts)
    for verdict in ("near", "differs", "doubtful"):
        assert sum(text.endswith(f", {verdict}") for text in texts) == (cells["verdict"] == verdict).sum()


def test_layer_spread_is_brought_to_the_papers_number_of_models():
    random, n, weights, std = np.random.default_rng(0), 40, 20_000, 0.13
    shares = (0.55 + std * random.uniform(-(3**0.5), 3**0.5, weights)).clip(0, 1)
    counted = random.binomial(n, shares) / n
    frame = pd.DataFrame({"zoo": "usps_seed", "method": "vd", "level": np.nan, "epoch": 5, "layer": "conv1", "weight": range(weights), "frequency": counted, "models": n})
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
