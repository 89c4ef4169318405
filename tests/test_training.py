"""The reference engine against ordinary PyTorch, one module at a time."""
import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zootwins.architectures import ARCHITECTURES
from zootwins.core import UserError
from zootwins.datasets import Images, load_images, subset
from zootwins.engines import train
from zootwins.population import Population, from_modules, plain_models, sample_population
from zootwins.selectors import prune
from zootwins.streams import Draws, epoch_order, stream_keys
from zootwins.training import Recipe, begin, train_epoch, training_module
from zootwins.variational import begin_variational, kl_weight, total_divergence
from zootwins.zoos import ZOOS


@pytest.fixture(scope="module")
def digits():
    return subset(load_images("digits"), 60, 100)


def by_hand(population, i, images, recipe, masks):
    "Train one model with an ordinary loop, torch's optimizers and the same random numbers."
    factors = population.models.iloc[i]
    plain = Population(
        {k: w for k, w in population.weights.items() if "sigma" not in k}, population.models, population.architecture
    )
    module, noisy = training_module(plain.to_module(i), recipe.variational)
    module.load_state_dict({k: w[i] for k, w in population.weights.items()})
    lr = factors["lr"] if recipe.lr is None else recipe.lr
    kind = {"adam": lambda p: torch.optim.Adam(p, lr, weight_decay=factors["wd"]),
            "sgd": lambda p: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=factors["wd"])}[factors["optimizer"]]
    optimizer = kind(module.parameters())
    key = stream_keys(recipe.zoo, recipe.stage, [factors["seed"]], recipe.run_seed)[0]
    for epoch in range(1, recipe.epochs + 1):
        order = epoch_order(len(images.x_train), key, epoch)
        for start in range(0, len(order), recipe.batch_size):
            batch = order[start : start + recipe.batch_size]
            for layer in noisy:
                layer.draws = Draws(key, torch.arange(start, start + len(batch)), torch.tensor(epoch))
            loss = F.cross_entropy(module(images.x_train[batch]), images.y_train[batch])
            if recipe.variational:
                loss = loss + kl_weight(epoch) * total_divergence(module)
            optimizer.zero_grad()
            loss.backward()
            for name, parameter in module.named_parameters():
                if name in masks:
                    parameter.grad *= masks[name][i]
            optimizer.step()
    return dict(module.named_parameters())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("activation,dropout", [("tanh", 0.0), ("relu", 0.5), ("sigmoid", 0.3), ("gelu", 0.0)])
@pytest.mark.parametrize("form", ["original", "mp", "vd"])
def test_a_population_trains_as_its_models_would_alone(digits, form, optimizer, activation, dropout):
    population = sample_population(ZOOS["digits_seed"], 3)
    population.models = population.models.assign(
        optimizer=optimizer, activation=activation, dropout=dropout, lr=[1e-3, 3e-3, 1e-4], wd=[0.0, 1e-3, 1e-2]
    )
    masks = {}
    if form == "mp":
        population, masks = prune(population, 0.7)
    if form == "vd":
        population = begin_variational(population)
    recipe = Recipe(
        "digits_seed", form, epochs=2, lr=None if form == "original" else 2e-3, batch_size=8, variational=form == "vd"
    )
    trained = train(population, digits, recipe, masks=masks, engine="torch", progress=False).population
    for i in (0, 2):
        alone = by_hand(population, i, digits, recipe, masks)
        apart = torch.cat([(parameter - trained.weights[name][i]).abs().flatten() for name, parameter in alone.items()])
        # the gradient of log alpha is 2 / |w|: where a noisy weight is nearly zero, rounding is magnified
        assert apart.quantile(0.998 if form == "vd" else 1.0) < 2e-5 and apart.max() < 5e-3


def test_mixed_populations_are_trained_group_by_group(digits):
    zoo = sample_population(ZOOS["mnist_fixed"], 6)
    recipe = Recipe("mnist_fixed", "original", epochs=1)
    together = train(zoo, digits, recipe, engine="torch", progress=False)
    assert zoo.models[["activation", "optimizer", "dropout"]].drop_duplicates().shape[0] > 1
    for i in (0, 5):
        alone = train(zoo[[i]], digits, recipe, engine="torch", progress=False)
        assert all(
            torch.allclose(alone.population.weights[k][0], w[i], atol=1e-5)
            for k, w in together.population.weights.items()
        )
    assert together.metrics["model"].tolist() == sorted(together.metrics["model"])
    with pytest.raises(UserError, match="differ in activation"):
        train_epoch(begin(zoo, stream_keys("z", "s", zoo.models["seed"])), digits.x_train, digits.y_train, recipe)


