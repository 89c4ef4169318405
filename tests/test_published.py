"""Published zoos: what is read is what was written, damage is named, and no file runs code."""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import threading
import time
import types
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PosixPath

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.metrics import METRIC_COLUMNS
from zootwins.population import sample_population
from zootwins.published import (
    RESULT_KEYS, ZENODO, download, fit, in_fractions, read_factors, read_result, read_zoo, write_zoo,
)
from zootwins.untrusted import LIMITS
from zootwins.variational import begin_variational
from zootwins.zoos import get_zoo


def records(models, epochs, method="original"):
    rows = [
        {
            "zoo": "z", "method": method, "level": np.nan, "model": m, "epoch": e, "train_loss": 1.0,
            "train_acc": 0.5 + e / 1000, "test_loss": 1.1, "test_acc": 0.4 + m / 1000, "sparsity": e / 100,
        }
        for m in models
        for e in epochs
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def zoo(tmp_path):
    "Four models with two epochs in the authors' layout."
    epochs = {epoch: sample_population(get_zoo("mnist_fixed"), 4, epoch) for epoch in (0, 50)}
    return epochs, write_zoo(epochs, records(range(4), (0, 50)), tmp_path / "tune_zoo")


def zipped(folder, compression=zipfile.ZIP_DEFLATED, prefix=""):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder.parent)}")
    return path


def same(left, right):
    return set(left.weights) == set(right.weights) and all(
        torch.equal(left.weights[name], tensor) for name, tensor in right.weights.items()
    )


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "netscratch/zoos/"])
def test_folder_and_zip_give_the_same_bits(zoo, compression, prefix):
    epochs, folder = zoo
    for source in (folder, zipped(folder, compression, prefix)):
        read = read_zoo(source, "all", limit=None, progress=False)
        assert read.method == "original" and read.left_out.empty
        assert all(same(read.populations[epoch], population) for epoch, population in epochs.items())
        assert read.metrics.groupby("model")["epoch"].apply(list).tolist() == [[0, 50]] * 4
        assert np.allclose(read.metrics["ggap"], read.metrics["train_acc"] - read.metrics["test_acc"])


@pytest.mark.parametrize("name", ["usps_seed", "cifar10_seed", "cifar10_large_fixed"])
def test_every_architecture_and_its_twins(tmp_path, name):
    population = sample_population(get_zoo(name), 2)
    assert same(
        read_zoo(
            write_zoo({50: population}, records(range(2), [50]), tmp_path / "dense"), limit=None, progress=False
        ).populations[50],
        population,
    )
    twins = begin_variational(population)
    twins.models["origin"] = ["/zoos/a/checkpoint_000050", "/zoos/b/checkpoint_000050"]
    read = read_zoo(
        write_zoo({25: twins}, records(range(2), [25], "vd"), tmp_path / "twins"), limit=None, progress=False
    )
    assert read.method == "vd" and same(read.populations[25], twins)
    assert read.populations[25].models["origin"].tolist() == twins.models["origin"].tolist()
    assert read.metrics["sparsity"].tolist() == [0.25, 0.25]


def test_a_written_checkpoint_loads_into_the_module_itself(zoo):
    epochs, folder = zoo
    path = next(folder.glob("*_00000_0_*/checkpoint_000050/checkpoints"))
    module = build("cnn_small_1ch")
    module.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(module.get_parameter("module_list.0.weight"), epochs[50].weights["module_list.0.weight"][0])


def test_shifted_keys_old_checkpoint_names_and_other_types(zoo):
    epochs, folder = zoo
    for model in sorted(folder.iterdir())[:2]:
        state = torch.load(model / "checkpoint_000050" / "checkpoints", weights_only=True)
        shift = {0: 0, 3: 4, 6: 8, 9: 11, 11: 14}
        renamed = {
            f"module_list.{shift[int(name.split('.')[1])]}.{name.split('.')[2]}": tensor.double()
            for name, tensor in reversed(state.items())
        }
        torch.save(OrderedDict(renamed), model / "checkpoint_000050" / "checkpoints")
    for model in folder.iterdir():
        (model / "checkpoint_000050").rename(model / "checkpoint_50")
        (model / "checkpoint_50" / "optimizer").write_bytes(b"not read")
    read = read_zoo(folder, limit=None, progress=False)
    assert read.left_out.empty and same(read.populations[50], epochs[50])


