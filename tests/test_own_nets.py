"""Nets of one's own: with and without biases, residual, normalised; no dictionary of the package is written to."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from small import IMAGES, different, says
from zootwins.architectures import ARCHITECTURES, build, register
from zootwins.averaging import average
from zootwins.blocks import predict, start_of, train_block
from zootwins.core import UserError
from zootwins.engines import train
from zootwins.hyperreps import token_layout
from zootwins.plans import make_plan, make_stages
from zootwins.population import from_modules, load_population, sample_population
from zootwins.published import fit, shapes_of
from zootwins.publishing import export_zoo, publish
from zootwins.store import read_stage, read_stage_metrics
from zootwins.streams import epoch_order
from zootwins.training import TORCH, Recipe, begin, model_keys, train_epoch
from zootwins.twins import load_models, make_twins
from zootwins.zoo_data import ZooDataset, twins_of
from zootwins.zoos import ZOOS, Zoo


class Residual(nn.Module):
    "Convolutions without biases, batch normalisations of both kinds, a layer and a group normalisation, an addition."

    def __init__(self, activation="relu"):
        super().__init__()
        self.act = {"relu": F.relu, "tanh": torch.tanh}[activation]
        self.first, self.norm = nn.Conv2d(1, 4, 7, stride=7, bias=False), nn.BatchNorm2d(4, momentum=0.3)
        self.second, self.plain = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False, eps=1e-3)
        self.hidden, self.flat = nn.Linear(64, 12), nn.BatchNorm1d(12)
        self.groups, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm(12)
        self.last = nn.Linear(12, 10, bias=False)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = self.act(self.groups(x + self.act(self.plain(self.second(x)))))
        return self.last(self.layer(self.act(self.flat(self.hidden(x.flatten(1))))))


ZOO = Zoo(
    "residuals", "Residuals", "digits", "residual", seeds=3, activation=("relu",), init=("kaiming_uniform",),
    lr=(3e-3,), wd=(1e-2,), epochs=2, batch_size=16, mp_epochs=1, mp_learning_rate=1e-3, vd_epochs=2,
    vd_learning_rate=1e-2,
)


@pytest.fixture(scope="module", autouse=True)
def residual():
    with register("residual", Residual):
        yield
    assert "residual" not in ARCHITECTURES and "residuals" not in ZOOS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("own"))
    plan = make_plan(ZOO, store=folder, figures=folder, levels="50", engine="torch")
    make_twins(plan, IMAGES, progress=False)
    return plan


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_is_that_of_pytorch(optimizer):
    "Step by step, with weight decay on weights and none on running statistics; batches of 32 leave one of 16."
    zoo = sample_population(replace(ZOO, optimizer=(optimizer,)), 2)
    zoo.weights = {name: tensor.double() for name, tensor in zoo.weights.items()}
    x, y = IMAGES.x_train.double(), IMAGES.y_train
    recipe = Recipe("residuals", "original", 2, batch_size=32)
    state, modules = begin(zoo, model_keys(recipe, zoo.models)), [zoo.to_module(i).double().train() for i in range(2)]
    make = {"adam": torch.optim.Adam, "sgd": lambda *a, **k: torch.optim.SGD(*a, momentum=0.9, **k)}[optimizer]
    optimizers = [make(module.parameters(), lr=3e-3, weight_decay=1e-2) for module in modules]
    for epoch in (1, 2):
        orders = epoch_order(len(x), state.keys, epoch)
        for module, steps, order in zip(modules, optimizers, orders):
            for batch in order.split(32):
                steps.zero_grad()
                F.cross_entropy(module(x[batch]), y[batch]).backward()
                steps.step()
        train_epoch(state, x, y, recipe)
    for i, module in enumerate(modules):
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert tensor == 6
            else:
                assert torch.allclose(state.population.weights[name][i], tensor, rtol=1e-5, atol=1e-6), name
    begun = zoo.weights["norm.running_mean"]
    assert not torch.allclose(state.population.weights["norm.running_mean"], begun, atol=1e-3)


def test_a_model_does_not_depend_on_its_company():
    zoo, recipe = sample_population(ZOO), Recipe("residuals", "original", 1, batch_size=16)
    zoo.weights = {name: tensor.double() for name, tensor in zoo.weights.items()}
    images = replace(IMAGES, x_train=IMAGES.x_train.double(), x_test=IMAGES.x_test.double())
    together, alone = (train(some, images, recipe, engine=TORCH, progress=False).population for some in (zoo, zoo[[2]]))
    assert all(
        torch.allclose(together.weights[name][2], tensor[0], atol=1e-8) for name, tensor in alone.weights.items()
    )


def test_statistics_are_stored_and_published_and_judge(made, tmp_path):
    public = publish(made.folder, tmp_path / "residuals")
    for stage in ("original", "mp", "vd"):
        stored = read_stage(made.folder, stage)
        assert {"norm.running_var", "plain.running_mean", "flat.running_mean"} < stored.weights.keys()
        loaded = load_population(public / stage)
        assert list(loaded.weights) == list(stored.weights) and all(
            torch.equal(loaded.weights[name], tensor) for name, tensor in stored.weights.items()
        )
        metrics = read_stage_metrics(made.folder, stage)
        last, models = (
            metrics[metrics["epoch"] == metrics["epoch"].max()].set_index("model")["test_acc"],
            load_models(public / stage),
        )
        for i, model in enumerate(models.models["model"]):
            with torch.no_grad():
                right = models.to_module(i).eval()(IMAGES.x_test).argmax(1) == IMAGES.y_test
            assert abs(right.double().mean().item() - last[model]) <= 1.01 / len(right)  # an image on the edge
    assert (
        read_stage(made.folder, "vd").weights["norm.running_mean"]
        != read_stage(made.folder, "original").weights["norm.running_mean"]
    ).any()
    item, _ = ZooDataset(public, "vd", form="layers")[1]
    assert torch.equal(item["norm.running_var"], read_stage(made.folder, "vd").weights["norm.running_var"][1])
    assert len(twins_of(public, 2)) == 2


def test_the_authors_layout_takes_them_as_state_dicts(made, tmp_path):
    folder = export_zoo(made.folder, tmp_path / "exported", trajectory=False)
    for stage, name in (("original", "original"), ("mp", "mp_50"), ("vd", "vd")):
        stored = read_stage(made.folder, stage)
        for i, path in enumerate(sorted(path for path in (folder / name).iterdir() if path.is_dir())):
            state = torch.load(max(path.glob("checkpoint_*/checkpoints")), weights_only=True)
            assert all(torch.equal(state[key], tensor[i]) for key, tensor in stored.weights.items())
    with register(
        "unnamed",
        lambda: nn.Sequential(nn.Conv2d(1, 2, 28), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(2, 10)),
    ):
        with pytest.raises(ValueError, match="no known architecture"):  # not taken without its statistics
            fit(shapes_of(build("unnamed").state_dict()))


def test_only_weights_of_layers_are_pruned_and_noisy(made):
    pruned, noisy = read_stage(made.folder, "mp"), read_stage(made.folder, "vd")
    total = 4 * 49 + 4 * 4 * 9 + 64 * 12 + 120
    zeros = sum(
        int((tensor[0] == 0).sum())
        for name, tensor in pruned.weights.items()
        if name.endswith("weight") and tensor.ndim > 2
    )
    assert zeros == round(0.5 * total) and (pruned.weights["norm.weight"] != 0).all()
    assert {name for name in noisy.weights if "log_sigma2" in name} == {
        f"{layer}.log_sigma2" for layer in ("first", "second", "hidden", "last")
    }
    metrics = read_stage_metrics(made.folder, "vd")
    assert metrics["train_loss"].notna().all() and {"sparsity_conv2", "sparsity_fc2"} < set(metrics)


def test_an_interrupted_block_goes_on_to_the_same_end(tmp_path, made):
    stage = make_stages(made)[0]
    from zootwins.blocks import cut_blocks
    block = next(cut_blocks(stage, TORCH))
    whole = list(train_block(block, IMAGES, TORCH))[-1]
    task = train_block(block, IMAGES, TORCH, parts=tmp_path)
    while next(task).epoch < 1:
        pass
    task.close()
    resumed = list(train_block(block, IMAGES, TORCH, parts=tmp_path))[-1]
    assert all(
        torch.equal(resumed.populations[2].weights[name], tensor)
        for name, tensor in whole.populations[2].weights.items()
    )
    assert torch.equal(
        predict(start_of(block).population, IMAGES, TORCH), predict(sample_population(ZOO), IMAGES, TORCH)
    )


def test_runs_of_the_same_zoo_agree_and_modules_come_back(tmp_path, made):
    again = make_plan(replace(ZOO), store=str(tmp_path), figures=str(tmp_path), levels="50", engine="torch")
    make_twins(again, IMAGES, progress=False)
    assert different(again, made) is None
    modules = [read_stage(made.folder, "original").to_module(i) for i in range(3)]
    back = from_modules(modules, "residual")
    assert all(
        torch.equal(back.weights[name], tensor) for name, tensor in read_stage(made.folder, "original").weights.items()
    )


def test_what_the_fast_engines_cannot_do_falls_back_with_the_reason(capsys, tmp_path):
    plan = make_plan(ZOO, store=str(tmp_path), figures=str(tmp_path))
    assert plan.engine is TORCH and "and not residual" in capsys.readouterr().out
    with pytest.raises(UserError, match="not residual: use engine torch"):
        make_plan(ZOO, engine="lanes", store=str(tmp_path), figures=str(tmp_path))


def test_a_batch_of_one_image_is_a_sentence():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(784, 10), nn.BatchNorm1d(10)

        def forward(self, x):
            return self.norm(self.layer(x.flatten(1)))

    with register("flat", Flat):
        zoo = sample_population(replace(ZOO, architecture="flat"), 1)
        with pytest.raises(UserError, match="choose a batch_size") as told:
            train(zoo, IMAGES, Recipe("residuals", "original", 1, batch_size=79), engine=TORCH, progress=False)
        assert says(told.value)


def test_nets_that_are_no_chains_have_no_tokens_of_neurons_and_no_graph(made):
    for call in (lambda: token_layout("residual"), lambda: ZooDataset(made.folder, form="graph")):
        with pytest.raises(UserError) as told:
            call()
        assert says(told.value)
    assert ZooDataset(made.folder, form="tokens")[0][0]["tokens"].shape[1] == 65


@pytest.mark.parametrize(
    "name,make,reason",
    [
        ("cnn_small_1ch", Residual, "cannot name"), ("a/b", Residual, "cannot name"),
        ("mine", lambda width: None, "needs width"), ("mine", lambda: "a net", "makes no nn.Module"),
        ("mine", lambda *, activation, depth: None, "needs depth"),
    ],
)
def test_architectures_that_cannot_be_registered(name, make, reason):
    before = dict(ARCHITECTURES)
    with pytest.raises(UserError, match=reason) as told:
        register(name, make)
    assert says(told.value) and ARCHITECTURES == before


def test_a_function_is_given_the_factors_that_it_takes():
    with register("mine", lambda dropout: nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(784, 10))):
        assert build("mine", "relu", 0.25)[1].p == 0.25
        with register("mine", lambda **factors: nn.Linear(2, 2)):
            assert isinstance(build("mine"), nn.Linear)
    assert "mine" not in ARCHITECTURES


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"name": "a/b"}, "cannot name a zoo"), ({"architecture": "residul"}, "did you mean 'residual'"),
        ({"kind": "grid"}, "kind of zoo"), ({"lr": [1e-3]}, "lr of the zoo residuals has to be a tuple"),
        ({"epochs": -1}, "epochs -1"), ({"batch_size": 2.0}, "batch_size 2.0"),
    ],
)
def test_zoos_that_cannot_be(tmp_path, change, reason):
    with pytest.raises(UserError, match=reason) as told:
        make_plan(replace(ZOO, **change), store=str(tmp_path), figures=str(tmp_path))
    assert says(told.value)


def test_averages_of_copies_have_averaged_statistics(made):
    copies = read_stage(made.folder, "original")
    copies.models = copies.models.assign(model=0, copy=range(3))
    assert torch.allclose(average(copies).weights["norm.running_var"][0], copies.weights["norm.running_var"].mean(0))
