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
from zootwins.correlation import correlate, correlation, kendall_of_resamples, paired_accuracy, pearson_of_resamples
from zootwins.layers import layer_profile, layer_sizes, whole_sparsity
from zootwins.metrics import KEYS, METRIC_COLUMNS, read_metrics, sparsity, summarise, tidy
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


def test_what_is_no_metrics_file_is_said_so(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    pd.DataFrame({"zoo": ["usps_seed"]}).to_parquet(tmp_path / "other.parquet")
    for name, message in (("missing", "run the zoo"), ("text", "run the zoo"), ("other", "test_acc")):
        with pytest.raises(UserError, match=message):
            read_metrics(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="original, mp, vd"):
        epoch_rows("dropout", None, 0, [0.5])


def test_summarise_groups_missing_levels_too():
    rows = pd.concat([epoch_rows("vd", None, 3, [0.2, 0.4, 0.9]), epoch_rows("mp", 0.5, 3, [0.7])])
    found = summarise(rows, ["method", "level"], ["test_acc"]).set_index("method")
    assert found.loc["vd", "mean"] == pytest.approx(0.5) and found.loc["vd", "std"] == pytest.approx(
        np.std([0.2, 0.4, 0.9], ddof=1)
    )
    assert found["n"].to_dict() == {"vd": 3, "mp": 1} and np.isnan(found.loc["mp", "std"])


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


def test_meaningless_coefficients_are_missing():
    for before, after in (
        ([], []), ([0.1, 0.2], [0.1, 0.3]), ([0.5] * 8, range(8)), (range(8), [0.5] * 8), ([np.nan, 1, 2], [1, 2, 3]),
    ):
        assert correlate(before, after)[["value", "low", "high"]].isna().all(axis=None)
    assert correlate([1, 2, 3, np.nan, 4], [1, 3, 2, 9, 4])["n"].tolist() == [4, 4]


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
