"""Multiply-adds, sparse files, filters."""
import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from zootwins.core import UserError
from zootwins.filters import SCOPES, FilterChains, filter_chains, without_pruned_filters
from zootwins.inference_costs import inference_costs, load_sparse, multiply_adds, pack_sparse, save_sparse, speed_up
from zootwins.module_masks import choose_masks, enforce, sparsity
from zootwins.networks import make_network, parameter_count, resnet8

NET, X = make_network("resnet8"), torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize(("layer", "shape", "count"), [
    (nn.Conv2d(3, 8, 5), (3, 28, 28), 24 * 24 * 8 * 3 * 25),
    (nn.Conv2d(3, 8, 5, padding=2, stride=2), (3, 28, 28), 14 * 14 * 8 * 3 * 25),
    (nn.Conv2d(8, 8, 3, groups=8), (8, 10, 10), 8 * 8 * 8 * 9),
    (nn.Conv2d(2, 4, 3, dilation=2), (2, 10, 10), 6 * 6 * 4 * 2 * 9),
    (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 4), 4 * 4 * 3 * 5 * 4),
    (nn.Conv1d(3, 4, 3), (3, 10), 8 * 4 * 3 * 3),
    (nn.Linear(6, 7), (6,), 42),
])
def test_multiply_adds_by_hand(layer, shape, count):
    module = nn.Sequential(nn.Identity(), layer)
    assert multiply_adds(module, torch.zeros(3, *shape)) == {"1.weight": count, "rest": 0}
    assert multiply_adds(layer, torch.zeros(3, *shape)) == {"weight": count, "rest": 0}


def test_layers_that_are_used_twice_count_twice_and_unknown_ones_are_said():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x))

    with pytest.raises(UserError, match="unused"):
        multiply_adds(Twice(), torch.zeros(1, 4))
    module = Twice()
    del module.unused
    assert multiply_adds(module, torch.zeros(1, 4))["inner.weight"] == 32
    module.train()
    multiply_adds(module, torch.zeros(1, 4))
    assert module.training


def test_speed_up_by_hand():
    module = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 30, bias=False))
    masks = {"0.weight": torch.zeros(10, 10, dtype=torch.bool), "1.weight": torch.ones(30, 10, dtype=torch.bool)}
    masks["0.weight"][:5] = True
    assert speed_up(module, torch.zeros(1, 10), masks) == 400 / 350
    with pytest.raises(UserError, match="Nothing is left"):
        speed_up(module, torch.zeros(1, 10), {name: torch.zeros_like(mask) for name, mask in masks.items()})
    level = choose_masks(NET, 0.75, "layerwise")
    assert speed_up(NET, X, level) == pytest.approx(4, rel=0.01)
    costs = inference_costs(NET, X, level)
    kept = sum(int(mask.sum()) for mask in level.values())
    assert costs["compression of prunable weights"] == 19_608 / kept
    assert costs["compression of the model"] == 19_954 / (346 + kept)


def test_sparse_files_hold_everything_and_are_checked(tmp_path):
    pruned, file = copy.deepcopy(NET), tmp_path / "net.safetensors"
    masks = choose_masks(pruned, 0.9)
    enforce(pruned, masks)
    assert save_sparse(pruned, file) == file.stat().st_size == len(pack_sparse(pruned, masks))
    fresh = make_network("resnet8", seed=5)
    read = load_sparse(file, fresh)
    assert all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), fresh.state_dict().values()))
    assert all(torch.equal(read[name], masks[name]) for name in masks)
    tensors = safetensors.torch.load_file(file)
    tensors["values/conv.weight"] = tensors["values/conv.weight"][:-1].clone()
    for content in (b"", safetensors.torch.save(tensors), safetensors.torch.save({"a": torch.ones(2)})):
        file.write_bytes(content)
        with pytest.raises(UserError, match="holds no sparse model"):
            load_sparse(file, fresh)


def test_filters_alone_are_whole_and_as_many_in_every_convolution():
    masks = choose_masks(NET, 0.25, "filters")
    for name, mask in masks.items():
        rows = mask.flatten(1)
        assert (rows.all(1) == rows.any(1)).all()
        assert int(rows.all(1).sum()) == (len(rows) if name == "linear.weight" else len(rows) - round(0.25 * len(rows)))
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Conv1d(4, 8, 3))
    masks = choose_masks(transposed, 0.5, "filters")
    assert masks["0.weight"].all() and masks["1.weight"].flatten(1).any(1).sum() == 4


def test_filter_chains_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(UserError, match="pip install"):
        filter_chains(NET, X)


@pytest.mark.parametrize("scope", SCOPES)
def test_chains_leave_the_net_and_nothing_changes(scope):
    pytest.importorskip("torch_pruning", reason="the extra zootwins[filters]")
    net = resnet8()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.normal_()
                layer.running_mean.normal_()
    chains = filter_chains(net, X)
    names = [[name for name, _ in chain.writers] for chain in chains]
    assert sorted(sum(names, [])) == sorted(name for name in choose_masks(net, 0.1) if name != "linear.weight")
    assert ["conv.weight", "groups.0.0.conv2.weight"] in [sorted(each) for each in names]  # added to each other
    earlier = FilterChains(X, scope).masks(net, 0.25)
    masks = FilterChains(X, scope).masks(net, 0.5, earlier)
    enforce(net.eval(), masks)
    smaller = without_pruned_filters(net, masks, X)
    assert torch.allclose(net(X), smaller(X), atol=1e-4)
    assert sparsity(earlier) < sparsity(masks) and parameter_count(smaller) < parameter_count(net) * 0.6
    if scope == "uniform":
        assert smaller.conv.weight.shape[0] == 4 and smaller.linear.weight.shape == (10, 16)
    with pytest.raises(UserError):
        FilterChains(X, "local").masks(net, 0.5)