def test_what_is_left_out_is_named(zoo):
    epochs, folder = zoo
    models = sorted(folder.iterdir())
    def change(model, value):
        path = model / "checkpoint_000050" / "checkpoints"
        state = torch.load(path, weights_only=True)
        state["module_list.9.weight"][0, 0] = value
        torch.save(state, path)
    change(models[0], float("nan"))
    change(models[1], 7.0)
    (models[2] / "params.json").write_text("{")
    read = read_zoo(folder, "all", limit=6.0, progress=False)
    reasons = {(row.model, None if pd.isna(row.epoch) else row.epoch): row.reason for row in read.left_out.itertuples()}
    assert "not finite" in reasons[models[0].name, 50] and "beyond 6" in reasons[models[1].name, 50]
    assert "params.json" in reasons[models[2].name, None] and len(reasons) == 3
    assert read.populations[0].models["model"].tolist() == [0, 1, 2] and read.populations[50].models[
        "model"
    ].tolist() == [2]
    assert read.populations[50].models["parent"].tolist() == [models[3].name]
    assert torch.equal(
        read.populations[50].weights["module_list.0.weight"][0], epochs[50].weights["module_list.0.weight"][3]
    )


def test_junk_beside_the_models_is_passed_over(zoo):
    epochs, folder = zoo
    (folder / "config.json").write_text("{}")
    (folder / "experiment_state-1.json").write_text("{}")
    (folder / "empty_trial").mkdir()
    (folder / "restarted").mkdir()
    (folder / "restarted" / "result.json").write_text("")
    archive = zipped(folder)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("__MACOSX/tune_zoo/x/params.json", b"\0")
        opened.writestr("__MACOSX/tune_zoo/x/checkpoint_000050/checkpoints", b"\0")
    read = read_zoo(archive, limit=None, progress=False)
    assert len(read.populations[50]) == 4 and read.left_out["model"].tolist() == ["restarted"]


def test_the_last_epoch_is_that_of_the_zoo(zoo):
    _, folder = zoo
    shutil.rmtree(next(folder.iterdir()) / "checkpoint_000050")
    read = read_zoo(folder, limit=None, progress=False)
    assert len(read.populations[50]) == 3 and "the last one is of epoch 0" in read.left_out["reason"].item()


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def test_checkpoints_of_old_pytorch_are_refused_with_advice(zoo):
    "They have no checksums: of 330 mutated ones, 97 gave other weights."
    _, folder = zoo
    path = next(folder.glob("*_00000_0_*/checkpoint_000050/checkpoints"))
    path.write_bytes(saved(torch.load(path, weights_only=True), _use_new_zipfile_serialization=False))
    read = read_zoo(folder, limit=None, progress=False)
    assert (
        len(read.populations[50]) == 3
        and "before 1.6" in read.left_out["reason"].item()
        and "load and save it" in read.left_out["reason"].item()
    )
    (folder / "dataset_old.pt").write_bytes(saved({}, _use_new_zipfile_serialization=False))
    with pytest.raises(UserError, match="PyTorch before 1.6"):
        read_zoo(folder / "dataset_old.pt")


@pytest.mark.parametrize(
    "text",
    [
        b"[1]", b"null", b"", b"\xff\xfe", b"[" * 100_000, b'{"seed": "a"}', b'{"seed": Infinity}', b'{"seed": 1e99}',
        b'{"seed": [1]}', b'{"optim::lr": "x"}', b'{"optim::wd": [1]}', b'{"seed": 10000000000000000000000}',
        b'{"optim::lr": 1' + b"0" * 400 + b"}",
    ],
)
def test_factors_that_cannot_be_read(zoo, text):
    _, folder = zoo
    (sorted(folder.iterdir())[1] / "params.json").write_bytes(text)
    read = read_zoo(folder, limit=None, progress=False)
    assert len(read.populations[50]) == 3 and "params.json" in read.left_out["reason"].item()


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"training_iteration": Infinity}',
        b'{"training_iteration": 1' + b"0" * 400 + b"}", b'{"training_iteration": 3, "test_acc": 1' + b"0" * 400 + b"}",
        b'{"training_iteration": -5}', b'{"training_iteration": 3, "test_acc": [1]}', None,
    ],
)
def test_models_without_readable_records_keep_their_weights(zoo, text):
    epochs, folder = zoo
    for model in folder.iterdir():
        (model / "result.json").unlink() if text is None else (model / "result.json").write_bytes(text)
    read = read_zoo(folder, limit=None, progress=False)
    assert (
        same(read.populations[50], epochs[50])
        and read.metrics.empty
        and read.metrics["test_acc"].dtype.kind == "f"
        and list(read.metrics) == METRIC_COLUMNS
    )


