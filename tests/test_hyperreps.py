"""Symmetries, losses and resumable training of the auto-encoder of weights."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zootwins import hyperreps
from zootwins.architectures import ARCHITECTURES, build
from zootwins.core import UserError
from zootwins.hyperreps import (
    CONFIGS, HyperAutoEncoder, permutation_index, random_orders, to_alpha_vectors, to_vectors, to_weights, token_layout,
)
from zootwins.population import Population, plain_models
from zootwins.store import read_part
from zootwins.variational import begin_variational, deterministic, log_alphas

PAPER = ("cnn_small_1ch", "cnn_small_3ch", "cnn_large")
IMAGES = {"cnn_small_1ch": (1, 28, 28), "cnn_small_3ch": (3, 28, 28), "cnn_large": (3, 32, 32)}
TINY = replace(
    CONFIGS["small"], name="tiny", dim=16, layers=1, hidden=16, latent=8, batch_size=8, epochs=3, dropout=0.1,
    projection_width=16, projection=8,
)


def noisy_population(architecture, n, seed=0):
    "Models with random weights, biases and log variances."
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(n, *p.shape, generator=generator) * 0.3 for name, p in build(architecture).named_parameters()
    }
    population = begin_variational(Population(weights, plain_models(n), architecture))
    for name, tensor in population.weights.items():
        if "log_sigma2" in name:
            tensor.uniform_(-12, 5, generator=generator)
    return population


def random_states(n_models=12, n_epochs=3, architecture="cnn_small_1ch"):
    "States of random models with random measures."
    random = np.random.default_rng(0)
    epochs = {epoch: noisy_population(architecture, n_models, epoch).weights for epoch in range(n_epochs)}
    rows = [(model, epoch, *random.random(3)) for epoch in epochs for model in range(n_models)]
    metrics = pd.DataFrame(rows, columns=["model", "epoch", "test_acc", "ggap", "sparsity"])
    return hyperreps.gather_states(epochs, metrics, range(n_models), "digits_seed", architecture)


def permuted(population, seed):
    "The same models with their hidden neurons in another order: parameters and log variances."
    layout = token_layout(population.architecture)
    index = permutation_index(layout, random_orders(layout, len(population), torch.Generator().manual_seed(seed)))
    plain = to_weights(to_vectors(population.weights, layout).gather(1, index), layout)
    noise = {}
    for layer in layout:
        noise[f"{layer.path}.weight"] = population.weights[f"{layer.path}.log_sigma2"]
        noise[f"{layer.path}.bias"] = population.weights.get(
            f"{layer.path}.log_sigma2_bias", torch.zeros(len(population), layer.neurons)
        )
    moved = to_weights(to_vectors(noise, layout).gather(1, index), layout)
    names = {name: name.replace(".weight", ".log_sigma2").replace(".bias", ".log_sigma2_bias") for name in moved}
    return index, plain | {names[name]: tensor for name, tensor in moved.items() if names[name] in population.weights}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(PAPER), st.sampled_from(["tanh", "relu", "gelu", "sigmoid"]), st.integers(0, 10_000))
def test_permuted_models_compute_the_same_before_and_after_pruning(architecture, activation, seed):
    population = noisy_population(architecture, 2, seed)
    _, other = permuted(population, seed)
    images = torch.randn(4, *IMAGES[architecture], generator=torch.Generator().manual_seed(seed))
    plain = {name: tensor for name, tensor in population.weights.items() if ".log_sigma2" not in name}
    for before, after in (
        (plain, {name: other[name] for name in plain}),
        (deterministic(population.weights), deterministic(other)),
    ):
        for i in range(2):
            module, again = (build(architecture, activation) for _ in range(2))
            module.load_state_dict({name: tensor[i] for name, tensor in before.items()})
            again.load_state_dict({name: tensor[i] for name, tensor in after.items()})
            assert torch.allclose(module(images), again(images), atol=1e-4)
            assert not torch.equal(module.module_list[0].weight, again.module_list[0].weight)


@pytest.mark.parametrize("architecture", PAPER)
def test_log_alphas_are_permuted_with_their_weights(architecture):
    population = noisy_population(architecture, 3)
    layout = token_layout(architecture)
    index, other = permuted(population, 1)
    assert torch.equal(to_alpha_vectors(other, layout), to_alpha_vectors(population.weights, layout).gather(1, index))
    assert all((index.sort(1).values == torch.arange(index.shape[1])).all(1))


def test_outputs_keep_their_places():
    layout = token_layout("cnn_small_1ch")
    assert torch.equal(random_orders(layout, 4, torch.Generator())[-1], torch.arange(10).expand(4, 10))


@pytest.mark.parametrize("architecture", PAPER)
def test_vectors_hold_everything(architecture):
    population = noisy_population(architecture, 2)
    layout = token_layout(architecture)
    again = to_weights(to_vectors(population.weights, layout), layout)
    assert all(torch.equal(tensor, population.weights[name]) for name, tensor in again.items()) and len(again) == 10
    alphas = to_weights(to_alpha_vectors(population.weights, layout), layout)
    assert all(torch.equal(alphas[name], relative) for name, relative in log_alphas(population.weights).items())
    assert hyperreps.noisy_places(layout).sum() == sum(
        relative[0].numel() for relative in log_alphas(population.weights).values()
    )


def test_what_is_no_chain_of_layers_has_no_tokens(monkeypatch):
    crooked = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(9, 4))
    monkeypatch.setitem(ARCHITECTURES, "crooked", lambda activation, dropout: crooked)
    with pytest.raises(UserError, match="only chains of layers"):
        token_layout("crooked")


class Skips(torch.nn.Module):
    "Layers of equal width, with or without something that passes them by."

    def __init__(self, how, bias=True):
        super().__init__()
        self.how, nn = how, torch.nn
        self.first, self.second, self.third = (
            nn.Conv2d(1, 4, 3, bias=bias),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4 * 26 * 26, 10),
        )

    def forward(self, x):
        x = self.first(x).tanh()
        y = self.second(x if self.how != "gate" else x * x.mean((2, 3), keepdim=True)).tanh()
        y = {
            "chain": y, "gate": y, "sum": y + x, "product": y * x,
            "twice": self.second(y).tanh() if self.how == "twice" else y, "order": y * torch.arange(4).reshape(4, 1, 1),
        }[self.how]
        return self.third(y.flatten(1))


@pytest.mark.parametrize("how", ["chain", "gate", "sum", "product", "twice", "order"])
def test_what_passes_a_layer_by_is_found(monkeypatch, how):
    monkeypatch.setitem(ARCHITECTURES, "skips", lambda activation, dropout: Skips(how))
    if how in ("chain", "gate"):  # a gate treats all neurons alike, wherever they stand
        assert len(token_layout("skips")) == 3
    else:
        with pytest.raises(UserError, match="only chains of layers"):
            token_layout("skips")


def test_what_cannot_be_laid_out_is_named(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "skips", lambda activation, dropout: Skips("chain", bias=False))
    with pytest.raises(UserError, match="first has no bias"):
        token_layout("skips")
    odd = lambda activation, dropout: torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 15 * 9, 10)
    )
    monkeypatch.setitem(ARCHITECTURES, "skips", odd)
    with pytest.raises(UserError, match="cannot be tried"):
        token_layout("skips")
    monkeypatch.setitem(
        ARCHITECTURES,
        "skips",
        lambda activation, dropout: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(784, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ),
    )
    assert [layer.neurons for layer in token_layout("skips")] == [8, 3]


def test_contrastive_loss_is_small_for_alike_views_and_large_for_mixed_ones():
    views = torch.eye(6)
    assert hyperreps.contrastive_loss(torch.cat([views, views]), 0.1) < 1e-3
    assert hyperreps.contrastive_loss(torch.cat([views, views.roll(1, 0)]), 0.1) > 5


def test_losses_ignore_what_does_not_count():
    written, truth = torch.zeros(2, 4), torch.tensor([[3.0, 9.0, -5.0, 0.0]]).expand(2, 4)
    counts = torch.tensor([True, False, False, False])
    expected = np.tanh((0 - 3) / 3) ** 2
    assert np.isclose(hyperreps.alpha_loss(written, truth, 3.0, counts).item(), expected)


def test_erased_places_are_not_asked_for_their_log_alpha():
    layout = token_layout("cnn_small_1ch")
    config = replace(TINY, erase=1.0, noise=0.5)
    weights, alphas = torch.rand(5, 2464) + 1, torch.randn(5, 2464)
    view = hyperreps.augment(weights, alphas, layout, torch.ones(2464), config, torch.Generator().manual_seed(0))
    erased = view.weights == 0
    assert (erased.sum(1) > 40).all() and not (view.kept & erased).any()
    assert torch.equal(view.kept | erased, hyperreps.noisy_places(layout) | erased)
    assert torch.equal(view.log_alphas.sort(1).values, alphas.sort(1).values)
    assert ((view.read - view.weights).std() - 0.5).abs() < 0.02


def test_reading_does_not_depend_on_the_rest_of_the_batch():
    layout = token_layout("cnn_large")
    torch.manual_seed(0)
    model = HyperAutoEncoder(layout, TINY, torch.zeros(10853), torch.ones(10853)).eval()
    vectors = torch.randn(3, 10853)
    with torch.no_grad():
        together = model.encode(vectors)
        assert torch.allclose(together[1:2], model.encode(vectors[1:2]), atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_all_states_of_a_model_are_on_one_side():
    states = random_states(20)
    assert (states.rows.groupby("model")["split"].nunique() == 1).all()
    assert states.rows.groupby("split")["model"].nunique().to_dict() == {"train": 14, "val": 3, "test": 3}
    with pytest.raises(UserError, match="too few"):
        hyperreps.split_models(range(9), "digits_seed")


def test_models_with_huge_or_broken_weights_are_left_out():
    epochs = {epoch: noisy_population("cnn_small_1ch", 12, epoch).weights for epoch in range(2)}
    epochs[0]["module_list.0.weight"][3, 0, 0, 0, 0] = 7.0
    epochs[1]["module_list.11.bias"][5, 2] = torch.nan
    metrics = pd.DataFrame(
        [(m, e, 0.5, 0.0, 0.1) for e in epochs for m in range(12)],
        columns=["model", "epoch", "test_acc", "ggap", "sparsity"],
    )
    states = hyperreps.gather_states(epochs, metrics, range(12), "digits_seed", "cnn_small_1ch")
    assert sorted(states.rows["model"].unique()) == [m for m in range(12) if m not in (3, 5)]
    at = states.rows.query("model == 4 and epoch == 1").index[0]
    assert torch.equal(states.weights[at], to_vectors(epochs[1], token_layout("cnn_small_1ch"))[4])


@pytest.mark.parametrize("compression", ["token", "all"])
def test_structure_is_learned(compression):
    "Models that differ in two directions only are reconstructed; with random orders of neurons this would take longer."
    states, random = random_states(20, 2), torch.Generator().manual_seed(0)
    directions, amounts = torch.randn(2, 2464, generator=random), torch.randn(len(states), 2, generator=random)
    states = replace(states, weights=0.1 * amounts @ directions, log_alphas=amounts @ directions.roll(1, 0))
    held, train = (states[states.rows["split"] == part] for part in ("val", "train"))
    config = replace(TINY, dropout=0.0, latent=16, learning_rate=5e-3, compression=compression)
    training = hyperreps.begin_training(train, config)
    model, places = training.model, hyperreps.noisy_places(training.model.layout)
    for _ in range(80):
        weights, alphas = model.decode(model.encode(train.weights))
        loss = hyperreps.weight_loss(weights, train.weights, model.scale) + hyperreps.alpha_loss(
            alphas, train.log_alphas, config.window, places
        )
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
    quality = hyperreps.reconstruction_quality(model, train, held)
    assert quality["r2_weights"] > 0.5 and quality["r2_alphas"] > 0.15, quality


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_hyperreps import train_here
train_here(sys.argv[1], 10_000)
"""


