"""The lane engine means the same as the reference engine, model by model and bit by bit."""

import _thread
import ctypes
import itertools
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from zootwins import lanes, training, variational
from zootwins.architectures import ACTIVATIONS, build
from zootwins.core import UserError
from zootwins.population import from_modules, plain_models, sample_population
from zootwins.store import read_part, save_part
from zootwins.streams import epoch_order, random_normal, stream_keys
from zootwins.training import Recipe, begin
from zootwins.zoos import ZOOS

pytestmark = pytest.mark.skipif(lanes.compiler() is None, reason="no C++ compiler")

ARCHITECTURES = list(lanes.IMAGE_SHAPES)
SLOW = settings(deadline=None, derandomize=True, max_examples=15, phases=[Phase.explicit, Phase.generate])


def recipe(noisy=False, batch=3):
    return Recipe("zoo", "stage", epochs=99, batch_size=batch, variational=noisy)


def make(
    architecture, activation="tanh", optimizer="adam", dropout=0.0, masked=False, noisy=False, models=2,
    dtype=torch.float32, seed=0,
):
    """A population amid its training: rates, decay and noise differ from model to model; so do factors in lists."""
    torch.manual_seed(seed)
    factors = plain_models(models, activation=activation, optimizer=optimizer, dropout=dropout)
    activation, dropout = factors["activation"][0], float(factors["dropout"][0])
    factors["lr"] = [2.0 ** -(7 + i % 3) for i in range(models)]  # exact in single precision
    factors["wd"] = [2.0 ** -(6 + i % 4) for i in range(models)]
    population = from_modules([build(architecture, activation, dropout) for _ in range(models)], architecture, factors)
    if noisy:
        population = variational.begin_variational(population)
    weights = population.weights
    for name, tensor in weights.items():  # log variances within, at and beyond the clamp
        weights[name] = (torch.randn_like(tensor) * 4 - 2 if "log_sigma2" in name else tensor).to(dtype)
    masks = (
        {name: torch.rand(tensor.shape) < 0.5 for name, tensor in weights.items() if name.endswith("weight")}
        if masked
        else {}
    )
    for name, mask in masks.items():
        weights[name] = weights[name] * mask
    state = begin(population, stream_keys("zoo", "stage", list(range(models))), masks)
    state.epoch, state.steps = 5, 7
    return state


def images(architecture, n, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *lanes.IMAGE_SHAPES[architecture], generator=generator).to(dtype), torch.randint(
        10, (n,), generator=generator
    )


def compare(a, b, before, tolerance):
    """All that training moves, relative to each tensor's largest number; Adam turns mere rounding into large steps."""
    assert (a.epoch, a.steps) == (b.epoch, b.steps)
    for part in ("first", "second"):
        one, other = getattr(a, part), getattr(b, part)
        assert one.keys() == other.keys()
        for name in one:
            scale = one[name].abs().amax() + 1e-9
            assert ((one[name] - other[name]).abs().amax() / scale).item() < tolerance, (part, name)
    for name, tensor in a.population.weights.items():
        scale = (tensor - before.population.weights[name]).abs().amax().item() + 1e-6
        difference = (tensor - b.population.weights[name]).abs()
        assert difference.mean().item() < tolerance * scale and difference.amax().item() < 20 * tolerance * scale, name


def same(a, b):
    """Whether two tensors have the same numbers, or none at the same places."""
    return np.array_equal(a, b, equal_nan=True)


configurations = st.fixed_dictionaries(
    {
        "architecture": st.sampled_from(ARCHITECTURES), "activation": st.sampled_from(list(ACTIVATIONS)),
        "optimizer": st.sampled_from(["adam", "sgd"]), "dropout": st.sampled_from([0.0, 0.3, 0.5]),
        "masked": st.booleans(), "noisy": st.booleans(), "models": st.integers(1, 3), "seed": st.integers(0, 9),
    }
)


@SLOW
@given(configurations, st.integers(1, 6))
def test_steps_equal_the_reference(configuration, n):
    x, y = images(configuration["architecture"], n)
    slow, fast = make(**configuration), make(**configuration)
    expected, found = (
        engine.train_epoch(state, x, y, recipe(configuration["noisy"]))
        for engine, state in ((training.TORCH, slow), (lanes.LANES, fast))
    )
    compare(slow, fast, make(**configuration), 5e-3)
    assert torch.allclose(expected[0], found[0], rtol=1e-4, atol=1e-5) and torch.equal(expected[1], found[1])


