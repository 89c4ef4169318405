"""Zoos as data: the states that are there, by number; the same weights in every form; splits by model; workers."""
import pickle
import shutil
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from small import IMAGES, says, small_plan
from zootwins import zoo_data
from zootwins.alignment import aligned
from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.population import flatten, parameter_shapes, unflatten
from zootwins.publishing import publish
from zootwins.soups import Chain, make_soups, phase_name
from zootwins.store import read_stage, read_stage_metrics
from zootwins.twins import make_twins
from zootwins.untrusted import HASHES
from zootwins.variational import deterministic, sparse_masks
from zootwins.zoo_data import (
    FIRST, PLACE, ZooDataset, best, graph_places, load_zoo, masks, population_of, random_order, select, split_models,
    token_places, twins_of,
)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    "Enough models for a split, made in two runs, so that blocks are not in the order of numbers."
    folder = tmp_path_factory.mktemp("twelve")
    for n in (3, 12):
        make_twins(small_plan(folder, n=n, epochs=2, levels="50,80"), IMAGES, progress=False)
    return small_plan(folder, n=12, epochs=2, levels="50,80")


@pytest.fixture(scope="module")
def public(twelve, tmp_path_factory):
    return publish(twelve.folder, tmp_path_factory.mktemp("public") / "digits-twins", trajectory=True)


def test_all_states_are_there_with_what_was_measured_of_them(twelve, public):
    zoo, metrics = (
        load_zoo(twelve.folder),
        {stage: read_stage_metrics(twelve.folder, stage) for stage in ("original", "mp", "vd")},
    )
    assert len(zoo) == 12 + 24 + 36 and zoo.models == list(range(12)) and load_zoo(zoo) is zoo
    for stage, measured in metrics.items():
        states = zoo.states[zoo.states["stage"] == stage]
        wanted = states[["model", "level", "epoch"]].merge(measured, how="left", on=["model", "level", "epoch"])
        for name in ("test_acc", "sparsity", "agreement", "train_loss"):
            assert np.array_equal(states[name], wanted[name], equal_nan=True) and (
                name == "agreement" or states[name].notna().all()
            )
    assert (
        load_zoo(public)
        .states.drop(columns=PLACE)
        .equals(zoo.states.drop(columns=PLACE)[load_zoo(public).states.drop(columns=PLACE).columns])
    )


