"""Recipes of the notebooks, run as they stand there, on a network with BatchNorm that nobody here wrote."""
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from small import IMAGES

from zootwins.module_masks import revived
from zootwins.retraining import shrunk

IMAGES_HALF = shrunk(IMAGES, 2)


def recipe(title):
    "The code under a heading of the notebook about retraining."
    cells = json.loads((Path(__file__).parents[1] / "nbs" / "72_retraining.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) + "\n\n" for cell in cells if cell["cell_type"] == "markdown")
    section = text.partition(f"## Recipe: {title}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    return code


def resnet():
    "A ResNet of Transformers, 5,442 parameters, nothing downloaded."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10))


@pytest.mark.parametrize(
    "title, packages", [("Lightning", ["lightning"]), ("the Trainer of Transformers", ["accelerate"])]
)
def test_a_recipe_of_the_notebook_runs_as_it_stands(tmp_path, monkeypatch, title, packages):
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    code, net = recipe(title), resnet()
    lines = re.search(r"def retrain.*?return model\n", code, re.S)[0].strip().splitlines()
    assert len(lines) + 1 <= 10  # and one that makes the soup
    names = {"images": IMAGES_HALF, "net": net}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers
        exec(code, names)
    cooked, before = names["cooked"], net.state_dict()
    (phase,) = cooked.phases
    total = sum(mask.numel() for mask in cooked.masks.values())
    assert type(cooked.model) is type(net) and revived(cooked.model, cooked.masks) == 0
    assert phase.sparsity == round(0.8 * total) / total and len(phase.candidates) == 3
    moved = [module.classifier[1].weight for module in phase.candidates]
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(before["classifier.1.weight"], moved[0])
    assert phase.soup.resnet.embedder.embedder.normalization.running_mean.abs().sum() > 0


@pytest.mark.parametrize("title", ["Lightning", "the Trainer of Transformers"])
def test_a_recipe_is_code(title):
    compile(recipe(title), title, "exec")