@SLOW
@given(configurations, st.integers(1, 6))
def test_steps_equal_the_reference_in_double_precision(configuration, n):
    configuration |= {"noisy": False, "dtype": torch.float64}
    x, y = images(configuration["architecture"], n, torch.float64)
    slow, fast = make(**configuration), make(**configuration)
    expected, found = (
        engine.train_epoch(state, x, y, recipe()) for engine, state in ((training.TORCH, slow), (lanes.LANES, fast))
    )
    compare(slow, fast, make(**configuration), 1e-7)  # the reference keeps learning rates in single precision
    assert torch.allclose(expected[0], found[0], atol=1e-12) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_the_reference_in_single_precision(architecture, noisy, activation):
    """After one step without momentum the first moment is the gradient, which no optimizer has enlarged."""
    x, y = images(architecture, 3)
    slow, fast = (make(architecture, activation, "sgd", noisy=noisy, models=4) for _ in range(2))
    training.train_epoch(slow, x, y, recipe(noisy))
    lanes.train_epoch(fast, x, y, recipe(noisy))
    for name, gradient in slow.first.items():
        assert torch.allclose(gradient, fast.first[name], rtol=1e-4, atol=2e-5 * gradient.abs().amax().item()), name


def lane_normals(n, key, site, position, epoch, scalar="double"):
    """The library's own normal numbers, for one image."""
    words = (ctypes.c_uint32 * 2)(*key.tolist())
    out = torch.zeros(n, dtype=torch.float64 if scalar == "double" else torch.float32)
    lanes.library(scalar).lanes_normals(words, int(site), int(position), int(epoch), n, ctypes.c_void_p(out.data_ptr()))
    return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation, dropout", [("gelu", 0.0), ("tanh", 0.5)])
def test_variational_gradient_in_double_precision(architecture, activation, dropout, monkeypatch):
    def same_noise(n, key, site, position, epoch):
        return torch.stack([lane_normals(n, key, site, place, epoch) for place in position])

    monkeypatch.setattr(variational, "random_normal", same_noise)
    state = make(architecture, activation, "sgd", dropout, noisy=True, models=1, dtype=torch.float64)
    state.population.models["wd"] = 0.0
    weights = {name: tensor[0].clone().requires_grad_() for name, tensor in state.population.weights.items()}
    x, y = images(architecture, 3, torch.float64)
    order = epoch_order(3, state.keys[0], 6)
    loss = training.loss_function(*training.training_module(build(architecture, activation, dropout).double(), True))
    value, _ = loss(
        weights, x[order], y[order], state.keys[0], torch.arange(3), torch.tensor(6), variational.kl_weight(6)
    )
    expected = torch.autograd.grad(value, list(weights.values()))
    lanes.train_epoch(state, x, y, recipe(True))
    for name, gradient in zip(weights, expected):  # momentum starts at zero, so after one step it is the gradient
        assert torch.allclose(state.first[name][0], gradient, rtol=1e-7, atol=1e-9 * gradient.abs().max().item()), name


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"noisy": True}, {"masked": True, "optimizer": "sgd", "activation": "gelu"}], ids=str
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_does_not_depend_on_its_company(architecture, options):
    x, y = images(architecture, 11)
    whole, threaded = make(architecture, models=19, **options), make(architecture, models=19, **options)
    lanes.train_epoch(whole, x, y, recipe("noisy" in options), threads=1)
    lanes.train_epoch(threaded, x, y, recipe("noisy" in options), threads=2)
    state = make(architecture, models=19, **options)
    rows = [17, 3, 16, 0]
    part = begin(state.population[rows], state.keys[rows], {name: mask[rows] for name, mask in state.masks.items()})
    part.epoch, part.steps = state.epoch, state.steps
    lanes.train_epoch(part, x, y, recipe("noisy" in options))
    for name, tensor in whole.population.weights.items():
        assert torch.equal(tensor, threaded.population.weights[name])
        assert torch.equal(tensor[rows], part.population.weights[name])
        assert torch.equal(whole.first[name][rows], part.first[name])