def train_here(folder, until):
    "Train for 10,000 epochs, saving each, or until some epoch is saved."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    states, config = random_states(), replace(TINY, epochs=10_000)
    training, train = hyperreps.begin_training(states, config), states[states.rows["split"] == "train"]
    history = hyperreps.open_training(Path(folder), training, states)
    while training.epoch < until:
        history = pd.concat(
            [history, pd.DataFrame([{"epoch": training.epoch + 1, **hyperreps.train_epoch(training, train)}])],
            ignore_index=True,
        )
        hyperreps.save_training(Path(folder), training, history)
    torch.set_num_threads(threads)
    return history


def test_a_killed_training_goes_on_to_the_same_end(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "killed"), os.path.dirname(__file__)])
    while not list((tmp_path / "killed").glob("training-*")) and worker.poll() is None:
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    until = len(read_part(tmp_path / "killed", "training")[1]) + 3
    resumed, through = train_here(tmp_path / "killed", until), train_here(tmp_path / "whole", until)
    assert resumed.equals(through) and len(through) == until
    first, second = ([path.name for path in (tmp_path / name).glob("training-*")] for name in ("killed", "whole"))
    assert first == second and len(first) == 1  # a file's name is the hash of its content


def test_a_finished_training_is_loaded(tmp_path):
    states = random_states()
    model, history = hyperreps.train_autoencoder(states, TINY, tmp_path, progress=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    again, same = hyperreps.train_autoencoder(states, TINY, tmp_path, progress=False)
    assert same.equals(history) and sorted(path.name for path in tmp_path.iterdir()) == before
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_seeds_and_damage_are_noticed(tmp_path, capsys):
    states = random_states()
    hyperreps.train_autoencoder(states, TINY, tmp_path, progress=False)
    with pytest.raises(UserError, match="other seed"):
        hyperreps.train_autoencoder(states, TINY, tmp_path, seed=1, progress=False)
    with pytest.raises(UserError, match="other config"):
        hyperreps.train_autoencoder(states, replace(TINY, beta=0.2), tmp_path, progress=False)
    kept = next(tmp_path.glob("training-*"))
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    hyperreps.train_autoencoder(states, TINY, tmp_path, progress=False)  # made anew, to the same bits
    assert "cannot be read" in capsys.readouterr().out and next(tmp_path.glob("training-*")).name == kept.name
    other = replace(states, weights=states.weights.clone())
    other.weights[5, 7] += 1e-3
    with pytest.raises(UserError, match="other content"):
        hyperreps.train_autoencoder(other, TINY, tmp_path, progress=False)


def test_too_few_states_for_a_batch_are_told():
    with pytest.raises(UserError, match="fewer than one batch"):
        hyperreps.begin_training(random_states(), replace(TINY, batch_size=500))
