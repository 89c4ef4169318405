"""Sparse soups of any module."""
import copy
import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import IMAGES
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zootwins.batch_statistics import class_probabilities, evaluate, recompute_statistics
from zootwins.core import UserError
from zootwins.module_masks import choose_masks, enforce, prunable_weights, revived, sparsity_table
from zootwins.module_soups import (
    average_modules, barrier_of, compare_runs, copy_seed, greedy_coefficients, identity_of, learned_coefficients,
    merge_modules, related_runs, repruned, soup,
)
from zootwins.networks import ResNet, make_network
from zootwins.retraining import Rates, Trainer, TrainSettings, shrunk, state_digest, train_network
from zootwins.schedules import initial_factors, pruning_damage
from zootwins.selectors import sparsity_per_phase

DATA = shrunk(replace(IMAGES, x_val=IMAGES.x_val[:40], y_val=IMAGES.y_val[:40]), 2)
SETTINGS = TrainSettings(batch_size=20, augment=False)
RATES = Rates(0.1, 1)


def net(seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNet([4, 4, 8], 1, channels=1)


NET = train_network(net(), DATA.x_train, DATA.y_train, Rates(0.1, 8), SETTINGS, 1)
cook = functools.partial(soup, NET, DATA, settings=SETTINGS, rates=RATES)


def bits(module):
    return state_digest(module.state_dict())


def loop(model, seed, rates):
    "Somebody's training."
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(DATA.x_train + 0.1 * torch.randn_like(DATA.x_train)), DATA.y_train).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def cooked():
    return cook(0.9, phases=2, m=2)


def test_phases_are_pruned_as_said_and_soups_keep_their_zeros(cooked):
    before, total = bits(NET), sum(weight.numel() for weight in prunable_weights(NET).values())
    for phase, level in zip(cooked.phases, sparsity_per_phase(0.9, 2), strict=True):
        assert phase.level == level and phase.sparsity == round(level * total) / total
        for module in (phase.pruned, phase.soup, *phase.candidates):
            assert revived(module, phase.masks) == 0
        assert sparsity_table(phase.soup).loc["prunable", "sparsity"] == pytest.approx(phase.sparsity)
    first, second = (phase.masks for phase in cooked.phases)
    assert all((second[name] <= first[name]).all() for name in first) and bits(NET) == before
    assert cooked.masks is second and cooked.model is cooked.phases[1].soup


def test_a_soup_is_the_mean_of_its_copies_with_statistics_of_its_own(cooked):
    phase = cooked.phases[0]
    for name, weight in phase.soup.named_parameters():
        mean = torch.stack([dict(module.named_parameters())[name] for module in phase.candidates]).mean(0)
        assert torch.allclose(weight, mean, atol=1e-6)
    again = copy.deepcopy(phase.soup)
    recompute_statistics(again, DATA)
    assert bits(again) == bits(phase.soup) != bits(average_modules(phase.candidates))
    accuracy = cooked.table.set_index(["phase", "row"])["test_acc"]
    assert accuracy[1, "soup"] == evaluate(phase.soup, DATA)["accuracy"]
    both = [accuracy[1, f"candidate {i}"] for i in range(2)]
    assert accuracy[1, "mean candidate"] == pytest.approx(sum(both) / 2) and accuracy[1, "best candidate"] == max(both)


def test_one_copy_is_imp_and_equal_copies_are_their_soup():
    one = cook(0.8, m=1).phases[0]
    assert bits(one.soup) == bits(one.candidates[0])
    assert bits(average_modules([NET] * 3)) == bits(NET)


def test_seeds_decide(cooked):
    assert bits(cook(0.9, phases=2, m=2).model) == bits(cooked.model) != bits(cook(0.9, phases=2, m=2, seed=1).model)
    assert len({copy_seed(s, p, n) for s in range(3) for p in range(3) for n in range(3)}) == 27


@pytest.mark.parametrize("pool", [
    lambda: ThreadPoolExecutor(2), lambda: ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))])
def test_workers_make_the_same_bits(cooked, pool):
    with pool() as workers:
        assert bits(cook(0.9, phases=2, m=2, workers=workers).model) == bits(cooked.model)


