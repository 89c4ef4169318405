"""Masks of any module: what others' users complained about, and the rules of the populations."""
import copy
import threading

import pandas as pd
import pytest
import safetensors.torch
import torch
from small import IMAGES
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.module_masks import (
    Pattern, check_fit, choose_masks, enforce, holding, load_masks, plain_state, prunable_weights, revived, save_masks,
    snip_saliency, sparsity, sparsity_table, unwrapped,
)
from zootwins.networks import make_network
from zootwins.population import Population
from zootwins.selectors import SELECTORS, Selector, magnitude_scores, prune

NET = make_network("resnet8", channels=1, seed=1)
X, Y = IMAGES.x_train[:32], IMAGES.y_train[:32]


def loop(model, optimizer, steps=3):
    "Somebody's training."
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "filters"])
@pytest.mark.parametrize("level", [0.3, 0.77])
def test_a_module_is_a_population_of_one(selector, level):
    weights = {name: tensor.detach()[None] for name, tensor in build("cnn_small_1ch").named_parameters()}
    told = pd.DataFrame({"model": [0], "seed": [4], "activation": ["tanh"], "dropout": [0.0]})
    module = Population(weights, told, "cnn_small_1ch").to_module(0)
    streams = type(module).__name__ if selector == "random" else "cnn_small_1ch"
    _, expected = prune(Population(weights, told, streams), level, selector, images=IMAGES)
    found = choose_masks(module, level, selector, data=IMAGES, seed=4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name][0]) for name in found)


@pytest.mark.parametrize("selector", ["global", "layerwise", "uniform+", "erk", "lamp", "random", "snip"])
def test_phases_are_nested_and_their_counts_exact(selector):
    total, earlier = sum(w.numel() for w in prunable_weights(NET).values()), None
    for level in (0.5, 0.75, 0.9):
        masks = choose_masks(NET, level, selector, earlier, data=(X, Y))
        kept = sum(int(mask.sum()) for mask in masks.values())
        wanted = total - round(level * total)
        by_layer = sum(mask.numel() - round(level * mask.numel()) for mask in masks.values())
        assert kept == (by_layer if selector == "layerwise" else wanted)
        assert sparsity(masks) == (total - kept) / total
        assert earlier is None or all((masks[name] <= earlier[name]).all() for name in masks)
        earlier = masks


def test_own_functions_and_own_rules_choose():
    inverse = lambda module, data: {name: -weight.abs() for name, weight in prunable_weights(module).items()}
    masks = choose_masks(NET, 0.5, inverse)
    weights = torch.cat([weight.detach().abs()[masks[name]] for name, weight in prunable_weights(NET).items()])
    gone = torch.cat([weight.detach().abs()[~masks[name]] for name, weight in prunable_weights(NET).items()])
    assert weights.max() <= gone.min()
    rows = choose_masks(NET, 0.5, lambda module, data: {"linear.weight": module.linear.weight.norm(dim=1)})
    assert rows["linear.weight"].all(1).sum() == 5 and rows["conv.weight"].all()
    seven = Selector("seven", magnitude_scores, lambda shapes, level: dict.fromkeys(shapes, 7))
    assert all(mask.sum() == 7 for mask in choose_masks(NET, 0.5, seven).values())
    with pytest.raises(UserError, match="do not fit"):
        choose_masks(NET, 0.5, lambda module, data: {"linear.weight": torch.ones(3)})


def test_only_matrices_of_layers_are_pruned():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
            self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8)])
            self.up, self.recurrent = nn.ConvTranspose2d(3, 4, 2), nn.LSTM(8, 8)
            self.twice, self.tied = nn.Linear(8, 8), nn.Linear(8, 9)
            self.again, self.tied.weight = self.twice, self.embed.weight

    weights = prunable_weights(Many())
    assert set(weights) == {"attention.q_proj_weight", "attention.k_proj_weight", "attention.v_proj_weight",
                            "attention.out_proj.weight", "up.weight", "recurrent.weight_ih_l0",
                            "recurrent.weight_hh_l0", "twice.weight"}
    masks = choose_masks(Many(), 0.5, "lamp")
    assert masks.keys() == weights.keys() and abs(sparsity(masks) - 0.5) < 1e-3


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Embedding(3, 3)),
    nn.Sequential(nn.LazyLinear(3)),
    nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
])
def test_models_without_weights_to_prune_are_refused(model):
    with pytest.raises(UserError):
        choose_masks(model, 0.5)