@pytest.mark.parametrize("options", [{}, {"noisy": True}, {"masked": True}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_that_are_not_alike_share_a_block(architecture, options):
    """Eighteen models of all activations, optimizers and several dropouts train as each group would alone."""
    kinds = list(itertools.product(ACTIVATIONS, ["adam", "sgd"], [0.0, 0.3]))[:9] + list(
        itertools.product(["gelu", "tanh", "sigmoid"], ["sgd", "adam", "sgd"], [0.5])
    )
    factors = dict(zip(("activation", "optimizer", "dropout"), map(list, zip(*kinds))))
    x, y = images(architecture, 7)
    together = make(architecture, models=18, **factors, **options)
    loss, accuracy = lanes.train_epoch(together, x, y, recipe("noisy" in options))
    before = make(architecture, models=18, **factors, **options)
    weights = variational.deterministic(before.population.weights) if "noisy" in options else before.population.weights
    judged, classes = lanes.evaluate(weights, architecture, factors["activation"], x, y)
    for rows in training.groups(before.population.models, training.TORCH):
        group = begin(
            before.population[rows], before.keys[rows], {name: mask[rows] for name, mask in before.masks.items()}
        )
        group.epoch, group.steps = before.epoch, before.steps
        own_loss, own_accuracy = lanes.train_epoch(group, x, y, recipe("noisy" in options))
        assert same(loss[rows], own_loss) and same(accuracy[rows], own_accuracy)
        for part, whole in (
            (group.population.weights, together.population.weights),
            (group.first, together.first),
            (group.second, together.second),
        ):
            assert all(same(tensor, whole[name][rows]) for name, tensor in part.items())
        own_judged, own_classes = lanes.evaluate(
            {name: tensor[rows] for name, tensor in weights.items()}, architecture,
            before.population.models["activation"].iloc[rows], x, y,
        )
        assert same(judged[rows], own_judged) and same(classes[rows], own_classes)
    assert training.groups(before.population.models, lanes.LANES) == [
        sum(training.groups(before.population.models, training.TORCH), [])
    ]


@pytest.mark.parametrize("options", [{}, {"noisy": True}, {"masked": True, "dropout": 0.3}], ids=str)
def test_resuming_from_disk_changes_nothing(options, tmp_path):
    x, y = images("cnn_small_1ch", 12)
    straight, before = make("cnn_small_1ch", models=3, **options), make("cnn_small_1ch", models=3, **options)
    for state, epochs in ((straight, 3), (before, 2)):
        for _ in range(epochs):
            lanes.train_epoch(state, x, y, recipe("noisy" in options))
    parts = {"weights": before.population.weights, "first": before.first, "second": before.second}
    tensors = {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    save_part(
        tmp_path, "part", tensors, pd.DataFrame({"epoch": [before.epoch]}),
        {"epoch": before.epoch, "steps": before.steps},
    )
    resumed, (kept, _, told) = make("cnn_small_1ch", models=3, **options), read_part(tmp_path, "part")
    for part, held in (("weights", resumed.population.weights), ("first", resumed.first), ("second", resumed.second)):
        held.update({name: kept[f"{part}/{name}"] for name in held})
    resumed.epoch, resumed.steps = told["epoch"], told["steps"]
    lanes.train_epoch(resumed, x, y, recipe("noisy" in options))
    assert (resumed.epoch, resumed.steps) == (straight.epoch, straight.steps)
    for part, other in (
        (straight.population.weights, resumed.population.weights),
        (straight.first, resumed.first),
        (straight.second, resumed.second),
    ):
        assert part.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in part.items())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_broken_models_harm_nobody(broken):
    x, y = images("cnn_small_1ch", 12)
    healthy, state = make("cnn_small_1ch", models=4), make("cnn_small_1ch", models=4)
    for tensor in state.population.weights.values():
        tensor[1] = broken
    loss, _ = lanes.train_epoch(state, x, y, recipe())
    expected, _ = lanes.train_epoch(healthy, x, y, recipe())
    others = [0, 2, 3]
    assert torch.equal(loss[others], expected[others]) and loss[1].isfinite().item() == (broken == 1e30)
    assert all(
        torch.equal(tensor[others], state.population.weights[name][others])
        for name, tensor in healthy.population.weights.items()
    )


@pytest.mark.parametrize("row, column", [(0, 0), (0, 1), (1, 0), (1, 1), (27, 27)])
def test_what_is_no_number_survives_pooling(row, column):
    """One pixel that is no number, wherever it lies in a pooling window, breaks the loss in both engines."""
    x, y = images("cnn_small_1ch", 2)
    x[1, 0, row, column] = float("nan")
    weights = make("cnn_small_1ch", models=3).population.weights
    for engine in (training.TORCH, lanes.LANES):
        assert engine.evaluate(weights, "cnn_small_1ch", ["tanh"] * 3, x, y)[0].isnan().all()
        state = make("cnn_small_1ch", models=3)
        assert engine.train_epoch(state, x, y, recipe())[0].isnan().all()


def test_saturated_units_move_as_in_the_reference():
    """Weights drawn from U(0, 1) saturate tanh; Adam makes steps out of the smallest slopes."""
    population = sample_population(ZOOS["mnist_seed"], 4)
    x, y = images("cnn_small_1ch", 40)
    keys = stream_keys("zoo", "stage", [1, 2, 3, 4])
    slow, fast = begin(population, keys), begin(population, keys)
    training.train_epoch(slow, x, y, recipe(batch=10))
    lanes.train_epoch(fast, x, y, recipe(batch=10))
    for name, tensor in slow.population.weights.items():
        assert (tensor - fast.population.weights[name]).abs().quantile(0.99) < 1e-6


@pytest.mark.parametrize("noisy, dropout", [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_populations_learn_alike(noisy, dropout):
    """Ten easy classes: after two epochs both engines have taught the same."""
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(80) % 10
    x = 2 * torch.randn(10, 1, 28, 28, generator=generator)[y] + 0.5 * torch.randn(80, 1, 28, 28, generator=generator)
    results = []
    for engine in (training.TORCH, lanes.LANES):
        state = make("cnn_small_1ch", "gelu", dropout=dropout, noisy=noisy, models=2)
        state.epoch = state.steps = 0
        state.population.models = state.population.models.assign(lr=1e-2, wd=0.0)
        for name in [name for name in state.population.weights if "log_sigma2" in name]:
            state.population.weights[name].fill_(-10)
        for _ in range(2):
            loss, accuracy = engine.train_epoch(state, x, y, recipe(noisy, batch=10))
        weights = variational.deterministic(state.population.weights) if noisy else state.population.weights
        _, predictions = engine.evaluate(weights, "cnn_small_1ch", ["gelu"] * 2, x, y)
        results.append((loss, accuracy, training.accuracy(predictions, y)))
    for expected, found in zip(*results):
        assert torch.allclose(expected, found, atol=0.05)
    assert dropout or results[1][2].min() > 0.5  # and it is more than chance


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_the_reference(architecture, activation):
    x, y = images(architecture, 70)
    weights = make(architecture, activation, models=18).population.weights
    weights["module_list.0.weight"][2] *= 30  # saturated
    weights["module_list.0.bias"][4] = float("nan")
    expected, predicted = training.evaluate(weights, architecture, [activation] * 18, x, y)
    found, classes = lanes.evaluate(weights, architecture, [activation] * 18, x, y)
    assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert classes.dtype == torch.uint8 and (classes != predicted).float().mean() < 1e-3
    alone, own = lanes.evaluate(
        {name: tensor[[17]] for name, tensor in weights.items()}, architecture, [activation], x, y
    )
    assert torch.equal(alone, found[[17]]) and torch.equal(own, classes[[17]])
    exact, near = (engine.logits(weights, architecture, [activation] * 18, x) for engine in (training, lanes))
    assert near.shape == (18, 70, 10) and torch.allclose(exact, near, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert (
        torch.equal(near.argmax(-1).to(torch.uint8)[:4], classes[:4])
        and near[4].isnan().any()
        and not near[5:].isnan().any()
    )
    assert torch.equal(
        lanes.logits({name: tensor[[17]] for name, tensor in weights.items()}, architecture, [activation], x),
        near[[17]],
    )


def test_normal_numbers():
    key = stream_keys("zoo", "stage", [3])[0]
    found = lane_normals(400_000, key, 2, 5, 9, "float")
    assert torch.allclose(found, random_normal(400_000, key, 2, 5, 9), rtol=1e-5, atol=3e-6)
    z = found.double().numpy()
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):  # within five standard errors
        values = z**power
        assert abs(values.mean() - expected) < 5 * values.std() / len(z) ** 0.5
    for limit, share in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 6.3342e-5)):
        count = (np.abs(z) > limit).sum()
        assert abs(count - share * len(z)) < 5 * (share * len(z)) ** 0.5
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / len(z) ** 0.5


def test_an_interrupted_epoch_changes_nothing():
    x, y = images("cnn_large", 20_000)
    state = make("cnn_large", models=4)
    before = {name: tensor.clone() for name, tensor in state.population.weights.items()}
    lanes.library()  # built before the clock runs
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell that runs this in the background lets it ignore Ctrl-C
    threading.Timer(0.3, _thread.interrupt_main).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.train_epoch(state, x, y, recipe())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (state.epoch, state.steps) == (5, 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.population.weights.items())


def test_interrupt_ends_work_in_other_threads():
    x, y = images("cnn_large", 20_000)
    states = [make("cnn_large", models=2, seed=seed) for seed in range(2)]
    lanes.library()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(lanes.train_epoch, state, x, y, recipe(), 1) for state in states]
        while len(lanes._under_way) < 2:
            time.sleep(0.01)
        lanes.interrupt()
        for work in running:
            with pytest.raises(InterruptedError):
                work.result(timeout=30)
    assert not lanes._under_way and all(state.epoch == 5 for state in states)


# To be renewed when the engine's bits are changed on purpose: stores of another arithmetic are refused.
ARITHMETIC = "lanes-ac23f928c976"


def test_the_arithmetic_is_that_of_every_other_machine():
    assert lanes.arithmetic() == ARITHMETIC


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these instruction sets belong to x86")
@pytest.mark.parametrize(
    "command, machine, level, width",
    [
        ("g++", "x86-64-v3", "-O1", 8), ("g++", "x86-64", "-O1", 4), ("clang++", "x86-64-v3", "-O1", 8),
        ("clang++", "native", "-O2", None),
    ],
)
def test_other_registers_and_compilers_yield_the_same_bits(command, machine, level, width, monkeypatch, tmp_path):
    """All nets, stages, activations and optimizers: AVX2, SSE2 without multiply-add, AVX-512; GCC and clang."""
    if not shutil.which(command):
        pytest.skip(f"{command} is not installed")
    if machine == "x86-64-v3" and "avx2" not in lanes.describe_processor():
        pytest.skip("this processor has no AVX2")
    flags = [flag.replace("native", machine).replace("-O3", level) for flag in lanes._flags("float")]
    monkeypatch.setattr(lanes, "_flags", lambda scalar: flags)
    lanes._compile(command, "float", tmp_path / "lanes.so")
    library = ctypes.CDLL(str(tmp_path / "lanes.so"))
    monkeypatch.setattr(lanes, "library", lambda scalar: library)
    assert width is None or library.lanes_width() == width
    assert lanes.arithmetic.__wrapped__() == ARITHMETIC


@pytest.mark.slow
def test_another_arithmetic_has_another_name(monkeypatch, tmp_path):
    """A compiler that may reorder sums and multiply by reciprocals."""
    flags = [flag.replace("-O3", "-O1") for flag in lanes._flags("float")]
    flags += [
        "-fassociative-math", "-freciprocal-math", "-fno-signed-zeros", "-fno-trapping-math",
    ]  # -ffast-math would change the whole process
    monkeypatch.setattr(lanes, "_flags", lambda scalar: flags)
    lanes._compile(lanes.compiler(), "float", tmp_path / "lanes.so")
    library = ctypes.CDLL(str(tmp_path / "lanes.so"))
    monkeypatch.setattr(lanes, "library", lambda scalar: library)
    assert lanes.arithmetic.__wrapped__() != ARITHMETIC


def test_a_model_that_is_no_number_has_one_form():
    """The sign of what is no number depends on the processor, so the engine hands over one form of it."""
    x, y = images("cnn_small_1ch", 4)
    state = make("cnn_small_1ch", models=2)
    state.population.weights["module_list.0.weight"][0] = -float("nan")
    loss, _ = lanes.train_epoch(state, x, y, recipe())
    assert state.population.weights["module_list.0.weight"][0].view(torch.int32).unique().tolist() == [0x7FC00000]
    assert loss[:1].view(torch.int64).tolist() == [0x7FF8000000000000]


def test_what_the_engine_cannot_do_is_said():
    x, y = images("cnn_small_1ch", 4)
    state = make("cnn_small_1ch", models=2)
    with pytest.raises(UserError, match="engine='torch'"):
        lanes.evaluate(state.population.weights, "cnn_huge", ["tanh"] * 2, x, y)
    state.population.models["activation"] = ["tanh", "swish"]
    with pytest.raises(UserError, match="swish"):
        lanes.train_epoch(state, x, y, recipe())
    state.population.models["activation"] = ["tanh", "relu"]
    with pytest.raises(UserError, match="groups them"):
        training.train_epoch(state, x, y, recipe())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, y, models, weights: (x, y + 10), "0 to 9"), (lambda x, y, models, weights: (x, y - 10), "0 to 9"),
        (lambda x, y, models, weights: (x, y[:2]), "as many labels"),
        (lambda x, y, models, weights: (x[:0], y[:0]), "at least one"),
        (lambda x, y, models, weights: (x, y.float()), "whole numbers"),
        (lambda x, y, models, weights: models.update({"optimizer": ["adam", "lion"]}), "lion"),
        (lambda x, y, models, weights: models.update({"dropout": [0.0, 1.0]}), "below 1"),
        (lambda x, y, models, weights: weights.update({"module_list.0.bias": torch.zeros(2, 9)}), r"\[2, 8\]"),
        (lambda x, y, models, weights: weights.update({"module_list.0.bias": torch.zeros(2, 8).half()}), "float16"),
        (lambda x, y, models, weights: weights.__delitem__("module_list.0.bias"), "module_list.0.bias"),
    ],
    ids=[
        "label 10", "label -1", "few labels", "no images", "label 0.5", "optimizer", "dropout", "shape",
        "half precision", "missing",
    ],
)
def test_nothing_is_read_from_beyond_a_tensor(spoil, message):
    x, y = images("cnn_small_1ch", 4)
    state = make("cnn_small_1ch", models=2)
    columns = {}
    x, y = spoil(x, y, columns, state.population.weights) or (x, y)
    state.population.models = state.population.models.assign(**columns)
    before = {name: tensor.clone() for name, tensor in state.population.weights.items()}
    with pytest.raises(UserError, match=message):
        lanes.train_epoch(state, x, y, recipe())
    assert state.epoch == 5 and all(
        torch.equal(tensor, before[name]) for name, tensor in state.population.weights.items()
    )


