"""Statements tried on zoos in which they are true, on zoos in which they are false, and on runs that lack something."""
import numpy as np
import pandas as pd
import pytest

from zootwins import claims as c
from zootwins import definitions as d
from zootwins.claims import CLAIMS, FAILS, HOLDS, OPEN
from zootwins.layers import layer_sizes
from zootwins.metrics import LAYERS, METRIC_COLUMNS, with_selectors
from zootwins.reported import read_reported

CELLS = read_reported()
PARAMETERS = {
    "before": (0.87, 0.017),
    "mp": {0.0: 0.90, 0.5: 0.90, 0.7: 0.89, 0.8: 0.88, 0.9: 0.74},
    "mp_std": 0.003,
    "vd_drop": 0.002,
    "vd_std": 0.002,
    "keeps_order": 1.0,
    "gap": {0.0: 0.05, 0.5: 0.04, 0.7: 0.03, 0.8: 0.03, 0.9: 0.03},
    "vd_gap": 0.03,
    "by_size": 1.0,
    "layer_std": 0.01,
    "agreement": 0.1,
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
        layers = {
            f"sparsity_{layer}": sparsity + 0.05 * p["by_size"] * rank[i] + random.normal(0, p["layer_std"], n)
            for i, layer in enumerate(LAYERS)
        }
        columns = {
            "test_acc": accuracy, "ggap": gap + random.normal(0, 0.002, n),
            "sparsity": sparsity + random.normal(0, 1e-4, n) * (method == "vd"), "agreement": agreement,
        }
        rows = pd.DataFrame(
            {"zoo": name, "method": method, "level": level, "model": range(n), "epoch": epoch, **columns, **layers}
        )
        parts.append(
            rows.assign(train_acc=rows["test_acc"] + rows["ggap"], train_loss=1 - accuracy, test_loss=1 - accuracy)
        )

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
        add(
            "vd", np.nan, epoch, accuracy, 0.037 * epoch, p["vd_gap"] if epoch else 0.05,
            accuracy - p["agreement"] - 0.01,
        )
    return with_selectors(pd.concat(parts, ignore_index=True))[METRIC_COLUMNS]


@pytest.fixture(scope="module")
def good():
    return zoo()


def verdicts(judge, rows):
    return [found.verdict for found in judge(rows)]


TRUE = {
    c.pruning_better_up_to_80: 1,
    c.dropout_better_above_80: 1,
    c.both_degrade: 2,
    c.dropout_steadier: 2,
    c.accuracy_preserved: 2,
    c.gap_lower: 2,
    c.performance_drops: 2,
    c.larger_layers_sparser: 2,
    c.layers_consistent: 2,
    c.agreement_high: 2,
    c.pruning_correlates: 2,
    c.best_stay_best: 2,
    c.best_is_best: 2,
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


@pytest.mark.parametrize(
    "part",
    [
        "method == 'original'", "method == 'mp'", "method == 'vd'", "method != 'mp'", "method != 'vd'", "model == 0",
        "model < 2", "model < 5", "method != 'vd' or epoch < 1", "method != 'vd' or epoch < 3",
        "method != 'mp' or level < 0.75", "method != 'mp' or level > 0.75", "method != 'mp' or epoch == 0",
    ],
)
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
    for name in (
        "pruned accuracies correlate above 0.9", "accuracy is a proxy of agreement", "little variation",
        "variational dropout correlates less",
    ):
        assert set(np.atleast_1d(found.loc[name, "verdict"])) == {OPEN}


def test_every_zoo_gets_its_verdicts(good):
    both = pd.concat([good, zoo("mnist_seed", seed=1), zoo("my_zoo", seed=2)], ignore_index=True)
    found = c.all_claims(both)
    alone = c.all_claims(good)
    pd.testing.assert_frame_equal(found[found["zoo"] == "usps_seed"].reset_index(drop=True), alone)
    glance = c.verdict_table(found)
    assert (
        set(glance.index.get_level_values("claim")) == {claim.name for claim in CLAIMS}
        and glance.index.is_unique
        and list(glance) == ["usps_seed", "mnist_seed", "my_zoo"]
    )
    assert glance.loc[("larger layers get sparser", "MP"), "my_zoo"] == OPEN and glance.loc[
        ("both degrade above 80 %", "VD"), "usps_seed"
    ].endswith(HOLDS)
    table = c.claims_table(found)
    assert (
        len(table.layout) == len(found) and r"\%" in table.to_latex() and "MNIST (s) Seed: 60 models" in table.caption
    )


def test_a_collapsed_population_is_not_called_steady(good):
    collapsed = good.copy()
    collapsed.loc[(collapsed["method"] == "mp") & (collapsed["level"] > 0.8), "test_acc"] = (
        0.1 + 1e-17 * collapsed["model"]
    )
    of = lambda rows: {found.of: found for found in c.dropout_steadier(rows)}
    assert (
        of(good)["spread"].verdict == HOLDS
        and of(collapsed)["spread"].verdict == OPEN
        and of(collapsed)["loss"].verdict == HOLDS
    )


def test_losses_need_both_methods_and_zoos_keep_their_order(good, monkeypatch):
    assert len(c.losses_above_80(good)) and not len(c.losses_above_80(good[good["method"] != "vd"]))
    monkeypatch.setattr(c, "CLAIMS", CLAIMS[:1])
    two = pd.concat([good, good.assign(zoo="mnist_seed")])
    assert c.all_claims(two)["zoo"].unique().tolist() == ["usps_seed", "mnist_seed"]


def test_a_sparsity_that_few_models_reach_is_left_out(good):
    """At a level above half of the models it is tried as is; below, each model where its variational dropout ends."""
    models = good["model"].nunique()
    for kept, at_level in ((models // 2, True), (models // 2 - 1, False)):
        slow = good.copy()
        late = (slow["method"] == "vd") & (slow["model"] >= kept)
        slow.loc[late, "sparsity"] = slow.loc[late, "sparsity"].clip(upper=0.75)
        found = c.dropped_at(slow, 0.8)
        assert found.count() == (kept if at_level else 0) and c.dropped_at(slow, 0.7).count() == models
        quantity = c.pruning_better_up_to_80(slow)[0].quantity
        assert ("80%" in quantity) == at_level and ("the end of variational dropout" in quantity) != at_level


def test_the_end_of_variational_dropout_is_compared_on_a_straight_line(good):
    twins = good[good["method"] == "vd"]
    ends = {0: 0.75, 1: 0.79, 2: 0.9}
    short = pd.concat(
        [
            good[good["method"] != "vd"],
            *(twins[(twins["model"] == model) & (twins["sparsity"] <= end + 1e-9)] for model, end in ends.items()),
            twins[twins["model"] > 2],
        ]
    )
    found = c.at_the_end(short, (0.7, 0.8))
    low, high = c.pruned(good, 0.7), c.pruned(good, 0.8)
    for model in ends:
        rows = short[(short["method"] == "vd") & (short["model"] == model)].sort_values("sparsity")
        end = min(rows["sparsity"].max(), 0.8)
        wanted = (
            low[model]
            + (high[model] - low[model]) * (end - 0.7) / 0.1
            - np.interp(end, rows["sparsity"], rows["test_acc"])
        )
        assert found[model] == pytest.approx(wanted)
    below = short[(short["method"] != "vd") | (short["sparsity"] < 0.6)]
    assert c.at_the_end(below, (0.7, 0.8)).isna().all()


def test_the_end_is_looked_for_between_the_last_level_reached_and_the_next(good, monkeypatch):
    seen = []
    monkeypatch.setattr(c, "at_the_end", lambda rows, levels: seen.append(levels) or c.pruned(rows, 0.5) * np.nan)
    levels = [0.5, 0.6, 0.7, 0.8]
    pruned = good[(good["method"] == "mp") & np.isclose(good["level"], 0.8)]
    more = pd.concat([good[good["method"] != "mp"], *(pruned.assign(level=level) for level in levels)])
    for end, between in ((0.55, [0.5, 0.6]), (0.65, [0.6, 0.7]), (0.75, [0.7, 0.8])):
        c.pruning_better_up_to_80(more[(more["method"] != "vd") | (more["sparsity"] < end)])
        assert seen.pop() == pytest.approx(between)
    assert not seen


def test_at_a_collapse_between_two_levels_pruning_is_not_called_better(good):
    """As in MNIST: better at 70 %, worse at 80 %, and variational dropout ends between."""
    worse = good[(good["method"] != "vd") | (good["sparsity"] < 0.78)].copy()
    worse.loc[np.isclose(worse["level"].fillna(0), 0.8), "test_acc"] -= 0.3
    found = c.pruning_better_up_to_80(worse)[0]
    assert found.verdict == FAILS and "the end of variational dropout" in found.quantity
    assert c.pruning_better_up_to_80(good)[0].verdict == HOLDS


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
    assert c.best_tenth(pd.Series([0.5] * 20)).tolist() == [0, 1] and c.best_tenth(pd.Series([0.1, 0.9])).tolist() == [
        1
    ]


def test_lower_bound_of_train_and_test_correlation_is_never_undercut():
    random = np.random.default_rng(0)
    for _ in range(200):
        test = random.normal(0, random.uniform(0.5, 10), 500)
        train = random.uniform(-1, 2) * test + random.normal(0, random.uniform(0.1, 5), 500)
        gap, spread = (train - test).std(ddof=1), test.std(ddof=1)
        cells = pd.DataFrame(
            [
                {
                    "table": 5, "zoo": "z", "method": "mp", "level": 0.8, "epoch": 15, "metric": metric, "mean": 0.0,
                    "std": std,
                }
                for metric, std in (("test_acc", spread), ("ggap", gap))
            ]
            + [
                {
                    "table": 2, "zoo": "z", "method": "mp", "level": 0.8, "epoch": pd.NA, "metric": "pearson",
                    "mean": 100 * np.corrcoef(train, test)[0, 1], "std": np.nan,
                }
            ]
        )
        found = d.least_train_test_correlation(cells)
        assert not found["excluded"].any()


def test_the_definition_behind_a_printed_row_is_found(good):
    twins = good[(good["method"] == "mp") & (good["level"] == 0.8)].pivot(
        index="model", columns="epoch", values="test_acc"
    )
    agreement = pd.Series(np.random.default_rng(4).normal(size=len(twins)), index=twins.index)
    truth = 0.6 * (twins[15] - twins[15].mean()) / twins[15].std() + 0.8 * agreement
    changed = good.copy()
    chosen = (changed["method"] == "mp") & (changed["level"] == 0.8) & (changed["epoch"] == 15)
    changed.loc[chosen, "agreement"] = truth.reindex(changed.loc[chosen, "model"]).to_numpy()
    r, tau = (100 * twins[15].corr(truth, method) for method in ("pearson", "kendall"))
    printed = CELLS.copy()
    row = (printed["table"] == 2) & (printed["zoo"] == "usps_seed") & (printed["method"] == "mp")
    (
        printed.loc[row & (printed["metric"] == "pearson"), "mean"],
        printed.loc[row & (printed["metric"] == "kendall"), "mean"],
    ) = round(r, 1), round(tau, 1)
    found = d.reproduces(changed, printed).query("method == 'mp'").set_index("family")
    assert found.loc["accuracy and agreement", "fits"] and abs(found.loc["accuracy and agreement", "z_pearson"]) < 0.1
    assert not found.loc["original and twin", "fits"] and found.loc[
        "original and twin", "printed_pearson"
    ] == pytest.approx(round(r, 1) / 100)
    best = d.nearest_candidates(found.reset_index())
    assert best["worst"].is_monotonic_increasing and len(best) == found.index.nunique()


def test_runs_without_the_printed_state_have_no_candidates(good):
    assert d.reproduces(good[good["level"].isna() | (good["level"] < 0.75)], CELLS)["method"].unique().tolist() == [
        "vd"
    ]
    assert (
        d.reproduces(good.assign(zoo="digits_seed"), CELLS).empty
        and d.nearest_candidates(d.reproduces(good.assign(zoo="digits_seed"))).empty
    )


def test_gaps_are_shifted_by_whole_epochs(good):
    found = c.shifted_gaps(good, CELLS)
    assert found.index.get_level_values("epoch").tolist() == [0, 2, 4, 6, 8, 10, 13, 16, 19, 22, 25]
    twins = good[good["method"] == "vd"].pivot(index="model", columns="epoch", values=["train_acc", "test_acc"])
    assert found.loc[("usps_seed", 10), "before"] == pytest.approx(
        100 * (twins["train_acc"][9] - twins["test_acc"][10]).mean()
    )
    assert (
        np.isnan(found.loc[("usps_seed", 0), "before"])
        and np.isnan(found.loc[("usps_seed", 25), "after"])
        and found.loc[("usps_seed", 25), "paper"] == 6.0
    )


@pytest.mark.slow
def test_a_candidate_is_excluded_beyond_two_bootstrap_errors(good):
    tried = d.reproduces(good, CELLS).query("method == 'vd' and family == 'original and twin'").iloc[0]
    state = good[(good["method"] == "vd")].pivot(index="model", columns="epoch", values="test_acc")
    epoch = int(tried["definition"].split()[-1])
    errors = d.fisher_errors(c.of_originals(good), state[epoch].rename("y"))
    for sign in (-1, 1):
        for distance, fits in ((1.9, True), (2.0, False)):
            printed = CELLS.copy()
            for name in ("pearson", "kendall"):
                row = (
                    (printed["table"] == 2)
                    & (printed["zoo"] == "usps_seed")
                    & (printed["method"] == "vd")
                    & (printed["metric"] == name)
                )
                beyond = distance * errors[name] * np.sqrt(1 + 60 / 1000)
                printed.loc[row, "mean"] = (
                    100 * np.tanh(np.arctanh(min(tried[name], 0.9999)) + sign * beyond) + sign * 0.05
                )
            again = d.reproduces(good, printed).query("method == 'vd' and family == 'original and twin'").iloc[0]
            assert abs(again["worst"]) == pytest.approx(distance, abs=0.03) and again["fits"] == fits


def test_errors_of_pooled_states_draw_models_not_states():
    random = np.random.default_rng(0)
    model = np.repeat(np.arange(40), 10)
    x, noise = np.repeat(random.normal(size=40), 10), np.repeat(random.normal(size=40), 10)
    index = pd.MultiIndex.from_arrays([model, np.tile(range(10), 40)], names=["model", "epoch"])
    pooled = d.fisher_errors(pd.Series(x, index), pd.Series(x + noise, index), resamples=2000)
    single = d.fisher_errors(
        pd.Series(x[::10]).rename_axis("model"), pd.Series((x + noise)[::10]).rename_axis("model"), resamples=2000
    )
    assert pooled["pearson"] == pytest.approx(single["pearson"], rel=0.25) and pooled["pearson"] > 0.1
    normal = pd.Series(random.normal(size=400)).rename_axis("model")
    error = d.fisher_errors(normal, (0.7 * normal + random.normal(size=400)).rename("y"), resamples=2000)
    assert error["pearson"] == pytest.approx(1 / np.sqrt(397), rel=0.15)


def test_common_candidates_are_judged_where_they_do_worst():
    tried = pd.DataFrame(
        [
            ("a", "mp", "f", "one", 1.0), ("b", "mp", "f", "one", 3.0), ("a", "mp", "f", "two", 2.0),
            ("b", "mp", "f", "two", 0.5), ("a", "mp", "g", "three", 0.1),
        ],
        columns=["zoo", "method", "family", "definition", "worst"],
    )
    found = d.common_candidates(tried)
    assert found[["definition", "worst", "zoo"]].to_numpy().tolist() == [["two", 2.0, "a"], ["one", 3.0, "b"]]


def test_a_chosen_definition_fits_in_every_zoo_that_it_is_chosen_by():
    columns = ["zoo", "method", "family", "definition", "worst", "fits"]
    tried = pd.DataFrame([
        ("a", "mp", "f", "one", 1.0, True), ("b", "mp", "f", "one", 1.5, True),    # fits in both
        ("a", "mp", "f", "two", 1.0, True), ("b", "mp", "f", "two", 3.0, False),   # in one
        ("a", "mp", "f", "three", 1.0, True),                                      # was not tried in the other
        ("a", "vd", "f", "one", 9.0, False), ("b", "vd", "f", "one", 1.0, True),   # another method
    ], columns=columns)
    unseen = pd.DataFrame([
        ("c", "mp", "f", "one", 2.5, False), ("c", "mp", "f", "two", 0.1, True), ("c", "mp", "f", "three", 0.1, True),
        ("c", "mp", "f", "four", 0.1, True), ("c", "vd", "f", "one", 0.2, True),
    ], columns=columns)
    found = d.foretold(tried, unseen)
    assert found["chosen"].tolist() == [True, False, False, False, False]
    assert found.index.tolist() == unseen["definition"].tolist()
    assert (found[["method", "worst", "fits"]].to_numpy() == unseen[["method", "worst", "fits"]].to_numpy()).all()


def states(**of):
    "One zoo without noise: `method, level, epoch` -> columns of values over the models."
    parts = []
    for (method, level, epoch), columns in of["rows"].items():
        n = max(np.size(value) for value in columns.values())
        base = {
            "zoo": "usps_seed", "method": method, "level": level, "model": range(n), "epoch": epoch, "test_acc": 0.9,
            "train_acc": 0.9, "ggap": 0.05, "train_loss": 1.0, "test_loss": 1.0, "sparsity": 0.0, "agreement": 1.0,
        }
        parts.append(pd.DataFrame(base | {f"sparsity_{layer}": 0.0 for layer in LAYERS} | columns))
    return with_selectors(pd.concat(parts, ignore_index=True))[METRIC_COLUMNS]


ORIGINAL, N = ("original", np.nan, 50), 20
SPREAD = np.linspace(-1, 1, N)


def only(findings):
    return [found.verdict for found in findings]


@pytest.mark.parametrize("share, verdict", [(0.9501, HOLDS), (0.9499, FAILS)])
def test_preserved_is_95_percent_at_half_of_the_weights(share, verdict):
    rows = states(
        rows={
            ORIGINAL: {"test_acc": np.full(N, 0.8)}, ("mp", 0.5, 15): {"test_acc": np.full(N, 0.8 * share)},
            ("mp", 0.6, 15): {"test_acc": np.full(N, 0.1)}, ("vd", np.nan, 0): {"test_acc": np.full(N, 0.8)},
            ("vd", np.nan, 1): {"test_acc": np.full(N, 0.8 - 1.6 * (1 - share) * 0.8), "sparsity": 0.8},
        }
    )
    found = c.accuracy_preserved(rows)
    assert only(found)[0] == verdict and found[0].value == pytest.approx(share)


@pytest.mark.parametrize("ratio, verdict", [(1.999, HOLDS), (2.001, FAILS)])
def test_little_variation_is_at_most_twice_the_originals(ratio, verdict):
    before = 0.8 + 0.01 * SPREAD
    rows = states(rows={ORIGINAL: {"test_acc": before}, ("mp", 0.9, 15): {"test_acc": 0.7 + ratio * 0.01 * SPREAD}})
    assert only(c.variation_low(rows)) == [verdict]


@pytest.mark.parametrize(
    "agreement, high, between",
    [(0.601, HOLDS, HOLDS), (0.599, FAILS, FAILS), (0.799, HOLDS, HOLDS), (0.801, HOLDS, FAILS)],
)
def test_high_agreement_is_60_and_relatively_high_ends_at_80(agreement, high, between):
    rows = states(rows={ORIGINAL: {"test_acc": np.full(N, 0.9)}, ("mp", 0.9, 15): {"agreement": np.full(N, agreement)}})
    assert only(c.agreement_high(rows)) == [high] and only(c.agreement_60_to_80(rows)) == [between]


@pytest.mark.parametrize(
    "more, verdict",
    [
        (0, FAILS), (50, FAILS), (100, OPEN), (150, HOLDS), (200, HOLDS), (250, HOLDS), (300, OPEN), (350, FAILS),
        (400, FAILS),
    ],
)
def test_no_preference_is_between_a_quarter_and_three_quarters(more, verdict):
    agreement = np.where(np.arange(400) < more, 0.9, 0.7)
    rows = states(rows={ORIGINAL: {"test_acc": np.full(400, 0.9)}, ("mp", 0.9, 15): {"agreement": agreement},
        ("vd", np.nan, 1): {"agreement": np.full(400, 0.8), "sparsity": 0.885}})
    found = c.agreement_prefers_none(rows)
    assert only(found) == [verdict] and found[0].value == more / 400
    tied = rows.assign(agreement=0.8)
    assert c.agreement_prefers_none(tied)[0].value == 0.5


@pytest.mark.parametrize("r, verdict", [(0.75, HOLDS), (0.66, FAILS), (0.707, OPEN)])
def test_a_proxy_explains_half_of_the_variance(r, verdict):
    random = np.random.default_rng(0)
    x, e = random.normal(size=(2, 3000))
    e = e - x * (x @ e) / (x @ x)
    y = r * x / x.std() + np.sqrt(1 - r**2) * e / e.std()
    rows = states(rows={ORIGINAL: {"test_acc": np.full(3000, 0.9)}, ("mp", 0.9, 15): {"test_acc": x, "agreement": y}})
    assert {found.of: found.verdict for found in c.accuracy_is_proxy(rows)} == {"models, MP": verdict}


@pytest.mark.parametrize("r, pearson", [(0.93, HOLDS), (0.85, FAILS)])
def test_correlated_above_09_and_tau_above_what_that_implies(r, pearson):
    random = np.random.default_rng(0)
    x = random.normal(size=800)
    y = r * x + np.sqrt(1 - r**2) * random.normal(size=800)
    rows = states(rows={ORIGINAL: {"test_acc": x}, ("mp", 0.8, 15): {"test_acc": y}})
    assert only(c.pruning_correlates(rows)) == [pearson, pearson]


@pytest.mark.parametrize("ratio, verdict", [(0.49, HOLDS), (0.51, FAILS)])
def test_consistent_layers_vary_by_less_than_half_of_their_differences(ratio, verdict):
    means = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    within = ratio * means.std(ddof=1)
    two = np.tile([-1, 1], 500) * np.sqrt(999 / 1000)
    layers = {f"sparsity_{layer}": mean + within * two for layer, mean in zip(LAYERS, means)}
    assert only(c.layers_consistent(states(rows={("mp", 0.5, 15): layers}))) == [verdict]


@pytest.mark.parametrize("span, verdict", [(1.1, HOLDS), (0.9, FAILS)])
def test_phases_are_more_than_an_epoch_apart(span, verdict):
    """Every layer rises in one epoch of its own; conv2's half comes at 0.5 and fc1's by `span` later."""
    random, moments = np.random.default_rng(0), dict(zip(LAYERS, [0.7, 0.5, 0.6, 0.5 + span, 0.8]))
    rise = lambda epoch, moment: np.clip((epoch - (moment - 0.5)), 0, 1)
    shift = 0.02 * random.normal(size=N)
    rows = states(
        rows={
            ("vd", np.nan, epoch): {
                f"sparsity_{layer}": 0.8 * rise(epoch, moment + shift) for layer, moment in moments.items()
            }
            for epoch in range(4)
        }
    )
    found = c.layers_in_phases(rows)
    halves = c.half_epochs(rows)
    assert list(halves) == LAYERS and len(halves) == N and only(found) == [verdict]
    assert found[0].quantity.startswith("epochs from the half of conv2 to the half of fc1") and found[
        0
    ].value == pytest.approx(np.ptp(halves.mean()))


def test_half_of_a_layer_is_met_on_a_straight_line():
    layers = lambda values: {f"sparsity_{layer}": values for layer in LAYERS}
    rows = states(
        rows={("vd", np.nan, epoch): layers(np.array([s, s / 2, 0.0])) for epoch, s in enumerate([0.1, 0.3, 0.7, 0.9])}
    )
    found = c.half_epochs(rows)
    assert found.index.tolist() == [0, 1] and np.allclose(found.to_numpy(), 1.5)
    assert c.half_epochs(rows.assign(epoch=rows["epoch"] * 2)).iloc[0, 0] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "shared, of, verdict",
    [
        (10, 10, HOLDS), (9, 10, HOLDS), (8, 10, OPEN), (5, 10, OPEN), (2, 10, OPEN), (1, 10, FAILS), (0, 10, FAILS),
        (62, 100, HOLDS), (38, 100, FAILS),
    ],
)
def test_likely_is_more_often_than_not(shared, of, verdict):
    n = 10 * of
    before = np.arange(n, dtype=float)[::-1]
    after = before.copy()
    after[:of][shared:] -= n
    rows = states(rows={ORIGINAL: {"test_acc": before}, ("mp", 0.8, 15): {"test_acc": after}})
    found = c.best_stay_best(rows)[0]
    assert found.verdict == verdict and found.value == shared / of and found.n == n
    assert found.quantity.endswith("(by chance 0.10)")


@pytest.mark.parametrize(
    "better, n, verdict", [(1, 10, HOLDS), (2, 10, FAILS), (1, 9, OPEN), (2, 20, HOLDS), (3, 20, FAILS)]
)
def test_among_the_best_is_a_tenth(better, n, verdict):
    before, after = np.linspace(0.9, 0.8, n), np.linspace(0.7, 0.6, n)
    after[0] = after[better] + 0.5 * (after[0] - after[1]) - (after[0] - after[1])
    rows = states(rows={ORIGINAL: {"test_acc": before}, ("mp", 0.8, 15): {"test_acc": after}})
    found = c.best_is_best(rows)[0]
    assert found.verdict == verdict and found.value == pytest.approx(better / n)


def test_friendly_is_what_shows_again():
    random = np.random.default_rng(0)
    n, quality = 200, np.linspace(-1, 1, 200)
    friendly = random.normal(size=n)
    twin = lambda share: 0.7 + 0.05 * quality + 0.03 * share * friendly + 0.01 * random.normal(size=n)
    frame = lambda share: states(
        rows={
            ORIGINAL: {"test_acc": 0.9 + 0.1 * quality}, ("mp", 0.7, 15): {"test_acc": twin(1)},
            ("mp", 0.8, 15): {"test_acc": twin(share)}, ("vd", np.nan, 0): {"test_acc": 0.9 + 0.1 * quality},
            ("vd", np.nan, 1): {"test_acc": twin(1), "sparsity": 0.8},
        }
    )
    by = lambda rows: {found.of: found.verdict for found in c.friendly_models(rows)}
    assert (
        by(frame(1)) == {"levels": HOLDS, "methods": HOLDS}
        and by(frame(-1)) == {"levels": FAILS, "methods": FAILS}
        and by(frame(0)) == {"levels": OPEN, "methods": OPEN}
    )
    more = pd.concat([frame(1), states(rows={
        ("mp", 0.5, 15): {"test_acc": twin(-1)}, ("mp", 0.9, 15): {"test_acc": twin(-1)},
    })], ignore_index=True)
    assert [found.quantity[-14:] for found in c.friendly_models(more)] == ["at 70% and 80%", "methods at 80%"]
    assert by(more) == {"levels": HOLDS, "methods": HOLDS}
    kept = c.kept_beyond(0.9 + 0.1 * quality, 0.5 + 0.7 * (0.9 + 0.1 * quality))
    assert np.allclose(kept, 0) and c.kept_beyond(np.ones(3), np.array([1.0, 2.0, 6.0])).tolist() == [-2, -1, 3]


@pytest.mark.parametrize("accuracy, judged", [(0.199, False), (0.201, True)])
def test_collapsed_is_below_twice_guessing(accuracy, judged):
    rows = states(
        rows={
            ORIGINAL: {"test_acc": np.full(N, 0.9)}, ("mp", 0.8, 15): {"test_acc": 0.8 + 0.01 * SPREAD},
            ("mp", 0.9, 15): {"test_acc": accuracy + 0.01 * SPREAD}, ("vd", np.nan, 0): {"test_acc": np.full(N, 0.9)},
            ("vd", np.nan, 1): {"test_acc": 0.7 + 0.002 * SPREAD, "sparsity": 0.95},
        }
    )
    found = next(found for found in c.dropout_steadier(rows) if found.of == "spread")
    assert found.verdict == (HOLDS if judged else OPEN) and ("has collapsed" in found.quantity) != judged


@pytest.mark.parametrize("ratio, verdict", [(0.9, HOLDS), (1.1, FAILS)])
def test_steadier_is_a_smaller_spread(ratio, verdict):
    rows = states(
        rows={
            ORIGINAL: {"test_acc": np.full(N, 0.9)}, ("mp", 0.8, 15): {"test_acc": 0.8 + 0.01 * SPREAD},
            ("mp", 0.9, 15): {"test_acc": 0.6 + 0.01 * SPREAD}, ("vd", np.nan, 0): {"test_acc": np.full(N, 0.9)},
            ("vd", np.nan, 1): {"test_acc": 0.7 + 0.01 * ratio * SPREAD, "sparsity": 0.9},
        }
    )
    assert [found.verdict for found in c.dropout_steadier(rows) if found.of == "spread"] == [verdict]


def test_the_smallest_advantage_is_judged_with_a_wider_interval():
    random = np.random.default_rng(0)
    values = pd.Series(random.normal(1, 1, 40))
    one = c.smallest_advantage({"50%": values}, "x")[0]
    two = c.smallest_advantage({"50%": values, "60%": values + 1, "70%": values * np.nan}, "x")[0]
    assert (
        one.value == two.value
        and one.quantity.endswith("at 50%")
        and two.high - two.low > one.high - one.low
        and "50%, where it is smallest of 50%, 60%" in two.quantity
    )
    assert (two.value, two.low, two.high) == pytest.approx(c.mean_interval(values, 0.975)) and c.smallest_advantage(
        {"50%": values[:1]}, "x"
    ) == []


def test_moderate_is_50_to_70_percent():
    gaps = {0.0: 0.05, 0.4: 0.5, 0.5: 0.04, 0.7: 0.02, 0.8: 0.5}
    rows = states(
        rows={
            ORIGINAL: {"ggap": np.full(N, 0.3)},
            **{("mp", level, 15): {"ggap": np.full(N, gap)} for level, gap in gaps.items()},
        }
    )
    found = c.gap_lower(rows)
    assert found[0].value == pytest.approx(0.03 - 0.05) and "level 0" in found[0].quantity
    without = c.gap_lower(rows[rows["level"] != 0.0])
    assert without[0].value == pytest.approx(0.03 - 0.3) and "the originals" in without[0].quantity


def test_verdicts_of_intervals():
    judge = lambda low, high, **bounds: c.finding("", (0.5, low, high), 9, **bounds).verdict
    assert (
        judge(0.1, 0.9, above=0.0) == HOLDS
        and judge(0.1, 0.9, above=0.1) == OPEN
        and judge(0.1, 0.9, above=0.9) == OPEN
        and judge(0.1, 0.9, above=0.91) == FAILS
    )
    assert (
        judge(0.1, 0.9, below=1.0) == HOLDS
        and judge(0.1, 0.9, below=0.9) == OPEN
        and judge(0.1, 0.9, below=0.1) == OPEN
        and judge(0.1, 0.9, below=0.09) == FAILS
    )


def test_changed_verdicts_are_those_of_today():
    moved = pd.DataFrame(c.CHANGES, columns=["date", "rule", "zoo", "claim", "of", "before", "after"])
    assert (moved["before"] != moved["after"]).all() and set(moved["claim"]) <= {claim.name for claim in CLAIMS}
    claims = moved.rename(columns={"after": "verdict"})[["zoo", "claim", "of", "verdict"]].drop_duplicates(
        ["zoo", "claim", "of"], keep="last"
    )
    assert len(c.changed_verdicts(claims)) == len(moved) and c.changed_verdicts(claims.query("zoo == 'none'")).empty


def test_the_latent_space_is_compared_property_by_property():
    table = pd.DataFrame(
        [
            ("z", "hyper-representation", "test_acc", 0.7), ("z", "layer statistics", "test_acc", 0.6),
            ("z", "hyper-representation", "epoch", 0.5), ("z", "layer statistics", "epoch", 0.8),
            ("z", "hyper-representation", "weights", 0.9), ("a", "hyper-representation", "epoch", 0.5),
            ("a", "raw weights", "epoch", 0.4), ("a", "layer statistics", "epoch", 0.5),
        ],
        columns=["zoo", "features", "property", "r2"],
    )
    assert c.latent_space_wins(table)[["zoo", "property", "wins"]].to_numpy().tolist() == [
        ["z", "test_acc", True], ["z", "epoch", False], ["a", "epoch", False],
    ]
    assert c.latent_space_wins(table, "raw weights")["wins"].tolist() == [True]


# --- by hand: each number of a statement on a few models

def linear(*points):
    "States of variational dropout: sparsity and accuracy by epoch, the same for every one of N models."
    return {("vd", np.nan, epoch): {"sparsity": np.full(N, sparsity), "test_acc": accuracy + 0.001 * SPREAD}
            for epoch, (sparsity, accuracy) in enumerate(points)}


def test_statements_have_names_of_their_own_and_places_of_the_paper():
    places = {part for claim in CLAIMS for part in claim.place.split(", ")}
    assert places == {"abstract", "introduction", "4.3", "Figure 3", "conclusion"}
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) == 21
    assert all(len(claim.quote) > 20 or claim.quote == "both methods degrade" for claim in CLAIMS)


def test_a_sparsity_is_passed_where_it_is_reached_first():
    """On a plateau at 50 % the first of its epochs counts, for the accuracy as for the half of a layer."""
    rows = states(rows=linear((0.0, 0.9), (0.5, 0.8), (0.5, 0.6), (1.0, 0.4)))
    layers = {f"sparsity_{layer}": rows["sparsity"] for layer in LAYERS}
    assert c.dropped_at(rows, 0.5).tolist() == pytest.approx(list(0.8 + 0.001 * SPREAD))
    assert np.allclose(c.half_epochs(rows.assign(**layers)), 1.0)
    assert c.dropped_at(rows, 0.75).tolist() == pytest.approx(list(0.5 + 0.001 * SPREAD))


@pytest.mark.parametrize("end, lead", [(0.6, 0.85 - 0.80), (0.75, 0.75 - 0.80), (0.95, 0.7 - 0.80 - 0.1 * 0.15 / 0.95)])
def test_the_lead_at_the_end_is_read_between_the_levels_around_it(end, lead):
    """Pruning has 0.9, 0.8 and 0.7 at 50, 70 and 80 %; dropout falls from 0.9 to 0.8 by its end, or has gone on."""
    rows = states(rows=linear((0.0, 0.9), (end, 0.8)) | {
        ("mp", level, 15): {"test_acc": accuracy + 0.001 * SPREAD} for level, accuracy in ((0.5, 0.9), (0.7, 0.8),
            (0.8, 0.7))
    })
    assert c.at_the_end(rows, (0.5, 0.7, 0.8)).mean() == pytest.approx(lead)


def test_levels_between_bounds_hold_the_upper_one_alone():
    rows = states(rows={("mp", level, 15): {} | {"test_acc": np.full(N, 0.9)} for level in (0.9, 0.8, 0.5, 0.0)}
                  | {("vd", np.nan, 0): {"test_acc": np.full(N, 0.9)}})
    assert c.levels_of(rows) == [0.5, 0.8, 0.9] and c.levels_of(rows, 0.5, 0.8) == [0.8] and c.levels_of(rows,
        0.9) == []


def test_the_sparsest_twins_are_those_of_the_last_level_and_the_last_epoch():
    rows = states(rows={ORIGINAL: {"test_acc": 0.9 + 0.01 * SPREAD}, ("original", np.nan, 49): {"test_acc": np.full(N,
        0.5)}}
                  | {("mp", level, epoch): {"test_acc": accuracy + 0.001 * SPREAD}
                     for level, epoch, accuracy in ((0.5, 15, 0.88), (0.9, 15, 0.7), (0.9, 0, 0.2))}
                  | linear((0.0, 0.9), (0.5, 0.85)))
    found = c.performance_drops(rows)
    assert [(one.of, one.n, one.verdict) for one in found] == [("MP", N, HOLDS), ("VD", N, HOLDS)]
    assert [one.value for one in found] == pytest.approx([0.2, 0.05])
    assert [one.of for one in c.performance_drops(rows[rows["method"] != "mp"])] == ["VD"]


def test_the_gap_of_dropout_is_read_at_50_60_and_70_percent():
    """It falls from 0.10 by 0.1 per unit of sparsity, to 0.05, 0.04 and 0.03: on average by 0.06."""
    rows = states(rows={("vd", np.nan, epoch): {"sparsity": np.full(N, s), "ggap": 0.1 - 0.1 * s + 0.001 * SPREAD}
                        for epoch, s in enumerate((0.0, 0.4, 0.8))})
    found = c.gap_lower(rows)
    assert [(one.of, one.n, one.verdict) for one in found] == [("VD", N, HOLDS)]
    assert found[0].value == pytest.approx(-0.06)
    few = rows.copy()
    late = (few["model"] >= 12) & (few["epoch"] == 2)
    few.loc[late, "sparsity"] = 0.65
    assert c.gap_lower(few)[0].n == 12


def test_agreement_follows_accuracy_over_states_after_the_first_epoch():
    """Three states on a line hold; epoch 0, far from it, does not count; two states are no correlation."""
    points = {0: (0.1, 0.9), 1: (0.8, 0.70), 2: (0.7, 0.62), 3: (0.6, 0.50)}
    rows = states(rows={("vd", np.nan, epoch): {"test_acc": x + 1e-4 * SPREAD, "agreement": y + 1e-4 * SPREAD}
                        for epoch, (x, y) in points.items()})
    found = {one.of: one for one in c.accuracy_is_proxy(rows)}["states, VD"]
    assert found.value == pytest.approx(np.corrcoef([0.8, 0.7, 0.6], [0.70, 0.62, 0.50])[0, 1])
    assert found.verdict == HOLDS and found.n == N and "over 3 states" in found.quantity
    assert not [one for one in c.accuracy_is_proxy(rows[rows["epoch"] < 3]) if one.of == "states, VD"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flat", ["test_acc", "agreement"])
def test_a_measure_without_spread_is_correlated_with_nothing(flat):
    varied = 0.8 + 0.01 * SPREAD
    rows = states(rows={ORIGINAL: {"test_acc": varied}, ("mp", 0.9, 15): {"test_acc": varied, "agreement": varied} | {
        flat: np.full(N, 0.8)}})
    assert only(c.accuracy_is_proxy(rows)) == [OPEN]


@pytest.mark.parametrize("n", [2, 3])
def test_three_models_are_the_fewest_for_a_correlation(n):
    x, y, z = (np.array(values)[:n] for values in ([0.9, 0.8, 0.7], [0.8, 0.7, 0.5], [0.6, 0.7, 0.65]))
    flat = {f"sparsity_{layer}": np.full(n, 0.0) for layer in LAYERS}
    rows = states(rows={
        ORIGINAL: {"test_acc": x}, ("mp", 0.7, 15): {"test_acc": z}, ("mp", 0.8, 15): {"test_acc": y},
        ("vd", np.nan, 0): {"test_acc": x} | flat,
        ("vd", np.nan, 1): {"test_acc": z, "sparsity": np.full(n, 0.885)} | {
            name: np.full(n, 0.8 + i / 50) for i, name in enumerate(flat)
        },
    })
    assert len(c.pruning_correlates(rows)) == 2 * (n == 3) and len(c.layers_in_phases(rows)) == (n == 3)
    assert [one.of for one in c.friendly_models(rows)] == ["levels", "methods"] * (n == 3)
    found = c.dropout_correlates_less(rows)
    assert len(found) == (n == 3)
    if found:
        assert found[0].value == pytest.approx(np.corrcoef(x, z)[0, 1] - np.corrcoef(x, y)[0, 1])
    assert all(np.isnan(c.bootstrap(np.mean, np.arange(2.0)))) and c.bootstrap(np.mean, np.arange(3.0))[0] == 1


def test_size_and_sparsity_are_correlated_by_rank_in_every_model():
    from scipy import stats
    random = np.random.default_rng(0)
    sparsities = random.uniform(size=(3, N, 5))
    sizes = [*layer_sizes("cnn_small_1ch").values()]
    at = lambda i: {f"sparsity_{layer}": sparsities[i, :, j] for j, layer in enumerate(LAYERS)}
    rows = states(rows={("mp", 0.5, 15): at(0), ("mp", 0.9, 15): at(1), ("mp", 0.6, 15): at(2), ("mp", 0.5, 3): at(2)})
    wanted = np.mean([stats.spearmanr(sizes, sparsities[i, model])[0] for i in (0, 1) for model in range(N)])
    found = c.larger_layers_sparser(rows)
    assert [(one.of, one.n) for one in found] == [("MP", N)] and found[0].value == pytest.approx(wanted)
    within = [np.sqrt(sparsities[i].var(axis=0, ddof=1).mean()) for i in (0, 1)]
    between = [sparsities[i].mean(axis=0).std(ddof=1) for i in (0, 1)]
    assert c.layers_consistent(rows)[0].value == pytest.approx(np.mean(np.divide(within, between)))
    same = rows.assign(**{f"sparsity_{layer}": 0.5 for layer in LAYERS})
    assert only(c.layers_consistent(same)) == only(c.larger_layers_sparser(same)) == [OPEN]
    level = rows.assign(**{f"sparsity_{layer}": 0.5 + rows["model"] / 64 for layer in LAYERS})
    found, = c.layers_consistent(level)  # models differ, layers do not: no ratio
    assert found.verdict == OPEN and np.isnan(found.value)


def test_layers_are_looked_at_in_figure_4_s_epochs_and_at_table_8_s_levels():
    layers = lambda value: {f"sparsity_{layer}": np.full(N, value) for layer in LAYERS}
    rows = states(rows={("vd", np.nan, epoch): layers(epoch / 100) for epoch in range(26)} | {
        ("mp", level / 100, epoch): layers(level / 100) for level in range(5, 100, 5) for epoch in (14, 15)
    })
    found = {name: values[0, :, 0].tolist() for name, values in c.layer_states(rows).items()}
    assert found == {"mp": [0.5, 0.7, 0.9], "vd": [0.05, 0.1, 0.15, 0.2]}


def test_gaps_are_shifted_by_hand():
    """Two models: training accuracies 50 and 60 at epoch 1, one point more at each epoch; test accuracies 40 and 44."""
    rows = states(rows={("vd", np.nan, epoch): {"train_acc": np.array([0.49, 0.59]) + epoch / 100, "test_acc":
                        np.array([0.40, 0.44])} for epoch in (1, 2, 3)})
    both = pd.concat([rows.assign(zoo="z"), rows.assign(zoo="a")])
    printed = pd.DataFrame([(zoo, 6, metric, 2, 5.0, 1.5) for zoo in "az" for metric in ("ggap", "test_acc")],
                           columns=["zoo", "table", "metric", "epoch", "mean", "std"])
    found = c.shifted_gaps(both, printed)
    assert found.index.tolist() == [("z", 2), ("a", 2)]
    names = ["paper", "paper std", "same", "before", "after", "same std", "before std", "after std"]
    assert found.loc[("z", 2), names].tolist() == pytest.approx([5, 1.5, 14, 13, 15, *[np.std([11, 17], ddof=1)] * 3])


def test_training_accuracies_are_what_print_implies():
    """Printed 80 at a gap of 5 implies 85; ours are 83 and 85 after fine-tuning: print lies 1 above, error 1."""
    rows = states(rows={("mp", 0.7, 15): {"train_acc": np.array([0.83, 0.85])}, ("mp", 0.7,
        0): {"train_acc": np.array([0, 0.1])},
                        ("mp", 0.9, 15): {"train_acc": np.array([0.5, 0.5])}, ("vd", np.nan,
                            15): {"train_acc": np.array([0, 0.1])}})
    cells = [("usps_seed", 5, 0.7, 15, "test_acc", 80.0), ("usps_seed", 5, 0.7, 15, "ggap", 5.0),
             ("usps_seed", 5, 0.7, 0, "ggap", 50.0), ("", 5, 0.7, 15, "ggap", 50.0), ("usps_seed", 5, 0.7, 15,
                 "agreement", 50.0)]
    printed = pd.DataFrame(cells, columns=["zoo", "table", "level", "epoch", "metric", "mean"])
    found = c.training_accuracies(rows, printed)
    assert found.index.tolist() == [("usps_seed", 0.7)] and found.to_numpy() == pytest.approx(np.array([[85, 84, 1,
        1]]))


def claims_by_hand():
    base = {"place": "4.3", "quote": "", "quantity": "number"}
    rows = [("one", "usps_seed", "MP", 0.51239, 0.4, 0.6, 9, HOLDS), ("one", "my_zoo", "", np.nan, np.nan, np.nan, 0,
        OPEN),
            ("two", "usps_seed", "", np.nan, np.nan, np.nan, 0, OPEN), ("two", "my_zoo", "", 0.25, np.nan, np.nan, 8,
                FAILS),
            ("three", "usps_seed", "", np.nan, np.nan, np.nan, 0, OPEN), ("three", "my_zoo", "", np.nan, np.nan,
                np.nan, 0, OPEN)]
    names = ["claim", "zoo", "of", "value", "low", "high", "n", "verdict"]
    return pd.DataFrame(rows, columns=names).assign(**base)[c.CLAIM_COLUMNS]


def test_claims_as_tables_by_hand():
    """Numbers with and without an interval; a zoo without one, and a statement that nobody could judge."""
    claims = claims_by_hand()
    table = c.claims_table(claims)
    assert table.name == "claims" and table.numbers is claims
    assert table.layout["Value"].tolist() == ["0.512 [0.400, 0.600]", "", "", "0.250", "", ""]
    glance = c.verdict_table(claims)
    assert glance.index.tolist() == [("one", "MP"), ("two", ""), ("three", "")] and list(glance) == ["usps_seed",
        "my_zoo"]
    assert glance.to_numpy().tolist() == [["0.512 holds", OPEN], [OPEN, "0.25 does not hold"], [OPEN, OPEN]]


def test_kept_tables_are_made_again_once(tmp_path):
    """Every file is new the first time, none is the second, and one that was changed by hand is the third."""
    (tmp_path / "usps_seed").mkdir()
    rows = zoo(n=4).query("method == 'original'")
    rows.assign(**rows.filter(like="sparsity").clip(0, 1)).to_parquet(tmp_path / "usps_seed" / "metrics.parquet")
    first, file = c.refresh(tmp_path), tmp_path / "usps_seed" / "claims.csv"
    assert sorted(first) == sorted(map(str, file.parent.glob("*.csv"))) and str(file) in first and len(first) > 1
    assert c.refresh(tmp_path) == []
    file.write_text("changed")
    assert c.refresh(tmp_path) == [str(file)]


@pytest.mark.parametrize("name, printed", [("usps_seed", True), ("digits_seed", False)])
def test_only_a_printed_zoo_is_compared(name, printed):
    rows = zoo(name, n=3).query("epoch in [0, 15, 25, 50] and method != 'mp'")
    tables = {table.name: table for table in c.tables_of(rows)}
    assert "claims" in tables and "table_6" in tables and "table_4" not in tables
    assert ("comparison" in tables) == printed
    if printed:
        assert set(tables["comparison"].numbers["zoo"]) == {name}


def test_every_statement_has_a_row_with_or_without_a_number():
    rows = states(rows={ORIGINAL: {"test_acc": np.full(3, 0.8)}, ("mp", 0.5, 15): {"test_acc": np.full(3, 0.8)}})
    found = c.all_claims(pd.concat([rows, rows.assign(zoo="my_zoo")]))
    of = lambda claim, zoo: found[(found["claim"] == claim) & (found["zoo"] == zoo)].iloc[0]
    kept = of("accuracy is preserved", "my_zoo")
    assert (kept["value"], kept["n"], kept["verdict"], kept["of"]) == (1, 3, HOLDS, "MP")
    phases = of("layers are pruned in phases", "usps_seed")
    assert np.isnan(phases["value"]) and (phases["n"], phases["verdict"], phases["of"]) == (0, OPEN, "")
    assert len(found.groupby(["claim", "zoo"])) == 2 * len(CLAIMS)


def test_a_bootstrap_holds_the_middle_95_percent():
    values = np.random.default_rng(1).normal(size=200)
    mean, low, high = c.bootstrap(np.mean, values)
    error = values.std() / 200**0.5
    assert ((mean - low) / error, (high - mean) / error) == pytest.approx((1.96, 1.96), abs=0.2)


def test_the_best_tenth_is_rounded():
    sizes = [len(c.best_tenth(pd.Series(range(n)))) for n in (1, 10, 14, 16, 400)]
    assert sizes == [1, 1, 1, 2, 40] and c.best_tenth(pd.Series([0.1, 0.5, 0.3])).tolist() == [1]


def test_student_intervals_are_scipys():
    from scipy import stats
    values = np.random.default_rng(0).normal(size=12)
    for confidence in (0.95, 0.99):
        low, high = stats.t.interval(confidence, 11, values.mean(), stats.sem(values))
        assert c.mean_interval(np.append(values, np.nan), confidence) == pytest.approx((values.mean(), low, high))
    assert (
        c.mean_interval([1.0])[0] == 1 and np.isnan(c.mean_interval([1.0])[1])
        and np.isfinite(c.mean_interval([1.0, 2.0])).all()
        and np.isnan(c.mean_interval([])[0])
        and np.isnan(c.bootstrap(np.mean, np.ones(2))[0])
        and c.bootstrap(np.mean, np.ones(3)) == (1, 1, 1)
    )
