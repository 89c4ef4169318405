"""Files from elsewhere: no damage goes unseen, nothing runs, and nothing costs more than its size."""
import builtins
import io
import os
import pickle
import time
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zootwins.architectures import build
from zootwins.core import UserError
from zootwins.untrusted import (
    KNOWN, LIMITS, Kind, Record, Storage, Stored, Unpickler, find_state, merge_masks, open_zip, read_checkpoint,
    read_file, read_table, read_tensors, stored_tensor, unpickle, view,
)


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


# ---- checkpoints

def test_checkpoints_of_one_kind_share_a_layout():
    layouts = []
    for _ in range(4):
        read_tensors(saved(build("cnn_small_1ch").state_dict()), layouts)
    assert len(layouts) == 1


def test_no_damage_to_a_checkpoint_goes_unseen():
    state = build("cnn_small_1ch").state_dict()
    good, layouts = saved(state), []
    read_tensors(good, layouts)
    for at in range(0, len(good), 7):
        data = bytearray(good)
        data[at] ^= 0x55
        for known in ([], list(layouts)):
            try:
                tensors = read_tensors(bytes(data), known)
            except ValueError:
                continue
            assert list(tensors) == list(state) and all(
                np.array_equal(tensors[name], tensor.numpy()) for name, tensor in state.items()
            )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 15_000))
def test_a_checkpoint_that_was_cut_is_refused(length):
    good = saved(build("cnn_small_1ch").state_dict())
    with pytest.raises(ValueError):
        read_tensors(good[: length % len(good)], [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_read(tmp_path, dtype):
    state = {"a.weight": torch.randn(7, 3, dtype=dtype), "b": torch.randn(6, 4, dtype=dtype)[::2, 1:].t()}
    torch.save(state, tmp_path / "model.pt")
    read = read_checkpoint(tmp_path / "model.pt")
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in state.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": state, "optimizer": {"state": {0: {}}, "param_groups": []}},
        lambda state: {"model_state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: (
            {f"_orig_mod.{name}": tensor for name, tensor in state.items()} | {"_orig_mod.n_averaged": torch.tensor(1)}
        ),
        lambda state: {"generator": state, "step": 7},
        lambda state: {"a": defaultdict(list), "state_dict": state, "args": Path("x")},
    ],
)
def test_what_people_save_is_found(tmp_path, wrap):
    state = build("cnn_small_1ch").state_dict()
    torch.save(wrap(state), tmp_path / "model.pt")
    read = read_checkpoint(tmp_path / "model.pt")
    read.pop("n_averaged", None)
    assert list(read) == list(state) and all(torch.equal(read[name], tensor) for name, tensor in state.items())


