"""Probes of hyper-representations, zero-shot masks, and the notebook that makes Table 3."""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from small import run_notebook
from zootwins import hyperreps, probes
from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.datasets import Images
from zootwins.hyperreps import PARAMETERS, choose_config, find_trajectory, token_layout
from zootwins.metrics import sparsity
from zootwins.population import Population, plain_models
from zootwins.selectors import prune
from zootwins.training import TORCH
from zootwins.variational import begin_variational, deterministic, sparse_masks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "hyper_representations.ipynb"
ARCHITECTURE = "cnn_small_1ch"
LAYOUT = token_layout(ARCHITECTURE)


def some_images(n=40):
    "Random images and labels."
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 28, 28, generator=generator), torch.randint(10, (n,), generator=generator)
    return Images("random", x, y, x, y, x, y)


def drifting_states(n_models=20, n_epochs=3):
    "Models whose noise grows from epoch to epoch, with true accuracies and sparsities."
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.3 * torch.randn(n_models, *p.shape, generator=generator)
        for name, p in build(ARCHITECTURE).named_parameters()
    }
    images, epochs, rows = some_images(), {}, []
    for epoch in range(n_epochs):
        noisy = begin_variational(Population(weights, plain_models(n_models), ARCHITECTURE)).weights
        noise = {name: tensor + 4.0 * epoch for name, tensor in noisy.items() if "log_sigma2" in name}
        epochs[epoch] = noisy | noise
        right = TORCH.evaluate(
            deterministic(epochs[epoch]), ARCHITECTURE, ["tanh"] * n_models, images.x_test, images.y_test
        )[1]
        zeros = sparsity(sparse_masks(epochs[epoch]), {layer.path: layer.path for layer in LAYOUT})["sparsity"]
        accuracies = (right == images.y_test).double().mean(1)
        rows += [
            (model, epoch, accuracies[model].item(), 0.01 * model, zeros[model].item()) for model in range(n_models)
        ]
    metrics = pd.DataFrame(rows, columns=["model", "epoch", "test_acc", "ggap", "sparsity"])
    return hyperreps.gather_states(epochs, metrics, range(n_models), "digits_seed", ARCHITECTURE)


def untrained(states):
    "An auto-encoder as it is born."
    config = replace(hyperreps.CONFIGS["small"], dim=16, hidden=16, latent=8, batch_size=8)
    return hyperreps.begin_training(states, config).model.eval()


@pytest.mark.parametrize("n,features", [(60, 5), (30, 200)])
def test_probe_is_the_best_ridge_regression(n, features):
    random = np.random.default_rng(n)
    x = random.normal(size=(3 * n, features)) * random.uniform(0.01, 100, features)
    y = pd.DataFrame({"a": x[:, 0] + x[:, 1] + random.normal(size=3 * n), "b": random.normal(size=3 * n)})
    split = pd.Series(random.permutation(np.repeat(["train", "val", "test"], n)))
    train, val, test = ((split == part).to_numpy() for part in ("train", "val", "test"))
    inputs = StandardScaler().fit(x[train]).transform(x)
    found = probes.probe(x, y, split)
    for name in y:
        rivals = [
            Ridge(penalty).fit(inputs[train], y.loc[train, name]) for penalty in probes.LAMBDAS if penalty >= 1e-4
        ]
        best = max(rivals, key=lambda rival: r2_score(y.loc[val, name], rival.predict(inputs[val])))
        assert np.allclose(found[name], best.predict(inputs[test]), atol=1e-3)
    assert found.index.tolist() == np.flatnonzero(test).tolist()


def test_test_states_do_not_choose_the_penalty_or_the_fit():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(90, 10)), pd.DataFrame({"a": random.normal(size=90)})
    split = pd.Series(np.repeat(["train", "val", "test"], 30))
    changed = y.copy()
    changed.iloc[60:] = 100.0
    assert probes.probe(x, y, split).equals(probes.probe(x, changed, split))


def test_intervals_resample_models():
    random = np.random.default_rng(0)
    truth = pd.DataFrame({"a": np.repeat(random.normal(size=10), 20)})
    predicted = truth + np.repeat(random.normal(size=(10, 1)), 20, axis=0)
    by_model = probes.explained_share(truth, predicted, pd.Series(np.repeat(range(10), 20)))
    by_state = probes.explained_share(truth, predicted, pd.Series(range(200)))
    width = lambda found: (found["high"] - found["low"]).item()
    assert width(by_model) > 2 * width(by_state)
    assert (by_model["low"] <= by_model["r2"]).all() and (by_model["r2"] <= by_model["high"]).all()


