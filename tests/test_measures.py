"""Measures against naive computations and against SciPy."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from zootwins.agreement import agreement, agreement_by_partner, pairwise_agreement
from zootwins.architectures import build, layer_names
from zootwins.core import UserError
from zootwins.correlation import (
    bootstrap_interval, correlate, correlation, kendall_of_resamples, most_influential, paired_accuracy,
    pearson_of_resamples,
)
from zootwins.layers import layer_profile, layer_sizes, whole_sparsity
from zootwins.metrics import (
    KEYS, METRIC_COLUMNS, measure_columns, one_selector, own_name, own_selector, read_metrics, sparsity, summarise,
        tidy,
    with_selectors,
)
from zootwins.population import sample_population
from zootwins.zoos import ZOOS


def naive_agreement(first, second):
    return [[sum(int(p == q) for p, q in zip(a, b)) / len(a) for b in second.tolist()] for a in first.tolist()]


@pytest.mark.parametrize("memory", [1, 500, 2**26])
def test_pairwise_agreement_is_the_double_loop(memory):
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, 10, (n, 53), dtype=torch.uint8, generator=random) for n in (5, 7))
    assert pairwise_agreement(first, second, memory).tolist() == naive_agreement(first, second)
    assert torch.equal(pairwise_agreement(first, second[:5]).diagonal(), agreement(first, second[:5]))


def test_partners_are_all_pairs_but_oneself():
    random = torch.Generator().manual_seed(1)
    originals, twins = (torch.randint(0, 4, (5, 31), dtype=torch.uint8, generator=random) for _ in range(2))
    found = agreement_by_partner(twins, originals).set_index("partner")
    across, among = (np.array(naive_agreement(twins, others)) for others in (originals, twins))
    off = ~np.eye(5, dtype=bool)
    for partner, values in {
        "its own original": across[~off],
        "other originals": across[off],
        "other twins": among[off],
    }.items():
        assert found.loc[partner, ["mean", "std", "pairs"]].tolist() == pytest.approx(
            [values.mean(), values.std(ddof=1), len(values)]
        )


@pytest.mark.parametrize("architecture", ["cnn_small_1ch", "cnn_small_3ch", "cnn_large"])
def test_sparsity_counts_weights_of_every_layer_and_no_bias(architecture):
    layers = layer_names(build(architecture))
    random = torch.Generator().manual_seed(1)
    weights = {
        name: (torch.rand(3, *p.shape, generator=random) > 0.4) * torch.ones(())
        for name, p in build(architecture).named_parameters()
    }
    found = sparsity(weights, layers)
    for i in range(3):
        zeros = {layer: (weights[f"{path}.weight"][i] == 0).sum().item() for layer, path in layers.items()}
        sizes = layer_sizes(architecture)
        assert all(found[f"sparsity_{layer}"][i] == zeros[layer] / sizes[layer] for layer in layers)
        assert found["sparsity"][i] == sum(zeros.values()) / sum(sizes.values())
    for name in weights:
        weights[name] = weights[name] * (0 if name.endswith("bias") else 1)
    assert torch.equal(sparsity(weights, layers)["sparsity"], found["sparsity"])


def epoch_rows(method, level, epoch, test_acc, zoo="usps_seed"):
    n = len(test_acc)
    population = sample_population(ZOOS[zoo], n)
    test_acc = torch.tensor(test_acc, dtype=torch.float64)
    zeros = sparsity(population.weights, layer_names(build(population.architecture)))
    return tidy(
        zoo, method, level, epoch, range(n), (test_acc, test_acc + 0.01), (test_acc, test_acc), zeros, torch.ones(n),
        "global" if method == "mp" else "",
    )


def test_tidy_rows_survive_parquet(tmp_path):
    rows = pd.concat(
        [epoch_rows("original", None, 50, [0.9, 0.8]), epoch_rows("mp", 0.5, 0, [0.4, 0.3])], ignore_index=True
    )
    rows.to_parquet(tmp_path / "metrics.parquet", index=False)
    again = read_metrics(tmp_path / "metrics.parquet")
    pd.testing.assert_frame_equal(again, rows)
    assert list(again.columns) == METRIC_COLUMNS and not again.duplicated(KEYS).any()
    assert again["level"].isna().tolist() == [True, True, False, False]
    assert again["agreement"].tolist() == [1] * 4
    rows.assign(zoo="mnist_seed").to_parquet(tmp_path / "other.parquet")
    both = read_metrics(tmp_path / "metrics.parquet", tmp_path / "other.parquet")
    assert both.index.tolist() == list(range(8)) and both["zoo"].nunique() == 2
    rows.drop(columns="selector").to_parquet(tmp_path / "older.parquet")
    assert read_metrics(tmp_path / "older.parquet")["selector"].tolist() == ["", "", "global", "global"]


def test_tidy_rows_name_what_was_measured():
    """Two models with a gap of 0.25; an agreement that nobody measured is missing, and so is a level."""
    acc, loss = torch.tensor([0.5, 0.75]), torch.tensor([1.0, 2.0])
    rows = tidy("z", "vd", None, 3, [7, 9], (loss, acc + 0.25), (loss + 1, acc), {"sparsity": acc})
    assert rows[["model", "epoch", "train_acc", "test_acc", "ggap", "train_loss", "test_loss"]].to_numpy().tolist() == [
        [7, 3, 0.75, 0.5, 0.25, 1, 2], [9, 3, 1, 0.75, 0.25, 2, 3],
    ]
    assert rows["agreement"].isna().all() and rows["level"].isna().all() and set(rows["selector"]) == {""}


def test_what_is_no_metrics_file_is_said_so(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"zoo": ["usps_seed"]}).to_parquet(tmp_path / "other.parquet")
    for name, message in (("missing", "run the zoo"), ("text", "run the zoo"), ("other", "test_acc")):
        with pytest.raises(UserError, match=message):
            read_metrics(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="original, mp, vd"):
        epoch_rows("dropout", None, 0, [0.5])
    rows = epoch_rows("original", None, 50, [0.9, 0.8])
    for frame, problem in (
        (rows.assign(test_acc="0.9"), "test_acc are not numbers"), (rows.drop(columns="agreement"),
            "agreement are miss"),
        (rows.drop(columns="epoch"), "epoch are missing"), (rows.drop(columns="zoo"), "zoo are missing"),
        (rows.assign(test_acc=[90.0, 80.0]), "test_acc are not between 0 and 1"),
        (rows.assign(train_acc=[0.9, 1.001]), "train_acc are not"),
        (rows.assign(agreement=[-0.001, 1]), "agreement are not"),
        (rows.assign(sparsity_fc1=[0.5, 50]), "sparsity_fc1 are not"), (pd.concat([rows, rows[1:]]), "there twice"),
    ):
        frame.to_parquet(tmp_path / "wrong.parquet")
        with pytest.raises(UserError, match=problem):
            read_metrics(tmp_path / "wrong.parquet")
    rows.assign(test_acc=[0, 1.0], train_acc=[1, np.nan], ggap=-1, test_loss=9.0).to_parquet(tmp_path / "good.parquet")
    assert len(read_metrics(tmp_path / "good.parquet")) == 2


def test_a_model_counts_once(tmp_path):
    "Two runs of one zoo are refused if they share a model's state, and read if they do not."
    rows = epoch_rows("original", None, 50, [0.9, 0.8, 0.7])
    rows[:2].to_parquet(tmp_path / "first.parquet")
    rows[1:].to_parquet(tmp_path / "shared.parquet")
    rows[2:].to_parquet(tmp_path / "more.parquet")
    assert read_metrics(tmp_path / "first.parquet", tmp_path / "more.parquet")["model"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="of usps_seed are there twice, in .*first.*shared.*one run of each zoo"):
        read_metrics(tmp_path / "first.parquet", tmp_path / "shared.parquet")


def pruned_rows(zoo, *selectors, method="mp"):
    return pd.DataFrame({"zoo": zoo, "method": method, "selector": selectors, "model": range(len(selectors))})


def test_a_row_of_magnitude_pruning_names_its_selector():
    """A zoo's own rule where none is named, the paper's for a zoo that nobody registered; others keep their names."""
    rows = pd.concat([pruned_rows("svhn_seed", "", None, "random"), pruned_rows("usps_seed", ""),
                      pruned_rows("my_zoo", ""), pruned_rows("usps_seed", "", method="vd")])
    wanted = ["layerwise", "layerwise", "random", "global", "global", ""]
    assert with_selectors(rows)["selector"].tolist() == wanted
    old = with_selectors(rows.drop(columns="selector"))
    assert list(old.columns) == list(rows.columns) and old["selector"].tolist() == [*wanted[:2], "layerwise",
        *wanted[3:]]
    assert [own_name(zoo) for zoo in ("svhn_seed", "usps_seed", "my_zoo")] == ["layerwise", "global", ""]


def test_one_selector_stays_for_every_zoo():
    """Its own, also where another comes first; the first in a run without its own, unless its own is asked for."""
    runs = {
        "usps_seed": ["random", "global", "random"], "svhn_seed": ["random", "global"], "my_zoo": ["random", "global"],
    }
    rows = pd.concat([pruned_rows(zoo, *selectors) for zoo, selectors in runs.items()]
                     + [pruned_rows("usps_seed", "", method="vd")])
    of = lambda found: found[["zoo", "selector"]].to_numpy().tolist()
    dropout = ["usps_seed", ""]
    assert of(one_selector(rows)) == [["usps_seed", "global"], ["svhn_seed", "random"], ["my_zoo", "random"], dropout]
    assert of(own_selector(rows)) == [["usps_seed", "global"], ["my_zoo", "random"], dropout]
    assert measure_columns(rows.assign(test_acc=0.5)) == ["test_acc"]


def test_summarise_groups_missing_levels_too():
    rows = pd.concat([epoch_rows("vd", None, 3, [0.2, 0.4, 0.9]), epoch_rows("mp", 0.5, 3, [0.7])])
    found = summarise(rows, ["method", "level"], ["test_acc"]).set_index("method")
    assert found.loc["vd", "mean"] == pytest.approx(0.5) and found.loc["vd", "std"] == pytest.approx(
        np.std([0.2, 0.4, 0.9], ddof=1)
    )
    assert found.index.tolist() == ["vd", "mp"] and found["n"].tolist() == [3, 1]
    assert np.isnan(found.loc["mp", "std"])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=15), st.integers(0, 10**6))
def test_coefficients_of_resamples_are_scipys(pairs, seed):
    x, y = np.array(pairs, dtype=float).T
    drawn = np.random.default_rng(seed).integers(0, len(x), (4, len(x)))
    counts = np.array([np.bincount(rows, minlength=len(x)) for rows in drawn])
    varied = [rows for rows in drawn if np.ptp(x[rows]) and np.ptp(y[rows])]
    kept = [i for i, rows in enumerate(drawn) if np.ptp(x[rows]) and np.ptp(y[rows])]
    kendall, pearson = kendall_of_resamples(x, y, counts), pearson_of_resamples(x, y, counts)
    np.testing.assert_allclose(kendall[kept], [stats.kendalltau(x[rows], y[rows])[0] for rows in varied], atol=1e-6)
    np.testing.assert_allclose(pearson[kept], [stats.pearsonr(x[rows], y[rows])[0] for rows in varied], atol=1e-6)
    assert np.isnan(kendall).sum() == np.isnan(pearson).sum() == 4 - len(kept)


def test_interval_is_like_scipys_bootstrap():
    x, y = np.random.default_rng(3).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 60).T
    found = correlate(x, y, resamples=4000, seed=1).set_index("coefficient")
    for name, exact in (("pearson", stats.pearsonr), ("kendall", stats.kendalltau)):
        statistic = lambda a, b, exact=exact: exact(a, b)[0]
        interval = stats.bootstrap(
            (x, y), statistic, paired=True, vectorized=False, method="percentile", n_resamples=1000, rng=0
        ).confidence_interval
        assert found.loc[name, "value"] == pytest.approx(exact(x, y)[0])
        assert found.loc[name, "low"] == pytest.approx(interval.low, abs=0.03) and found.loc[
            name, "high"
        ] == pytest.approx(interval.high, abs=0.03)
    pd.testing.assert_frame_equal(correlate(x, y, seed=5), correlate(x, y, seed=5))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of", [pearson_of_resamples, kendall_of_resamples])
def test_coefficients_of_resamples_know_no_unit_and_no_value_without_spread(of):
    """Models that differ by 1e-8 are ranked like others; a resample of equal models is missing, without a warning."""
    x, y = np.array([1.0, 2, 4, 3]), np.array([1.0, 3, 4, 2])
    counts = np.array([[1, 1, 1, 1], [2, 1, 1, 0], [4, 0, 0, 0]])
    found = of(x, y, counts)
    np.testing.assert_allclose(of(1e-8 * x, 5 + 1e-3 * y, counts), found, atol=1e-6)
    assert np.isnan(found).tolist() == [False, False, True] and np.isnan(of(0 * x, y, counts)).all()


def test_an_interval_is_the_middle_share_of_the_known_resamples():
    """The numbers 0 to 1000 in place of coefficients: 95 % of them lie between 25 and 975, 80 % between 100 and 900."""
    drawn = []

    def known(x, y, counts):
        drawn.append(counts)
        return np.append(np.arange(1001.0), np.nan)

    x = np.arange(5)
    assert bootstrap_interval(known, x, x) == pytest.approx((25, 975))
    assert bootstrap_interval(known, x, x, 300, confidence=0.8, seed=1) == pytest.approx((100, 900))
    assert [counts.shape for counts in drawn] == [(1000, 5), (300, 5)] and (drawn[0].sum(axis=1) == 5).all()
    assert drawn[0].mean(axis=0) == pytest.approx(np.ones(5), abs=0.15)


@pytest.mark.filterwarnings("error")
def test_meaningless_coefficients_are_missing():
    for before, after in (
        ([], []), ([0.1, 0.2], [0.1, 0.3]), ([0.5] * 8, range(8)), (range(8), [0.5] * 8), ([np.nan, 1, 2], [1, 2, 3]),
    ):
        assert correlate(before, after)[["value", "low", "high"]].isna().all(axis=None)
    assert correlate([1, 2, 3, np.nan, 4], [1, 3, 2, 9, 4])["n"].tolist() == [4, 4]
    assert correlate([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])["value"].tolist() == pytest.approx([-1, -1])


def test_correlation_pairs_a_twin_with_its_own_original():
    before, after = [0.9, 0.8, 0.7, 0.6], [0.5, 0.6, 0.3, 0.2]
    rows = [
        epoch_rows("original", None, 0, [0.1] * 4), epoch_rows("original", None, 50, before),
        epoch_rows("mp", 0.5, 15, after).sample(frac=1, random_state=0), epoch_rows("mp", 0.9, 15, [0.1] * 4),
        epoch_rows("vd", None, 25, [0.1] * 4),
    ]
    metrics = pd.concat(rows)
    pairs = paired_accuracy(metrics, "mp", 15, 0.5).sort_values("model")
    assert pairs["before"].tolist() == before and pairs["after"].tolist() == after
    found = correlation(metrics, "mp", 15, 0.5).set_index("coefficient")["value"]
    assert found["kendall"] == pytest.approx(4 / 6) and found["pearson"] == pytest.approx(
        np.corrcoef(before, after)[0, 1]
    )
    assert correlation(metrics, "mp", 14, 0.5).empty


def test_correlation_of_several_zoos_is_that_of_each():
    """Zoos stay in their order, with models of their own; variational dropout has no level."""
    of = {"usps_seed": ([0.9, 0.8, 0.7], [0.5, 0.6, 0.7]), "mnist_seed": ([0.7, 0.8, 0.9], [0.5, 0.7, 0.6])}
    metrics = pd.concat([
        rows for zoo, (before, after) in of.items() for rows in (
            epoch_rows("original", None, 50, before, zoo), epoch_rows("vd", None, 25, after, zoo),
            epoch_rows("mp", 0.5, 25, [0.1] * 3, zoo),
        )
    ])
    found = correlation(metrics, "vd", 25, resamples=20)
    assert found[["zoo", "coefficient", "n"]].to_numpy().tolist() == [
        ["usps_seed", "pearson", 3], ["usps_seed", "kendall", 3], ["mnist_seed", "pearson", 3],
        ["mnist_seed", "kendall", 3],
    ] and found.index.tolist() == [0, 1, 2, 3]
    assert found["value"].tolist() == pytest.approx([-1, -1, 0.5, 1 / 3]) and found["level"].isna().all()
    assert correlation(metrics, "mp", 25, 0.5)["level"].tolist() == [0.5] * 4


@pytest.mark.parametrize("far", [0, 3, 6])
def test_the_most_influential_model_is_found_by_leaving_out_each(far):
    before, after = np.array([0.80, 0.82, 0.83, 0.85, 0.86, 0.88, 0.89]), np.array([3, 1, 2, 5, 4, 7, 6]) / 10
    after[far] = 2.0 if far == 0 else -1.5
    pairs = pd.DataFrame({"model": range(10, 17), "before": before, "after": after})
    kept = [np.arange(7) != i for i in range(7)]
    r = [stats.pearsonr(before[of], after[of])[0] for of in kept]
    most = int(np.abs(np.array(r) - stats.pearsonr(before, after)[0]).argmax())
    found = most_influential(pairs)
    assert found["model"] == 10 + most == 10 + far and found["pearson"] == pytest.approx(
        stats.pearsonr(before, after)[0]
    )
    assert found["pearson_without"] == pytest.approx(r[most])
    assert found["kendall_without"] == pytest.approx(stats.kendalltau(before[kept[most]], after[kept[most]])[0])


def moved_most(before, after, weights):
    "The place whose row of weights changes r most."
    covariances = [np.cov(before, after, aweights=row) for row in weights]
    r = np.array([of[0, 1] / np.sqrt(of[0, 0] * of[1, 1]) for of in covariances])
    return np.abs(r - np.corrcoef(before, after)[0, 1]).argmax()


def test_the_most_influential_model_is_left_out_and_not_halved():
    """In some of these samples another model would move r most if its weight were halved."""
    others, differ = 1 - np.eye(6), 0
    for seed in range(60):
        before, after = np.random.default_rng(seed).normal(size=(2, 6))
        pairs = pd.DataFrame({"model": range(6), "before": before, "after": after})
        assert most_influential(pairs)["model"] == moved_most(before, after, others)
        differ += moved_most(before, after, others) != moved_most(before, after, 1 + others)
    assert differ


def test_of_few_models_or_equal_ones_none_is_influential():
    pairs = pd.DataFrame({"model": range(4), "before": [0.1, 0.2, 0.3, 0.5], "after": [0.1, 0.4, 0.2, 0.3]})
    names = ["model", "pearson_without", "kendall_without"]
    assert most_influential(pairs)[names].notna().all()
    assert most_influential(pairs.head(3))[names].isna().all() and most_influential(pairs.head(3))["pearson"] == (
        pytest.approx(stats.pearsonr([0.1, 0.2, 0.3], [0.1, 0.4, 0.2])[0])
    )
    assert most_influential(pairs.assign(before=0.5)).isna().all()


def test_layers_add_up_to_the_whole_model():
    population = sample_population(ZOOS["cifar10_large_seed"], 2)
    for tensor in population.weights.values():
        tensor[tensor.abs() < 0.05] = 0
    zeros = sparsity(population.weights, layer_names(build("cnn_large")))
    ones = torch.ones(2)
    metrics = tidy("cifar10_large_seed", "vd", None, 1, [0, 1], (ones, ones), (ones, ones), zeros)
    profile = layer_profile(metrics)
    assert profile["size"].tolist() == [432, 4608, 4320, 1200, 200] and profile["layer"].tolist() == [
        "conv1", "conv2", "conv3", "fc1", "fc2",
    ]
    assert whole_sparsity(profile)["mean"].item() == pytest.approx(metrics["sparsity"].mean())
    assert profile["mean"].between(0.01, 0.99).all()
    with pytest.raises(UserError, match="my_zoo"):
        layer_profile(metrics.assign(zoo="my_zoo"))
    own = {"my_zoo": layer_sizes("cnn_large")}
    assert layer_profile(metrics.assign(zoo="my_zoo"), sizes=own)["mean"].equals(profile["mean"])
