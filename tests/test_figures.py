"""Figures: byte-stable, independent of the reader's settings, and drawn for poor data, too."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from zootwins.core import UserError
from zootwins.figures import FIGURES, accuracy_over_sparsity, figure_2, figure_5, save_figure
from zootwins.metrics import LAYERS, tidy


def run(n=12, zoo="usps_seed", levels=(0.0, 0.5, 0.9), vd_epochs=25):
    random = np.random.default_rng(0)
    skill = random.normal(0.85, 0.02, n)

    def rows(method, level, epoch, drop, share):
        test_acc = torch.tensor(skill - drop - random.normal(0, 0.005, n)).clip(0, 1)
        parts = {"sparsity": torch.full((n,), share)} | {f"sparsity_{layer}": torch.full((n,), share) for layer in LAYERS}
        return tidy(zoo, method, level, epoch, range(n), (test_acc, test_acc), (test_acc, test_acc), parts, test_acc)

    parts = [rows("original", None, epoch, 0.75 * 0.9**epoch, 0.0) for epoch in range(51)]
    parts += [rows("mp", level, epoch, 0.5 * level**4, level) for level in levels for epoch in (0, 15)]
    parts += [rows("vd", None, epoch, 0.004 * epoch, 0.9 * epoch / 25) for epoch in range(vd_epochs + 1)]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_same_metrics_give_the_same_bytes(tmp_path, suffix):
    metrics = run()
    save_figure(figure_2(metrics), tmp_path / f"one{suffix}")
    with plt.rc_context({"axes.facecolor": "red", "font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30, "axes.grid": False}):
        save_figure(figure_2(metrics), tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    save_figure(figure_2(metrics.assign(test_acc=metrics["test_acc"] - 0.05)), tmp_path / f"three{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() != (tmp_path / f"three{suffix}").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("n, methods", [(1, "original mp vd"), (2, "mp vd"), (3, "original vd"), (4, "original mp")])
def test_poor_data_are_drawn_without_a_warning(tmp_path, recwarn, name, n, methods):
    metrics = run(n)
    save_figure(FIGURES[name](metrics[metrics["method"].isin(methods.split())]), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, (UserWarning, RuntimeWarning))] == []
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
    assert [text.get_text() for text in axes.get_legend().get_texts()][:3] == ["USPS (s) Seed", "MNIST (s) Seed", "SVHN (s) Seed"]


def test_mistakes_are_told(tmp_path):
    zoos = pd.concat([run(1, "usps_seed"), run(1, "mnist_seed")])
    with pytest.raises(UserError, match="usps_seed, mnist_seed"):
        figure_2(zoos)
    with pytest.raises(UserError, match=".png"):
        save_figure(figure_2(run(1)), tmp_path / "figure.bmp")
    assert list(tmp_path.iterdir()) == [] and plt.get_fignums() == []
