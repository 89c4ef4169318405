"""Statements tried on zoos in which they are true, on zoos in which they are false, and on runs that lack something."""
import numpy as np
import pandas as pd
import pytest

from zootwins import claims as c
from zootwins.claims import CLAIMS, FAILS, HOLDS, OPEN
from zootwins.layers import layer_sizes
from zootwins.metrics import LAYERS, METRIC_COLUMNS
from zootwins.reported import read_reported

CELLS = read_reported()
PARAMETERS = {
    "before": (0.87, 0.017), "mp": {0.0: 0.90, 0.5: 0.90, 0.7: 0.89, 0.8: 0.88, 0.9: 0.74}, "mp_std": 0.003, "vd_drop": 0.002, "vd_std": 0.002,
    "keeps_order": 1.0, "gap": {0.0: 0.05, 0.5: 0.04, 0.7: 0.03, 0.8: 0.03, 0.9: 0.03}, "vd_gap": 0.03, "by_size": 1.0, "layer_std": 0.01, "agreement": 0.1,
}


def zoo(name="usps_seed", n=60, seed=0, **changes):
    "A zoo in which the statements are true; `changes` to PARAMETERS make them false."
    p, random = PARAMETERS | changes, np.random.default_rng(seed)
    quality = random.normal(size=n)
    before = p["before"][0] + p["before"][1] * quality
    sizes = np.array([*layer_sizes("cnn_small_1ch").values()])
    rank = sizes.argsort().argsort() - 2
    parts = []

    def add(method, level, epoch, accuracy, sparsity, gap, agreement):
        layers = {f"sparsity_{layer}": sparsity + 0.05 * p["by_size"] * rank[i] + random.normal(0, p["layer_std"], n) for i, layer in enumerate(LAYERS)}
        columns = {"test_acc": accuracy, "ggap": gap + random.normal(0, 0.002, n), "sparsity": sparsity + random.normal(0, 1e-4, n) * (method == "vd"), "agreement": agreement}
        rows = pd.DataFrame({"zoo": name, "method": method, "level": level, "model": range(n), "epoch": epoch, **columns, **layers})
        parts.append(rows.assign(train_acc=rows["test_acc"] + rows["ggap"], train_loss=1 - accuracy, test_loss=1 - accuracy))

    def twins(mean, std):
        mixed = p["keeps_order"] * quality + (1 - abs(p["keeps_order"])) * random.normal(size=n)
        return mean + std * (mixed - mixed.mean()) / mixed.std() + random.normal(0, std / 20, n)

    for epoch in (0, 25, 50):
        add("original", np.nan, epoch, before * (epoch / 50) if epoch < 50 else before, 0.0, p["gap"][0.0], np.ones(n))
    for level, mean in p["mp"].items():
        for epoch in (0, 14, 15):
            accuracy = twins(mean - 0.3 * (epoch == 0), p["mp_std"] * (30 if level > 0.8 else 1))
            add("mp", level, epoch, accuracy, level, p["gap"][level], accuracy - p["agreement"])
    for epoch in range(26):
        accuracy = twins(0.87 - p["vd_drop"] * epoch, p["vd_std"])
        add("vd", np.nan, epoch, accuracy, 0.037 * epoch, p["vd_gap"] if epoch else 0.05, accuracy - p["agreement"] - 0.01)
    return pd.concat(parts, ignore_index=True)[METRIC_COLUMNS]


@pytest.fixture(scope="module")
def good():
    return zoo()


def verdicts(judge, rows):
    return [found.verdict for found in judge(rows)]


TRUE = {
    c.pruning_better_up_to_80: 1, c.dropout_better_above_80: 1, c.both_degrade: 2, c.dropout_steadier: 2, c.accuracy_preserved: 2, c.gap_lower: 2,
    c.performance_drops: 2, c.larger_layers_sparser: 2, c.layers_consistent: 2, c.agreement_high: 2, c.pruning_correlates: 2, c.best_stay_best: 2, c.best_is_best: 2,
}


@pytest.mark.parametrize("judge, count", TRUE.items(), ids=lambda value: getattr(value, "__name__", value))
def test_true_statements_hold(good, judge, count):
    assert verdicts(judge, good) == [HOLDS] * count


@pytest.mark.parametrize("judge, changes, wanted", [
    (c.pruning_better_up_to_80, {"mp": {0.0: 0.9, 0.5: 0.9, 0.7: 0.75, 0.8: 0.88}}, [FAILS]),
    (c.dropout_better_above_80, {"mp": {0.8: 0.88, 0.9: 0.87}}, [FAILS]),
    (c.both_degrade, {"mp": {0.8: 0.80, 0.9: 0.89}, "vd_drop": -0.002}, [FAILS, FAILS]),
    (c.dropout_steadier, {"mp": {0.8: 0.88, 0.9: 0.88}, "vd_drop": 0.02, "vd_std": 0.2}, [FAILS, FAILS]),
    (c.accuracy_preserved, {"mp": {0.5: 0.7}, "vd_drop": 0.02}, [FAILS, FAILS]),
    (c.variation_low, {"mp_std": 0.002, "vd_std": 0.002, "before": (0.87, 0.05)}, [HOLDS, HOLDS]),
    (c.variation_low, {"mp_std": 0.2, "vd_std": 0.2}, [FAILS, FAILS]),
    (c.gap_lower, {"gap": {0.0: 0.05, 0.5: 0.06, 0.7: 0.07, 0.8: 0.1, 0.9: 0.1}, "vd_gap": 0.08}, [FAILS, FAILS]),
    (c.performance_drops, {"mp": {0.9: 0.95}, "vd_drop": -0.002}, [FAILS, FAILS]),
    (c.larger_layers_sparser, {"by_size": -1.0}, [FAILS, FAILS]),
    (c.layers_consistent, {"layer_std": 0.3}, [FAILS, FAILS]),
    (c.agreement_high, {"agreement": 0.6}, [FAILS, FAILS]),
    (c.agreement_60_to_80, {"agreement": 0.1, "mp": {0.9: 0.80}}, [HOLDS, HOLDS]),
    (c.agreement_60_to_80, {"agreement": -0.1, "mp": {0.9: 0.80}}, [FAILS, FAILS]),
    (c.pruning_preserves_more, {"mp": {0.9: 0.95}, "mp_std": 0.0002}, [HOLDS, HOLDS]),
    (c.pruning_preserves_more, {"mp": {0.9: 0.5}}, [FAILS, FAILS]),
    (c.agreement_prefers_none, {"mp": {0.9: 0.82}}, [HOLDS]),
    (c.agreement_prefers_none, {"mp": {0.9: 1.2}}, [FAILS]),
    (c.agreement_prefers_none, {"mp": {0.9: 0.5}}, [FAILS]),
    (c.pruning_correlates, {"keeps_order": 0.3}, [FAILS, FAILS]),
    (c.best_stay_best, {"keeps_order": -1.0}, [FAILS, FAILS]),
    (c.best_is_best, {"keeps_order": -1.0}, [FAILS, FAILS]),
])
def test_each_bound_is_found(judge, changes, wanted):
    assert verdicts(judge, zoo(**changes)) == wanted


def test_variational_dropout_that_loses_the_order_correlates_less(good):
    mixed = zoo(keeps_order=0.1)
    both = pd.concat([good[good["method"] != "vd"], mixed[mixed["method"] == "vd"]])
    assert verdicts(c.dropout_correlates_less, both) == [HOLDS]
    other = pd.concat([mixed[mixed["method"] != "vd"], good[good["method"] == "vd"]])
    assert verdicts(c.dropout_correlates_less, other) == [FAILS]


def test_agreement_follows_accuracy_or_not(good):
    assert set(verdicts(c.accuracy_is_proxy, good)) == {HOLDS}
    random = np.random.default_rng(0)
    noise = good.assign(agreement=random.uniform(size=len(good)))
    assert HOLDS not in verdicts(c.accuracy_is_proxy, noise) and FAILS in verdicts(c.accuracy_is_proxy, noise)