def renamed(tensors):
    return {name.replace("module_list.0", "module_list.1"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state: setattr(state, "keys", state.keys[:1]), r"keys has to be int64 \[2, 2\]"),
        (lambda state: setattr(state, "keys", state.keys[:, :1]), r"keys has to be int64 \[2, 2\]"),
        (lambda state: setattr(state, "keys", state.keys.to(torch.int32)), "keys has to be int64"),
        (lambda state: setattr(state, "keys", state.keys.double()), "keys has to be int64"),
        (
            lambda state: state.masks.update({"module_list.0.weight": torch.ones(2, 8, 1, 5, 4, dtype=torch.bool)}),
            r"\(masks\) has to be bool \[2, 8, 1, 5, 5\]",
        ),
        (
            lambda state: state.masks.update({"module_list.0.weight": torch.ones(1, 8, 1, 5, 5, dtype=torch.bool)}),
            r"\(masks\) has to be bool \[2, 8, 1, 5, 5\]",
        ),
        (lambda state: state.masks.update({"module_list.0.weight": torch.ones(2, 8, 1, 5, 5)}), "float32"),
        (lambda state: state.masks.update({"other": torch.ones(2, dtype=torch.bool)}), r"lack \(other\)"),
        (
            lambda state: state.first.update({"module_list.0.bias": torch.zeros(2, 7)}),
            r"\(first\) has to be float32 \[2, 8\]",
        ),
        (lambda state: state.first.update({"module_list.0.bias": torch.zeros(2, 8).double()}), "float64"),
        (lambda state: state.first.clear(), "first moments"),
        (lambda state: setattr(state, "first", renamed(state.first)), "module_list.1.bias"),
        (
            lambda state: state.second.update({"module_list.0.bias": torch.zeros(16)}),
            r"\(second\) has to be float32 \[2, 8\]",
        ),
        (lambda state: state.second.clear(), "second moments"),
        (lambda state: state.second.__delitem__("module_list.0.bias"), "second moments"),
        (lambda state: state.population.weights.update({"module_list.0.bias": torch.zeros(())}), r"float32 \[\]"),
        (lambda state: state.population.weights.update({"module_list.0.bias": torch.zeros(2, 8).double()}), "float64"),
        (lambda state: setattr(state.population, "models", state.population.models.iloc[:1]), r"float32 \[1, "),
        (lambda state: setattr(state.population, "models", pd.concat([state.population.models] * 2)), r"float32 \[4, "),
        (lambda state: setattr(state, "steps", -1), "cannot have been done"),
    ],
    ids=[
        "keys", "half keys", "keys int32", "keys float64", "mask", "mask of one", "mask float32", "mask of none",
        "first", "first float64", "no first", "other first", "second", "no second", "few second", "weight of no model",
        "weight float64", "few rows", "many rows", "negative steps",
    ],
)
def test_every_pointer_of_a_state_is_checked(spoil, message):
    """Each of these tensors, as a file may hold them, would be read or written beyond its end."""
    x, y = images("cnn_small_1ch", 4)
    state = make("cnn_small_1ch", models=2, masked=True)
    spoil(state)
    with pytest.raises(UserError, match=message) as failure:
        lanes.train_epoch(state, x, y, recipe())
    assert "\n" not in str(failure.value) and state.epoch == 5


