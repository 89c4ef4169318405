"""Pruning during training: every method against its own paper's definition, on cases worked by hand."""
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from small import IMAGES, says
from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.datasets import subset
from zootwins.during_training import (
    BIMP, DNW, DPF, DST, GMP, GRIDS, GSM, LC, METHODS, SET, STR, THRESHOLD, Memory, Method, RigL, SparseRule,
    largest, paper_grid, sparsify_module, sparsify_population, speed_up, table_2,
)
from zootwins.inference_costs import multiply_adds
from zootwins.module_masks import prunable_weights
from zootwins.networks import make_network
from zootwins.population import sample_population
from zootwins.retraining import Rates, TrainSettings, train_network
from zootwins.schedules import initial_factors
from zootwins.selectors import prunable
from zootwins.streams import stream_keys
from zootwins.training import Recipe, train_epoch
from zootwins.zoos import ZOOS

NAME = "fc.weight"
SHORT = Recipe("digits_seed", "during", epochs=2, batch_size=20, schedule="LLR")


def weights(*rows):
    "One model with one matrix."
    return {NAME: torch.tensor([rows], dtype=torch.float64)}


def flat(found, name=NAME):
    return found[name].flatten().tolist()


def after(method, w, level=0.5):
    "The memory after the first masks."
    memory = Memory(level)
    method.change(w, level, memory)
    memory.changes += 1
    return memory


W = weights([0.1, -0.2], [0.3, -0.4])
G = weights([1.0, 2.0], [3.0, 4.0])


def test_largest_is_global_over_layers():
    two = {"a.weight": torch.tensor([[0.1, 0.9]]), "b.weight": torch.tensor([[0.2, 0.8]])}
    kept = largest(two, 0.5)
    assert kept["a.weight"].tolist() == [[False, True]] and kept["b.weight"].tolist() == [[False, True]]


def test_gmp_is_cubic_as_zhu_and_gupta_have_it():
    s_f, n, steps = 0.9, 4, 100
    by_hand = {20 * k: s_f + (0 - s_f) * (1 - (20 * k) / (n * 20)) ** 3 for k in range(1, n + 1)}
    found = GMP(events=n).when(s_f, steps)
    assert list(found) == list(by_hand) and list(found.values()) == pytest.approx(list(by_hand.values()))
    assert found[80] == s_f
    with pytest.raises(UserError, match="4 events do not fit into a run of 4"):
        GMP(events=4).when(s_f, 4)


def test_gmp_sees_and_reaches_what_is_left():
    memory = after(GMP(), W)
    assert flat(GMP().seen(W, memory)) == [0, 0, 0.3, -0.4]
    assert flat(GMP().reach(W, G, memory)) == [0, 0, 3, 4]


def test_dpf_applies_the_pruned_gradient_to_dense_weights():
    memory = after(DPF(), W)
    seen, reached = DPF().seen(W, memory), DPF().reach(W, G, memory)
    assert flat(seen) == [0, 0, 0.3, -0.4] and flat(reached) == [1, 2, 3, 4]
    moved = {NAME: W[NAME] - 0.2 * reached[NAME]}  # w - eta g(m * w) = (-.1, -.6, -.3, -1.2)
    assert flat(DPF().seen(moved, after(DPF(), moved))) == pytest.approx([0, -0.6, 0, -1.2])


def test_dpf_finds_masks_every_16_steps_at_the_last_level():
    found = DPF(events=2).when(0.8, 90)
    rises = GMP(events=2).when(0.8, 90)
    assert list(found) == [30, 46, 60, 62, 78] and [found[at] for at in (30, 46)] == [rises[30]] * 2
    assert [found[at] for at in (60, 62, 78)] == [0.8] * 3


def test_dnw_has_the_final_sparsity_at_every_step():
    assert DNW().when(0.7, 5) == dict.fromkeys(range(5), 0.7)
    memory = after(DNW(), W, 0.75)
    assert flat(DNW().seen(W, memory)) == [0, 0, 0, -0.4] and flat(DNW().reach(W, G, memory)) == [1, 2, 3, 4]


def test_gsm_lets_the_most_important_gradients_through():
    w, g = weights([0.1, -0.2], [0.3, -0.4]), weights([9.0, 1.0], [1.0, -2.0])
    assert flat(GSM().reach(w, g, Memory(0.5))) == [9, 0, 0, -2]  # |w g| = .9, .2, .3, .8
    assert flat(GSM().seen(w, Memory(0.5))) == flat(w) and GSM().when(0.5, 10) == {}
    assert flat(GSM().final(w, Memory(0.5))) == [0, 0, 0.3, -0.4]