@pytest.mark.parametrize("damage", ["encrypted", "unknown method", "garbage"])
def test_a_damaged_file_in_a_zip_costs_one_model(zoo, damage):
    _, folder = zoo
    path = zipped(folder)
    data, archive = bytearray(path.read_bytes()), zipfile.ZipFile(path)
    member = next(member for member in archive.infolist() if member.filename.endswith("checkpoint_000050/checkpoints"))
    entry = data.index(member.filename.encode(), archive.start_dir) - 46
    if damage == "encrypted":
        data[entry + 8] |= 1
        data[member.header_offset + 6] |= 1
    elif damage == "unknown method":
        data[entry + 10] = data[member.header_offset + 8] = 9
    else:
        data[member.header_offset + 300 : member.header_offset + 500] = bytes(200)
    archive.close()
    path.write_bytes(data)
    read = read_zoo(path, "all", limit=None, progress=False)
    assert [len(read.populations[epoch]) for epoch in (0, 50)] == [4, 3] and len(read.left_out) == 1


def test_one_model_alone_and_deep_folders(zoo, tmp_path):
    epochs, folder = zoo
    assert len(read_zoo(sorted(folder.iterdir())[1], limit=None, progress=False).populations[50]) == 1
    shutil.move(folder, tmp_path / "a" / "b" / "c")
    assert same(read_zoo(tmp_path / "a", limit=None, progress=False).populations[50], epochs[50])


def test_an_epoch_that_nobody_has_whole_is_not_there(zoo):
    epochs, folder = zoo
    for path in folder.glob("*/checkpoint_000050/checkpoints"):
        path.write_bytes(b"PK")
    read = read_zoo(folder, "all", limit=None, progress=False)
    assert list(read.populations) == [0] and len(read.left_out) == 4
    with pytest.raises(UserError, match="No model of tune_zoo could be used|No model of this zoo can be read"):
        read_zoo(folder, limit=None, progress=False)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.dictionaries(
                st.sampled_from(["training_iteration", "test_acc", "train_acc"]),
                st.one_of(st.integers(0, 60), st.floats(), st.none(), st.text(max_size=3)),
            ),
        ),
        max_size=6,
    )
)
def test_any_result_file_is_read(lines):
    found = read_result(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    ).values
    assert list(found) == sorted(found) and all(
        type(epoch) is int and len(values) == len(RESULT_KEYS) for epoch, values in found.items()
    )


def test_sentinels_are_missing_values():
    found = read_result(
        b'{"training_iteration": 0, "test_acc": 0.1}\n'
        b'{"training_iteration": 0, "train_acc": -999, "train_loss": -999, "test_acc": 0.2}'
    ).values
    assert list(found) == [0] and np.isnan(found[0][:2]).all() and found[0][3] == 0.2


def test_factors_of_every_kind():
    factors, _ = read_factors(
        b'{"model::nlin": "tanh", "model::dropout": 0, "optim::wd": 0, "optim::lr": 0.0003, "seed": 7, '
        b'"wandb": {"x": 1}}'
    )
    assert (
        factors["dropout"] == 0.0
        and isinstance(factors["wd"], float)
        and factors["seed"] == 7
        and factors["init"] == ""
    )


def test_an_unknown_architecture_is_a_mistake_in_one_sentence(tmp_path):
    path = tmp_path / "zoo" / "a" / "checkpoint_000001" / "checkpoints"
    path.parent.mkdir(parents=True)
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    (tmp_path / "zoo" / "a" / "params.json").write_text("{}")
    with pytest.raises(UserError, match="no known architecture"):
        read_zoo(tmp_path / "zoo", progress=False)
    with pytest.raises(UserError, match="There is no zoo"):
        read_zoo(tmp_path / "nowhere")
    (tmp_path / "bad.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a readable zip"):
        read_zoo(tmp_path / "bad.zip")
    with pytest.raises(ValueError, match="no known architecture"):
        fit((("1.weight", (3, 2)),))