@pytest.mark.parametrize("activations", [[], ["tanh"], ["tanh"] * 3], ids=len)
def test_every_model_needs_one_activation(activations):
    x, y = images("cnn_small_1ch", 4)
    with pytest.raises(UserError, match=rf"float32 \[{len(activations)}, "):
        lanes.evaluate(make("cnn_small_1ch", models=2).population.weights, "cnn_small_1ch", activations, x, y)


def test_a_job_takes_no_tensor_that_it_cannot_read():
    job, good = lanes.Job(models=2), torch.zeros(2, 3)
    assert job.hold("rate", good, (2, 3), torch.float32) is good and job.rate == good.data_ptr()
    for bad in (
        good.T, torch.zeros(3, 2).T, torch.zeros(2, 6)[:, ::2], good.to_sparse(), good.to("meta"),
        good[:1].expand(2, 3),
    ):
        with pytest.raises(UserError, match=r"loss has to be float32 \[2, 3\]"):
            job.hold("loss", bad, (2, 3), torch.float32)
    assert job.loss is None


@pytest.mark.parametrize(
    "optimizer, nesterov, factor",
    [
        ("sgd", False, [1.0, 0.25, 0.5]), ("sgd", True, [1.0, 1.0, 1.0]), ("sgd", True, [0.1, 2.0, 0.0]),
        ("adam", False, [1.0, 0.25, 0.5]), ("adam", True, None), ("sgd", True, None),
    ],
)
def test_rates_by_step_and_nesterov(optimizer, nesterov, factor):
    """Three steps beside torch's own optimizers, all in double precision; Adam does not know of Nesterov."""
    state = make("cnn_small_1ch", optimizer=optimizer, models=2, dtype=torch.float64)
    state.epoch = state.steps = 0
    x, y = images("cnn_small_1ch", 8, torch.float64)
    expected = []
    for m in range(2):
        rate, decay = (float(state.population.models[name][m]) for name in ("lr", "wd"))
        net = build("cnn_small_1ch", "tanh").double()
        net.load_state_dict({name: tensor[m].clone() for name, tensor in state.population.weights.items()})
        if optimizer == "sgd":
            optimizer_ = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=decay, nesterov=nesterov)
        else:
            optimizer_ = torch.optim.Adam(net.parameters(), lr=rate, weight_decay=decay)
        for step, batch in enumerate(epoch_order(8, state.keys[m], 1).split(3)):
            optimizer_.param_groups[0]["lr"] = rate * (factor or [1.0] * 3)[step]
            optimizer_.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer_.step()
        expected.append({name: tensor.detach() for name, tensor in net.state_dict().items()})
    moving = [lanes._copies(part) for part in (state.population.weights, state.first, state.second)]
    job = lanes._training_job(state, moving, x, y, recipe())
    job.nesterov = int(nesterov)
    if factor:
        job.hold("factor", torch.tensor(factor, dtype=torch.float64), (3,), torch.float64)
    lanes._run("lanes_train", job, torch.float64, 1)
    for m, weights in enumerate(expected):
        for name, tensor in weights.items():
            assert torch.allclose(moving[0][name][m], tensor, rtol=0, atol=1e-11), name


