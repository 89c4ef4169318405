"""Variational dropout: the divergence against its integral, outputs against sampled weights, modules, populations."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F

from zootwins.architectures import ARCHITECTURES, build
from zootwins.population import sample_population
from zootwins.streams import Draws, stream_keys
from zootwins.training import training_module
from zootwins.variational import (
    CONV_LIMIT,
    LINEAR_LIMIT,
    THRESHOLD,
    SparseConv2d,
    SparseLinear,
    begin_variational,
    deterministic,
    kl_divergence,
    kl_weight,
    log_alpha,
    log_alphas,
    sparse_masks,
    sparsify,
    total_divergence,
)
from zootwins.zoos import ZOOS


def integral(value):
    "The divergence up to a constant, by numerical integration."
    std = math.exp(value / 2)
    low, high = 1 - 12 * std, 1 + 12 * std
    return (
        quad(lambda e: norm.pdf(e, 1, std) * math.log(abs(e)), low, high, points=[0.0] if low < 0 else None, limit=500)[
            0
        ]
        - value / 2
    )


@settings(deadline=None, max_examples=30)
@given(st.floats(-10, 10))
def test_the_fitted_divergence_is_the_integral(value):
    assert kl_divergence(torch.tensor(value)).item() == pytest.approx(integral(value) - integral(30.0), abs=0.02)


@settings(deadline=None, max_examples=30)
@given(st.floats(-20, 20), st.floats(-3, 3), st.sampled_from([CONV_LIMIT, LINEAR_LIMIT]))
def test_no_gradient_passes_outside_the_clamp(log_sigma2, weight, limit):
    w, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (weight, log_sigma2))
    relative = log_alpha(w, s, limit)
    kl_divergence(relative).backward()
    inside = abs(log_sigma2 - 2 * math.log(abs(weight) + 1e-15)) < limit
    assert abs(relative.item()) <= limit and (s.grad.item() != 0) == inside


@pytest.mark.parametrize("layer", [SparseConv2d(2, 3, 3, stride=2, padding=1), SparseLinear(7, 4)])
def test_outputs_have_the_moments_of_sampled_weights(layer):
    torch.manual_seed(1)
    conv = isinstance(layer, SparseConv2d)
    with torch.no_grad():
        layer.log_sigma2.uniform_(-5, -1)
        layer.bias.fill_(0.3)
        if conv:
            layer.log_sigma2_bias.fill_(-2.0)
        x = torch.rand(1, 2, 5, 5) if conv else torch.rand(1, 7)
        std = (
            torch.exp(log_alpha(layer.weight, layer.log_sigma2, CONV_LIMIT if conv else LINEAR_LIMIT) / 2)
            * layer.weight.abs()
        )
        std_bias = (
            torch.exp(log_alpha(layer.bias, layer.log_sigma2_bias, CONV_LIMIT) / 2) * layer.bias.abs()
            if conv
            else torch.zeros(4)
        )
        apply = (lambda w, b: F.conv2d(x, w, b, 2, 1)) if conv else (lambda w, b: F.linear(x, w, b))
        n = 6000
        local = torch.cat([layer(x) for _ in range(n)])
        direct = torch.cat(
            [
                apply(layer.weight + std * torch.randn_like(std), layer.bias + std_bias * torch.randn_like(std_bias))
                for _ in range(n)
            ]
        )
    error = direct.std(0) / math.sqrt(n)
    assert ((local.mean(0) - direct.mean(0)).abs() < 8 * error).all()
    assert torch.allclose(local.std(0), direct.std(0), rtol=0.06)


@pytest.mark.parametrize("name", ["cnn_small_1ch", "cnn_small_3ch", "cnn_large"])
def test_modules_and_populations_are_pruned_alike(name):
    zoo = sample_population(
        ZOOS[{"cnn_small_1ch": "usps_seed", "cnn_small_3ch": "cifar10_seed", "cnn_large": "cifar10_large_seed"}[name]],
        3,
    )
    noisy = begin_variational(zoo)
    torch.manual_seed(0)
    for key in noisy.weights:
        if "log_sigma2" in key:
            noisy.weights[key].uniform_(-12, 6)
    plain, masks = deterministic(noisy.weights), sparse_masks(noisy.weights)
    x = torch.rand(4, *{"cnn_small_1ch": (1, 28, 28), "cnn_small_3ch": (3, 28, 28), "cnn_large": (3, 32, 32)}[name])
    for i in range(3):
        twin, dense = sparsify(zoo.to_module(i)).eval(), zoo.to_module(i).eval()
        twin.load_state_dict({key: w[i] for key, w in noisy.weights.items()})
        dense.load_state_dict({key: w[i] for key, w in plain.items()})
        assert torch.allclose(twin(x), dense(x), atol=1e-6)
        assert all((w[i] == 0).equal(~masks[key][i]) for key, w in plain.items() if key in masks)
    assert 0 < sum((~m).sum().item() for m in masks.values())


def test_the_threshold_is_reached_at_exactly_3():
    conv = SparseConv2d(1, 1, 1).eval()
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.fill_(1.0)
        conv.log_sigma2_bias.fill_(-10.0)
        for log_sigma2, expected in ((THRESHOLD, 1.0), (THRESHOLD - 1e-5, 2.0)):
            conv.log_sigma2.fill_(log_sigma2)
            assert conv(torch.ones(1, 1, 1, 1)).item() == expected


def test_log_alphas_are_clamped_by_the_kind_of_their_layer():
    noisy = begin_variational(sample_population(ZOOS["digits_seed"], 2))
    for sign in (-1, 1):
        found = log_alphas(
            {name: torch.full_like(w, sign * 50.0) if "log_sigma2" in name else w for name, w in noisy.weights.items()}
        )
        limits = {
            name: CONV_LIMIT
            if noisy.weights[name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name].ndim == 5
            else LINEAR_LIMIT
            for name in found
        }
        assert all((relative == sign * limits[name]).all() for name, relative in found.items()) and set(
            limits.values()
        ) == {8.0, 10.0}
        assert (
            sum(name.endswith(".bias") for name in found) == 3 and sum(name.endswith(".weight") for name in found) == 5
        )


def test_a_diverged_model_is_not_sparse():
    noisy = begin_variational(sample_population(ZOOS["digits_seed"], 2))
    for tensor in noisy.weights.values():
        tensor[1] = torch.nan
    masks, plain = sparse_masks(noisy.weights), deterministic(noisy.weights)
    assert all(mask[1].all() for mask in masks.values())
    assert all(tensor[1].isnan().all() and not tensor[0].isnan().any() for tensor in plain.values())


def test_the_first_epoch_has_no_divergence_and_the_last_nearly_one_percent():
    assert [kl_weight(e) for e in (1, 2, 25, 26)] == pytest.approx([0, 0.0004, 0.0096, 0.01])
    assert kl_weight(10_000) == 1.0


def test_noise_belongs_to_the_place_of_an_image_not_to_its_batch():
    module, noisy = training_module(build("cnn_small_1ch", dropout=0.5), variational=True)
    key, x = stream_keys("z", "vd", [4])[0], torch.rand(6, 1, 28, 28)

    def run(rows):
        for layer in noisy:
            layer.draws = Draws(key, torch.arange(6)[rows], torch.tensor(3))
        return module(x[rows])

    assert torch.allclose(run(slice(0, 6))[2:5], run(slice(2, 5)), atol=1e-5)


def test_the_divergence_counts_weights_and_biases_of_convolutions():
    twin = sparsify(build("cnn_large"))
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(0.0)  # log alpha at the upper clamp everywhere
    layers = 8.0 * torch.ones(432 + 16 + 4608 + 32 + 4320 + 15), 10.0 * torch.ones(1200 + 200)
    assert total_divergence(twin).item() == pytest.approx(
        sum(kl_divergence(part).sum().item() for part in layers), rel=1e-3
    )


def test_the_divergence_is_of_log_sigma2_less_the_square_of_the_weight():
    """Molchanov et al. (2017): log alpha = log sigma^2 - log w^2, for the weights of both kinds of layer."""
    torch.manual_seed(0)
    for layer in (SparseConv2d(2, 3, 2, bias=False), SparseLinear(4, 3)):
        with torch.no_grad():
            layer.weight.uniform_(0.1, 0.6)
            layer.log_sigma2.uniform_(-6, -1)
        wanted = layer.log_sigma2 - torch.log(layer.weight**2)
        assert wanted.abs().max() < CONV_LIMIT
        assert total_divergence(layer).item() == pytest.approx(kl_divergence(wanted).sum().item(), rel=1e-4)


def test_the_divergence_of_a_bias_is_that_of_a_weight():
    layer = SparseConv2d(1, 2, 1)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.log_sigma2.fill_(-3.0)
        layer.bias.copy_(torch.tensor([0.1, 0.4]))
        layer.log_sigma2_bias.copy_(torch.tensor([-2.0, -5.0]))
    wanted = torch.tensor([-3.0, -3.0, -2.0, -5.0]) - 2 * torch.tensor([0.5, 0.5, 0.1, 0.4]).log()
    assert wanted.abs().max() < CONV_LIMIT
    assert total_divergence(layer).item() == pytest.approx(kl_divergence(wanted).sum().item(), rel=1e-4)


def test_a_weight_is_pruned_from_log_alpha_3_on_and_noise_begins_at_site_0():
    for relative, kept in ((2.999, 0.5), (3.001, 0.0)):
        weights = {"fc.weight": torch.full((1, 1, 1), 0.5), "fc.bias": torch.zeros(1, 1)}
        weights["fc.log_sigma2"] = torch.full((1, 1, 1), relative + math.log(0.25))
        assert deterministic(weights)["fc.weight"].item() == kept
    assert SparseConv2d(1, 1, 1).site == SparseLinear(1, 1).site == 0


def test_other_layers_are_left_as_they_are():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1, bias=False, padding="same"),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 2)),
    )
    twin = sparsify(module)
    kinds = [type(m).__name__ for m in twin.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == ["SparseConv2d", "BatchNorm2d", "Flatten", "SparseLinear"]
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(twin.eval()(x), module.eval()(x), atol=0.02)
    assert type(sparsify(nn.Linear(3, 2))) is SparseLinear and "cnn_large" in ARCHITECTURES