def test_an_epoch_that_is_not_there(zoo):
    for epochs in ([7], "last", []):
        with pytest.raises(UserError, match="from 0 to 50"):
            read_zoo(zoo[1], epochs, progress=False)
    assert list(read_zoo(zoo[1], 50, limit=None, progress=False).populations) == [50]


def test_nothing_is_left_of_a_write_that_failed(tmp_path, monkeypatch):
    population = sample_population(get_zoo("mnist_seed"), 2)
    with pytest.raises(KeyError):
        write_zoo({50: population}, pd.DataFrame({"nothing": []}), tmp_path / "zoo")
    assert list(tmp_path.iterdir()) == []
    write_zoo({50: population}, records(range(2), [50]), tmp_path / "zoo")
    with pytest.raises(UserError, match="exists already"):
        write_zoo({50: population}, records(range(2), [50]), tmp_path / "zoo")


# ---- preprocessed files: a module of the authors' name stands in for theirs while a file is written

@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    package, module = (
        types.ModuleType("checkpoints_to_datasets"),
        types.ModuleType("checkpoints_to_datasets.dataset_base"),
    )
    class ModelDatasetBase:
        pass
    ModelDatasetBase.__module__, ModelDatasetBase.__qualname__ = module.__name__, "ModelDatasetBase"
    module.ModelDatasetBase = ModelDatasetBase
    population = sample_population(get_zoo("mnist_fixed"), 6)
    content = {}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, module.__name__, module)
        for name, indices in (("trainset", range(4)), ("valset", [4]), ("testset", [5])):
            part = ModelDatasetBase()
            states = [(i, epoch) for i in indices for epoch in (0, 50)]
            part.data_in = [
                OrderedDict((key, tensor[i] * (1 + epoch)) for key, tensor in population.weights.items())
                for i, epoch in states
            ]
            part.labels_in = [f"/zoos/model_{i}#_#epoch_{epoch}#_#layer_[0, 3]" for i, epoch in states]
            part.root, part.threshold = PosixPath("/zoos"), np.float64(5)
            part.properties = {
                "test_acc": [0.5 + i / 100 for i, _ in states], "ggap": [np.float64(0.01)] * len(states),
                "training_iteration": [e for _, e in states],
                "model::nlin": [population.models["activation"][i] for i, _ in states],
            }
            content[name] = part
        torch.save(content, tmp_path / "dataset_z.pt")
    return population, tmp_path / "dataset_z.pt", content, monkeypatch, module


def test_preprocessed_zoos(preprocessed):
    population, path, *_ = preprocessed
    read = read_zoo(path, "all", limit=None, progress=False)
    assert sorted(read.populations) == [0, 50] and same(read.populations[0], population)
    assert torch.equal(
        read.populations[50].weights["module_list.3.bias"], population.weights["module_list.3.bias"] * 51
    )
    assert read.populations[50].models["activation"].tolist() == population.models["activation"].tolist()
    first = read.metrics.query("model == 5 and epoch == 50").iloc[0]
    assert np.isclose(first["test_acc"], 0.55) and np.isclose(first["train_acc"], 0.56)
    assert len(read_zoo(path, "all", limit=5.0, progress=False).left_out) > 0