STARVED = """
import resource, sys
import torch
sys.path.insert(0, {tests!r})
from test_lanes import images, lanes, make, recipe
lanes.library()
state, (x, y) = make("cnn_large", models=64), images("cnn_large", 20)
if sys.argv[1] == "threads":
    import _thread
    start, left = _thread.start_new_thread, [int(sys.argv[2])]
    def few(*work):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        return start(*work)
    lanes.start_new_thread = few
else:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + int(sys.argv[2]) * 2**20] * 2)
try:
    lanes.train_epoch(state, x, y, recipe(), threads=4)
    print("trained")
except lanes.UserError as error:
    assert state.epoch == 5
    print(error)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="limits of memory as Linux has them")
@pytest.mark.parametrize(
    "kind, limit", [("threads", 0), ("threads", 1), ("threads", 4), ("memory", 1), ("memory", 24), ("memory", 2000)]
)
def test_a_starved_process_ends_with_a_sentence(kind, limit):
    """Threads that do not start and memory that runs out, with 4 threads and 4 blocks of models."""
    script = STARVED.format(tests=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-c", script, kind, str(limit)], capture_output=True, text=True, timeout=120
    )
    said = result.stdout.strip().splitlines()
    assert result.returncode == 0 and len(said) == 1, result.stderr[-500:]
    if (kind, limit) in (("threads", 4), ("memory", 2000)):
        assert said == ["trained"]
    elif kind == "threads":
        assert said[0].startswith("4 threads could not be started (can't start new thread)")
    else:
        assert (
            said == ["trained"]
            and limit > 1
            or said[0].startswith(("4 threads could not be started", "Memory ran out in the fast engine"))
        )


SANITIZED = """
import ctypes, itertools, sys
sys.path.insert(0, {tests!r})
import torch
from test_lanes import ACTIVATIONS, images, lanes, make, recipe, variational
library = ctypes.CDLL(sys.argv[1])
lanes.library = lambda scalar="float": library
kinds = list(itertools.product(ACTIVATIONS, ["adam", "sgd"], [0.0, 0.3]))
factors = dict(zip(("activation", "optimizer", "dropout"), map(list, zip(*kinds))))
if sys.argv[2] == "broken":
    held = lambda job: job.__dict__.setdefault("held", [])
    lanes.Job._address = lambda self, name, tensor, shape, dtype: held(self).append(tensor) or tensor.data_ptr()