def test_lc_pulls_as_the_augmented_lagrangian_does():
    method = LC(penalty=0.5, growth=2.0)
    memory = after(method, W)
    assert flat(memory.more["target"]) == [0, 0, 0.3, -0.4] and flat(memory.more["multiplier"]) == [0] * 4
    moved = weights([0.2, -0.1], [0.5, -0.4])
    assert flat(method.reach(moved, weights([0.0, 0.0], [0.0, 0.0]), memory)) == pytest.approx(
        [0.5 * 0.2, -0.5 * 0.1, 0.5 * 0.2, 0]
    )
    method.change(moved, 0.5, memory)
    memory.changes += 1
    assert flat(memory.more["target"]) == [0, 0, 0.5, -0.4]
    assert flat(memory.more["multiplier"]) == pytest.approx([-0.5 * 0.2, 0.5 * 0.1, 0, 0])  # lambda - mu (w - theta)
    reached = flat(method.reach(moved, weights([0.0, 0.0], [0.0, 0.0]), memory))
    assert reached == pytest.approx([1.0 * 0.2 + 0.1, -1.0 * 0.1 - 0.05, 0, 0])  # mu has doubled
    method.change(moved, 0.5, memory)  # theta is the projection of w - lambda / mu = (.3, -.15, .5, -.4)
    assert flat(memory.more["target"]) == pytest.approx([0, 0, 0.5, -0.4])


def test_lc_is_the_gradient_of_its_penalty():
    method, memory = LC(penalty=0.3), after(LC(penalty=0.3), W)
    memory.more["multiplier"] = weights([0.1, 0.2], [-0.1, 0.0])
    w = weights([0.2, -0.1], [0.5, -0.3])[NAME].requires_grad_()
    theta, multiplier = memory.more["target"][NAME], memory.more["multiplier"][NAME]
    (0.3 / 2 * (w - theta - multiplier / 0.3).square().sum()).backward()
    found = method.reach({NAME: w.detach()}, {NAME: torch.zeros_like(w)}, memory)
    assert torch.allclose(found[NAME], w.grad)


class Step(torch.autograd.Function):
    "A unit step with the paper's estimate for its derivative, as DST's authors define it."

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        inner = (2 - 4 * x.abs()) * (x.abs() <= 0.4)
        return gradient * (inner + 0.4 * ((x.abs() > 0.4) & (x.abs() <= 1)))


def test_dst_reaches_what_differentiation_gives():
    method, generator = DST(alpha=0.1), torch.Generator().manual_seed(1)
    w = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.rand(1, 3, generator=generator, dtype=torch.float64).requires_grad_()
    g = torch.randn(1, 3, 5, generator=generator, dtype=torch.float64)
    seen = w * Step.apply(w.abs() - t[..., None])
    ((seen * g).sum() + 0.1 * torch.exp(-t).sum()).backward()
    every = {NAME: w.detach(), NAME + THRESHOLD: t.detach()}
    memory = after(method, every)
    assert torch.equal(method.seen(every, memory)[NAME], seen.detach())
    reached = method.reach(every, {NAME: g}, memory)
    assert torch.allclose(reached[NAME], w.grad) and torch.allclose(reached[NAME + THRESHOLD], t.grad)


def test_dst_gives_an_empty_layer_its_weights_back():
    every = weights([0.1, -0.2], [0.3, -0.4]) | {NAME + THRESHOLD: torch.full((1, 2), 0.5)}
    memory = after(DST(), every)
    assert memory.masks[NAME].all() and flat(every, NAME + THRESHOLD) == [0, 0]
    half = weights([0.1, -0.2], [0.3, -0.4]) | {NAME + THRESHOLD: torch.tensor([[0.5, 0.35]])}
    assert after(DST(), half).masks[NAME].flatten().tolist() == [False, False, False, True]
    assert flat(half, NAME + THRESHOLD) == pytest.approx([0.5, 0.35])


def test_str_reaches_what_differentiation_gives():
    method = STR(first=-1.0)
    w = torch.tensor([[[0.1, -0.2], [0.3, -0.4]]], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    seen = w.sign() * F.relu(w.abs() - s.sigmoid())
    (seen * G[NAME]).sum().backward()
    every = W | method.thresholds(W)
    assert torch.allclose(method.seen(every, Memory(0.5))[NAME], seen.detach())
    reached = method.reach(every, G, Memory(0.5))
    assert torch.allclose(reached[NAME], w.grad) and torch.allclose(reached[NAME + THRESHOLD], s.grad)
    assert flat(method.seen(every, Memory(0.5))) == pytest.approx(
        [0, 0, 0.3 - 1 / (1 + math.e), -(0.4 - 1 / (1 + math.e))]
    )


SIX = {NAME: torch.tensor([[[0.1, -0.5, 0.4], [0.0, 0.0, 0.0]]], dtype=torch.float64)}
SLOPES = {NAME: torch.tensor([[[1.0, 9.0, 9.0], [2.0, -4.0, 3.0]]], dtype=torch.float64)}


def connected(progress=0.0, seed=0):
    "The six weights above, the first three of them in the mask."
    return Memory(0.5, {NAME: SIX[NAME] != 0}, progress=progress, keys=stream_keys("", "test", [seed]))


def test_rigl_drops_the_smallest_and_grows_where_the_dense_gradient_is_largest():
    memory, method = connected(), RigL(share=0.34)
    assert flat(method.reach(SIX, SLOPES, memory)) == [
        1, 9, 9, 0, 0, 0,
    ]  # what is off does not move, yet its gradient counts
    method.change(SIX, 0.5, memory)
    assert flat(memory.masks) == [False, True, True, False, True, False]
    assert flat(method.seen(SIX, memory)) == [0, -0.5, 0.4, 0, 0, 0]  # the new one begins at zero
    memory = connected()
    method.reach(SIX, {NAME: torch.tensor([[[5.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])}, memory)
    method.change(SIX, 0.5, memory)  # what was dropped has the largest gradient and is grown again, with its value
    assert flat(method.seen(SIX, memory)) == flat(SIX)


def test_rigl_replaces_a_share_that_falls_as_a_cosine():
    method = RigL(share=0.3, until=0.75)
    assert [method.replaced(progress) for progress in (0, 0.25, 0.375, 0.75)] == pytest.approx([0.3, 0.225, 0.15, 0])
    assert list(RigL(every=10, until=0.5).when(0.8, 60)) == [0, 10, 20] and set(
        RigL(every=10).when(0.8, 60).values()
    ) == {0.8}
    two, one = connected(0.0), connected(0.375)  # of three weights two fall at first, and one where the share is half
    for memory, left in ((two, 1), (one, 2)):
        RigL(share=0.7).reach(SIX, {NAME: torch.tensor([[[0.0, 0.0, 0.0], [2.0, -4.0, 3.0]]])}, memory)
        RigL(share=0.7).change(SIX, 0.5, memory)
        assert (memory.masks[NAME] & (SIX[NAME] != 0)).sum() == left and memory.masks[NAME].sum() == 3


def test_set_drops_the_smallest_and_grows_anywhere():
    grown = torch.zeros(6)
    for seed in range(200):
        memory = connected(0.7, seed)
        SET(share=0.34).change(SIX, 0.5, memory)
        mask = memory.masks[NAME].flatten()
        assert mask[1] and mask[2] and mask.sum() == 3
        grown += mask
    assert (grown[[0, 3, 4, 5]] > 30).all()  # 50 each on average
    again = connected(0.7, 199)
    SET(share=0.34).change(SIX, 0.5, again)
    assert torch.equal(again.masks[NAME].flatten(), mask)


@pytest.mark.parametrize("start, counts", [("erk", [24, 12]), ("uniform", [16, 20])])
def test_a_sparse_start_has_the_counts_of_its_rule(start, counts):
    w = {
        "a.weight": torch.ones(2, 4, 20),
        "b.weight": torch.ones(2, 10, 10),
    }  # 36 of 180 in proportion to 24 and 20, or 80 and 100
    memory = Memory(0.8, keys=stream_keys("", "test", [1, 2]))
    SET(start=start).change(w, 0.8, memory)
    found = [[int(mask.sum()) for mask in masks] for masks in memory.masks.values()]
    assert found == ([[20, 20], [16, 16]] if start == "erk" else [[n] * 2 for n in counts])
    assert not torch.equal(*memory.masks["b.weight"])  # each model has its own


@pytest.mark.parametrize("method", [SET(every=2), RigL(every=2)])
def test_sparsity_is_exact_and_constant_and_grown_weights_begin_at_nothing(method):
    net = small_net()
    optimizer, rule = (
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
        SparseRule(method, 0.7),
    )
    rule.start(net, optimizer, 12)
    before, changed = deepcopy(rule.memory.masks), 0
    for step in range(12):
        batch = torch.arange(20) + step % 4 * 20
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES.x_train[batch]), IMAGES.y_train[batch]).backward()
        rule.gradients(net, step / 12)
        optimizer.step()
        rule.stepped(net, optimizer, (step + 1) / 12)
        masks = rule.memory.masks
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.7 * 1540)
        for name, weight in prunable_weights(net).items():
            buffer, grown = optimizer.state[weight]["momentum_buffer"], (masks[name] & ~before[name])[0]
            assert (
                masks[name].sum() == before[name].sum()
                and (weight[~masks[name][0]] == 0).all()
                and (buffer[~masks[name][0]] == 0).all()
            )
            assert (weight[grown] == 0).all() and (buffer[grown] == 0).all()
            changed += int(grown.sum())
        before = deepcopy(masks)
    assert changed > 50


def test_bimp_shares_the_budget_and_restarts_the_rate():
    method, memory = BIMP(dense=0.5, events=2), Memory(0.75)
    assert method.when(0.75, 80) == {40: pytest.approx(0.5), 60: 0.75}
    assert [method.rate(step, 80, memory) for step in (0, 20)] == [1, 0.5]
    method.change(W, 0.5, memory)
    d = math.sqrt((0.01 + 0.04) / 0.3) / math.sqrt(0.5)  # |w - w_p| / (|w| sqrt(q))
    assert memory.first_rate.item() == pytest.approx(d)
    assert float(method.rate(40, 80, memory)) == pytest.approx(max(d, 20 / 40)) and float(
        method.rate(50, 80, memory)
    ) == pytest.approx(max(d, 0.5) / 2)
    assert float(method.rate(50, 80, memory)) == pytest.approx(0.5 * float(initial_factors(torch.tensor([d]), 20, 40)))


def test_grids_are_those_of_the_appendix():
    assert {name: len(paper_grid(name)) for name in GRIDS} == {
        "BIMP": 6, "GMP": 4, "DPF": 2, "GSM": 4, "LC": 2, "DNW": 2, "DST": 16,
    }
    assert {method.events for method, _ in paper_grid("GMP")} == {5, 9, 18, 45}
    assert [(method.momentum, other["wd"]) for method, other in paper_grid("GSM")] == [
        (0.9, 1e-4), (0.9, 1e-5), (0.95, 1e-4), (0.95, 1e-5),
    ]
    with pytest.raises(UserError, match="no method with a grid in the paper 'STR'"):
        paper_grid("STR")


@pytest.fixture(scope="module")
def start():
    population = sample_population(ZOOS["digits_seed"], 3)
    population.models = population.models.assign(optimizer="sgd", lr=0.05, wd=1e-4)
    return population


def zeros(population):
    return torch.cat([w.flatten(1) == 0 for w in prunable(population.weights).values()], 1).sum(1).tolist()


TOTAL = 2464 - 48


@pytest.mark.parametrize(
    "method",
    [
        GMP(events=2), DPF(events=2, every=3), BIMP(dense=0.5, events=2), GSM(), DNW(), LC(events=3), SET(every=4),
        RigL(every=4), Method(),
    ],
)
def test_every_model_ends_at_the_level(start, method):
    before = {name: tensor.clone() for name, tensor in start.weights.items()}
    found = sparsify_population(start, IMAGES, SHORT, method, 0.7)
    assert zeros(found) == [round(0.7 * sum(w[0].numel() for w in prunable(found.weights).values()))] * 3
    assert (
        all(tensor.isfinite().all() for tensor in found.weights.values())
        and found.weights.keys() == start.weights.keys()
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in start.weights.items())


@pytest.mark.parametrize("method", [DST(alpha=1e-2), STR(first=-3.0)])
def test_thresholds_are_learned_and_not_left_behind(start, method):
    found = sparsify_population(start, IMAGES, SHORT, method, 0.7)
    assert found.weights.keys() == start.weights.keys() and min(zeros(found)) > 0


@pytest.mark.parametrize(
    "method, m", [(GMP(events=2), 1), (DPF(events=2), 2), (STR(), 1), (SET(every=4), 1), (RigL(every=4), 1)]
)
def test_a_model_does_not_depend_on_its_neighbours(start, method, m):
    exact = replace(start, weights={name: tensor.double() for name, tensor in start.weights.items()})  # no near ties
    exact_x = {name: getattr(IMAGES, name).double() for name in ("x_train", "x_val", "x_test")}
    images = replace(IMAGES, **exact_x)
    together = sparsify_population(exact, images, SHORT, method, 0.6, m=m)
    alone = sparsify_population(exact[[1]], images, SHORT, method, 0.6, m=m)
    assert all(torch.allclose(together.weights[name][1], alone.weights[name][0], atol=1e-10) for name in alone.weights)


def test_dense_training_is_the_reference_engine(start):
    from zootwins.training import begin, model_keys

    found = sparsify_population(start, IMAGES, replace(SHORT, epochs=1), Method(), 0.0)
    state = begin(start, model_keys(SHORT, start.models))
    train_epoch(state, IMAGES.x_train, IMAGES.y_train, replace(SHORT, epochs=1))
    assert all(
        torch.allclose(found.weights[name], tensor, atol=1e-6) for name, tensor in state.population.weights.items()
    )


@pytest.mark.parametrize("method", [GMP(events=2), BIMP(dense=0.5, events=2), DPF(events=2)])
def test_soups_in_every_interval_keep_the_level(start, method):
    one, three = (sparsify_population(start, IMAGES, SHORT, method, 0.6, m=m) for m in (1, 3))
    assert zeros(one) == zeros(three) and "copy" not in three.models
    assert not torch.equal(one.weights["module_list.0.weight"], three.weights["module_list.0.weight"])
    late = sparsify_population(start, IMAGES, SHORT, method, 0.6, m=3, branch=1.0)
    assert all(torch.equal(late.weights[name], one.weights[name]) for name in one.weights)


@pytest.mark.parametrize("call, told", [
    (lambda p: sparsify_population(p, IMAGES, SHORT, DNW(), 0.5, m=2), "DNW cannot be trained in 2 copies"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, GMP(), 0.5, m=0), "at least one copy"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, GMP(), 1.0), "sparsity level of 1.0"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, GMP(events=0), 0.5), "at least one for events"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, BIMP(dense=1.0), 0.5), "share between 0 and 1"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, RigL(share=1.2), 0.5), "at most 1 for share, and not 1.2"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, SET(start="dense"), 0.5), "no start 'dense'"),
    (lambda p: sparsify_population(p, IMAGES, SHORT, SET(every=0), 0.5), "at least one for every"),
])
def test_what_cannot_be(start, call, told):
    with pytest.raises(UserError, match=told) as error:
        call(start)
    assert says(error.value)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def module_zeros(module):
    return sum(int((weight == 0).sum()) for weight in prunable_weights(module).values())


@pytest.mark.parametrize(
    "method, m",
    [
        (GMP(events=2), 1), (GMP(events=2), 2), (DPF(events=2), 2), (BIMP(dense=0.5), 2), (GSM(), 1), (LC(events=3), 1),
        (DNW(), 1), (SET(every=4), 1), (RigL(every=4), 1),
    ],
)
def test_modules_end_at_the_level_too(method, m):
    module = sparsify_module(small_net(), IMAGES, replace(SHORT, lr=0.05), method, 0.7, m=m)
    idle = 5 if isinstance(method, SET) else 0  # grown where no gradient arrives
    assert 0 <= module_zeros(module) - round(0.7 * (100 + 1440)) <= idle
    assert (module[1].weight != 0).all() and module[1].running_mean.abs().sum() > 0


def test_wrapped_modules_and_frozen_or_unused_layers():
    recipe, plain = replace(SHORT, lr=0.05, epochs=1), small_net()
    sparsify_module(plain, IMAGES, recipe, GMP(events=1), 0.5)
    wrapped = nn.DataParallel(torch.compile(small_net(), backend="eager"))
    assert sparsify_module(wrapped, IMAGES, recipe, GMP(events=1), 0.5) is wrapped
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))
    frozen = small_net()
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(UserError, match="0.weight is frozen"):
        sparsify_module(frozen, IMAGES, recipe, GMP(events=1), 0.5)
    before, optimizer = (
        frozen[0].weight.clone(),
        torch.optim.SGD(frozen.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2),
    )
    rule = SparseRule(RigL(every=1), 0.5)
    rule.start(frozen, optimizer, 4)
    for step in range(4):
        optimizer.zero_grad()
        F.cross_entropy(frozen(IMAGES.x_train[:20]), IMAGES.y_train[:20]).backward()
        rule.gradients(frozen, step / 4)
        optimizer.step()
        rule.stepped(frozen, optimizer, (step + 1) / 4)
    kept = frozen[0].weight != 0
    assert torch.equal(frozen[0].weight[kept], before[kept]) and (frozen[4].weight != 0).any()