def resave(path, content, monkeypatch, module):
    "Write the parts again, under the name of the authors' class."
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "checkpoints_to_datasets", types.ModuleType("checkpoints_to_datasets"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(content, path)


def test_parts_that_are_not_needed_do_no_harm(preprocessed):
    "A path of pathlib's newer kind, an object of an unknown class, no properties, numbers of bfloat16."
    population, path, content, monkeypatch, module = preprocessed
    content["trainset"].transform, content["valset"].properties = threading.Thread(), None
    content["valset"].data_in = [
        OrderedDict((key, tensor.bfloat16()) for key, tensor in state.items()) for state in content["valset"].data_in
    ]
    content["note"] = "by hand"
    monkeypatch.setattr(threading.Thread, "__reduce__", lambda self: (threading.Thread, ()))
    resave(path, content, monkeypatch, module)
    read = read_zoo(path, "all", limit=None, progress=False)
    assert read.left_out.empty and len(read.populations[50]) == 6
    half = {name: tensor[4].bfloat16().float() for name, tensor in population.weights.items()}
    assert all(torch.equal(read.populations[0].weights[name][4], tensor) for name, tensor in half.items())
    passed = read.passed_over.set_index(["kind", "name"])["times"]
    assert (
        passed["class", "threading.Thread"] == 1
        and passed["property", "properties"] == 1
        and passed["part", "note"] == 1
    )
    assert passed["factor", "seed"] == 6 and read.metrics.query("model == 4")["test_acc"].isna().all()


def test_the_same_state_again_and_again_is_refused(preprocessed):
    "A small file could name one state a million times."
    _, path, content, monkeypatch, module = preprocessed
    part = content["trainset"]
    part.data_in = [part.data_in[1]] * len(part.data_in)
    part.labels_in = [f"/zoos/model_{i}#_#epoch_50" for i in range(len(part.data_in))]
    resave(path, content, monkeypatch, module)
    read = read_zoo(path, 50, limit=None, progress=False)
    assert len(read.populations[50]) == 3 and read.left_out["reason"].str.contains("same state").sum() == 5
    assert read.passed_over.query("kind == 'state'")["times"].tolist() == [2]


@pytest.mark.parametrize(
    "content,reason",
    [
        ({"a": torch.ones(2)}, "one model's state dict"),
        ([1], "no preprocessed zoo"),
        ({"trainset": None}, "no preprocessed zoo"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "dataset_z.pt")
    with pytest.raises(UserError, match=reason):
        read_zoo(tmp_path / "dataset_z.pt")


# ---- what others write

def rewrite(folder, params=None, record=None, first=0):
    "Change every params.json and every record of a zoo by functions; checkpoints are numbered on from `first`."
    for model in sorted(folder.iterdir()):
        if params:
            (model / "params.json").write_text(json.dumps(params(json.loads((model / "params.json").read_text()))))
        if record:
            lines = [json.dumps(record(json.loads(line))) for line in (model / "result.json").read_text().splitlines()]
            (model / "result.json").write_text("\n".join(lines))
        for i, path in enumerate(sorted(model.glob("checkpoint_*"))):
            path.rename(model / f"checkpoint_{first + i:06d}") if first is not None else None


@pytest.fixture
def short(tmp_path):
    "Three models with the epochs 1 to 4, as Ray counts them."
    epochs = {epoch: sample_population(get_zoo("mnist_fixed"), 3, epoch) for epoch in range(1, 5)}
    return epochs, write_zoo(epochs, records(range(3), range(1, 5)), tmp_path / "tune_zoo")


def other_writer(values):
    return {
        "epoch": values["training_iteration"], "train_acc": 100 * values["train_acc"],
        "test_acc": 100 * values["test_acc"], "val_acc": 1,
    }


def test_a_writer_of_other_names_and_units(short):
    "Bare names, epoch for training_iteration, percentages: all are read, and what is not is counted."
    epochs, folder = short
    rewrite(
        folder,
        lambda p: {
            "seed": p["seed"], "lr": 0.003, "weight_decay": 0.02, "optim": {"momentum": 0.5}, "scheduler": "step",
        },
        other_writer,
        None,
    )
    read = read_zoo(folder, "all", limit=None, progress=False)
    models = read.populations[4].models
    assert set(models["lr"]) == {0.003} and set(models["wd"]) == {0.02} and len(read.metrics) == 12
    assert np.allclose(read.metrics["test_acc"], [0.4 + m / 1000 for m in range(3) for _ in range(4)]) and same(
        read.populations[2], epochs[2]
    )
    passed = read.passed_over.set_index(["kind", "name"])["times"]
    assert (
        passed["factor", "activation"] == 3
        and passed["factor", "scheduler"] == 3
        and passed["factor", "optim::momentum 0.5"] == 3
    )
    assert (
        passed["field", "val_acc"] == 12 and passed["value", "train_loss"] == 12 and passed["value", "test_acc"] == 12
    )


@pytest.mark.parametrize(
    "values,expected",
    [
        ([0.1, 0.9, 0.5, 1.0], [0.1, 0.9, 0.5, 1.0]), ([0.4, 90, 1.0, 50], [0.004, 0.9, 0.01, 0.5]),
        ([0.1, 0.9, 90, 95], [0.1, 0.9, None, None]), ([50, 60, 70, 1600], [0.5, 0.6, None, None]),
        ([0.1, 0.2, -0.1, 0.5], [0.1, 0.2, None, None]), ([None, 80, 90, None], [None, 0.8, 0.9, None]),
    ],
)
def test_units_are_recognised_or_refused(values, expected):
    "Two models with two epochs each."
    frame = pd.DataFrame({"model": [0, 0, 1, 1], "test_acc": np.array(values, float)})
    found, passed = in_fractions(frame, "test_acc")
    assert np.allclose(found, np.array(expected, float), equal_nan=True)
    changed = sum(
        1
        for before, after in zip(frame["test_acc"], found)
        if not (before == after or (np.isnan(before) and np.isnan(after)))
    )
    assert sum(one.total() for one in passed) == changed


@pytest.mark.parametrize("first,dense,offset,certain", [(1, True, 0, True), (0, True, 1, True), (5, True, 0, False)])
def test_epochs_are_those_of_the_records(short, first, dense, offset, certain):
    "Ray before 2.7 names a checkpoint by its iteration, a newer one counts from 0."
    epochs, folder = short
    rewrite(folder, first=first)
    read = read_zoo(folder, "all", limit=None, progress=False)
    assert (read.numbering.offset, read.numbering.certain) == (offset, certain)
    assert sorted(read.populations) == [first + i + offset for i in range(4)]
    assert first == 5 or all(same(read.populations[epoch], epochs[epoch]) for epoch in epochs)
    assert [
        read_zoo(folder, first + 3 + offset, limit=None, progress=False)
        .populations[first + 3 + offset]
        .weights["module_list.0.bias"]
        .shape[0]
    ] == [3]


def test_the_surest_note_counts(short):
    "A record that names its checkpoint, before what lies beside one, before counts; contradictions are told."
    _, folder = short
    for model in folder.iterdir():
        for path in model.glob("checkpoint_*"):
            (path / ".tune_metadata").write_bytes(
                pickle.dumps({"iteration": int(path.name[-2:]) + 1, "last_result": None})
            )
    noted = read_zoo(folder, "all", limit=None, progress=False)
    assert noted.numbering.offset == 1 and sorted(noted.populations) == [2, 3, 4, 5] and noted.numbering.certain
    rewrite(
        folder, record=lambda r: r | {"checkpoint_dir_name": f"checkpoint_{r['training_iteration']:06d}"}, first=None
    )
    assert read_zoo(folder, "all", limit=None, progress=False).numbering.offset == 0
    (next(folder.iterdir()) / "result.json").write_text(
        '{"training_iteration": 3, "test_acc": 0.1, "checkpoint_dir_name": "checkpoint_000001"}'
    )
    mixed = read_zoo(folder, "all", limit=None, progress=False).numbering
    assert mixed.offset == 0 and not mixed.certain and "8 of 9" in mixed.evidence


def test_real_params(zoo):
    "Every parameter of a params.json as the authors wrote it is either read or counted."
    _, folder = zoo
    real = {
        "cuda": False, "dataset::dump": "/zoos/dataset.pt", "model::channels_in": 1, "model::dropout": 0,
        "model::init_type": "normal", "model::nlin": "relu", "model::o_dim": 4, "model::type": "CNN",
        "optim::lr": 0.001, "optim::momentum": 0.9, "optim::optimizer": "sgd", "optim::wd": 0, "seed": 832104,
        "training::batchsize": 10, "training::checkpoint_dir": None, "wandb": {"project": "MNIST", "log_config": False},
    }
    rewrite(folder, lambda params: real, first=None)
    read = read_zoo(folder, limit=None, progress=False)
    assert read.populations[50].models[["seed", "activation", "init", "optimizer", "lr", "wd", "dropout"]].iloc[
        0
    ].tolist() == [832104, "relu", "normal", "sgd", 0.001, 0.0, 0.0]
    factors = read.passed_over.query("kind == 'factor'")
    assert set(factors["name"]) == {
        "cuda", "dataset::dump", "model::channels_in", "model::o_dim", "model::type", "training::checkpoint_dir",
        "wandb::project", "wandb::log_config",
    }
    assert (factors["models"] == 4).all() and (factors["reason"] == "not needed here").all()


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"model::dropout": 50}, "dropout is 50"), ({"optim::lr": -1}, "lr is -1"), ({"optim::lr": True}, "lr is True"),
        ({"model::nlin": ["tanh"]}, "activation is not a name"), ({"optim::lr": float("nan")}, "lr is nan"),
        ({"model::dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_factors_that_cannot_be_cost_a_model(zoo, change, reason):
    _, folder = zoo
    path = sorted(folder.iterdir())[2] / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reason in read_zoo(folder, limit=None, progress=False).left_out["reason"].item()


def test_checkpoints_with_other_things_beside_the_weights(zoo):
    epochs, folder = zoo
    for path in folder.glob("*/checkpoint_000050/checkpoints"):
        state = {f"module.{name}": tensor for name, tensor in torch.load(path, weights_only=True).items()}
        torch.save({"epoch": 50, "state_dict": state, "args": threading.Event}, path)
    read = read_zoo(folder, limit=None, progress=False)
    assert same(read.populations[50], epochs[50])
    assert set(read.passed_over.query("kind == 'checkpoint'")["name"]) == {"epoch", "args"}


# ---- files that are made to do harm

def test_a_zip_of_zips_is_refused_by_name(zoo, tmp_path):
    _, folder = zoo
    inner = zipped(folder)
    with zipfile.ZipFile(tmp_path / "zoos.zip", "w") as archive:
        archive.write(inner, "zoos/mnist.zip")
    with pytest.raises(UserError, match=r"packed files \(mnist.zip\)"):
        read_zoo(tmp_path / "zoos.zip", progress=False)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="packed files"):
        read_zoo(tmp_path, progress=False)


def test_a_pipe_or_a_device_is_not_read(zoo):
    _, folder = zoo
    first, second = sorted(folder.iterdir())[:2]
    (first / "params.json").unlink()
    os.mkfifo(first / "params.json")
    (second / "checkpoint_000050" / "checkpoints").unlink()
    (second / "checkpoint_000050" / "checkpoints").symlink_to("/dev/zero")
    read = read_zoo(folder, limit=None, progress=False)
    assert len(read.populations[50]) == 2 and read.left_out["reason"].str.contains("not an ordinary file").all()
    os.mkfifo(folder.parent / "dataset.pt")
    with pytest.raises(UserError, match="not an ordinary file"):
        read_zoo(folder.parent / "dataset.pt")


def test_a_bomb_inside_a_zoo_costs_one_model(zoo, monkeypatch):
    _, folder = zoo
    (sorted(folder.iterdir())[0] / "params.json").write_bytes(b" " * 300_000 + b"{}")
    assert len(read_zoo(zipped(folder), limit=None, progress=False).populations[50]) == 4
    monkeypatch.setattr(LIMITS, "json", 200_000)
    read = read_zoo(zipped(folder), limit=None, progress=False)
    assert "300,002 bytes" in read.left_out["reason"].item() and "LIMITS" in read.left_out["reason"].item()


def test_many_epochs_of_many_models_make_no_more_room_than_they_need(zoo):
    "Three hundred folders with one checkpoint each, all of another epoch: the matrix of all would have 0.9 GB."
    _, folder = zoo
    path = zipped(folder)
    content = next(folder.glob("*/checkpoint_000050/checkpoints")).read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(300):
            archive.writestr(
                f"tune_zoo/m{i:04d}/checkpoint_{i + 60:06d}/checkpoints", content if i % 30 == 0 else b"PK"
            )
            archive.writestr(f"tune_zoo/m{i:04d}/params.json", b"{}")
    read = read_zoo(path, "all", limit=None, progress=False)
    assert sum(len(population) for population in read.populations.values()) == 8 + 10


def small_file(program):
    "A preprocessed file with a description of one's own and no numbers."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return buffer.getvalue()


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


AGAIN = 60_000
PART = b"\x80\x02}" + text(b"trainset") + b"cm\nC\n)\x81}"  # {"trainset": C() with attributes {...}}
REPEATED = {
    "a long label": PART
    + text(b"data_in")
    + b"]("
    + b"N" * AGAIN
    + b"es"
    + text(b"labels_in")
    + b"]("
    + text(b"a" * 300_000)
    + b"q\x01"
    + b"h\x01" * (AGAIN - 1)
    + b"esbs.",
    "a state": PART
    + text(b"data_in")
    + b"](}q\x02("
    + b"".join(text(b"%05d" % i) + b"N" for i in range(9000))
    + b"u"
    + b"h\x02" * (AGAIN - 1)
    + b"es"
    + text(b"labels_in")
    + b"]("
    + text(b"a#_#epoch_1")
    + b"q\x01"
    + b"h\x01" * (AGAIN - 1)
    + b"esbs.",
    "a list of states": b"\x80\x02}]("
    + b"N" * AGAIN
    + b"eq\x01]("
    + (text(b"a#_#epoch_1") + b"q\x02" + b"h\x02" * (AGAIN - 1))
    + b"eq\x03"
    + b"00("
    + b"".join(
        text(b"%05d" % i) + b"cm\nC\n)\x81}" + text(b"data_in") + b"h\x01s" + text(b"labels_in") + b"h\x03sb"
        for i in range(3000)
    )
    + b"u.",
    "a state dict": b"\x80\x02}}("
    + b"".join(text(b"%05d" % i) + b"}" for i in range(9000))
    + b"uq\x010("
    + b"".join(text(b"%05d" % i) + b"h\x01" for i in range(AGAIN))
    + b"u.",
}


@pytest.mark.parametrize("kind", REPEATED)
def test_what_is_named_again_and_again_is_looked_at_once(tmp_path, kind):
    (tmp_path / "dataset_z.pt").write_bytes(small_file(REPEATED[kind]))
    started = time.process_time()
    with pytest.raises(UserError, match="was not read"):
        read_zoo(tmp_path / "dataset_z.pt", progress=False)
    assert time.process_time() - started < 5


def test_names_that_are_not_unicode(zoo):
    _, folder = zoo
    first = sorted(folder.iterdir())[0]
    os.rename(first, os.path.join(os.fsencode(folder), b"NN_\xff\n"))
    params = next(folder.glob("*_1_*/params.json"))
    params.write_text(json.dumps(json.loads(params.read_text()) | {"model::nlin": "\ud800"}))
    read = read_zoo(folder, limit=None, progress=False)
    models = read.populations[50].models
    assert len(models) == 4 and "NN_?" in models["parent"].tolist() and "?" in models["activation"].tolist()


# ---- downloads, from a server of our own

class Server(BaseHTTPRequestHandler):
    content, checksum, ranges, broken = b"", "", [], 0

    def do_GET(self):
        cls = type(self)
        if self.path.startswith("/api/"):
            body = json.dumps({"files": [{"key": "stl_small_seed.zip", "checksum": f"md5:{cls.checksum}"}]}).encode()
            self.send_response(200)
        else:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            cls.ranges.append(start)
            body = cls.content[start:]
            self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.broken and not self.path.startswith("/api/"):
            cls.broken -= 1
            self.wfile.write(body[: len(body) // 2])
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site():
    Server.content, Server.ranges, Server.broken = bytes(range(256)) * 4000, [], 0
    Server.checksum = hashlib.md5(Server.content).hexdigest()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_interrupted_download_goes_on(site, tmp_path):
    Server.broken = 1
    with pytest.raises(UserError, match="run again"):
        download("stl10", "stl_small_seed.zip", tmp_path, site, progress=False)
    assert (tmp_path / "stl_small_seed.zip.part").stat().st_size > 0
    path = download("stl10", "stl_small_seed.zip", tmp_path, site, progress=False)
    assert path.read_bytes() == Server.content and len(Server.ranges) == 2 and Server.ranges[1] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["stl_small_seed.zip"]
    assert download("stl10", "stl_small_seed.zip", tmp_path, "http://127.0.0.1:1", progress=False) == path


def test_a_wrong_checksum_leaves_nothing(site, tmp_path):
    Server.checksum = "0" * 32
    with pytest.raises(UserError, match="checksum"):
        download("stl10", "stl_small_seed.zip", tmp_path, site, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_offline_says_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError) as error:
        download("stl10", "stl_small_seed.zip", tmp_path, "http://127.0.0.1:1", progress=False)
    assert f"records/{ZENODO['stl10'].record}/files/stl_small_seed.zip" in str(error.value) and str(tmp_path) in str(
        error.value
    )
    with pytest.raises(UserError, match="10.5281/zenodo.8141666"):
        download("eurosat", "x.zip", tmp_path)
    with pytest.raises(UserError, match="There is no record"):
        download("imagenet", "x.zip", tmp_path)
