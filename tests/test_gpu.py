"""The GPU engine on the host means the same as the lanes; NVIDIA's compiler, where installed, finds room for it."""

import ctypes
import importlib.util
import math
import re
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zootwins import engines, gpu, lanes, training
from zootwins.architectures import ACTIVATIONS, build
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.population import Population, from_modules, plain_models, sample_population
from zootwins.streams import epoch_order, random_normal, random_words, stream_keys
from zootwins.training import Recipe, begin
from zootwins.variational import begin_variational, deterministic
from zootwins.zoos import ZOOS

pytestmark = pytest.mark.skipif(lanes.compiler() is None, reason="no C++ compiler")

ARCHITECTURES = list(lanes.IMAGE_SHAPES)
STAGES = ("original", "mp", "vd")
NAMES = [f"{variant.architecture}{'-noisy' * variant.noisy}" for variant in gpu.VARIANTS]
SPECIAL = {"dropout": [0.0, 0.3, 0.5, 0.0, 0.2, 0.0, 0.4, 0.0], "wd": [2.0 ** -(6 + i % 4) for i in range(8)]}


def recipe(stage, batch=2):
    return Recipe("zoo", stage, epochs=99, batch_size=batch, variational=stage == "vd")


def make(architecture, stage="original", dtype=torch.float32, models=8):
    """Eight models of four activations and both optimizers, with and without dropout, amid their training."""
    torch.manual_seed(0)
    factors = plain_models(8).assign(
        activation=[name for name in ACTIVATIONS for _ in range(2)],
        optimizer=["adam", "sgd"] * 4,
        lr=[2.0 ** -(10 + i % 3) for i in range(8)],
        **SPECIAL,
    )
    population = from_modules([build(architecture) for _ in range(8)], architecture, factors)
    if stage == "vd":
        population = begin_variational(population)
    for name, tensor in population.weights.items():
        population.weights[name] = (tensor + torch.randn_like(tensor) if "log_sigma2" in name else tensor).to(dtype)
    masks = (
        {name: torch.rand(tensor.shape) < 0.5 for name, tensor in population.weights.items() if name.endswith("weight")}
        if stage == "mp"
        else {}
    )
    for name, mask in masks.items():
        population.weights[name] *= mask
    state = begin(
        population[list(range(models))],
        stream_keys("zoo", stage, list(range(models))),
        {name: mask[:models] for name, mask in masks.items()},
    )
    state.epoch, state.steps = 5, 7
    return state


def images(architecture, n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *lanes.IMAGE_SHAPES[architecture], generator=generator).to(dtype), torch.randint(
        10, (n,), generator=generator
    )


def parts(state):
    return state.population.weights, state.first, state.second


def furthest(a, b, moments=True):
    """The largest difference in all that training moves, relative to the numbers themselves where they exceed 1."""
    assert (a.epoch, a.steps) == (b.epoch, b.steps) and all(
        one.keys() == other.keys() for one, other in zip(parts(a), parts(b))
    )
    pairs = list(zip(parts(a), parts(b)))[:None if moments else 1]
    return max(
        ((one[name].double() - other[name].double()).abs() / one[name].double().abs().clamp(min=1)).max().item()
        for one, other in pairs
        for name in one
    )


def equal(a, b):
    return all(torch.equal(one[name], other[name]) for one, other in zip(parts(a), parts(b)) for name in one)


def after_twenty_steps(engine, architecture, stage, dtype):
    """Small steps for variational models, whose log alphas magnify the rounding of weights near zero."""
    state, (x, y) = make(architecture, stage, dtype), images(architecture, 40, dtype)
    if stage == "vd":
        state.population.models["lr"] /= 2**6
    return state, *engine.train_epoch(state, x, y, recipe(stage))


KINDS = [(architecture, stage) for architecture in ARCHITECTURES for stage in STAGES]
QUICK = ("cnn_small_1ch", "vd")  # the others take minutes together