def test_dask_carries_functions_that_no_module_holds(tmp_path):
    def local(model, seed, rates):
        return loop(model, seed, rates)

    distributed = pytest.importorskip("distributed")
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        found = soup(NET, DATA, retrain=local, m=2, workers=client.get_executor(pure=False), folder=tmp_path)
    assert (
        bits(found.model) == bits(soup(NET, DATA, retrain=loop, m=2).model) and len(list(tmp_path.glob("copy-*"))) == 2
    )


def test_failing_workers_are_told_and_finished_copies_kept(tmp_path):
    def fails(model, seed, rates):
        if seed == copy_seed(0, 1, 1):
            raise OSError("the node has gone")
        return model

    with ThreadPoolExecutor(1) as workers, pytest.raises(UserError, match="workers have failed"):
        soup(NET, DATA, retrain=fails, folder=tmp_path, workers=workers, m=2)
    assert len(list(tmp_path.glob("copy-*.safetensors"))) == 1


def test_what_is_on_disk_is_not_made_again(tmp_path):
    called = []

    def counting(model, seed, rates):
        called.append(seed)
        return loop(model, seed, rates)

    make = functools.partial(soup, NET, DATA, 0.9, retrain=counting, folder=tmp_path)
    first = make(m=2)
    assert len(called) == 2 and bits(make(m=2).model) == bits(first.model) and len(called) == 2
    make(m=3)
    assert len(called) == 3  # the third copy alone
    make(m=2, phases=2)
    make(m=2, phases=2, merge=lambda modules, data: [1.0, 0.0])
    assert len(called) == 9  # two phases, and a second phase of another beginning
    for file in tmp_path.glob("copy-*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        make(m=2)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    script = "from test_module_soups import *; cook(0.9, phases=2, m=2, rates=Rates(0.1, 40), folder=sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent)
    while not list(tmp_path.glob("copy-*.safetensors")) or not list(tmp_path.glob("parts/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    how = dict(phases=2, m=2, rates=Rates(0.1, 40))
    assert bits(cook(0.9, folder=tmp_path, **how).model) == bits(cook(0.9, **how).model)
    assert not list(tmp_path.glob("parts/*.safetensors")) and len(list(tmp_path.glob("copy-*.safetensors"))) == 4


def test_functions_are_known_by_their_source(tmp_path):
    assert identity_of(loop) != identity_of(net) and identity_of(functools.partial(loop, rates=1)) != identity_of(loop)
    changed = Trainer(DATA, replace(SETTINGS, momentum=0.5))
    assert identity_of(Trainer(DATA, SETTINGS)) != identity_of(changed)
    assert pickle.loads(pickle.dumps(changed))(net(), 1, RATES) is not None
    with pytest.raises(UserError, match="told"):
        soup(NET, DATA, retrain=eval("lambda model, seed, rates: model"), folder=tmp_path)


def test_loops_that_train_a_copy_are_pruned_again_and_said():
    with pytest.warns(UserWarning, match="had come back"):
        found = soup(NET, DATA, retrain=lambda model, seed, rates: loop(copy.deepcopy(model), seed, rates))
    assert revived(found.model, found.masks) == 0


def test_wrapped_models_are_souped(cooked):
    wrapped = nn.DataParallel(torch.compile(copy.deepcopy(NET), backend="eager"))
    found = soup(wrapped, DATA, 0.9, 2, 2, settings=SETTINGS, rates=RATES)
    assert bits(found.model) == bits(cooked.model)
    parallel = soup(NET, DATA, retrain=lambda model, seed, rates: nn.DataParallel(loop(model, seed, rates)))
    assert type(parallel.model) is type(NET)


@pytest.mark.parametrize(("retrain", "words"), [
    (lambda model, seed, rates: None, "has to return"),
    (lambda model, seed, rates: nn.Linear(2, 2), "another architecture"),
    (lambda model, seed, rates: model.linear.bias.data.fill_(torch.nan) is not None and model, "diverged"),
])
def test_retraining_that_went_wrong_is_said(retrain, words):
    with pytest.raises(UserError, match=words):
        soup(NET, DATA, retrain=retrain, m=1)


@pytest.mark.parametrize(
    "how",
    [
        dict(m=0), dict(m="three"), dict(m=2.0), dict(level=1.0), dict(level=-0.1), dict(phases=0), dict(merge="stew"),
        dict(selector="best"), dict(merge=lambda modules, data: [1.0]),
        dict(merge=lambda modules, data: [1.0, -1.0, 0.0]),
    ],
)
def test_what_cannot_be_is_said_in_one_line(how):
    with pytest.raises(UserError) as caught:
        soup(NET, DATA, retrain=lambda model, seed, rates: model, **how)
    assert "\n" not in str(caught.value)


def test_without_data_only_plain_models_can_be_souped():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(49 * 4, 10))
    retrain = lambda model, seed, rates: loop(model, seed, rates)
    found = soup(plain, level=0.5, retrain=retrain)
    assert found.phases[0].sparsity == 0.5 and list(found.table["row"])[-1] == "ensemble"
    with pytest.raises(UserError, match="statistics"):
        soup(NET, retrain=retrain)
    with pytest.raises(UserError, match="plain trainer needs images"):
        soup(plain)
    with pytest.raises(UserError, match="uniform soup"):
        soup(plain, retrain=retrain, merge="greedy")
    for empty in (nn.Sequential(nn.LayerNorm(3)), nn.Sequential(nn.Flatten(), nn.ReLU())):
        with pytest.raises(UserError, match="no weights that can be pruned"):
            soup(empty, retrain=retrain)
    with pytest.raises(UserError, match="at least one model"):
        merge_modules([])


def test_loaders_serve_as_data_and_shuffling_ones_are_refused():
    parts = {
        part: TensorDataset(getattr(DATA, f"x_{part}"), getattr(DATA, f"y_{part}")) for part in ("train", "val", "test")
    }
    loaders = {part: DataLoader(pairs, 80) for part, pairs in parts.items()}
    ours, theirs = (soup(NET, data, retrain=loop) for data in (DATA, loaders))
    assert bits(ours.model) == bits(theirs.model) and theirs.table.equals(ours.table)
    with pytest.raises(UserError, match="shuffles"):
        soup(NET, {"train": DataLoader(parts["train"], 80, shuffle=True)}, retrain=loop)


def test_allr_begins_by_what_pruning_has_damaged():
    phase = cook(0.9, m=1, rates=Rates(0.1, 1, "ALLR", original_epochs=20)).phases[0]
    stacked = {name: weight.detach()[None] for name, weight in prunable_weights(NET).items()}
    damage = pruning_damage(stacked, {name: mask[None] for name, mask in phase.masks.items()})
    assert phase.rates.first == pytest.approx(float(initial_factors(damage, 1, 20))) and 0.05 < phase.rates.first < 1
    assert cook(0.9, m=1).phases[0].rates.first == 1


def test_greedy_is_never_worse_than_the_best_candidate_on_validation(cooked):
    candidates = [*cooked.phases[0].candidates, cooked.phases[0].pruned]
    spoiled = copy.deepcopy(candidates[0])
    with torch.no_grad():
        for weight in spoiled.linear.parameters():
            weight.neg_()
    for order in ([spoiled, *candidates], [*candidates, spoiled]):
        share = greedy_coefficients(order, DATA)
        assert share[order.index(spoiled)] == 0 and share.sum() == 1
        kept = average_modules(order, share)
        recompute_statistics(kept, DATA)
        best = max(evaluate(module, DATA, "val")["accuracy"] for module in order)
        assert evaluate(kept, DATA, "val")["accuracy"] >= best
    assert greedy_coefficients(candidates[:1] * 2, DATA).tolist() == [0.5, 0.5]  # no worse is good enough


def test_learned_coefficients_leave_a_spoiled_copy_out(cooked):
    spoiled = copy.deepcopy(cooked.phases[0].candidates[0])
    with torch.no_grad():
        for weight in spoiled.linear.parameters():
            weight.neg_()
    share = learned_coefficients([*cooked.phases[0].candidates, spoiled], DATA)
    assert share[2] < 0.2 and share.sum() == pytest.approx(1)


def test_a_distilled_soup_imitates_the_dense_model():
    cooked = cook(0.9, m=2, merge="distilled").phases[0]
    share = learned_coefficients(cooked.candidates, DATA, teacher=NET)
    assert torch.equal(cooked.coefficients, share / share.sum())
    taught = class_probabilities(NET, DATA, "val")[0]

    def divergence(coefficients):
        mixed = average_modules(cooked.candidates, coefficients)
        recompute_statistics(mixed, DATA)
        found = class_probabilities(mixed, DATA, "val")[0]
        return (taught * (taught.log() - found.log())).sum(1).mean().item()

    assert divergence(share) <= divergence([1, 1])
    backwards = copy.deepcopy(cooked.candidates[0])
    with torch.no_grad():
        for weight in backwards.linear.parameters():
            weight.neg_()
    wrong = [
        cooked.candidates[0],
        backwards,
    ]  # imitation, and not the labels, decides: a teacher who is wrong is followed
    assert learned_coefficients(wrong, DATA, teacher=NET)[0] > 0.8
    assert learned_coefficients(wrong, DATA, teacher=backwards)[0] < 0.2
    merged = merge_modules(cooked.candidates, DATA, "distilled", teacher=NET)
    assert bits(merged) == bits(cooked.soup)
    with pytest.raises(UserError, match="dense model"):
        merge_modules(cooked.candidates, DATA, "distilled")


def dropping():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))


