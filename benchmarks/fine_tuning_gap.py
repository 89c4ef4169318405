"""What may part from print after fine-tuning: the same pruned models at other learning rates, measured in every way.

    python benchmarks/fine_tuning_gap.py ZOO MODELS FILE.csv LEVELS [RATE ...]

LEVELS are percentages such as 0,70. Originals are taken from the store or made. Each setting is one row per model:
the running training accuracy, accuracies in eval mode on training, validation and test images, and the agreement with
the original. A setting that is in the file already is not made again.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from zootwins.core import atomic_path
from zootwins.datasets import Images, load_images
from zootwins.engines import train
from zootwins.lanes import evaluate
from zootwins.plans import Plan, make_plan, parse_levels
from zootwins.population import Population
from zootwins.selectors import prune
from zootwins.training import Recipe
from zootwins.twins import load_models, make_twins


def predictions(
    population: Population,  # plain weights
    x: torch.Tensor,         # images
    y: torch.Tensor,         # labels
) -> torch.Tensor:           # uint8 [models, images]
    "Classes in eval mode."
    return evaluate(population.weights, population.architecture, population.models["activation"], x, y)[1]


def run(
    plan: Plan,             # names the zoo and its recipes
    originals: Population,  # to prune
    images: Images,         # of the zoo
    level: float,           # a fraction
    rate: float,            # of fine-tuning
) -> pd.DataFrame:          # one row per model
    "Fine-tune one level at one rate and measure it."
    zoo = plan.zoo
    pruned, masks = prune(originals, level, zoo.mp_selector)
    recipe = Recipe(zoo.name, f"mp_{100 * level:g}", zoo.mp_epochs, rate, zoo.batch_size)
    tuned = train(pruned, images, recipe, masks=masks)
    last = tuned.metrics[tuned.metrics["epoch"] == zoo.mp_epochs].reset_index(drop=True)
    rows = pd.DataFrame({"model": last["model"], "level": level, "rate": rate, "running": last["train_acc"]})
    for part in ("train", "val", "test"):
        x, y = getattr(images, f"x_{part}"), getattr(images, f"y_{part}")
        classes = predictions(tuned.population, x, y)
        rows[part] = (classes == y.to(torch.uint8)).double().mean(1).numpy()
    agree = classes == predictions(originals, images.x_test, images.y_test)
    return rows.assign(agreement=agree.double().mean(1).numpy())


def main(
    name: str, n: str, file: str, levels: str, *rates: str,
) -> None:
    "Make what the file lacks."
    plan, path = make_plan(name, int(n), methods="", levels="0"), Path(file)
    images = load_images(plan.zoo.dataset, plan.zoo.image_size)
    make_twins(plan, images, only=["original"])
    originals = load_models(plan.folder / "original").numbered(range(int(n)))
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["level", "rate"])
    for rate in map(float, rates or (plan.zoo.mp_learning_rate,)):
        for level in parse_levels(levels):
            if not ((rows["level"] == level) & (rows["rate"] == rate)).any():
                rows = pd.concat([rows, run(plan, originals, images, level, rate)]).dropna(axis=1, how="all")
                with atomic_path(path) as temporary:
                    rows.to_csv(temporary, index=False, float_format="%.5f")
    print((100 * rows.groupby(["level", "rate"]).mean().drop(columns="model")).round(2).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
