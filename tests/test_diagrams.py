"""Diagrams: byte-stable, drawn from the weights they are given, inside their canvas."""
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_figures import run

from zootwins.core import UserError
from zootwins.diagrams import figure_1, figure_6, fold, layer_picture
from zootwins.population import sample_population
from zootwins.selectors import prune
from zootwins.style import save_figure
from zootwins.variational import begin_variational
from zootwins.zoos import ZOOS


def populations(zoo="usps_seed", n=3):
    original = sample_population(ZOOS[zoo], n)
    noisy, random = begin_variational(original), torch.Generator().manual_seed(0)
    for name in [name for name in noisy.weights if ".log_sigma2" in name]:
        noisy.weights[name] = noisy.weights[name] + 14 * torch.rand(noisy.weights[name].shape, generator=random)
    return original, prune(original, 0.8)[0], noisy


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
@pytest.mark.parametrize("draw", [lambda: figure_1(run(), *populations()), lambda: figure_6(populations()[2])])
def test_the_same_weights_give_the_same_bytes(tmp_path, draw, suffix):
    save_figure(draw(), tmp_path / f"one{suffix}")
    with plt.rc_context({"font.size": 20, "image.cmap": "hot", "lines.linewidth": 9, "axes.grid": True}):
        save_figure(draw(), tmp_path / f"two{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", [lambda: figure_1(run(), *populations()), lambda: figure_6(populations()[2])])
def test_no_text_leaves_the_figure_and_no_two_texts_overlap(draw):
    fig = draw()
    fig.draw_without_rendering()
    texts = [
        text for ax in [fig.axes[0], *fig.axes[0].child_axes] for text in (*ax.texts, ax._left_title) if text.get_text()
    ]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) > 12 and all(
        fig.bbox.x0 <= b.x0 and b.x1 <= fig.bbox.x1 and fig.bbox.y0 <= b.y0 and b.y1 <= fig.bbox.y1 for b in boxes
    )
    overlapping = [
        (a.get_text(), b.get_text())
        for i, a in enumerate(texts)
        for j, b in enumerate(texts)
        if i < j and boxes[i].overlaps(boxes[j])
    ]
    assert overlapping == []


@pytest.mark.parametrize("zoo, shape", [("usps_seed", (20, 36)), ("cifar10_large_seed", (20, 60))])
def test_pictures_are_white_where_weights_are_removed(zoo, shape):
    original, pruned, noisy = populations(zoo)
    assert layer_picture(original, 1).shape == shape and not np.isnan(layer_picture(original, 1)).any()
    name = next(name for name, tensor in pruned.weights.items() if tensor.shape[1:] == shape)
    np.testing.assert_array_equal(np.isnan(layer_picture(pruned, 1)), pruned.weights[name][1] == 0)
    assert 0 < np.isnan(layer_picture(noisy, 2)).mean() < 1


@pytest.mark.parametrize("methods, n", [("original mp", 2), ("original vd", 1), ("mp vd", 3)])
def test_poor_data_are_drawn_without_a_warning(tmp_path, recwarn, methods, n):
    metrics = run(n)
    save_figure(figure_1(metrics[metrics["method"].isin(methods.split())], *populations(n=n)), tmp_path / "figure.png")
    save_figure(figure_6(populations("cifar10_large_seed", n)[2], n - 1), tmp_path / "other.png")
    assert [str(w.message) for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))] == []


def test_fold_loses_nothing():
    tensors = [torch.arange(5.0), torch.arange(5.0, 40.0).reshape(5, 7)]
    folded = fold(tensors, 32)
    assert folded.shape == (2, 32) and folded[~np.isnan(folded)].tolist() == list(range(40))


def test_mistakes_are_told():
    original, pruned, noisy = populations()
    with pytest.raises(UserError, match="variational dropout"):
        figure_6(original)
    with pytest.raises(UserError, match="fc9"):
        layer_picture(original, 0, "fc9")