@pytest.mark.parametrize("part", [
    "method == 'original'", "method == 'mp'", "method == 'vd'", "method != 'mp'", "method != 'vd'", "model == 0", "model < 2", "model < 5",
    "method != 'vd' or epoch < 1", "method != 'vd' or epoch < 3", "method != 'mp' or level < 0.75", "method != 'mp' or level > 0.75", "method != 'mp' or epoch == 0",
])
@pytest.mark.filterwarnings("error")
def test_incomplete_runs_are_not_judged_beyond_what_they_have(good, part):
    rows = good.query(part)
    found = c.all_claims(rows)
    assert list(found.columns) == c.CLAIM_COLUMNS and set(found["claim"]) == {claim.name for claim in CLAIMS}
    assert (found.loc[found["value"].isna(), "verdict"] == OPEN).all()
    if rows["model"].nunique() < 2 or rows["method"].nunique() == 1 and "original" in set(rows["method"]):
        assert (found["verdict"] == OPEN).all()


def test_models_without_spread_are_no_evidence():
    flat = zoo(n=12)
    flat["test_acc"], flat["agreement"] = 0.9, 0.9
    found = c.all_claims(flat).set_index("claim")
    for name in ("pruned accuracies correlate above 0.9", "accuracy is a proxy of agreement", "little variation", "variational dropout correlates less"):
        assert set(np.atleast_1d(found.loc[name, "verdict"])) == {OPEN}


def test_every_zoo_gets_its_verdicts(good):
    both = pd.concat([good, zoo("mnist_seed", seed=1), zoo("my_zoo", seed=2)], ignore_index=True)
    found = c.all_claims(both)
    alone = c.all_claims(good)
    pd.testing.assert_frame_equal(found[found["zoo"] == "usps_seed"].reset_index(drop=True), alone)
    glance = c.verdict_table(found)
    assert set(glance.index.get_level_values("claim")) == {claim.name for claim in CLAIMS} and glance.index.is_unique and list(glance) == ["usps_seed", "mnist_seed", "my_zoo"]
    assert glance.loc[("larger layers get sparser", "MP"), "my_zoo"] == OPEN and glance.loc[("both degrade above 80 %", "VD"), "usps_seed"].endswith(HOLDS)
    table = c.claims_table(found)
    assert len(table.layout) == len(found) and r"\%" in table.to_latex() and "MNIST (s) Seed: 60 models" in table.caption


def test_a_collapsed_population_is_not_called_steady(good):
    collapsed = good.copy()
    collapsed.loc[(collapsed["method"] == "mp") & (collapsed["level"] > 0.8), "test_acc"] = 0.1 + 1e-17 * collapsed["model"]
    of = lambda rows: {found.of: found for found in c.dropout_steadier(rows)}
    assert of(good)["spread"].verdict == HOLDS and of(collapsed)["spread"].verdict == OPEN and of(collapsed)["loss"].verdict == HOLDS


