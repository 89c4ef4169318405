"""Publications: whole, described truly, read back as they were."""
import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml

from zootwins.core import UserError
from zootwins.datasets import load_images, subset
from zootwins.plans import make_plan
from zootwins.population import load_population
from zootwins.published import read_zoo
from zootwins.publishing import export_zoo, publish
from zootwins.store import read_stage
from zootwins.twins import load_metrics, make_twins
from zootwins.untrusted import HASHES, check_hashes
from zootwins.zoos import get_zoo


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    "Three models with short stages."
    folder = tmp_path_factory.mktemp("store")
    zoo = replace(get_zoo("digits_seed"), epochs=3, mp_epochs=2, vd_epochs=2)
    plan = replace(make_plan("digits_seed", 3, levels="0,90", store=str(folder), figures=str(folder)), zoo=zoo)
    make_twins(plan, subset(load_images("digits"), 80, 50), progress=False)
    return plan


def front_matter(folder):
    "The card's header."
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


@pytest.mark.parametrize("stages,trajectory", [(None, False), (["vd"], True), (["mp", "original"], False)])
def test_what_is_published_is_what_was_stored(tmp_path, plan, stages, trajectory):
    folder = publish(plan.folder, tmp_path / "public", stages, trajectory)
    check_hashes(folder)
    chosen = stages or ["original", "mp", "vd"]
    for stage in chosen:
        one, other = read_stage(plan.folder, stage), load_population(folder / stage)
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights) and one.models.equals(
            other.models
        )
    assert {p.stem for p in folder.glob("*.safetensors")} == set(chosen)
    assert len(list(folder.rglob("trajectory/*.safetensors"))) == (3 if trajectory else 0)
    stored = load_metrics(plan)
    assert pd.read_parquet(folder / "metrics.parquet").equals(
        stored[stored["method"].isin(chosen)].reset_index(drop=True)
    )
    head = front_matter(folder)
    assert (
        all((folder / config["data_files"]).exists() for config in head["configs"]) and head["license"] == "cc-by-4.0"
    )
    assert sorted(config["config_name"] for config in head["configs"]) == sorted(
        ["metrics", *(f"{stage}_{kind}" for stage in chosen for kind in ("models", "weights"))]
    )
    assert sum(config.get("default", False) for config in head["configs"]) == 1


def test_the_card_tells_the_numbers_of_the_data(tmp_path, plan):
    text = (publish(plan.folder, tmp_path / "public", licence="cc0-1.0") / "README.md").read_text(encoding="utf-8")
    metrics = load_metrics(plan)
    last = metrics.query("method == 'vd' and epoch == 2")
    assert f"{100 * last['test_acc'].mean():.1f} ({100 * last['test_acc'].std():.1f})" in text
    assert "12 models" in text and 'license: "cc0-1.0"' in text and "80 for training and 50 for testing" in text
    assert "{" not in text.split("---\n", 2)[2] and str(tmp_path) not in text


def test_damage_is_found(tmp_path, plan):
    folder = publish(plan.folder, tmp_path / "public")
    (folder / "vd.parquet").write_bytes(b"damaged" + (folder / "vd.parquet").read_bytes()[7:])
    (folder / "mp.safetensors").unlink()
    (folder / "new.txt").write_text("new")
    with pytest.raises(UserError, match="mp.safetensors, vd.parquet differ"):
        check_hashes(folder)
    (folder / HASHES).unlink()
    with pytest.raises(UserError, match="is not a publication"):
        check_hashes(folder)