class Module(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    "content,reason",
    [
        (Module(), "an object of .*Module, not a state dict"), ({"epoch": 3}, "'epoch' is a value of type int"),
        ({}, "it is empty"), ([1], "type list"),
        ({"student": {"w": torch.ones(1)}, "teacher": {"w": torch.ones(1)}}, r"2 state dicts \(student, teacher\)"),
        ({"model": {"model": {"model": {"w": torch.ones(1)}}}}, "too deep"),
        ({"w": torch.ones(1), "epoch": 3}, "'epoch' is a value"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "type that is not known"),
        ({"state_dict": Module()}, "an object of"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=reason):
        read_checkpoint(tmp_path / "model.pt")


def test_what_is_no_file_of_pytorch(tmp_path):
    for content in (b"", b"hello", b"PK\x03\x04", pickle.dumps({"w": [1.0]})):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a usable checkpoint"):
            read_checkpoint(tmp_path / "model.pt")
    with pytest.raises(UserError, match="not a usable checkpoint"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_masks_are_multiplied_and_other_names_are_left_alone():
    state = {
        "a.weight_orig": torch.tensor([1.0, 2.0]), "a.weight_mask": torch.tensor([1.0, 0.0]), "b_mask": torch.ones(1),
        "c_orig": torch.ones(1),
    }
    merged = merge_masks(state)
    assert list(merged) == ["a.weight", "b_mask", "c_orig"] and merged["a.weight"].tolist() == [1.0, 0.0]


# ---- pickles

class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["system", "exec", "open", "getattr", "path"])
def test_a_hostile_pickle_runs_nothing(tmp_path, kind, protocol):
    mark = tmp_path / "it_ran"
    call = {
        "system": Runs(os.system, f"touch {mark}"), "exec": Runs(builtins.exec, f"open({str(mark)!r}, 'w')"),
        "open": Runs(builtins.open, str(mark), "w"), "getattr": Runs(builtins.getattr, "text", "upper"),
        "path": Runs(Path.touch, Path(mark)),
    }[kind]
    read = unpickle(pickle.dumps(OrderedDict(state=[{"deep": call}], epoch=4), protocol))
    assert read.value["epoch"] == 4 and type(read.value["state"][0]["deep"]) is Record and read.unknown.total() > 0
    assert not mark.exists()


def test_old_protocols_are_not_read():
    with pytest.raises(ValueError, match="which PyTorch does not write"):
        unpickle(pickle.dumps({"a": 1.5}, 0))


@pytest.mark.parametrize(
    "program",
    [
        b"", b".", b"I1\n.", b"\x80\x02\xff", b"\x80\x02NQ.", b"\x80\x02\x82\x01.", b"\x80\x02K\x01}b.", b"\x80\x022.",
        b"\x80\x02}}b}a.", b"\x80\x02]K\x01K\x02s.", b"\x80\x02N)R.", b"\x80\x02h\x05.",
        b"\x80\x02ctorch\nSize\n)K\x01b.", b"\x80\x04\x8c\x01aK\x01\x93.", b"\x80\x02c" + b"a" * 300 + b"\nb\n.",
    ],
    ids=range(15),
)
def test_programs_that_are_none(program):
    with pytest.raises(ValueError, match="not a pickle of plain data"):
        unpickle(program)


PAIRS = b"q\x00h\x00\x86" * 60  # of pairs of pairs
EXPENSIVE = {
    "a key of nested pairs": b"\x80\x02}K\x01K\x01\x86" + PAIRS + b"K\x01s.",
    "a set of nested pairs": b"\x80\x04\x8f(K\x01K\x01\x86" + PAIRS + b"\x90.",
    "a path of nested pairs": b"\x80\x02cpathlib\nPosixPath\nK\x01K\x01\x86" + PAIRS + b"\x85R.",
    "a number of nested pairs": b"\x80\x02cnumpy\ndtype\nK\x01K\x01\x86" + PAIRS + b"\x85R.",
    "bytes of nested pairs": b"\x80\x02c_codecs\nencode\nK\x01K\x01\x86" + PAIRS + b"X\x06\x00\x00\x00latin1\x86R.",
    "a tensor of nested pairs": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01\x86"
    + PAIRS
    + b"h\x00h\x00h\x00tR.",
    "a dictionary made of nested pairs": b"\x80\x02ccollections\nOrderedDict\nK\x01K\x01\x86" + PAIRS + b"\x85R.",
    "a large index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "large bytes": b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".",
    "a large frame": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b".",
    "a large text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "attributes copied again and again": b"\x80\x02cx\ny\nq\x01}q\x02("
    + b"".join(b"X\x04\x00\x00\x00%04dK\x01" % i for i in range(9999))
    + b"u0"
    + b"h\x01)\x81h\x02b0" * 20_000
    + b"N.",
    "arguments copied again and again": b"\x80\x02ctorch._utils\n_rebuild_parameter\nq\x01("
    + b"K\x01" * 50_000
    + b"tq\x020"
    + b"h\x01h\x02R0" * 20_000
    + b"N.",
    "keys of equal hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0c%bK\x01" % (i * (2**61 - 1)).to_bytes(12, "little") for i in range(1, 20_000))
    + b"u.",
    "a long name asked for again and again": b"\x80\x04X\x40\x42\x0f\x00"
    + b"a" * 1_000_000
    + b"\x94"
    + b"h\x00h\x00\x930" * 50_000
    + b"N.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("kind", EXPENSIVE)
def test_a_pickle_costs_no_more_than_its_size(kind):
    "Each of these took minutes, or gigabytes, with an unpickler of Python's own."
    started = time.process_time()
    try:
        unpickle(EXPENSIVE[kind])
    except ValueError:
        pass
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "state", [b"N}U\x08labels_iNs\x86b", b"}U\x08labels_iNsb", b"N}U\x08__init__Ns\x86b", b"}U\x0c__setstate__Nsb"]
)
def test_a_pickle_cannot_change_the_stand_ins(state):
    before = dict(vars(Record)), dict(vars(Kind)), dict(Unpickler.dispatch), dict(KNOWN)
    for name in [*KNOWN, "x.y"]:
        with pytest.raises(ValueError):
            unpickle(b"\x80\x02c" + "\n".join(name.rsplit(".", 1)).encode() + b"\n" + state + b".")
    assert (dict(vars(Record)), dict(vars(Kind)), dict(Unpickler.dispatch), dict(KNOWN)) == before


@pytest.mark.parametrize(
    "offset,shape,stride",
    [
        (10**30, (2,), (1,)), (0, (2,), (10**30,)), ("x", (2,), (1,)), (0, "ab", (1, 1)), (0, (2, 2), (1,)),
        (0, (2,), None), (0.5, (2,), (1,)), (True, (2,), (1,)), (-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)),
        (199, (2,), (1,)), (0, (10**9, 10**9), (0, 0)), (0, [[8]], (1,)), (0, (1,) * 9, (1,) * 9), (0, (201,), (0,)),
    ],
)
def test_a_tensor_that_cannot_be(offset, shape, stride):
    assert stored_tensor(Storage("<f4", "0", 200), 198, (2,), (1,)).count == 200
    with pytest.raises(pickle.UnpicklingError):
        stored_tensor(Storage("<f4", "0", 200), offset, shape, stride)