def test_dropout_in_threads_gives_the_same_bits_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make = functools.partial(soup, dropping(), DATA, 0.5, m=4, rates=Rates(0.05, 6), settings=SETTINGS)
    alone = make()
    with ThreadPoolExecutor(4) as workers:
        together = [make(workers=workers) for _ in range(2)]
    assert {bits(each.model) for each in together} == {bits(alone.model)} and torch.equal(before, torch.get_rng_state())
    assert len({bits(module) for module in alone.phases[0].candidates}) == 4


def test_loops_that_share_the_global_generator_are_told():
    both = threading.Barrier(2, timeout=60)

    def draws_with_others(model, seed, rates):
        both.wait()
        torch.rand(1)
        both.wait()
        return model

    with ThreadPoolExecutor(2) as workers, pytest.warns(UserWarning, match="PyTorch's global generator side by side"):
        soup(NET, DATA, retrain=draws_with_others, m=2, workers=workers)
    with ThreadPoolExecutor(1) as workers, warnings.catch_warnings():
        warnings.simplefilter("error")
        soup(NET, DATA, retrain=lambda model, seed, rates: model if torch.rand(1) < 2 else None, m=2, workers=workers)


def test_models_without_a_common_parent_are_warned_of_and_copies_are_not(cooked):
    other = train_network(net(2), DATA.x_train, DATA.y_train, Rates(0.1, 8), SETTINGS, 2)
    with pytest.warns(UserWarning, match="barrier"):
        far = merge_modules([NET, other], DATA)
    assert barrier_of(far, [NET, other], DATA)["accuracy"] > 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_modules(cooked.phases[0].candidates, DATA)
    with pytest.raises(UserError, match="statistics of BatchNorm"):
        merge_modules([NET, other])