def test_what_a_client_of_a_hub_adds_is_named_and_does_no_harm(tmp_path, plan):
    folder = publish(plan.folder, tmp_path / "public")
    for name in (
        ".gitattributes", ".cache/huggingface/.gitignore", ".cache/huggingface/download/mp.parquet.metadata",
        ".git/config",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert check_hashes(folder) == [".cache (2 files)", ".git (1 files)", ".gitattributes"]
    (folder / "README.md").write_text("a card that was edited on the hub's pages")
    assert check_hashes(folder)[0] == "README.md (rewritten)"
    (folder / "store.json").write_text("{}")
    with pytest.raises(UserError, match="store.json differs"):
        check_hashes(folder)


@pytest.mark.parametrize(
    "text", ["", "no hashes", "0" * 64 + "  ../../etc/passwd", "0" * 64 + "  /etc/passwd", "\xff\xfe"]
)
def test_a_list_of_hashes_that_is_none(tmp_path, plan, text):
    folder = publish(plan.folder, tmp_path / "public")
    (folder / HASHES).write_text(text, encoding="latin1")
    with pytest.raises(UserError, match="not a list of hashes|not a publication"):
        check_hashes(folder)


def test_links_of_a_hubs_cache_are_followed(tmp_path, plan):
    "Its snapshots are links to blobs."
    folder = publish(plan.folder, tmp_path / "public")
    (folder / "mp.parquet").rename(tmp_path / "blob")
    (folder / "mp.parquet").symlink_to(tmp_path / "blob")
    (folder / HASHES).write_text((folder / HASHES).read_text().replace("\n", "\r\n"))
    assert check_hashes(folder) == []


def test_a_publication_is_whole_or_not_there(tmp_path, plan):
    store = tmp_path / "store"
    shutil.copytree(plan.folder, store)
    next((store / "mp").iterdir()).unlink()
    with pytest.raises((UserError, OSError)):
        publish(store, tmp_path / "public")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    with pytest.raises(UserError, match="no finished stage"):
        publish(tmp_path, tmp_path / "public")
    with pytest.raises(UserError, match="Valid: original, mp, vd"):
        publish(plan.folder, tmp_path / "public", ["vdd"])
    (tmp_path / "public").mkdir()
    with pytest.raises(UserError, match="exists already"):
        publish(plan.folder, tmp_path / "public")


def test_export_in_the_authors_layout(tmp_path, plan):
    folder = export_zoo(plan.folder, tmp_path / "exported")
    assert sorted(p.name for p in folder.iterdir()) == ["mp_0", "mp_90", "original", "vd"]
    stored = {stage: read_stage(plan.folder, stage) for stage in ("original", "mp", "vd")}
    stored |= {"mp_0": stored["mp"][:3], "mp_90": stored.pop("mp")[3:]}
    metrics = load_metrics(plan)
    for name, population in stored.items():
        read = read_zoo(folder / name, epochs="all", progress=False)
        last = read.populations[max(read.populations)]
        assert all(torch.equal(last.weights[key], population.weights[key]) for key in population.weights)
        method, _, level = name.partition("_")
        rows = metrics[(metrics["method"] == method) & ((metrics["level"] == float(level or 0) / 100) | (level == ""))]
        assert max(read.populations) == rows["epoch"].max()
        pd.testing.assert_series_equal(
            read.metrics.sort_values(["model", "epoch"])["test_acc"],
            rows.sort_values(["model", "epoch"])["test_acc"],
            check_index=False,
        )
    twins = read_zoo(folder / "vd", epochs="all", progress=False)
    assert sorted(twins.populations) == [0, 1, 2]
    for model, link in zip(twins.populations[2].models["seed"], twins.populations[2].models["origin"]):
        assert (folder / "vd" / link).is_file() and f"seed={model}" in link
    with pytest.raises(UserError, match="exists already"):
        export_zoo(plan.folder, folder)
    assert sorted(p.name for p in export_zoo(plan.folder, tmp_path / "few", ["vd"], trajectory=False).iterdir()) == [
        "vd"
    ]


def test_a_publication_is_a_source(tmp_path, plan):
    public = publish(plan.folder, tmp_path / "public", ["original"])
    there = replace(
        make_plan("digits_seed", source=str(public), methods="vd", store=str(tmp_path), figures=str(tmp_path)),
        zoo=plan.zoo,
    )
    make_twins(there, subset(load_images("digits"), 80, 50), progress=False)
    one, other = (read_stage(p.folder, "vd") for p in (plan, there))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    card = (publish(there.folder, tmp_path / "twins") / "README.md").read_text(encoding="utf-8")
    assert "taken as they are, after 3 epochs, from `public`" in card
    assert json.loads((tmp_path / "twins" / "store.json").read_text())["source"]["models"] == 3