@pytest.mark.parametrize("form", ["flat", "layers", "tokens", "graph"])
@pytest.mark.parametrize("stage", ["original", "mp", "vd"])
def test_every_form_holds_the_weights_that_are_judged(twelve, public, form, stage):
    stored = read_stage(twelve.folder, stage)
    judged, order = (
        deterministic(stored.weights),
        {key: i for i, key in enumerate(zip(stored.models["model"], stored.models["level"].fillna(-1)))},
    )
    for source in (twelve.folder, public):
        data = ZooDataset(source, stage, form=form)
        assert len(data) == len(stored)
        for i in (0, len(data) // 2, len(data) - 1):
            item, target = data[i]
            row = data.rows.iloc[i]
            at = order[row["model"], -1 if np.isnan(row["level"]) else row["level"]]
            weights = {name: tensor[at] for name, tensor in judged.items()}
            assert target.item() == np.float32(row["test_acc"])
            if form == "layers":
                assert item.keys() == weights.keys() and all(torch.equal(item[name], weights[name]) for name in item)
            elif form == "flat":
                assert torch.equal(
                    item, torch.cat([weights[name].flatten() for name in parameter_shapes("cnn_small_1ch")])
                )
            elif form == "tokens":
                assert torch.equal(item["tokens"][:8, :25], weights["module_list.0.weight"].flatten(1))
                assert (
                    torch.equal(item["tokens"][:8, 25], weights["module_list.0.bias"])
                    and (item["tokens"][~item["mask"]] == 0).all()
                )
            else:
                first = item["edge_layer"] == 4  # nine inputs of a linear layer are an edge
                ends = item["edge_index"][:, first]
                edge = int(((ends[0] == 1 + 8 + 6 + 2) & (ends[1] == 1 + 8 + 6 + 4 + 7)).nonzero())
                assert torch.equal(item["edge_attr"][first][edge, :9], weights["module_list.9.weight"][7, 18:27])
                assert item["x"][0] == 0 and torch.equal(item["x"][-10:, 0], weights["module_list.11.bias"])


@pytest.mark.parametrize("width", [0, 1, 64, 201, 300])
@pytest.mark.parametrize("architecture", ["cnn_small_3ch", "cnn_large"])
def test_tokens_are_neurons_cut_and_padded(architecture, width):
    "Against a loop over neurons, number by number, as SANE lays models out."
    state = {name: torch.randn_like(tensor) for name, tensor in build(architecture).state_dict().items()}
    vector = flatten({name: tensor[None] for name, tensor in state.items()})[0]
    layers = [name for name in state if name.endswith("weight")]
    neurons = [
        [*state[name][unit].flatten().tolist(), state[name.replace("weight", "bias")][unit].item()]
        for name in layers
        for unit in range(len(state[name]))
    ]
    where = [(layer, unit) for layer, name in enumerate(layers) for unit in range(len(state[name]))]
    size, tokens, positions = width or max(map(len, neurons)), [], []
    for neuron, place in zip(neurons, where):
        for start in range(0, len(neuron), size):
            tokens.append(neuron[start : start + size])
            positions.append((len(positions), *place))
    found = token_places(architecture, width)
    values = torch.cat([vector, torch.zeros(1)])[found.index]
    assert found.positions.tolist() == [list(position) for position in positions] and len(values) == len(tokens)
    for value, mask, token in zip(values, found.mask, tokens):
        assert value.tolist() == [*token, *[0.0] * (size - len(token))] and mask.tolist() == [
            i < len(token) for i in range(size)
        ]


def test_a_graph_computes_what_its_model_does(twelve):
    "Messages along the edges of the linear layers give the logits."
    data = ZooDataset(twelve.folder, "original", form="graph")
    graph, _ = data[4]
    layer = graph["edge_layer"] == 5
    ends, weights, nodes = graph["edge_index"][:, layer], graph["edge_attr"][layer, 0], torch.rand(len(graph["x"]))
    logits = graph["x"][-10:, 0].clone().index_add_(0, ends[1] - (len(nodes) - 10), weights * nodes[ends[0]])
    module = data.population(4).to_module(0)
    assert torch.allclose(logits, module.module_list[11](nodes[-30:-10]), atol=1e-6)
    assert graph_places("cnn_large").edges.shape[1] == 9
    data = ZooDataset(twelve.folder, "vd", form="graph")
    assert len(DataLoader(data, batch_size=3)) == 4


def test_graphs_of_pytorch_geometric(twelve, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(UserError, match=r"zootwins\[graphs\]"):
        ZooDataset(twelve.folder, form="pyg")
    monkeypatch.undo()
    loader = pytest.importorskip("torch_geometric.loader").DataLoader
    data, plain = (
        ZooDataset(twelve.folder, form="pyg", targets=("test_acc", "lr")),
        ZooDataset(twelve.folder, form="graph"),
    )
    batch = next(iter(loader(data, batch_size=3)))
    assert batch.num_nodes == 3 * 49 and tuple(batch.y.shape) == (3, 2) and batch.edge_index.max() == 3 * 49 - 1
    assert torch.equal(batch[2].edge_attr, plain[2][0]["edge_attr"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(twelve, context):
    data = ZooDataset(twelve.folder, "vd", epoch="all", targets=("sparsity", "optimizer", "lr"))
    data[0]  # files are open when it travels
    assert len(pickle.dumps(data)) < 100_000
    loader = DataLoader(
        data, batch_size=8, num_workers={"fork": 2, "spawn": 1}[context], multiprocessing_context=context
    )
    vectors, targets = (torch.cat(parts) for parts in zip(*loader))
    assert torch.equal(vectors, torch.stack([data[i][0] for i in range(len(data))])) and torch.equal(
        targets, data.targets
    )
    assert data.classes == {"optimizer": ["adam"]} and (targets[:, 1] == 0).all()


def test_files_stay_open_and_are_not_too_many(twelve, monkeypatch):
    monkeypatch.setattr(zoo_data, "OPEN", 1)
    data, whole = ZooDataset(twelve.folder, "mp"), read_stage(twelve.folder, "mp")
    assert data.rows["file"].nunique() > 1
    for i in range(len(data)):
        assert torch.equal(data[i][0], flatten(whole.weights)[i]) and len(data.reader.files) == 1


def test_twins_and_copies_of_a_model_are_on_one_side(twelve):
    split = split_models(range(12), "digits_seed")
    for part in ("train", "val", "test"):
        data = ZooDataset(twelve.folder, ("original", "mp", "vd"), split=part, epoch="all")
        assert set(data.rows["model"]) == set(split[split == part].index) and len(data) == (split == part).sum() * 6
    assert set(ZooDataset(twelve.folder, split="test").rows["model"]) != set(
        ZooDataset(twelve.folder, split="test", seed=3).rows["model"]
    )
    with pytest.raises(UserError, match="too few"):
        split_models(range(9), "digits_seed")


def test_transforms_move_weights_and_not_what_they_compute(twelve):
    data, moved = ZooDataset(twelve.folder, "vd"), ZooDataset(twelve.folder, "vd", transform=random_order)
    images = torch.rand(8, 1, 28, 28)
    torch.manual_seed(1)
    first, again = moved.population(3), moved.population(3)
    torch.manual_seed(1)
    same = moved.population(3)
    assert not torch.equal(flatten(first.weights), flatten(again.weights)) and torch.equal(
        flatten(first.weights), flatten(same.weights)
    )
    assert torch.allclose(first.to_module(0)(images), data.population(3).to_module(0)(images), atol=1e-4)
    reference = data.population(3)
    back = ZooDataset(twelve.folder, "vd", transform=partial(lambda p: aligned(random_order(p), reference)))
    assert torch.equal(back[3][0], data[3][0])


def test_masks_are_those_of_the_model_with_that_number(twelve, public):
    pruned, noisy = read_stage(twelve.folder, "mp"), read_stage(twelve.folder, "vd")
    at = pruned.models.query("model == 5 and level == 0.8").index[0]
    for source in (twelve.folder, public):
        for name, mask in masks(source, model=5, level=0.8).items():
            assert torch.equal(mask, pruned.weights[name][at] != 0)
        found = masks(source, model=5)
        for name, mask in sparse_masks(noisy.weights).items():
            assert torch.equal(found[name], mask[noisy.models.query("model == 5").index[0]])
    assert sum(int(mask.sum()) for mask in masks(public, model=5, level=0.1 + 0.2 + 0.5).values()) == 2416 - round(
        0.8 * 2416
    )  # 0.8 and a bit


@pytest.mark.parametrize(
    "wrong,reason",
    [
        ({"model": 12}, "no model 12"), ({"model": 3, "level": 0.7}, r"no level 0.7 .* 0.5, 0.8"),
        ({"model": 3, "stage": "mp"}, "differ in level"), ({"model": 3, "selector": "lamp"}, "no selector lamp"),
        ({"model": 3, "level": 0.8, "epoch": 1}, "no epoch 1"), ({"model": 3, "epoch": "all"}, "differ in epoch"),
        ({"model": 3, "stage": "imp"}, "no stage imp"),
    ],
)
def test_twins_that_are_not_there(twelve, wrong, reason):
    with pytest.raises(UserError, match=reason) as told:
        masks(twelve.folder, **wrong)
    assert says(told.value)


def test_copies_and_selectors_are_told_apart(tmp_path, public):
    "A publication with a second selector and with copies, as other stages have them."
    folder = tmp_path / "digits-twins"
    shutil.copytree(public, folder)
    for kind in ("safetensors", "parquet"):
        shutil.copy(folder / f"mp.{kind}", folder / f"mp_lamp.{kind}")
    metrics = pd.read_parquet(folder / "metrics.parquet")
    own = metrics.assign(selector=np.where(metrics["method"] == "mp", "global", ""))
    lamp = own[own["method"] == "mp"].assign(selector="lamp", test_acc=0.125)
    pd.concat([own, lamp]).to_parquet(folder / "metrics.parquet")
    (folder / HASHES).write_text("")
    from zootwins.publishing import hashes
    (folder / HASHES).write_text(hashes(folder))
    zoo = load_zoo(folder)
    assert set(zoo.states.query("method == 'mp'")["selector"]) == {"global", "lamp"}
    assert len(select(zoo, model=4, level=0.8)) == 2 and len(select(zoo, model=4, level=0.8, selector="lamp")) == 1
    assert masks(zoo, model=4, level=0.8).keys() == masks(zoo, model=4, level=0.8, selector="lamp").keys()
    copies = load_zoo(zoo)
    doubled = pd.concat([copies.states, copies.states.query("stage == 'vd'").assign(copy=1)], ignore_index=True)
    both = zoo_data.replace(copies, states=doubled)
    with pytest.raises(UserError, match="differ in copy"):
        masks(both, model=4)
    assert masks(both, model=4, copy=1).keys() == masks(both, model=4, copy=0).keys()
    assert {"vd, copy 0", "vd, copy 1", "mp 80 %", "mp_lamp 80 %"} < set(best(both))


def test_candidates_of_soups_are_states_of_their_own(copied):
    told = []
    chain = Chain(level=0.5, phases=1, m=2, merge="uniform", epochs=1)
    make_soups(
        copied, IMAGES, [chain], progress=False,
        on_epoch=lambda stage, rows, epoch, metrics: told.append((epoch, len(rows))),
    )
    stage, zoo = phase_name(copied, chain, 1), load_zoo(copied.folder)
    states = select(zoo, stage)
    assert set(states["method"]) == {"imp"} and len(states) == 10 and sorted(set(states["copy"])) == [0, 1]
    assert sum(rows for epoch, rows in told if epoch == 1) == 10 and states["test_acc"].notna().all()
    with pytest.raises(UserError, match="differ in copy"):
        masks(zoo, model=2, stage=stage)
    first, second = (masks(zoo, model=2, stage=stage, copy=copy) for copy in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)  # pruned from one original
    one, other = (ZooDataset(zoo, stage, model=2, copy=copy)[0][0] for copy in (0, 1))
    assert not torch.equal(one, other)
    assert (zoo.states.query("stage == 'vd'")["copy"] == 0).all() and masks(zoo, model=2)


def test_the_best_and_their_twins(twelve):
    zoo = load_zoo(twelve.folder)
    table = best(zoo, 4)
    originals = read_stage_metrics(twelve.folder, "original").query("epoch == 2").set_index("model")["test_acc"]
    assert table["test_acc"].tolist() == sorted(originals, reverse=True)[:4] and [*table] == [
        "model", "test_acc", "mp 50 %", "mp 80 %", "vd",
    ]
    ties = originals[originals == table["test_acc"][0]].index.tolist()
    assert table["model"].tolist()[: len(ties)] == sorted(ties)[:4]
    twins = twins_of(zoo, table["model"])
    assert len(twins) == 4 * 3 and set(twins.models["model"]) == set(table["model"])
    wanted = twins.models.query("stage == 'vd'").set_index("model")["test_acc"]
    assert np.array_equal(table["vd"], wanted[table["model"]])
    assert best(zoo, 4, by="ggap", measure="sparsity")["vd"].between(0, 1).all()


def test_originals_and_noise_as_trained(twelve):
    zoo = load_zoo(twelve.folder)
    whole = population_of(zoo, select(zoo, "vd"), judged=False)
    stored = read_stage(twelve.folder, "vd")
    assert list(whole.weights) == list(stored.weights) and all(
        torch.equal(whole.weights[name], stored.weights[name]) for name in stored.weights
    )
    item, _ = ZooDataset(zoo, "vd", form="layers", judged=False)[0]
    assert item.keys() == stored.weights.keys()
    mixed = population_of(zoo, select(zoo, ("original", "vd"), model=1), judged=False)
    assert list(mixed.weights) == list(parameter_shapes(zoo.architecture))
    assert torch.equal(
        unflatten(flatten(mixed.weights), zoo.architecture)["module_list.3.weight"],
        mixed.weights["module_list.3.weight"],
    )


@pytest.mark.parametrize(
    "damage,reason",
    [("store.json", "not a zoo"), ("vd.json", "damaged"), ("weights", "damaged"), ("names", "no zoo")],
)
def test_a_damaged_store_is_a_sentence(copied, damage, reason):
    if damage == "weights":
        path = next((copied.folder / "vd").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    elif damage == "names":
        (copied.folder / "store.json").write_text('{"zoo": 3}')
    else:
        (copied.folder / damage).write_text("{}") if damage == "vd.json" else (copied.folder / damage).unlink()
    with pytest.raises(UserError, match=reason) as told:
        load_zoo(copied.folder)
    assert says(told.value)


def test_a_publication_is_not_trusted(tmp_path, public):
    from zootwins.publishing import hashes
    folder = tmp_path / "strange"
    shutil.copytree(public, folder)
    shutil.copy(folder / "original.parquet", folder / "mp.parquet")  # of other models than mp.safetensors
    (folder / HASHES).write_text(hashes(folder))
    with pytest.raises(UserError, match="not the weights of 12 models") as told:
        load_zoo(folder)
    assert says(told.value)


@pytest.mark.parametrize(
    "wrong,reason",
    [
        ({"targets": "accuracy"}, "no target 'accuracy'"), ({"form": "vector"}, "no form of weights 'vector'"),
        ({"split": "training"}, "no split"), ({"form": "tokens", "width": -1}, "not a width"),
        ({"stage": "mp", "level": 0.9}, "no level 0.9"),
    ],
)
def test_data_sets_that_cannot_be(twelve, wrong, reason):
    with pytest.raises(UserError, match=reason) as told:
        ZooDataset(twelve.folder, **wrong)
    assert says(told.value)


def test_what_a_state_is_called_comes_first(twelve):
    assert list(load_zoo(twelve.folder).states)[: len(FIRST)] == FIRST