def test_hooks_of_torch_have_to_be_removed_first():
    layer = nn.Linear(4, 4)
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(UserError, match="prune.remove"):
        choose_masks(nn.Sequential(layer), 0.5)
    torch_prune.remove(layer, "weight")
    assert choose_masks(nn.Sequential(layer), 0.5)["0.weight"].sum() == 8


def test_diverged_models_are_refused():
    broken = copy.deepcopy(NET)
    broken.conv.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="diverged"):
        choose_masks(broken, 0.5)


def test_masks_of_another_model_are_refused():
    masks = choose_masks(NET, 0.5)
    for wrong in (choose_masks(make_network("resnet8", channels=3), 0.5), {}, {n: m.float() for n, m in masks.items()}):
        with pytest.raises(UserError, match="not of this model"):
            check_fit(NET, wrong)


@pytest.mark.parametrize("optimizer", [sgd, lambda m: torch.optim.Adam(m.parameters(), 1e-2, weight_decay=1e-2),
                                       lambda m: torch.optim.AdamW(m.parameters(), 1e-2, amsgrad=True),
                                       lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, momentum=0.9)])
def test_no_weight_comes_back_through_the_optimizer(optimizer):
    masks = choose_masks(NET, 0.9)
    free, held = copy.deepcopy(NET), copy.deepcopy(NET)
    enforce(free, masks)
    loop(free, optimizer(free))
    with holding(held, masks):
        stepping = optimizer(held)
        loop(held, stepping)
    assert revived(free, masks) > 10_000 and revived(held, masks) == 0
    for name, weight in prunable_weights(held).items():
        for remembered in stepping.state[weight].values():
            if remembered.shape == weight.shape:
                assert (remembered[~masks[name]] == 0).all()


def test_momentum_from_before_pruning_moves_nothing_back():
    model, masks = copy.deepcopy(NET), choose_masks(NET, 0.9)
    optimizer = sgd(model)
    loop(model, optimizer)
    enforce(model, masks, optimizer)
    model.zero_grad()
    for weight in prunable_weights(model).values():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert revived(model, masks) == 0


def test_nothing_is_held_after_the_block_and_other_models_never():
    masks, held, other = choose_masks(NET, 0.9), copy.deepcopy(NET), copy.deepcopy(NET)
    with pytest.raises(KeyboardInterrupt), holding(held, masks):
        loop(other, sgd(other))
        raise KeyboardInterrupt
    assert revived(other, masks) > 10_000
    loop(held, sgd(held))
    assert revived(held, masks) > 10_000
    with holding(other, masks), pytest.raises(UserError, match="held already"), holding(other, masks):
        pass


def test_copies_of_a_held_model_are_ordinary_models():
    masks, model = choose_masks(NET, 0.9), copy.deepcopy(NET)
    with holding(model, masks):
        loop(model, sgd(model))
        copied = copy.deepcopy(model)
    assert same(model, copied) and not copied._forward_pre_hooks and list(copied.state_dict()) == list(NET.state_dict())
    with holding(copied, masks):
        loop(copied, sgd(copied))
    assert revived(copied, masks) == 0


def test_pruning_goes_on_through_several_fits():
    model, earlier = copy.deepcopy(NET), None
    for level in (0.5, 0.75, 0.9):
        earlier = choose_masks(model, level, earlier=earlier)
        with holding(model, earlier):
            loop(model, sgd(model))
        assert sparsity_table(model).loc["prunable", "sparsity"] == pytest.approx(sparsity(earlier))


def test_weights_and_masks_reload_and_train_on_alike(tmp_path):
    masks, model = choose_masks(NET, 0.9), copy.deepcopy(NET)
    with holding(model, masks):
        loop(model, sgd(model))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_masks(masks, tmp_path / "masks.safetensors")
    fresh = make_network("resnet8", channels=1, seed=9)
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    read = load_masks(tmp_path / "masks.safetensors")
    for one, its in ((model, masks), (fresh, read)):
        with holding(one, its):
            loop(one, sgd(one))
    assert same(model, fresh) and revived(fresh, masks) == 0


