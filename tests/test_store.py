"""What lies on disk: whole or not at all, and nothing that was not meant."""
import multiprocessing
import os
import resource
import shutil
import threading
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from small import IMAGES, STAGES, different, in_child, left_over, says, small_plan
from zootwins import store
from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.plans import fingerprint
from zootwins.store import (
    OutOfMemory, Piece, add_file, check_piece, finished_files, locked, open_store, opened, pack, read_manifest,
    read_part, read_predictions, read_stage, row_names, rows_in, save_part, sweep, write_manifest,
)
from zootwins.twins import load_epoch, load_metrics, load_models, load_twins, make_twins


def made_again(plan, trained, capsys):
    "Run once more; give what is said. The store must then be as it was, or a sentence says why not."
    try:
        make_twins(plan, IMAGES, progress=False)
    except UserError as error:
        assert says(error), error
        return f"UserError {error}"
    assert different(plan, trained) is None and not left_over(plan)
    return capsys.readouterr().out


def test_a_row_is_known_by_its_model_and_level():
    rows = pd.DataFrame({"model": [3, 3, 3], "level": [0.1 + 0.2, 0.3, float("nan")]})
    assert row_names(rows) == ["3 at 0.3", "3 at 0.3", "3"]


@pytest.mark.parametrize("wrong", ["epoch", "row", "metrics", "twice", "predictions"])
def test_what_is_not_finished_is_not_written(trained, wrong):
    with opened(finished_files(trained.folder, "original")[0]) as file:
        metrics, whole = store.table_in(file, "metrics"), store.models_in(file)
    piece = Piece({6: whole}, metrics, 0, torch.zeros(len(whole), 50, dtype=torch.uint8))
    check_piece(piece)
    changes = {
        "epoch": {"metrics": metrics[metrics["epoch"] != 3]},
        "row": {"populations": {6: whole, 5: whole[:2]}},
        "metrics": {"metrics": metrics[metrics["model"] != 1]},
        "twice": {"metrics": pd.concat([metrics, metrics.tail(1)])},
        "predictions": {"predictions": piece.predictions[:2]},
    }
    with pytest.raises(UserError, match="rows"):
        pack(replace(piece, **changes[wrong]))


@pytest.mark.parametrize(
    "stage,harm",
    [
        *((stage, harm) for stage in STAGES for harm in ("delete", "flip")),
        *(("mp", harm) for harm in ("truncate", "empty", "folder", "link")),
    ],
)
def test_a_harmed_piece_is_made_again_or_told(copied, trained, capsys, stage, harm):
    path = finished_files(copied.folder, stage)[0]
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "link":
        path.symlink_to("/nowhere")
    elif harm != "delete":
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncate": content[:-1], "empty": b"", "flip": content}[harm])
    with pytest.raises(UserError, match="cannot be read" if harm in ("delete", "link") else "is damaged") as error:
        load_metrics(copied)
    assert says(error.value)
    said = made_again(copied, trained, capsys)
    assert "are gone; their rows are made again" in said if harm == "delete" else path.name in said
    if harm != "delete":
        path.rmdir() if harm == "folder" else path.unlink()
        assert "are gone" in made_again(copied, trained, capsys)