def test_a_sparsity_that_few_models_reach_is_left_out(good):
    """The advantage up to 80 % is tried at the levels that at least half of the models reach."""
    models = good["model"].nunique()
    for kept, levels in ((models // 2, "80%"), (models // 2 - 1, None)):
        slow = good.copy()
        late = (slow["method"] == "vd") & (slow["model"] >= kept)
        slow.loc[late, "sparsity"] = slow.loc[late, "sparsity"].clip(upper=0.75)
        found = c.dropped_at(slow, 0.8)
        assert found.count() == (kept if levels else 0) and c.dropped_at(slow, 0.7).count() == models
        assert ("80%" in c.pruning_better_up_to_80(slow)[0].quantity) == bool(levels)


def test_sparsity_is_met_on_a_straight_line(good):
    twins = good[good["method"] == "vd"]
    found = c.dropped_at(good, 0.5)
    for model in (0, 7):
        rows = twins[twins["model"] == model].sort_values("epoch")
        assert found[model] == pytest.approx(np.interp(0.5, rows["sparsity"], rows["test_acc"]))
    assert c.dropped_at(good, 0.99).isna().all() and c.dropped_at(twins[twins["epoch"] == 3], 0.05).isna().all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    samples = random.normal(size=(300, 40))
    inside = lambda found, truth: found[1] <= truth <= found[2]
    assert np.mean([inside(c.mean_interval(sample), 0) for sample in samples]) == pytest.approx(0.95, abs=0.04)
    assert np.mean([inside(c.bootstrap(np.std, sample, resamples=200), 1) for sample in samples[:150]]) > 0.82


def test_best_tenth_is_decided_by_number_among_equals():
    assert c.best_tenth(pd.Series([0.5] * 20)).tolist() == [0, 1] and c.best_tenth(pd.Series([0.1, 0.9])).tolist() == [1]


def test_lower_bound_of_train_and_test_correlation_is_never_undercut():
    random = np.random.default_rng(0)
    for _ in range(200):
        test = random.normal(0, random.uniform(0.5, 10), 500)
        train = random.uniform(-1, 2) * test + random.normal(0, random.uniform(0.1, 5), 500)
        gap, spread = (train - test).std(ddof=1), test.std(ddof=1)
        cells = pd.DataFrame([
            {"table": 5, "zoo": "z", "method": "mp", "level": 0.8, "epoch": 15, "metric": metric, "mean": 0.0, "std": std} for metric, std in (("test_acc", spread), ("ggap", gap))
        ] + [{"table": 2, "zoo": "z", "method": "mp", "level": 0.8, "epoch": pd.NA, "metric": "pearson", "mean": 100 * np.corrcoef(train, test)[0, 1], "std": np.nan}])
        found = c.least_train_test_correlation(cells)
        assert not found["excluded"].any()


def test_the_definition_behind_a_printed_row_is_found(good):
    twins = good[(good["method"] == "mp") & (good["level"] == 0.8)].pivot(index="model", columns="epoch", values="test_acc")
    agreement = pd.Series(np.random.default_rng(4).normal(size=len(twins)), index=twins.index)
    truth = 0.6 * (twins[15] - twins[15].mean()) / twins[15].std() + 0.8 * agreement
    changed = good.copy()
    chosen = (changed["method"] == "mp") & (changed["level"] == 0.8) & (changed["epoch"] == 15)
    changed.loc[chosen, "agreement"] = truth.reindex(changed.loc[chosen, "model"]).to_numpy()
    r, tau = (100 * twins[15].corr(truth, method) for method in ("pearson", "kendall"))
    printed = CELLS.copy()
    row = (printed["table"] == 2) & (printed["zoo"] == "usps_seed") & (printed["method"] == "mp")
    printed.loc[row & (printed["metric"] == "pearson"), "mean"], printed.loc[row & (printed["metric"] == "kendall"), "mean"] = round(r, 1), round(tau, 1)
    found = c.reproduces(changed, printed).query("method == 'mp'").set_index("family")
    assert found.loc["accuracy and agreement", "reproduced"] and found.loc["accuracy and agreement", "p_pearson"] > 0.9
    assert not found.loc["original and twin", "reproduced"] and found.loc["original and twin", "printed_pearson"] == pytest.approx(round(r, 1) / 100)
    best = c.nearest_candidates(found.reset_index())
    assert best["p"].is_monotonic_decreasing and len(best) == found.index.nunique()


def test_runs_without_the_printed_state_have_no_candidates(good):
    assert c.reproduces(good[good["level"].isna() | (good["level"] < 0.75)], CELLS)["method"].unique().tolist() == ["vd"]
    assert c.reproduces(good.assign(zoo="digits_seed"), CELLS).empty and c.nearest_candidates(c.reproduces(good.assign(zoo="digits_seed"))).empty


def test_gaps_are_shifted_by_whole_epochs(good):
    found = c.shifted_gaps(good, CELLS)
    assert found.index.get_level_values("epoch").tolist() == [0, 2, 4, 6, 8, 10, 13, 16, 19, 22, 25]
    twins = good[good["method"] == "vd"].pivot(index="model", columns="epoch", values=["train_acc", "test_acc"])
    assert found.loc[("usps_seed", 10), "before"] == pytest.approx(100 * (twins["train_acc"][9] - twins["test_acc"][10]).mean())
    assert np.isnan(found.loc[("usps_seed", 0), "before"]) and np.isnan(found.loc[("usps_seed", 25), "after"]) and found.loc[("usps_seed", 25), "paper"] == 6.0