def test_any_module_of_standard_layers(digits, monkeypatch):
    nn = torch.nn
    mine = lambda activation, dropout: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(196, 10),
    )
    monkeypatch.setitem(ARCHITECTURES, "mine", mine)
    torch.manual_seed(0)
    population = from_modules([mine("relu", 0) for _ in range(3)], "mine", plain_models(3, activation="relu"))
    trained = train(population, digits, Recipe("mine", "original", epochs=8), engine="torch", progress=False)
    assert trained.metrics.query("epoch == 8")["test_acc"].min() > trained.metrics.query("epoch == 0")["test_acc"].max()
    sparse = train(
        begin_variational(trained.population), digits, Recipe("mine", "vd", epochs=1, variational=True), engine="torch",
        progress=False,
    )
    assert set(sparse.population.weights) == {"0.weight", "0.log_sigma2", "5.weight", "5.bias", "5.log_sigma2"}


def test_epoch_0_is_an_eval_mode_pass(digits):
    zoo = sample_population(ZOOS["digits_seed"], 2)
    zoo.models = zoo.models.assign(dropout=0.5)
    row = train(zoo, digits, Recipe("digits_seed", "original", epochs=1), engine="torch", progress=False).metrics.iloc[
        0
    ]
    module = zoo.to_module(0).eval()
    assert row["epoch"] == 0
    assert row["train_acc"] == pytest.approx(
        (module(digits.x_train).argmax(1) == digits.y_train).double().mean().item()
    )
    assert row["test_loss"] == pytest.approx(F.cross_entropy(module(digits.x_test), digits.y_test).item(), abs=1e-5)


def test_exploding_models_leave_their_neighbours_alone(digits):
    zoo = sample_population(ZOOS["digits_seed"], 3)
    wild = Population({k: w.clone() for k, w in zoo.weights.items()}, zoo.models, zoo.architecture)
    wild.weights["module_list.0.weight"][1] = torch.nan
    recipe = Recipe("digits_seed", "original", epochs=1)
    calm, hurt = (train(p, digits, recipe, engine="torch", progress=False) for p in (zoo, wild))
    for k in zoo.weights:
        assert torch.equal(hurt.population.weights[k][[0, 2]], calm.population.weights[k][[0, 2]])
    assert isinstance(digits, Images) and hurt.metrics.query("model == 1")["train_loss"].isna().all()


# ---- modules that cannot be trained here are refused by name before a step is made

class Functional(nn.Module):
    "Drops out by a function, in training or always, or rolls dice of its own."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(784, 10)

    def forward(self, x):
        x = x.flatten(1)
        x = {
            "training": lambda: F.dropout(x, 0.5, self.training), "always": lambda: F.dropout(x, 0.5),
            "dice": lambda: x * random.random(), "noise": lambda: x + torch.randn_like(x),
        }[self.kind]()
        return self.layer(x)


def flat(*layers, classes=10):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(784, classes))


@pytest.mark.parametrize(
    "make,reason",
    [
        (lambda: flat(nn.Dropout2d(0.5)), "Dropout2d"), (lambda: flat(nn.AlphaDropout(0.5)), "AlphaDropout"),
        (lambda: flat(nn.RReLU()), "RReLU"), (lambda: flat(nn.FeatureAlphaDropout(0.2)), "FeatureAlphaDropout"),
        (lambda: Functional("training"), "F.dropout"), (lambda: Functional("always"), "F.dropout"),
        (lambda: Functional("dice"), "random numbers"), (lambda: Functional("noise"), "random numbers"),
        (lambda: flat(classes=257), "of which there may be 256"), (lambda: flat(classes=9), "the classes 0 to 8"),
    ],
)
@pytest.mark.parametrize("form", ["original", "vd"])
def test_modules_that_cannot_be_trained_are_refused(monkeypatch, digits, make, reason, form):
    monkeypatch.setitem(ARCHITECTURES, "mine", lambda activation, dropout: make())
    population = from_modules([make() for _ in range(2)], "mine", plain_models(2))
    before = {name: tensor.clone() for name, tensor in population.weights.items()}
    with pytest.raises(UserError, match=reason):
        train(
            begin_variational(population) if form == "vd" else population, digits,
            Recipe("digits_seed", form, 1, variational=form == "vd"), progress=False,
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in population.weights.items())


def test_as_many_classes_as_predictions_can_tell(monkeypatch, digits):
    monkeypatch.setitem(ARCHITECTURES, "mine", lambda activation, dropout: flat(nn.Dropout(dropout), classes=256))
    many = replace(digits, y_train=digits.y_train + 246, y_test=digits.y_test + 246)
    done = train(
        from_modules([flat(nn.Dropout(0.1), classes=256)], "mine", plain_models(1, dropout=0.1)), many,
        Recipe("digits_seed", "original", 3, 1e-2), progress=False,
    )
    assert done.metrics["test_acc"].iloc[-1] > 0.5