def test_intervals_are_those_of_resampled_rows():
    random = np.random.default_rng(0)
    truth = pd.DataFrame({"a": random.normal(size=60), "b": random.normal(size=60)})
    predicted, models = truth + 0.5 * random.normal(size=(60, 2)), pd.Series(np.tile(range(12), 5))
    found = probes.explained_share(truth, predicted, models, draws=4000)
    chosen = random.integers(12, size=(4000, 12))
    rows = [np.concatenate([np.flatnonzero(models == model) for model in draw]) for draw in chosen[:1500]]
    slow = np.percentile(
        [r2_score(truth.to_numpy()[at], predicted.to_numpy()[at], multioutput="raw_values") for at in rows],
        [2.5, 97.5],
        axis=0,
    )
    assert np.allclose(found[["low", "high"]].to_numpy().T, slow, atol=0.05)
    assert np.allclose(found["r2"], [r2_score(truth[name], predicted[name]) for name in "ab"])


def test_statistics_do_not_depend_on_the_order_of_neurons():
    weights = torch.randn(3, 2464)
    index = hyperreps.permutation_index(LAYOUT, hyperreps.random_orders(LAYOUT, 3, torch.Generator().manual_seed(0)))
    assert np.allclose(
        probes.weight_statistics(weights, LAYOUT), probes.weight_statistics(weights.gather(1, index), LAYOUT), atol=1e-6
    )


def test_pruning_by_magnitude_is_magnitude_pruning():
    states = drifting_states()
    kept = hyperreps.to_weights(probes.keep_by(states.weights.abs(), 0.7, LAYOUT), LAYOUT)
    weights = hyperreps.to_weights(states.weights, LAYOUT)
    _, expected = prune(Population(weights, plain_models(len(states.weights)), ""), 0.7)
    assert all(torch.equal(kept[name], mask) for name, mask in expected.items())
    assert all(kept[name].all() for name in kept if name.endswith("bias"))


def test_a_twins_own_mask_at_its_own_level_gives_the_twin():
    "Here weights stay as they were, so that the mask by the twin's log alphas at its own sparsity gives its accuracy."
    states = drifting_states()
    state = states[(states.rows["epoch"] == 2) & (states.rows["model"] == 7)]
    kept = probes.keep_by(-state.log_alphas, state.rows["sparsity"].item(), LAYOUT)
    places = LAYOUT and probes.weight_places(LAYOUT)
    assert torch.equal(kept[:, places], (state.log_alphas < 3)[:, places])
    bias_noise = torch.where(~places & (state.log_alphas >= 3), 0.0, 1.0)
    right = probes.vector_accuracy(
        state.weights * kept * bias_noise, pd.Series(["tanh"]), ARCHITECTURE, some_images(), TORCH
    )
    assert right[0] == pytest.approx(state.rows["test_acc"].item())


def test_vector_accuracy_knows_activations():
    states = drifting_states(10, 1)
    activations = pd.Series(["tanh", "relu"] * 5)
    images = some_images()
    found = probes.vector_accuracy(states.weights, activations, ARCHITECTURE, images, TORCH)
    for i in (0, 1, 9):
        module = build(ARCHITECTURE, activations[i])
        module.load_state_dict(
            {name: tensor[i] for name, tensor in hyperreps.to_weights(states.weights, LAYOUT).items()}
        )
        assert found[i] == (module(images.x_test).argmax(1) == images.y_test).double().mean().item()


def test_zero_shot_prunes_test_models_only_and_equally():
    states = drifting_states()
    model = untrained(states)
    found = probes.zero_shot(model, states, 2, pd.Series("tanh", index=range(20)), some_images(), TORCH)
    test_models = set(states.rows.loc[states.rows["split"] == "test", "model"])
    assert set(found["model"]) == test_models and len(found) == 5 * len(test_models)
    masked = found[found["method"] != "variational dropout"]
    assert masked["sparsity"].nunique() == 1
    level = states.rows.query("epoch == 2 and split == 'train'")["sparsity"].mean()
    assert abs(masked["sparsity"].iloc[0] - level) < 1e-3
    assert (masked.loc[masked["method"] == "mask of the twin", "overlap"] == 1).all() and masked["overlap"].between(
        0, 1
    ).all()
    same_order = masked[masked["method"] == "magnitude pruning"]["overlap"]
    assert (same_order > 0.99).all()  # with equal log variances the order of log alphas is that of magnitudes


def test_tables_have_the_printed_rows_and_every_baseline():
    states = drifting_states()
    model = untrained(states)
    numbers = probes.qualities(model, states)
    table = probes.table_3(pd.concat([numbers, numbers.assign(zoo="mnist_seed")]))
    assert list(table.layout.columns) == ["Weights", "Alphas", "Accuracy", "Sparsity", "Epoch", "GGap"]
    assert table.layout.loc[("SVHN (s)", "printed in the paper")].tolist() == [
        "74.8", "74.2", "94.5", "97.6", "30.2", "10.5",
    ]
    ours = table.layout.loc["Digits (s) Seed"]
    assert ours.index.tolist() == ["hyper-representation", "layer statistics", "raw weights"] and ours.equals(
        table.layout.loc["MNIST (s) Seed"]
    )
    accuracy = numbers.query("features == 'layer statistics' and property == 'test_acc'")
    assert (
        ours.loc["layer statistics", "Accuracy"] == f"{100 * accuracy['r2'].item():.1f}"
        and accuracy["low"].item() <= accuracy["r2"].item() <= accuracy["high"].item()
    )
    assert (ours.loc["hyper-representation"] != "").all() and (
        ours.loc["raw weights", ["Weights", "Alphas"]] == ""
    ).all()
    assert "Digits (s) Seed: 3, MNIST (s) Seed: 3" in table.caption
    twins = probes.probe_twins(model, states)
    assert set(twins["property"]) == {"test_acc", "sparsity"} and "the original's accuracy" in set(twins["features"])


def test_epochs_of_other_models_are_refused():
    states = drifting_states()
    lacking = states[~((states.rows["epoch"] == 2) & (states.rows["model"] == 3))]
    with pytest.raises(UserError, match="same models"):
        probes.move_latents(untrained(states), lacking, 2)


papermill = partial(run_notebook, NOTEBOOK)


def test_the_notebook_explains_its_parameters():
    cells = [c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", [])]
    lines = cells[0].source.splitlines()
    assert (
        len(cells) == 1
        and tuple(line.split(" = ")[0] for line in lines) == PARAMETERS
        and all("  # " in line for line in lines)
    )


@pytest.mark.slow
def test_the_notebook_writes_its_tables_and_figures(tmp_path):
    done = papermill(tmp_path, n_models=12, epochs=1, formats="csv,md,png,svg")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "figures" / "digits_seed" / "hyper_representations"
    names = {p.name for p in folder.iterdir()}
    figures = {f"figure_{name}.{form}" for name in ("losses", "latent", "zero_shot") for form in ("png", "svg")}
    assert names == {"run.json", "table_3.csv", "table_3.md", "probes_twins.csv", "zero_shot.csv", *figures}
    record = json.loads((folder / "run.json").read_text())
    assert record["n_models"] == 12 and record["config"]["epochs"] == 1 and record["states"] == 12 * 26


@pytest.mark.slow
def test_the_notebook_runs_again_in_one_kernel(tmp_path):
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    own = [
        f"n_models, epochs, store, figures = 12, {n}, {str(tmp_path / 'zoos')!r}, {str(tmp_path / 'figures')!r}\n"
        "mine = 3"
        for n in (1, 2)
    ]
    notebook.cells = [
        cell
        for code in own
        for cell in (*notebook.cells[:first], nbformat.v4.new_code_cell(code), *notebook.cells[first:])
    ]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    record = json.loads((tmp_path / "figures/digits_seed/hyper_representations/run.json").read_text())
    assert record["config"]["epochs"] == 2


def test_a_mistake_is_told_before_any_work(tmp_path):
    done = papermill(tmp_path, epoch=3)
    assert done.returncode != 0 and "There is no parameter of hyper_representations 'epoch'" in done.stderr
    done = papermill(tmp_path, formats="jpg")
    assert done.returncode != 0 and "csv, md, tex" in done.stderr
    assert not (tmp_path / "zoos").exists()


def test_mistakes_are_told(tmp_path):
    for wrong, told in (
        ({"zoo": "digits_sed"}, "did you mean 'digits_seed'"),
        ({"zoo": "digits_seed", "n_models": 4}, "take at least 10"),
    ):
        with pytest.raises(UserError, match=told):
            find_trajectory(**wrong, store=str(tmp_path), figures=str(tmp_path))
    with pytest.raises(UserError, match="There is no configuration of the auto-encoder 'large'"):
        choose_config("large", None)