@pytest.mark.parametrize(
    "architecture, stage", [kind if kind == QUICK else pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_twenty_steps_equal_the_lanes_in_double_precision(architecture, stage):
    """All nets, stages, activations and optimizers, in a GPU's precision and, far more closely, in double precision."""
    exact, loss, right = after_twenty_steps(lanes, architecture, stage, torch.float64)
    single, single_loss, single_right = after_twenty_steps(gpu, architecture, stage, torch.float32)
    double, double_loss, double_right = after_twenty_steps(gpu, architecture, stage, torch.float64)
    assert (
        furthest(exact, single, moments=stage != "vd") < 1e-6
        and torch.allclose(loss, single_loss, atol=1e-6)
        and torch.equal(right, single_right)
    )
    assert (
        furthest(exact, double) < 1e-11
        and torch.allclose(loss, double_loss, atol=1e-12)
        and torch.equal(right, double_right)
    )
    untouched = make(architecture, stage, torch.float64)
    untouched.epoch, untouched.steps = exact.epoch, exact.steps
    assert furthest(exact, untouched, moments=False) > 1e-4  # there was something to agree about


def test_another_activation_is_found_out():
    """The comparison above would notice a model that was trained as another kind."""
    x, y = images("cnn_small_1ch", 40)
    exact, found = make("cnn_small_1ch"), make("cnn_small_1ch")
    found.population.models = found.population.models.assign(activation=["tanh"] * 6 + ["relu"] * 2)
    lanes.train_epoch(exact, x, y, recipe("original"))
    gpu.train_epoch(found, x, y, recipe("original"))
    assert furthest(exact, found) > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_equals_the_lanes(architecture):
    x, y = images(architecture, 7)
    state = make(architecture, "vd")
    weights, activations = deterministic(state.population.weights), state.population.models["activation"]
    weights["module_list.0.bias"][4] = float("nan")
    expected, predicted = lanes.evaluate(weights, architecture, activations, x, y)
    found, classes = gpu.evaluate(weights, architecture, activations, x, y)
    assert (
        torch.allclose(expected, found, rtol=1e-5, atol=1e-6, equal_nan=True)
        and torch.equal(predicted, classes)
        and classes.dtype == torch.uint8
    )
    assert found[4].isnan() and not found[:4].isnan().any()
    given, expected = (engine.logits(weights, architecture, activations, x) for engine in (gpu, lanes))
    assert given.shape == (8, 7, 10) and torch.allclose(expected, given, rtol=1e-4, atol=1e-5, equal_nan=True)


def with_flags(monkeypatch, *flags):
    """Build with more flags from now on."""
    usual = gpu._host_flags
    monkeypatch.setattr(gpu, "_host_flags", lambda scalar: [*usual(scalar), *flags])
    gpu.program.cache_clear()
    gpu.host_library.cache_clear()


@pytest.fixture
def fresh():
    yield
    gpu.program.cache_clear()
    gpu.host_library.cache_clear()


def trained(architecture, stage, n=5, batch=3):
    """A state after an epoch of a whole batch and a part of one."""
    state = make(architecture, stage, models=4)
    loss, _ = gpu.train_epoch(state, *images(architecture, n), recipe(stage, batch))
    return state, loss


@pytest.mark.parametrize("stage", ["original", "vd"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_threads_in_reverse_order_make_the_same_bits(architecture, stage, monkeypatch, fresh):
    forward, loss = trained(architecture, stage)
    with_flags(monkeypatch, "-O0", "-DREVERSED")
    backward, other = trained(architecture, stage)
    assert equal(forward, backward) and torch.equal(loss, other)


def test_a_missing_barrier_is_found_out(monkeypatch, tmp_path, fresh):
    """Threads that read what others write between the same two barriers give other bits in reverse order."""
    text, gap = gpu.SOURCE.read_text(), "        BARRIER\n        THREADS\n            FOR(i, count * T::CI * T::H) {"
    assert text.count(gap) == 1
    (tmp_path / "gpu.cu").write_text(text.replace(gap, "            FOR(i, count * T::CI * T::H) {"))
    (tmp_path / "elementary.h").write_bytes(gpu.HEADER.read_bytes())
    monkeypatch.setattr(gpu, "SOURCE", tmp_path / "gpu.cu")
    with_flags(monkeypatch)
    forward, _ = trained("cnn_small_1ch", "original")
    with_flags(monkeypatch, "-O0", "-DREVERSED")
    backward, _ = trained("cnn_small_1ch", "original")
    assert not equal(forward, backward)


@pytest.mark.parametrize("n", [1, 3, 160, 161, 5000])
def test_orders_are_those_of_the_streams(n):
    keys = stream_keys("zoo", "stage", [1, 2, 3])
    job = gpu.Job(models=3, samples=n, epoch=9)
    job.hold("keys", keys)
    for field in ("order", "room"):
        job.hold(field, torch.empty(3, n, dtype=torch.int32))
    gpu.program(gpu.VARIANTS[0], torch.device("cpu"), torch.float32).run("shuffle", job)
    assert torch.equal(job.held["order"].long(), epoch_order(n, keys, 9))


def test_normal_numbers_are_those_of_the_streams():
    """To 1e-6 of what the streams' words give in double precision."""
    key, n = stream_keys("zoo", "stage", [3])[0], 20_000
    found = torch.empty(n)
    gpu.host_library(gpu.VARIANTS[0]).normals(*key.tolist(), 2, 5, 9, n, ctypes.c_void_p(found.data_ptr()))
    u, v = (random_words(n, key, 2, 5, 9).double() * 2.0**-32 + 2.0**-33).unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).flatten(-2)
    assert (found - exact).abs().max() < 1e-6 < (found[:-1] - exact[1:]).abs().max()
    assert torch.allclose(found, random_normal(n, key, 2, 5, 9), rtol=1e-5, atol=3e-6)


def test_a_model_does_not_depend_on_its_company():
    x, y = images("cnn_small_3ch", 5)
    together = make("cnn_small_3ch", "mp")
    loss, _ = gpu.train_epoch(together, x, y, recipe("mp", 3))
    state = make("cnn_small_3ch", "mp")
    alone = begin(state.population[[5]], state.keys[[5]], {name: mask[[5]] for name, mask in state.masks.items()})
    alone.epoch, alone.steps = 5, 7
    own, _ = gpu.train_epoch(alone, x, y, recipe("mp", 3))
    assert torch.equal(own, loss[[5]]) and all(
        torch.equal(tensor[0], together.population.weights[name][5])
        for name, tensor in alone.population.weights.items()
    )
    assert (
        len(training.groups(together.population.models, gpu.GPU))
        == 1
        < len(training.groups(together.population.models, training.TORCH))
    )


def test_broken_models_harm_nobody():
    x, y = images("cnn_small_1ch", 5)
    healthy, state = make("cnn_small_1ch"), make("cnn_small_1ch")
    for tensor in state.population.weights.values():
        tensor[1] = float("nan")
    loss, _ = gpu.train_epoch(state, x, y, recipe("original"))
    expected, _ = gpu.train_epoch(healthy, x, y, recipe("original"))
    others = [0, 2, 3, 4, 5, 6, 7]
    assert loss[1].isnan() and torch.equal(loss[others], expected[others])
    assert all(
        torch.equal(tensor[others], state.population.weights[name][others])
        for name, tensor in healthy.population.weights.items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_changes_nothing(stage, tmp_path):
    """What a block keeps on disk, weights and moments, is all that the next epoch needs."""
    x, y = images("cnn_small_1ch", 5)
    straight, before, resumed = (make("cnn_small_1ch", stage, models=3) for _ in range(3))
    for state, epochs in ((straight, 3), (before, 2)):
        for _ in range(epochs):
            gpu.train_epoch(state, x, y, recipe(stage))
    for number, (part, own) in enumerate(zip(parts(before), parts(resumed))):
        save_file(part, tmp_path / str(number))
        own.update(load_file(tmp_path / str(number)))
    resumed.epoch, resumed.steps = before.epoch, before.steps
    gpu.train_epoch(resumed, x, y, recipe(stage))
    assert (resumed.epoch, resumed.steps) == (straight.epoch, straight.steps) and equal(resumed, straight)


def test_schedules_and_momentum_that_looks_ahead():
    """Rates that change from step to step, and Nesterov's momentum, are those of the lanes."""
    x, y = images("cnn_small_1ch", 40)
    ahead = replace(recipe("original"), schedule="LLR", nesterov=True)
    exact, found, plain = make("cnn_small_1ch", dtype=torch.float64), make("cnn_small_1ch"), make("cnn_small_1ch")
    lanes.train_epoch(exact, x.double(), y, ahead)
    gpu.train_epoch(found, x, y, ahead)
    gpu.train_epoch(plain, x, y, recipe("original"))
    assert furthest(exact, found) < 1e-6 and furthest(exact, plain, moments=False) > 1e-4


def test_only_sgd_needs_no_second_moments():
    x, y = images("cnn_small_1ch", 5)
    given = make("cnn_small_1ch", models=2)
    population = Population(given.population.weights, given.population.models.assign(optimizer="sgd"), "cnn_small_1ch")
    states = [begin(population, given.keys), begin(population, given.keys)]
    lanes.train_epoch(states[0], x, y, recipe("original"))
    gpu.train_epoch(states[1], x, y, recipe("original"))
    assert not states[1].second and furthest(*states) < 1e-6


def test_work_that_was_interrupted_changes_nothing():
    x, y = images("cnn_large", 2000)
    state, before = make("cnn_large"), make("cnn_large")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(gpu.train_epoch, state, x, y, recipe("original"))
        while not gpu._under_way:
            time.sleep(0.01)
        while not work.done():
            gpu.interrupt()
            time.sleep(0.01)
    assert isinstance(work.exception(), InterruptedError)
    assert (state.epoch, state.steps) == (5, 7) and equal(state, before) and not gpu._under_way


@pytest.mark.parametrize("spoil, message", [
    (lambda x, y, state: (x, y + 10), "0 to 9"),
    (lambda x, y, state: (x, y[:2]), "as many labels"),
    (lambda x, y, state: (x[:, :, :27], y), "28"),
    (lambda x, y, state: state.population.weights.update({"module_list.0.bias": torch.zeros(8, 9)}), r"\[8, 8\]"),
    (lambda x, y, state: state.population.models.__setitem__("optimizer", "lion"), "lion"),
    (lambda x, y, state: state.population.models.__setitem__("dropout", 1.0), "below 1"),
], ids=["label 10", "few labels", "image size", "shape", "optimizer", "dropout"])
def test_nothing_is_read_from_beyond_a_tensor(spoil, message):
    x, y = images("cnn_small_1ch", 4)
    gpu.train_epoch(make("cnn_small_1ch"), x, y, recipe("original"))  # these labels were looked at before
    state = make("cnn_small_1ch")
    state.population.models = state.population.models.copy()
    x, y = spoil(x, y, state) or (x, y)
    before = {name: tensor.clone() for name, tensor in state.population.weights.items()}
    with pytest.raises(UserError, match=message):
        gpu.train_epoch(state, x, y, recipe("original"))
    assert state.epoch == 5 and all(
        torch.equal(tensor, before[name]) for name, tensor in state.population.weights.items()
    )


def test_labels_that_changed_are_looked_at_again():
    x, y = images("cnn_small_1ch", 4)
    state = make("cnn_small_1ch")
    gpu.train_epoch(state, x, y, recipe("original"))
    y += 10
    with pytest.raises(UserError, match="0 to 9"):
        gpu.train_epoch(state, x, y, recipe("original"))


def test_a_population_goes_through_its_recipe():
    """Digits for two epochs, measured after each, as the lanes have it."""
    pictures, population = subset(load_images("digits"), 60, 40), sample_population(ZOOS["digits_seed"], 3)
    results = [
        engines.train(population, pictures, Recipe("digits_seed", "original", epochs=2), engine=engine, progress=False)
        for engine in (lanes.LANES, gpu.GPU)
    ]
    expected, found = (result.metrics for result in results)
    assert list(found["epoch"]) == [0, 1, 2] * 3 and np.allclose(expected, found, atol=1e-5)


def test_what_is_measured_on_a_device_runs_on_the_host():
    path = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_gpu", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.check_against_host("cnn_small_1ch", "vd", "cpu")
    assert found["well"] and found["weights"] == found["loss"] == found["classes"] == 0
    assert (
        benchmark.check_alone("cnn_small_1ch", "mp", "cpu", models=3, images=3)
        and benchmark.check_orders("cpu", 100)
        and benchmark.peak("cpu") is None
    )
    state = benchmark.some_state("cnn_small_1ch", "original", 2, "cpu")
    assert (
        benchmark.rate(
            lambda x, y: gpu.train_epoch(state, x, y, benchmark.a_recipe("original")), "cnn_small_1ch", 2, "cpu", 2,
            0.01,
        )
        > 0
    )


def test_images_that_lie_askew():
    """Tensors that begin anywhere in memory are copied to where four numbers can be read at once."""
    x, y = images("cnn_small_1ch", 5)
    askew = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert askew.data_ptr() % 16
    one, other = make("cnn_small_1ch"), make("cnn_small_1ch")
    gpu.train_epoch(one, x, y, recipe("original"))
    gpu.train_epoch(other, askew, y, recipe("original"))
    assert equal(one, other)


# --------------------------------------------------------------------------------------------------------- sanitizers

def sanitized(variant, folder, source=None):
    """Train in a program of its own, under the sanitizers of addresses and of undefined behaviour."""
    flags = [
        "-std=c++20", "-O0", "-ffp-contract=off", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    ]
    command = [
        lanes.compiler(), *flags, *variant.options(), f"-I{(source or gpu.SOURCE).parent}", f"-I{gpu.SOURCE.parent}",
        str(Path(__file__).with_name("gpu_main.cpp")),
    ]
    built = subprocess.run([*command, "-o", str(folder / "program")], capture_output=True, text=True)
    if "asan" in built.stderr and "cannot find" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert not built.returncode, built.stderr
    return subprocess.run([folder / "program"], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", gpu.VARIANTS, ids=NAMES)
def test_sanitizers_find_nothing(variant, tmp_path):
    result = sanitized(variant, tmp_path)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "clean", "")


@pytest.mark.parametrize("right, wrong, message", [
    ("FOR(k, count) s.label[k] =", "FOR(k, S + 1) s.label[k] =", "out of bounds"),
    ("FOR(i, T::WEIGHTS) g(", "FOR(i, T::WEIGHTS + 999) g(", "heap-buffer-overflow|out of bounds"),
], ids=["shared", "global"])
def test_sanitizers_would_find_something(right, wrong, message, tmp_path):
    text = gpu.SOURCE.read_text()
    assert text.count(right) == 1
    (tmp_path / "gpu.cu").write_text(text.replace(right, wrong))
    result = sanitized(gpu.VARIANTS[0], tmp_path, tmp_path / "gpu.cu")
    assert result.returncode and re.search(message, result.stderr)


# -------------------------------------------------------------------------------------------------- NVIDIA's compiler


def nvrtc_missing():
    try:
        gpu.nvrtc()
    except UserError:
        return True


def symbol_sizes(cubin):
    """The sizes of a program's symbols, from the tables of its ELF file."""
    sections, = struct.unpack_from("<Q", cubin, 40)
    count, = struct.unpack_from("<H", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections + 64 * i) for i in range(count)]
    sizes = {}
    for _, kind, _, _, offset, length, link, *_ in headers:
        if kind == 2:  # a table of symbols, whose names lie in another section
            for at in range(offset, offset + length, 24):
                name, _, _, _, _, size = struct.unpack_from("<IBBHQQ", cubin, at)
                start = headers[link][4] + name
                sizes[cubin[start:cubin.index(b"\0", start)].decode()] = size
    return sizes


@pytest.mark.skipif(nvrtc_missing(), reason="NVRTC is not installed")
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("variant", gpu.VARIANTS, ids=NAMES)
def test_every_variant_fits_every_gpu(variant, chip):
    cubin, log = gpu.compile_for_gpu(variant, chip, ("--ptxas-options=-v",))
    registers = [int(line.split("Used")[1].split()[0]) for line in log.splitlines() if "Used" in line]
    spills = [line for line in log.splitlines() if "spill" in line]
    assert len(registers) == len(spills) == (2 if variant.noisy else 3) and max(registers) <= 128
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    sizes, library = symbol_sizes(cubin), gpu.host_library(variant)
    assert sizes["shared_bytes"] <= (113 if "small" in variant.architecture else 227) * 1024
    assert (
        sum(library.part_size(part) for part in range(7))
        <= sizes["shared_bytes"]
        < sum(library.part_size(part) for part in range(7)) + 1024
    )
    assert sizes["threads_per_block"] * max(registers) <= 65536 // (2 if "small" in variant.architecture else 1)


@pytest.mark.skipif(nvrtc_missing(), reason="NVRTC is not installed")
def test_programs_are_kept_and_mistakes_told(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "cache_folder", lambda: tmp_path)
    first = gpu.cubin(gpu.VARIANTS[0], "sm_90")
    assert first[:4] == b"\x7fELF" and [path.suffix for path in (tmp_path / "gpu").iterdir()] == [".cubin"]
    monkeypatch.setattr(gpu, "compile_for_gpu", None)
    assert gpu.cubin(gpu.VARIANTS[0], "sm_90") == first
    monkeypatch.undo()
    with pytest.raises(UserError, match="sm_1") as told:
        gpu.compile_for_gpu(gpu.VARIANTS[0], "sm_1")
    assert "\n" not in str(told.value)


def test_without_what_it_needs_the_engine_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "_nvrtc_paths", lambda: ["no/such/libnvrtc.so"])
    gpu.nvrtc.cache_clear()
    try:
        with pytest.raises(UserError, match="pip install nvidia-cuda-nvrtc") as told:
            gpu.nvrtc()
    finally:
        gpu.nvrtc.cache_clear()
    assert "\n" not in str(told.value)
    assert "cnn_small_1ch" in gpu.why_unavailable("cnn_huge")
    if not torch.cuda.is_available():
        assert "no CUDA device" in gpu.why_unavailable("cnn_large") and gpu.block_width() == 8


def test_a_compiler_that_fails_is_told(monkeypatch, fresh):
    monkeypatch.setenv("CXX", "/bin/false")
    gpu.host_library.cache_clear()
    with pytest.raises(UserError, match="could not be built|could not build") as told:
        gpu.host_library(gpu.VARIANTS[0])
    assert "\n" not in str(told.value)
