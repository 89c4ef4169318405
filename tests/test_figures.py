"""Figures: byte-stable, independent of the reader's settings, and drawn for poor data, too."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from zootwins.architectures import build, layer_names
from zootwins.core import UserError
from zootwins.figures import (
    FIGURES, accuracy_over_sparsity, agreement_range, bin_layers, correlation_curve, figure_2, figure_3, figure_4,
    figure_5, figure_agreement, figure_individuals, figure_layers, figure_twins, frequency_matrix, spaced, stretch,
    stretched_ticks, unstretch,
)
from zootwins.individuals import accuracy_changes, hardness, individuals
from zootwins.style import RINGS, printed_means, save_figure, zoo_looks
from zootwins.layers import layer_profile, removal_frequency, stack_frequencies
from zootwins.metrics import LAYERS, tidy
from zootwins.population import sample_population
from zootwins.reported import read_reported
from zootwins.selectors import prune
from zootwins.zoos import ZOOS, model_table


def run(n=12, zoo="usps_seed", levels=(0.0, 0.5, 0.9), vd_epochs=25):
    random = np.random.default_rng(0)
    skill = random.normal(0.85, 0.02, n)

    def rows(method, level, epoch, drop, share):
        test_acc = torch.tensor(skill - drop - random.normal(0, 0.005, n)).clip(0, 1)
        parts = {"sparsity": torch.full((n,), share)} | {
            f"sparsity_{layer}": torch.full((n,), share) for layer in LAYERS
        }
        return tidy(zoo, method, level, epoch, range(n), (test_acc, test_acc), (test_acc, test_acc), parts, test_acc)

    parts = [rows("original", None, epoch, 0.75 * 0.9**epoch, 0.0) for epoch in range(51)]
    parts += [rows("mp", level, epoch, 0.5 * level**4, level) for level in levels for epoch in (0, 15)]
    parts += [rows("vd", None, epoch, 0.004 * epoch, 0.9 * epoch / 25) for epoch in range(vd_epochs + 1)]
    return pd.concat(parts, ignore_index=True)


def removal(zoo="usps_seed", n=3, methods="vd mp"):
    population = sample_population(ZOOS[zoo], n)
    names = layer_names(build(population.architecture))
    share = lambda level: removal_frequency(prune(population, level)[1], names)
    states = {(zoo, "vd", "", None, epoch): share(0.03 * epoch) for epoch in range(26)} | {
        (zoo, "mp", "global", level, 15): share(level) for level in (0.0, 0.5, 0.9)
    }
    return stack_frequencies({state: frequency for state, frequency in states.items() if state[1] in methods.split()})


@pytest.mark.parametrize(
    "name, suffix",
    [
        *((name, ".png") for name in FIGURES),
        *((name, kind) for name in ("figure_2", "figure_agreement") for kind in (".pdf", ".svg")),
    ],
)
def test_the_same_metrics_give_the_same_bytes(tmp_path, name, suffix):
    metrics = run()
    save_figure(FIGURES[name](metrics), tmp_path / f"one{suffix}")
    with plt.rc_context(
        {
            "axes.facecolor": "red", "font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30, "axes.grid": False,
            "image.cmap": "hot", "scatter.marker": "x",
        }
    ):
        save_figure(FIGURES[name](metrics), tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_frequencies_give_the_same_bytes(tmp_path, suffix):
    save_figure(figure_3(removal()), tmp_path / f"one{suffix}")
    with plt.rc_context({"image.interpolation": "bicubic", "image.cmap": "hot", "image.origin": "lower"}):
        save_figure(figure_3(removal()), tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_other_metrics_give_other_bytes(tmp_path, suffix):
    metrics = run()
    save_figure(figure_2(metrics), tmp_path / f"one{suffix}")
    save_figure(figure_2(metrics.assign(test_acc=metrics["test_acc"] - 0.05)), tmp_path / f"three{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() != (tmp_path / f"three{suffix}").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("n, methods", [(1, "original mp vd"), (2, "mp vd"), (3, "original vd"), (4, "original mp")])
def test_poor_data_are_drawn_without_a_warning(tmp_path, recwarn, name, n, methods):
    metrics = run(n)
    save_figure(FIGURES[name](metrics[metrics["method"].isin(methods.split())]), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert [
        str(warning.message) for warning in recwarn if issubclass(warning.category, (UserWarning, RuntimeWarning))
    ] == []
    assert plt.get_fignums() == []


def test_figure_5_draws_the_means():
    metrics = run()
    line = next(line for line in figure_5(metrics).axes[0].lines if line.get_label() == "Magnitude pruning")
    last = metrics[(metrics["method"] == "mp") & (metrics["epoch"] == 15)]
    np.testing.assert_allclose(line.get_ydata(), last.groupby("level")["test_acc"].mean())
    np.testing.assert_allclose(line.get_xdata(), [0, 0.5, 0.9])
    curve = accuracy_over_sparsity(last, "level")
    assert (curve["low"] <= curve["accuracy"]).all() and (curve["accuracy"] <= curve["high"]).all()


def test_figure_5_tells_many_zoos_apart():
    zoos = pd.concat([run(3, zoo) for zoo in ("usps_seed", "mnist_seed", "svhn_seed")], ignore_index=True)
    axes = figure_5(zoos).axes[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 6
    assert [text.get_text() for text in axes.texts] == ["USPS (s) Seed", "MNIST (s) Seed", "SVHN (s) Seed"]
    places = sorted(text.xyann[1] for text in axes.texts)
    assert np.diff(places).min() >= 0.052 * 1.02 - 1e-9 and all(
        text.xy == pytest.approx((0.9, text.xy[1])) for text in axes.texts
    )


def test_labels_keep_their_order_and_their_distance():
    random = np.random.default_rng(0)
    for wanted in (random.random(14), np.zeros(5), [0.3]):
        places = spaced(wanted, 0.05)
        assert (np.diff(np.sort(places)) >= 0.05 - 1e-9).all() and (
            np.argsort(places, kind="stable") == np.argsort(wanted, kind="stable")
        ).all()
        assert places.mean() == pytest.approx(np.mean(wanted))
    assert spaced([0.1, 0.2], 0.05).tolist() == [0.1, 0.2] and spaced([0.1, 0.2], 0.2) == pytest.approx([0.05, 0.25])


# --- what was printed

def rings(ax, kind="printed 2023"):
    lines = [line for line in ax.lines if line.get_gid() == kind]
    return sorted((round(float(x), 4), round(float(y), 4)) for line in lines for x, y in line.get_xydata())


def test_printed_means_are_those_of_tables_5_to_8():
    cells = read_reported()
    assert printed_means(cells, "usps_seed", "mp", "test_acc")["value"].to_dict() == pytest.approx(
        {0: 0.91, 0.5: 0.901, 0.6: 0.899, 0.7: 0.895, 0.8: 0.885, 0.9: 0.738}
    )
    dropout = printed_means(cells, "usps_seed", "vd", "test_acc")["value"]
    assert [*dropout[[0, 2, 5, 25]]] == pytest.approx([0.87, 0.874, 0.865, 0.714])
    layer = printed_means(cells, "usps_seed", "vd", "sparsity", "conv2")["value"]
    assert layer.to_dict() == pytest.approx({0: 0.009, 5: 0.808, 10: 0.946, 15: 0.974, 20: 0.975, 25: 0.969})
    assert printed_means(cells, "cifar10_seed", "mp", "sparsity", "conv2")["doubtful"].all()
    assert not printed_means(cells, "cifar10_seed", "vd", "sparsity", "conv2")["doubtful"].any()
    assert printed_means(cells, "digits_seed", "mp", "test_acc").empty


def test_rings_stand_where_the_paper_printed_them():
    cells, metrics = read_reported(), run()
    drawn = rings(figure_5(metrics, cells).axes[0])
    assert {(0.5, 0.901), (0.9, 0.738), (0.006, 0.87), (0.945, 0.714)} <= set(drawn) and len(drawn) == 6 + 11
    left, right = figure_2(metrics, cells).axes
    assert rings(left) == [(50, 0.87)] and {(25, 0.714), (25, 0.945), (5, 0.865)} <= set(rings(right))
    first = figure_4(metrics, cells).axes[0]
    assert {y for _, y in rings(first)} == {0.554, 0.808, 0.306, 0.582, 0.192} and {x for x, _ in rings(first)} == {
        200, 1200, 96, 720,
    }
    dropout, pruning = figure_layers(metrics, cells).axes
    assert (25, 0.969) in rings(dropout) and (0.9, 0.995) in rings(pruning) and len(rings(pruning)) == 15


def test_contradicted_numbers_have_rings_of_their_own():
    axes = figure_layers(run(zoo="cifar10_seed"), read_reported()).axes
    assert (
        len(rings(axes[1])) == 0
        and len(rings(axes[1], "printed, but contradicted")) == 15
        and len(rings(axes[0])) == 30
    )


@pytest.mark.parametrize("name", ["figure_2", "figure_4", "figure_5", "figure_layers"])
def test_without_printed_numbers_there_are_no_rings(name):
    for metrics, cells in ((run(), None), (run(zoo="digits_seed"), read_reported())):
        fig = FIGURES[name](metrics, cells)
        assert all(rings(ax, kind) == [] for ax in fig.axes for kind in RINGS)
        legends = [*fig.legends, *(ax.get_legend() for ax in fig.axes if ax.get_legend())]
        texts = [text.get_text() for legend in legends for text in legend.get_texts()]
        assert texts and not set(texts) & set(RINGS)


def test_zoos_look_different():
    looks = zoo_looks([str(i) for i in range(100)])
    assert len({tuple(look.values()) for look in looks.values()}) == 100


def test_figure_2_gives_every_zoo_a_row():
    zoos = pd.concat([run(3, "usps_seed"), run(12, "mnist_seed")], ignore_index=True)
    fig = figure_2(zoos)
    assert fig.get_suptitle() == "Lines: means; bands: middle 90 % and range of the models; thin: single models"
    assert [ax.get_ylabel() for ax in fig.axes] == ["USPS (s) Seed\n3 models", "", "MNIST (s) Seed\n12 models", ""]
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Original training", "Variational dropout", "", ""]
    line = fig.axes[3].lines[-1]
    np.testing.assert_allclose(line.get_ydata(), [0.9 * epoch / 25 for epoch in range(26)])


@pytest.mark.parametrize("zoo, size", [("usps_seed", 2416), ("cifar10_large_seed", 10760)])
def test_figure_3_shows_every_weight_in_the_order_of_the_network(zoo, size):
    frequencies = removal(zoo)
    matrix = frequency_matrix(frequencies[frequencies["method"] == "mp"], "level")
    assert matrix.shape == (size, 3) and list(matrix.index.unique("layer")) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert (
        matrix.groupby("layer").size() == frequencies[frequencies["epoch"] == 0].groupby("layer", observed=True).size()
    ).all()
    np.testing.assert_allclose(matrix.mean(), [0, 0.5, 0.9], atol=1e-3)
    axes = figure_3(frequencies).axes
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["0", "50", "90"] and axes[0].get_ylim() == (
        size,
        0,
    )


@pytest.mark.parametrize("methods", ["vd", "mp"])
def test_figure_3_of_one_method_keeps_its_labels(methods, recwarn):
    axes = figure_3(removal(n=1, methods=methods)).axes
    drawn, empty = (axes[0], axes[1]) if methods == "vd" else (axes[1], axes[0])
    assert not empty.axison and drawn.get_ylabel().startswith("Weights") and drawn.yaxis.get_tick_params()["labelleft"]
    assert [str(w.message) for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))] == []


def test_bins_hold_the_spread_between_layers_and_within_them():
    profile = pd.DataFrame({"size": [100, 140, 1000], "mean": [0.2, 0.4, 0.9], "std": [0.03, 0.04, np.nan]})
    bins = bin_layers(profile)
    assert bins["layers"].tolist() == [2, 1] and bins["mean"].tolist() == pytest.approx([0.3, 0.9])
    assert bins["std"].tolist() == pytest.approx([np.sqrt((0.03**2 + 0.04**2) / 2 + 0.1**2), 0]) and bins["size"][
        0
    ] == pytest.approx(np.sqrt(14000))


def test_figure_4_joins_zoos_of_different_architectures():
    zoos = pd.concat([run(3, "usps_seed"), run(4, "cifar10_large_seed")], ignore_index=True)
    axes = figure_4(zoos).axes
    small, large = (line.get_xdata() for line in axes[0].lines[:2])
    assert small == pytest.approx(np.array([200, 1200, 96, 720, 200]) / 1.04**0.5) and large == pytest.approx(
        np.array([432, 4608, 4320, 1200, 200]) * 1.04**0.5
    )
    profile = layer_profile(zoos[(zoos["method"] == "vd") & (zoos["epoch"] == 5)])
    assert sum(len(line.get_xdata()) for line in axes[0].lines[:2]) == len(profile)
    own = run(3, "usps_seed").assign(zoo="mine")
    assert figure_4(own, epochs=(1, 20), sizes={"mine": dict(zip(LAYERS, (1, 20, 300, 4000, 50000)))}).axes[1].axison


def test_agreement_range_holds_for_any_predictions():
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 40)
    originals, twins = (
        np.where(random.random((200, 40)) < random.random((200, 1)), truth, random.integers(0, 3, (200, 40)))
        for _ in range(2)
    )
    first, second, agreed = (originals == truth).mean(1), (twins == truth).mean(1), (originals == twins).mean(1)
    for worst, best in ((first, first), (first.min(), first.max())):
        low, high = agreement_range(second, worst, best)
        assert (low - 1e-9 <= agreed).all() and (agreed <= high + 1e-9).all()
    assert np.allclose(unstretch(stretch(np.linspace(0, 1, 50))), np.linspace(0, 1, 50))
    assert 4 <= len(stretched_ticks(0, 1, 8)) <= 9


def test_hardness_finds_the_models_that_always_lose_most():
    metrics = run(20)
    twins = metrics["method"] != "original"
    metrics.loc[twins & (metrics["model"] == 7), "test_acc"] -= 0.2
    metrics.loc[twins & (metrics["model"] == 3), "test_acc"] += 0.2
    table = individuals(metrics)
    for method in ("mp", "vd"):
        rows = table[table["method"] == method]
        assert rows["model"].iloc[0] == 3 and rows["model"].iloc[-1] == 7 and rows["hardness"].is_monotonic_increasing
        assert (
            rows["hardness"].iloc[0] == 0
            and rows["hardness"].iloc[-1] == 1
            and rows["hardness"].mean() == pytest.approx(0.5)
        )
    assert (table["seed"] == table["model"] + 1).all()
    changes = accuracy_changes(metrics, "mp")
    last = metrics[
        (metrics["method"] == "mp") & (metrics["epoch"] == 15) & (metrics["level"] == 0.9) & (metrics["model"] == 7)
    ]["test_acc"].item()
    before = metrics[(metrics["method"] == "original") & (metrics["epoch"] == 50) & (metrics["model"] == 7)][
        "test_acc"
    ].item()
    assert changes.loc[7, 0.9] == pytest.approx(last - before) and hardness(changes.head(1)).tolist() == [0]


def test_models_at_chance_are_left_out():
    metrics = run(12)
    originals = (metrics["method"] == "original") & (metrics["epoch"] == 50)
    metrics.loc[originals & (metrics["model"] == 4), "test_acc"] = 0.19
    metrics.loc[originals & (metrics["model"] == 5), "test_acc"] = 0.2
    assert set(individuals(metrics)["model"]) == set(range(12)) - {4} == set(accuracy_changes(metrics, "vd").index)
    assert "11 models, 1 at chance left out" in figure_individuals(metrics).get_suptitle()
    assert "at chance" not in figure_individuals(run(12)).get_suptitle()


def test_panels_that_are_compared_have_equal_axes():
    metrics = run(12)
    for ax in figure_agreement(metrics).axes[:2]:
        assert ax.get_xlim() == ax.get_ylim() == figure_agreement(metrics).axes[0].get_xlim()
    one, two = figure_twins(metrics).axes
    assert (
        one.get_xlim() == two.get_xlim() and one.get_ylim() == two.get_ylim() and one.get_ylim()[1] >= one.get_xlim()[1]
    )


def test_extremes_are_named_with_the_factors_that_differ():
    grid = run(12, "mnist_fixed")
    labels = [text.get_text() for text in figure_individuals(grid).axes[0].get_legend().get_texts()]
    first = individuals(grid).query("method == 'mp'").iloc[0]
    activation = model_table(ZOOS["mnist_fixed"]).loc[first["model"], "activation"]
    name = f"model {first['model']} ({100 * first['original']:.1f}\u00a0%): {activation}, "
    assert labels[0].startswith(name) and "seed" in labels[0]
    seeds = [text.get_text() for text in figure_individuals(run(12, "usps_seed")).axes[0].get_legend().get_texts()]
    assert all(label.startswith("seed\u00a0") for label in seeds if label != "median of all")
    own = individuals(
        run(4, "usps_seed").assign(zoo="mine"), pd.DataFrame({"model": range(4), "lr": [0.1, 0.2, 0.3, 0.4]})
    )
    assert list(own.columns) == ["zoo", "method", "model", "hardness", "original", "change", "lr"]
    assert list(individuals(run(4).assign(zoo="mine")).columns)[-1] == "change"


def test_correlation_over_sparsity_is_that_of_table_2():
    metrics = run(12)
    curve = correlation_curve(metrics, "mp").query("coefficient == 'pearson'")
    before = metrics[(metrics["method"] == "original") & (metrics["epoch"] == 50)].set_index("model")["test_acc"]
    after = metrics[(metrics["method"] == "mp") & (metrics["epoch"] == 15)].pivot(
        index="model", columns="level", values="test_acc"
    )
    np.testing.assert_allclose(curve["value"], [after[level].corr(before) for level in after])
    assert (
        len(correlation_curve(metrics, "vd")) == 2 * 26
        and correlation_curve(metrics[metrics["method"] == "vd"], "vd").empty
    )


def test_mistakes_are_told(tmp_path):
    zoos = pd.concat([run(1, "usps_seed"), run(1, "mnist_seed")])
    with pytest.raises(UserError, match="usps_seed, mnist_seed"):
        figure_layers(zoos)
    with pytest.raises(UserError, match=".png"):
        save_figure(figure_2(run(1)), tmp_path / "figure.bmp")
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []
