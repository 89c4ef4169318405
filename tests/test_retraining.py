"""The plain trainer, and statistics of BatchNorm."""
import copy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from small import IMAGES
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from zootwins.batch_statistics import (
    batches, check_fixed, class_probabilities, evaluate, recompute_statistics, statistic_layers,
)
from zootwins.core import UserError
from zootwins.datasets import load_images
from zootwins.networks import make_network
from zootwins.retraining import Rates, Rule, Trainer, TrainSettings, augmented, images_of, state_digest, train_network
from zootwins.schedules import epoch_factors

NET = make_network("resnet8", channels=1, seed=1)
SETTINGS, RATES = TrainSettings(batch_size=16), Rates(0.05, 2)
X, Y = IMAGES.x_train, IMAGES.y_train


def trained(rates=RATES, settings=SETTINGS, seed=1, net=NET, **how):
    return train_network(copy.deepcopy(net), X, Y, rates, settings, seed, **how)


def bits(module):
    return state_digest(module.state_dict())


def test_rates_are_those_of_the_schedules():
    for name in ("constant", "FT", "LRW", "SLR", "CLR", "LLR"):
        rates = Rates(0.2, 4, name, (0.1, 0.1, 0.05, 0.02, 0.01))
        there = [rates((1 + step / 5) / 4) for step in range(5)]
        assert there == pytest.approx((0.2 * epoch_factors(name, 2, 4, 5, rates.history)).tolist())
    for wrong in (dict(lr=0), dict(epochs=0), dict(schedule="ALLR"), dict(schedule="cosine"), dict(warm_up=1.0)):
        with pytest.raises(UserError):
            Rates(**wrong)


def test_seed_and_settings_decide_and_nothing_else():
    torch.manual_seed(5)
    expected = bits(trained())
    torch.rand(3)
    assert bits(trained()) == expected
    changed = [dict(seed=2), dict(rates=Rates(0.05, 2, first=0.5)), *(
        dict(settings=replace(SETTINGS, **{name: value})) for name, value in (
            ("augment", False), ("flip", False), ("nesterov", False), ("momentum", 0.0), ("weight_decay", 0.1),
            ("amp", True), ("batch_size", 20)))]
    assert len({expected, *(bits(trained(**how)) for how in changed)}) == 1 + len(changed)
    channels_last = trained(settings=replace(SETTINGS, channels_last=True))
    assert torch.allclose(channels_last.conv.weight, trained().conv.weight, atol=1e-4)


def test_dropout_follows_the_seed_and_leaves_other_random_numbers_alone():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(X[0].numel(), 10))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = bits(trained(net=net))
    assert torch.rand(1) == expected and bits(trained(net=net)) == one != bits(trained(net=net, seed=2))


def test_a_step_is_torchs():
    net = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 10))
    ours = train_network(copy.deepcopy(net), X[:16], Y[:16], Rates(0.1, 3), replace(SETTINGS, augment=False), 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[:16]), Y[:16]).backward()
        optimizer.step()
    assert torch.allclose(ours[1].weight, net[1].weight, atol=1e-6)


def test_crops_and_mirrors():
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    shifted = augmented(x, torch.tensor([[0, 2, 0]]))[0, 0]  # one down, one to the left
    assert torch.equal(shifted[1:, :-1], x[0, 0, :-1, 1:]) and (shifted[0] == 0).all() and (shifted[:, -1] == 0).all()
    assert torch.equal(augmented(x, torch.tensor([[1, 1, 1]])), x.flip(3))
    assert torch.equal(augmented(x, torch.tensor([[1, 1, 1]]), flip=False), x)


@pytest.mark.parametrize("until", [1, 2])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, until):
    rates, file = Rates(0.05, 3), tmp_path / "a" / "training.safetensors"
    trained(rates, checkpoint=file, until=until)
    assert bits(trained(rates, checkpoint=file)) == bits(trained(rates))
    for how in (
        dict(seed=2),
        dict(net=make_network("resnet8", channels=1, seed=2)),
        dict(settings=replace(SETTINGS, flip=False)),
    ):
        with pytest.raises(UserError, match="another training"):
            trained(rates, checkpoint=file, **how)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="holds no training"):
        trained(rates, checkpoint=file)


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    script = (
        "from test_retraining import *; import sys\n"
        "print(bits(trained(Rates(0.05, 60), checkpoint=sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "t.safetensors")]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE)
    while not (tmp_path / "t.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = bits(trained(Rates(0.05, 60), checkpoint=tmp_path / "t.safetensors"))
    assert resumed == bits(trained(Rates(0.05, 60)))


def test_a_rule_sees_every_step_and_its_state_is_kept(tmp_path):
    class Counting(Rule):
        def __init__(self):
            self.seen, self.count = [], torch.zeros(1)

        def start(self, module, optimizer, steps):
            self.steps = steps

        def penalty(self, module, progress):
            return 1e-3 * module.conv.weight.square().sum()

        def gradients(self, module, progress):
            self.seen.append(progress)

        def stepped(self, module, optimizer, progress):
            self.count += 1

        def state(self):
            return {"count": self.count}

        def load(self, state):
            self.count = state["count"]

    whole, first, second = Counting(), Counting(), Counting()
    expected = bits(trained(rule=whole))
    trained(rule=first, checkpoint=tmp_path / "t", until=1)
    assert bits(trained(rule=second, checkpoint=tmp_path / "t")) == expected != bits(trained())
    assert whole.count == second.count == whole.steps == 10 and whole.seen == [k / 10 for k in range(10)]


def test_divergence_is_said():
    with pytest.raises(UserError, match="diverged in epoch"):
        trained(Rates(1e12, 3))


def test_images_that_a_function_loads_are_loaded_once():
    load = partial(load_images, "digits")
    assert images_of(load) is images_of(partial(load_images, "digits"))
    trainer = Trainer(IMAGES, SETTINGS)
    assert bits(trainer(copy.deepcopy(NET), 1, Rates(0.05, 2))) == bits(trained())
    assert trainer.told() != Trainer(load, SETTINGS).told()


class Kinds(nn.Module):
    "Every kind of layer with statistics."

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3, momentum=0.3)
        self.sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))
        self.instance, self.without = (
            nn.InstanceNorm2d(3, track_running_stats=True),
            nn.BatchNorm2d(3, track_running_stats=False),
        )
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, x):
        y = self.dropout(self.instance(self.without(self.two(x))))
        return self.linear(self.three(self.one(y.flatten(2)).reshape(*x.shape, 1)).mean((2, 3, 4)))


def test_every_kind_of_statistics_is_the_mean_over_equal_batches():
    net, x = Kinds(), 3 + 2 * torch.randn(700, 3, 4, 4)
    net.train()
    net.instance.eval()
    data = replace(IMAGES, x_train=x, y_train=torch.zeros(700, dtype=torch.int64))
    assert len(statistic_layers(net)) == 5 == recompute_statistics(net, data)
    chunks = [x for (x,), _, _ in batches(data, "train")]
    assert {len(chunk) for chunk in chunks} == {233, 234}
    assert torch.allclose(net.two.running_mean, torch.stack([c.mean((0, 2, 3)) for c in chunks]).mean(0), atol=1e-5)
    assert torch.allclose(net.two.running_var, torch.stack([c.var((0, 2, 3)) for c in chunks]).mean(0), atol=1e-4)
    assert net.three.momentum == 0.3 and net.training and not net.instance.training
    before = state_digest(net.state_dict())
    recompute_statistics(net, data)
    assert state_digest(net.state_dict()) == before


def test_statistics_are_those_of_torch_where_nothing_is_dropped():
    ours, theirs = copy.deepcopy(NET), copy.deepcopy(NET)
    recompute_statistics(ours, IMAGES)
    update_bn([x for (x,), _, _ in batches(IMAGES, "train")], theirs)
    assert bits(ours) == bits(theirs)
    assert recompute_statistics(nn.Sequential(nn.Linear(2, 2)), IMAGES) == 0


def test_loaders_without_a_fixed_order_or_with_augmentation_are_refused():
    class Augmented(TensorDataset):
        def __getitem__(self, i):
            return (super().__getitem__(i)[0] + torch.rand(1), self.tensors[1][i])

    pairs, generator = TensorDataset(X, Y), torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    for loader in (DataLoader(pairs, 20, shuffle=True), DataLoader(pairs, 20, shuffle=True, generator=generator),
                   DataLoader(Augmented(X, Y), 20)):
        with pytest.raises(UserError, match="and statistics need"):
            check_fixed(loader)
    check_fixed(DataLoader(pairs, 20))
    assert torch.equal(state, torch.get_rng_state())
    plain = copy.deepcopy(NET)
    recompute_statistics(plain, {"train": DataLoader(pairs, 80)})
    ours = copy.deepcopy(NET)
    recompute_statistics(ours, IMAGES)
    assert bits(plain) == bits(ours)
    with pytest.raises(UserError, match="no part 'val'"):
        evaluate(plain, {"train": DataLoader(pairs, 80)}, "val")


def test_loaders_that_hide_their_order_are_refused_too():
    class Stream(IterableDataset):
        def __init__(self, shuffled):
            self.shuffled = shuffled

        def __iter__(self):
            order = torch.randperm(len(X)) if self.shuffled else torch.arange(len(X))
            return iter(zip(X[order], Y[order]))

    pairs = TensorDataset(X, Y)
    hidden = DataLoader(pairs, batch_sampler=BatchSampler(RandomSampler(pairs), 20, False))
    for loader in (hidden, DataLoader(Stream(True), 20)):
        with pytest.raises(UserError, match="shuffles"):
            check_fixed(loader)
    with pytest.raises(UserError, match="read only once"):
        recompute_statistics(copy.deepcopy(NET), {"train": iter([(X, Y)])})
    ours, theirs = copy.deepcopy(NET), copy.deepcopy(NET)
    recompute_statistics(ours, {"train": DataLoader(Stream(False), 20)})
    recompute_statistics(theirs, {"train": DataLoader(pairs, 20)})
    assert bits(ours) == bits(theirs)


def test_judging_restores_modes_and_refuses_nan():
    net = copy.deepcopy(NET).train()
    net.groups.eval()
    found = evaluate(net, IMAGES)
    assert net.training and not net.groups.training and 0 <= found["accuracy"] <= 1
    loader = [{"x": IMAGES.x_test, "labels": IMAGES.y_test}]
    assert evaluate(net, {"test": loader}) == pytest.approx(found)
    net.linear.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        class_probabilities(net, IMAGES)