def test_compiled_and_parallel_models_share_masks_with_the_plain_one():
    masks = choose_masks(NET, 0.9)
    wrappings = (lambda m: torch.compile(m, backend="eager"), nn.DataParallel,
                 lambda m: nn.DataParallel(torch.compile(m, backend="eager")))
    plain = copy.deepcopy(NET)
    with holding(plain, masks):
        loop(plain, sgd(plain), 1)
    for wrap in wrappings:
        model = wrap(copy.deepcopy(NET))
        assert all(torch.equal(masks[name], mask) for name, mask in choose_masks(model, 0.9).items())
        with holding(model, masks):
            loop(model, sgd(model), 1)
        assert revived(model, masks) == 0 and list(plain_state(model.state_dict())) == list(NET.state_dict())
        fresh = make_network("resnet8", channels=1)
        fresh.load_state_dict(plain_state(model.state_dict()))
        assert torch.allclose(fresh.conv.weight, plain.conv.weight, atol=1e-6)
        assert type(unwrapped(model)) is type(NET)
    inner = copy.deepcopy(NET)
    inner.groups[0] = torch.compile(inner.groups[0], backend="eager")
    check_fit(inner, masks)


def test_mixed_precision_with_a_scaler_that_skips_a_step():
    masks, model = choose_masks(NET, 0.9), copy.deepcopy(NET)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with holding(model, masks):
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(X), Y)
            scaler.scale(loss * (torch.inf if step == 1 else 1.0)).backward()
            before = model.conv.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model.conv.weight) == (step == 1)
    assert revived(model, masks) == 0 and scaler.get_scale() == 2.0**15


def test_threads_hold_their_own_copies():
    levels, ended = [0.3, 0.5, 0.7, 0.9], {}

    def work(level):
        model, masks = copy.deepcopy(NET), choose_masks(NET, level)
        with holding(model, masks):
            loop(model, sgd(model))
        ended[level] = (
            revived(model, masks),
            sparsity_table(model).loc["prunable", "kept"] == sum(m.sum() for m in masks.values()),
        )

    threads = [threading.Thread(target=work, args=(level,)) for level in levels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == dict.fromkeys(levels, (0, True))


def test_pruned_numbers_that_are_none_become_zero():
    masks, model = choose_masks(NET, 0.9), copy.deepcopy(NET)
    model.conv.weight.data[~masks["conv.weight"]] = torch.nan
    enforce(model, masks)
    assert model.conv.weight.isfinite().all()


@pytest.mark.parametrize(
    "content", [b"", b"nonsense" * 10, safetensors.torch.save({"a": torch.ones(3)}), safetensors.torch.save({})]
)
def test_files_that_hold_no_masks_are_refused(tmp_path, content):
    (tmp_path / "masks.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="holds no masks"):
        load_masks(tmp_path / "masks.safetensors")


def test_patterns_keep_the_largest_of_every_group():
    module = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 3))
    module[0].weight.data = torch.tensor([[1.0, -4, 3, 2, 0, 0, 5, -6], [8, 7, 6, 5, 4, 3, 2, 1]])
    masks = choose_masks(module, 0.5, Pattern(2, 4))
    assert (
        masks["0.weight"].int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]]
        and masks["1.weight"].all()
    )
    assert sparsity(masks) == 8 / 22
    for pattern, level in ((Pattern(2, 4), 0.6), (Pattern(4, 4), 0.0)):
        with pytest.raises(UserError, match="prune by that"):
            choose_masks(module, level, pattern)


def test_snip_scores_frozen_and_unused_layers_and_leaves_them_so():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10))
    free = snip_saliency(net, (IMAGES.x_train, IMAGES.y_train))
    net[1].weight.requires_grad_(False)
    frozen = snip_saliency(net, (IMAGES.x_train, IMAGES.y_train))
    assert all(torch.equal(free[name], frozen[name]) for name in free) and not net[1].weight.requires_grad
    net.register_module("spare", nn.Linear(2, 2))
    net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
    assert (snip_saliency(net, (IMAGES.x_train, IMAGES.y_train))["spare.weight"] == 0).all()