def test_averages_of_what_does_not_fit_are_refused():
    one, other = copy.deepcopy(NET), copy.deepcopy(NET)
    enforce(one, choose_masks(one, 0.5))
    enforce(other, choose_masks(other, 0.5, "random"))
    with pytest.raises(UserError, match="differ in which of"):
        average_modules([one, other])
    with pytest.raises(UserError, match="one architecture"):
        average_modules([NET, make_network("resnet8", channels=1)])
    other.linear.bias.data[0] = torch.inf
    with pytest.raises(UserError, match="diverged"):
        average_modules([NET, other], same_masks=False)


def test_rows_of_the_tables(tmp_path):
    runs = related_runs(NET, DATA, 0.9, 2, 2, RATES, settings=SETTINGS, folder=tmp_path)
    rows = compare_runs(runs, DATA).set_index(["row", "merge", "phase"])["test_acc"]
    longer = cook(0.9, phases=2, m=1, rates=Rates(0.1, 2))
    assert rows["IMP_mx", "", 2] == evaluate(longer.model, DATA)["accuracy"]
    assert rows["IMP", "", 1] == runs["uniform"].table.set_index("row").loc["candidate 0", "test_acc"].iloc[0]
    mean = repruned([runs["IMP"].model, runs["IMP 1"].model], 0.9, "global", DATA)
    assert sparsity_table(mean).loc["prunable", "sparsity"] == pytest.approx(runs["IMP"].phases[1].sparsity)
    assert rows["IMP-RePrune", "", 2] == evaluate(mean, DATA)["accuracy"]
    assert ("IMP-RePrune", "", 1) not in rows.index and "IMP 1" not in related_runs(
        NET, DATA, 0.9, 1, 2, RATES, settings=SETTINGS, folder=tmp_path)
    assert not os.listdir(tmp_path / "parts")