def test_a_view_cannot_reach_beyond_its_storage():
    for offset, shape, stride in ((0, (5,), (-1000,)), (-3, (2,), (1,)), (0, (10**9,), (1,)), (0, (-2,), (1,))):
        with pytest.raises(ValueError):
            view(bytes(64), Stored("0", "<f4", 16, offset, shape, stride))


def with_storage(count, length):
    "A file of PyTorch's whose only storage says it has so many numbers and has so many bytes."
    file, program = io.BytesIO(), io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if item == "here" else None

    Pickler(program, 2).dump(
        OrderedDict(w=Runs(torch._utils._rebuild_tensor_v2, "here", 0, (2,), (1,), False, OrderedDict()))
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/data/0", bytes(length))
    return file.getvalue()


def test_a_storage_is_as_long_as_it_says():
    assert read_tensors(with_storage(2, 8), [])["w"].tolist() == [0.0, 0.0]
    for count, length in ((2, 7), (3, 8), (2, 12)):
        with pytest.raises(ValueError, match="as many numbers as it says"):
            read_tensors(with_storage(count, length), [])


# ---- zips, files and tables

@pytest.mark.parametrize("size", [10_000_000, 1000])
def test_a_zip_may_not_unpack_to_more_than_it_can_hold(tmp_path, size):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(size))
    if size > 100_000:
        with pytest.raises(UserError, match="unpacks to 10,000,000 bytes"), open_zip(tmp_path / "a.zip"):
            pass
    else:
        with open_zip(tmp_path / "a.zip") as (archive, _):
            assert archive.namelist() == ["a"]


def test_parts_that_share_their_bytes(tmp_path):
    "A table of contents that names one part a hundred times."
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", os.urandom(5000))
        archive.filelist.extend([archive.filelist[0]] * 100)
    with pytest.raises(UserError, match="overlap"), open_zip(tmp_path / "a.zip"):
        pass


def test_a_table_may_not_have_more_cells_than_allowed(tmp_path, monkeypatch):
    pd.DataFrame({"a": np.zeros(1000), "b": np.zeros(1000)}).to_parquet(tmp_path / "t.parquet")
    assert len(read_table(tmp_path / "t.parquet")) == 1000
    monkeypatch.setattr(LIMITS, "cells", 1999)
    with pytest.raises(UserError, match="2,000 cells"):
        read_table(tmp_path / "t.parquet")


def test_a_file_may_not_be_larger_than_allowed(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert len(read_file(tmp_path / "a", 100)) == 100
    with pytest.raises(ValueError, match="100 bytes, and at most 99"):
        read_file(tmp_path / "a", 99)


def test_find_state_takes_what_is_in_memory():
    module = build("cnn_small_1ch")
    assert list(find_state({"epoch": 1, "model": module.state_dict()})) == list(module.state_dict())
    with pytest.raises(ValueError, match="a whole module"):
        find_state({"model": {"net": module}})