@pytest.mark.parametrize(
    "stage,harm",
    [
        *((stage, "delete") for stage in STAGES),
        *(
            ("mp", harm)
            for harm in (
                "[]", "3", "null", "{}", "", "folder", "half", '{"files": ["../../x"], "history": [], "digest": ""}',
            )
        ),
    ],
)
def test_a_harmed_manifest_is_made_again_or_told(copied, trained, capsys, stage, harm):
    path = copied.folder / f"{stage}.json"
    before = path.read_text()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "delete":
        path.write_text(before[: len(before) // 2] if harm == "half" else harm)
    with pytest.raises(UserError) as error:
        load_metrics(copied)
    assert says(error.value)
    said = made_again(copied, trained, capsys)
    assert "are taken up" in said if harm == "delete" else path.name in said


@pytest.mark.parametrize("record", ["[]", "3", "null", "{}", "", '"a"', "{" * 5000, "folder", "\xff", '{"format": 1}'])
def test_a_store_without_its_own_record_is_refused(copied, trained, capsys, record):
    path = copied.folder / "store.json"
    path.unlink()
    if record == "folder":
        path.mkdir()
    else:
        path.write_bytes(record.encode("latin-1"))
    assert made_again(copied, trained, capsys).startswith("UserError")
    assert finished_files(copied.folder, "mp")


def test_a_store_without_a_record_is_not_adopted(copied, trained, capsys):
    (copied.folder / "store.json").unlink()
    assert "what it was made from is not known" in made_again(copied, trained, capsys)


@pytest.mark.parametrize(
    "changes,told",
    [
        ({"seed": 1}, "another seed"), ({"engine": "torch"}, "another engine"), ({"epochs": 4}, "epochs 3, now 4"),
        ({"arithmetic": 1}, "another arithmetic"),
    ],
)
def test_other_parameters_do_not_touch_a_store(tmp_path, images, changes, told):
    plan = small_plan(tmp_path)
    if plan.engine.name == "torch" and "engine" in changes:
        pytest.skip("there is only one engine here: no C++ compiler")
    open_store(plan.folder, fingerprint(plan, images))
    other = plan if "arithmetic" in changes else small_plan(tmp_path, **changes)
    if "arithmetic" in changes:
        other = replace(plan, engine=replace(plan.engine, arithmetic=lambda: "another kind"))
    with pytest.raises(UserError, match=told) as error:
        open_store(plan.folder, fingerprint(other, images))
    assert says(error.value)


@pytest.mark.parametrize("name,place", [("x_train", 150), ("x_test", 7), ("y_train", 79), ("y_test", 0)])
def test_other_images_do_not_touch_a_store(tmp_path, name, place):
    images, plan = subset(load_images("digits"), 200, 50), small_plan(tmp_path)
    open_store(plan.folder, fingerprint(plan, images))
    changed = getattr(images, name).clone()
    changed[place] = changed[place] + 1
    with pytest.raises(UserError, match="another images"):
        open_store(plan.folder, fingerprint(plan, replace(images, **{name: changed})))


@pytest.mark.parametrize("name", ["with space", "ünï-ço∂é", "a[b]*?", "100%s", "{x}", "-rf", "'quoted'"])
def test_odd_names_of_folders_are_only_names(tmp_path, images, name):
    plan = small_plan(tmp_path / name, n=1, levels="50", methods="mp")
    make_twins(plan, images, progress=False)
    (plan.folder / "parts").mkdir(exist_ok=True)
    assert [r.made for r in make_twins(plan, images, progress=False)] == [0, 0] and not left_over(plan)
    assert len(load_metrics(plan)) == 4 + 3


def test_a_relative_path_and_a_link_lead_to_the_same_store(copied, images, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(copied.folder.parent)
    monkeypatch.chdir(copied.folder.parent)
    for place in (".", tmp_path / "link"):
        assert [r.made for r in make_twins(small_plan(place, n=5, epochs=6), images, progress=False)] == [0, 0, 0]


@pytest.mark.parametrize("where", ["", "digits_seed", "digits_seed/mp", "digits_seed/mp.lock"])
def test_something_in_the_way_is_told(tmp_path, images, where):
    place = tmp_path / "store" / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if where.endswith("lock") else place.write_text("a file where a folder is to be")
    if where.startswith("digits_seed/"):
        plan = small_plan(tmp_path / "store", n=1)
        (tmp_path / "elsewhere").mkdir()
        shutil.move(place, tmp_path / "elsewhere" / place.name)
        open_store(plan.folder, fingerprint(plan, images))
        (plan.folder / "mp.lock").unlink(missing_ok=True)
        shutil.move(tmp_path / "elsewhere" / place.name, place)
    with pytest.raises(UserError, match="cannot be written") as error:
        make_twins(small_plan(tmp_path / "store", n=1), images, progress=False)
    assert says(error.value)


def test_a_limit_on_files_is_told_and_leaves_nothing_half(tmp_path, images):
    plan = small_plan(tmp_path, n=2)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(UserError, match="cannot be written .File too large"):
            make_twins(plan, images, progress=False)

    assert in_child(limited) == 0 and not list(plan.folder.rglob(".*")) and not finished_files(plan.folder, "original")
    assert [r.made for r in make_twins(plan, images, progress=False)] == [2, 4, 2]


def test_a_lack_of_memory_is_not_blamed_on_a_file(copied, monkeypatch):
    def none_left(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    monkeypatch.setattr(store, "models_in", none_left)
    with pytest.raises(OutOfMemory, match="not enough memory to read"):
        read_stage(copied.folder, "mp")


def test_temporary_files_are_swept_up_and_others_are_not(copied, images):
    ours = [
        copied.folder / name
        for name in (".store-1.json", ".mp-1.json", "mp/.mp-1-2.safetensors", "parts/.vd-1-2.safetensors")
    ]
    others = [copied.folder / name for name in (".keep", "mp/.DS_Store", "mp/.ipynb_checkpoints/mp.json")]
    for path in (*ours, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    make_twins(copied, images, progress=False)
    assert not any(path.exists() for path in ours) and all(path.exists() for path in others)
    with locked(copied.folder, "mp"):
        assert sweep(copied.folder, "mp") == 0


def test_a_file_is_written_once_and_named_by_its_content(tmp_path):
    path = add_file(tmp_path, "mp-1", b"content")
    before = path.stat()
    assert add_file(tmp_path, "mp-1", b"content") == path and path.stat().st_mtime_ns == before.st_mtime_ns
    assert add_file(tmp_path, "mp-1", b"Content") != path


def test_rows_that_are_there_twice_are_given_once(copied, trained):
    path = finished_files(copied.folder, "original")[0]
    shutil.copy(path, path.with_name(path.name.replace("original-", "original-copied")))
    write_manifest(copied.folder, "original", {"made": 0})
    assert len(read_stage(copied.folder, "original")) == 5 == len(read_predictions(copied.folder, "original"))
    assert different(copied, trained) is None


def test_the_latest_unfinished_work_counts(tmp_path):
    metrics = pd.DataFrame({"model": [0], "level": [0.5], "epoch": [1]})
    for epoch in (2, 3, 1):
        (tmp_path / "other").mkdir(exist_ok=True)
        save_part(tmp_path / "other", "mp-1", {"weights/a": torch.full((2,), float(epoch))}, metrics, {"epoch": epoch})
        shutil.copytree(tmp_path / "other", tmp_path / "parts", dirs_exist_ok=True)
    assert len(list((tmp_path / "parts").iterdir())) == 3 and read_part(tmp_path / "parts", "mp-1")[2] == {"epoch": 3}
    save_part(tmp_path / "parts", "mp-1", {"weights/a": torch.zeros(2)}, metrics, {"epoch": 4})
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_reader_beside_a_writer_never_sees_halves(tmp_path, images):
    """While models and levels are added, a reader of earlier ones finds them whole: the old or the new."""
    plan, more = small_plan(tmp_path, n=2), small_plan(tmp_path, n=4, levels="0,50,90")
    make_twins(plan, images, progress=False)
    before = load_metrics(plan)

    def read() -> tuple[int, ...]:
        """Check the models that were there from the start; count all that are there now."""
        assert load_metrics(plan).equals(before)
        assert len(load_twins(plan, "mp", 0.9, 2)) == len(load_epoch(plan, 1)) == 2
        return tuple(len(load_models(plan.folder / kind)) for kind in ("original", "mp", "vd"))

    sizes = [read()]  # A fast writer may end its first stage before the first reading beside it.
    writer = multiprocessing.get_context("fork").Process(
        target=make_twins, args=(more, images), kwargs={"progress": False})
    writer.start()
    while writer.is_alive():
        sizes.append(read())
    writer.join()
    sizes.append(read())
    assert writer.exitcode == 0 and sizes[0] == (2, 4, 2) and sizes[-1] == (4, 12, 4)
    assert sizes == sorted(sizes) and set(sizes) <= {(2, 4, 2), (4, 4, 2), (4, 12, 2), (4, 12, 4)}


def test_a_second_run_says_that_it_waits(tmp_path, capsys):
    with locked(tmp_path, "mp"):
        def second():
            with locked(tmp_path, "mp"):
                pass
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        assert other.is_alive()
    other.join(5)
    said = capsys.readouterr().out
    assert not other.is_alive() and said.count("\n") == 1 and "this one waits for it" in said


def test_a_manifest_lists_what_is_read(copied):
    names = [path.name for path in finished_files(copied.folder, "mp")]
    assert (
        read_manifest(copied.folder, "mp")["files"] == names and len(read_manifest(copied.folder, "mp")["history"]) == 1
    )
    with opened(copied.folder / "mp" / names[0]) as file:
        assert len(rows_in(file)) == 15


def test_readers_give_the_plan_its_part(copied, trained):
    smaller = replace(copied, n_models=2, levels=(0.5,))
    metrics = load_metrics(smaller)
    assert set(metrics["model"]) == {0, 1} and set(metrics["level"].dropna()) == {0.5}
    assert len(load_epoch(smaller, 1)) == 2 and len(load_models(copied.folder / "mp")) == 15
    for larger in (replace(copied, n_models=6), replace(copied, levels=(0.7,))):
        with pytest.raises(UserError, match="run the zoo to make them"):
            load_metrics(larger)


def test_a_store_that_cannot_be_written_is_told(copied, trained, capsys):
    if os.geteuid() == 0:
        pytest.skip("whoever may do everything is not kept out")
    copied.folder.chmod(0o500)
    try:
        assert "cannot be written" in made_again(copied, trained, capsys)
        assert len(load_metrics(copied)) == len(load_metrics(trained))
    finally:
        copied.folder.chmod(0o700)