def test_dropout_follows_the_seed_in_the_methods_own_loop():
    def trained(seed):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))
        torch.rand(number)
        before = torch.get_rng_state()
        sparsify_module(net, IMAGES, replace(SHORT, epochs=1), GMP(events=1), 0.5, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return net[1].weight

    number = 1
    first = trained(0)
    number = 7
    assert torch.equal(first, trained(0)) and not torch.equal(first, trained(3))


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_in_a_foreign_loop_is_the_same_method(name):
    "SGD written out here and the package's own loop give the same network, for every method."
    method = (
        METHODS[name](events=2)
        if name in ("GMP", "BIMP", "DPF", "LC")
        else METHODS[name](**{"every": 1} if name in ("SET", "RigL") else {})
    )
    recipe, one, other = replace(SHORT, lr=0.05, schedule="constant"), small_net(), small_net()
    images = subset(IMAGES, 40, 10)
    sparsify_module(one, images, recipe, method, 0.5)
    rule, optimizer = (
        SparseRule(method, 0.5),
        torch.optim.SGD(other.parameters(), lr=0.05, momentum=method.momentum, weight_decay=1e-4),
    )
    rule.start(other, optimizer, 4)
    from zootwins.streams import epoch_order
    from zootwins.training import model_keys
    from zootwins.population import plain_models
    key = model_keys(recipe, plain_models(1).assign(seed=0))[0]
    for step in range(4):
        batch = epoch_order(40, key, 1 + step // 2)[step % 2 * 20 : step % 2 * 20 + 20]
        optimizer.zero_grad()
        F.cross_entropy(other(images.x_train[batch]), images.y_train[batch]).backward()
        rule.gradients(other, step / 4)
        optimizer.step()
        rule.stepped(other, optimizer, (step + 1) / 4)
    for (path, a), (_, b) in zip(one.named_parameters(), other.named_parameters()):
        assert torch.allclose(a, b, atol=1e-5), path


@pytest.mark.parametrize("method", [GMP(events=3), DPF(events=3, every=2), LC(events=4), SET(every=4), RigL(every=4)])
def test_a_rule_goes_on_from_a_file(tmp_path, method):
    settings, rates = TrainSettings(batch_size=20, augment=False), Rates(lr=0.05, epochs=3)
    x, y, start = IMAGES.x_train, IMAGES.y_train, small_net()
    whole = train_network(deepcopy(start), x, y, rates, settings, 0, SparseRule(method, 0.6))
    train_network(
        deepcopy(start), x, y, rates, settings, 0, SparseRule(method, 0.6), checkpoint=tmp_path / "half", until=2
    )
    again = train_network(
        deepcopy(start), x, y, rates, settings, 0, SparseRule(method, 0.6), checkpoint=tmp_path / "half"
    )
    assert module_zeros(whole) == round(0.6 * 1540)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_a_network_with_batchnorm_and_shortcuts():
    module = make_network("resnet8")
    images = IMAGES.__class__("", *[torch.randn(20, 3, 8, 8), torch.arange(20) % 10] * 3)
    sparsify_module(module, images, Recipe("", "", epochs=2, lr=0.05, batch_size=10), GMP(events=1), 0.5)
    total = sum(w.numel() for w in prunable_weights(module).values())
    assert module_zeros(module) == round(total / 2)


def test_speed_up_follows_the_layers(start):
    work = multiply_adds(build("cnn_small_1ch"), IMAGES.x_test[:1])
    assert list(work.values()) == [24 * 24 * 8 * 25, 8 * 8 * 6 * 8 * 25, 3 * 3 * 4 * 6 * 4, 36 * 20, 20 * 10, 0]
    assert speed_up(start, IMAGES.x_test[:1]).tolist() == pytest.approx([1.0] * 3)
    half = deepcopy(start)
    half.weights["module_list.0.weight"][0, :4] = 0
    by_hand = sum(work.values()) / (sum(work.values()) - work["module_list.0.weight"] / 2)
    assert speed_up(half, IMAGES.x_test[:1])[0].item() == pytest.approx(by_hand)


def test_table_2_by_hand(start):
    table = table_2({("GMP", 0.5): torch.tensor([0.5, 0.6, 0.7])}, {("GMP", 0.5): start}, IMAGES.x_test[:1], "test")
    assert table.layout.loc["GMP"].tolist() == ["60.00 ± 10.00", "1.0 ± 0.0", "0.0 ± 0.0"]