for architecture in lanes.IMAGE_SHAPES:
    x, y = images(architecture, 7)
    for options in ({{}}, {{"masked": True}}, {{"noisy": True}}):
        state = make(architecture, models=len(kinds), **factors, **options)
        if sys.argv[2] == "broken":
            state.keys = state.keys[:1].clone()
        lanes.train_epoch(state, x, y, recipe("noisy" in options), threads=2)
        weights = state.population.weights
        weights = variational.deterministic(weights) if "noisy" in options else weights
        lanes.evaluate(weights, architecture, factors["activation"], x, y)
print("clean")
"""


def test_the_sanitizers_find_nothing(tmp_path):
    """Small trainings of all architectures under ASan and UBSan, which do find reads beyond a tensor once unchecked."""
    command = lanes.compiler()
    runtime = subprocess.run([command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    flags = [flag.replace("-O3", "-O1") for flag in lanes._flags("float")] + [
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    built = subprocess.run(
        [command, *flags, "-o", str(tmp_path / "lanes.so"), str(lanes.SOURCE)], capture_output=True, text=True
    )
    if not Path(runtime).is_absolute() or built.returncode:
        pytest.skip(f"{command} has no sanitizers that can be loaded into Python")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    script = SANITIZED.format(tests=str(Path(__file__).parent))
    for kind in ("whole", "broken"):
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "lanes.so"), kind], capture_output=True, text=True,
            env=environment,
        )
        if kind == "whole":
            assert (result.returncode, result.stdout) == (0, "clean\n"), result.stderr[-3000:]
        else:
            assert result.returncode and "heap-buffer-overflow" in result.stderr, result.stderr[-3000:]


def test_the_kind_of_models_has_to_fit_the_recipe():
    x, y = images("cnn_small_1ch", 4)
    plain, noisy = make("cnn_small_1ch"), make("cnn_small_1ch", noisy=True)
    with pytest.raises(UserError, match="begin_variational"):
        lanes.train_epoch(plain, x, y, recipe(noisy=True))
    with pytest.raises(UserError, match="deterministic"):
        lanes.train_epoch(noisy, x, y, recipe())
    with pytest.raises(UserError, match="deterministic"):
        lanes.evaluate(noisy.population.weights, "cnn_small_1ch", ["tanh"] * 2, x, y)
    with pytest.raises(UserError, match="at least one image"):
        lanes.train_epoch(plain, x, y, recipe(batch=0))


def test_labels_of_any_whole_type():
    x, y = images("cnn_small_1ch", 4)
    weights = make("cnn_small_1ch").population.weights
    expected = lanes.evaluate(weights, "cnn_small_1ch", ["tanh"] * 2, x, y)
    for kind in (torch.int32, torch.uint8):
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected, lanes.evaluate(weights, "cnn_small_1ch", ["tanh"] * 2, x, y.to(kind)))
        )


@pytest.fixture
def fresh_library():
    lanes.library.cache_clear()
    yield
    lanes.library.cache_clear()


def test_compilers_and_folders_that_do_not_work(fresh_library, monkeypatch, tmp_path):
    """Whatever keeps the library from being built or loaded is told in one sentence, and nothing else is raised."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", shutil.which("false"))
        assert "could not be built with" in lanes.why_unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "cache_folder", lambda: tmp_path / "file" / "cache")
        assert "cannot be written" in lanes.why_unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "cache_folder", lambda: tmp_path)
        path = lanes._library_path(lanes.compiler(), "float")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"no library")
        assert "not be loaded from there" in lanes.why_unavailable()
    assert lanes.why_unavailable() == ""


@pytest.mark.parametrize("locks", [True, False])
def test_of_many_workers_one_builds_where_there_are_locks(locks, monkeypatch, tmp_path):
    source, path, built = tmp_path / "tiny.cpp", tmp_path / "cache" / "tiny.so", []
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(lanes, "SOURCE", source)
    if not locks:
        monkeypatch.setattr(lanes.FileLock, "acquire", lambda self: (_ for _ in ()).throw(NotImplementedError()))
    compile, ready = lanes._compile, threading.Barrier(3)
    monkeypatch.setattr(lanes, "_compile", lambda *words: built.append(words) or compile(*words))

    def work(_):
        ready.wait()
        lanes._build_once(lanes.compiler(), "float", path)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert ctypes.CDLL(str(path)).answer() == 42 and (len(built) == 1 if locks else 1 <= len(built) <= 3)


def test_building(monkeypatch, tmp_path):
    """Two builders at once leave one whole library; a broken source is told in one line."""
    source, path = tmp_path / "tiny.cpp", tmp_path / "cache" / "tiny.so"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(lanes, "SOURCE", source)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: lanes._compile(lanes.compiler(), "float", path), range(2)))
    assert [file.name for file in path.parent.iterdir()] == ["tiny.so"] and ctypes.CDLL(str(path)).answer() == 42
    first = lanes._library_path(lanes.compiler(), "float")
    source.write_text("this is not C++\n")
    assert lanes._library_path(lanes.compiler(), "float") != first
    with pytest.raises(UserError, match="could not build tiny.cpp") as failure:
        lanes._compile(lanes.compiler(), "float", tmp_path / "broken.so")
    assert "\n" not in str(failure.value) and not (tmp_path / "broken.so").exists()
