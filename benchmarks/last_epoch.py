"""What one more epoch at other learning rates does to originals: a jump such as that of CIFAR-10 (l) Seed's records.

    python benchmarks/last_epoch.py ZOO MODELS FILE.csv RATE ...

Originals are taken from the store or made. Each is trained for one epoch more, from its last weights with a new
optimizer, at every RATE; the zoo's own among them is the control. One row per model and rate, rate 0 being the
original: running training accuracy (none for originals), and accuracies in eval mode on training and test images.
The last column is the test accuracy of the same network if images are normalised by the data set's own mean and
spread instead of by 0.5, the slip that is most common. A rate that is in the file already is not trained again.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from zootwins.core import atomic_path
from zootwins.datasets import Images, load_images
from zootwins.engines import train
from zootwins.lanes import evaluate
from zootwins.plans import Plan, make_plan
from zootwins.population import Population
from zootwins.training import Recipe
from zootwins.twins import load_models, make_twins


def accuracies(
    population: Population,  # plain weights
    x: torch.Tensor,         # images
    y: torch.Tensor,         # labels
) -> np.ndarray:             # [models]
    "Accuracy in eval mode."
    classes = evaluate(population.weights, population.architecture, population.models["activation"], x, y)[1]
    return (classes == y.to(torch.uint8)).double().mean(1).numpy()


def measured(
    population: Population,  # plain weights
    images: Images,          # of the zoo
) -> dict[str, np.ndarray]:  # train, test, other: [models]
    "Accuracies on training and test images, and on test images that are normalised in another way."
    over = (0, 2, 3) if images.x_train.ndim == 4 else (0, 1, 2)
    mean, std = images.x_train.float().mean(over, keepdim=True), images.x_train.float().std(over, keepdim=True)
    other = (images.x_test.float() - mean) / std
    pairs = {"train": (images.x_train, images.y_train), "test": (images.x_test, images.y_test),
             "other": (other, images.y_test)}
    return {name: accuracies(population, *pair) for name, pair in pairs.items()}


def rows_at(
    plan: Plan,             # names the zoo
    originals: Population,  # at their last epoch
    images: Images,         # of the zoo
    rate: float,            # of the epoch more; 0: none
) -> pd.DataFrame:          # one row per model
    "Train one epoch more and measure."
    rows = {"zoo": plan.zoo.name, "rate": rate, "model": range(len(originals.models)), "running": np.nan}
    if rate:
        # the stream of another stage, so that the epoch's order is new
        more = train(originals, images, Recipe(plan.zoo.name, "last_epoch", 1, rate, plan.zoo.batch_size))
        rows["running"] = more.metrics.query("epoch == 1")["train_acc"].to_numpy()
        originals = more.population
    return pd.DataFrame(rows | measured(originals, images))


def main(
    zoo: str, n: str, file: str, *rates: str,
) -> None:
    "Measure every rate that the file lacks."
    path, plan = Path(file), make_plan(zoo, int(n), methods="vd", levels="0")
    images = load_images(plan.zoo.dataset, plan.zoo.image_size)
    make_twins(plan, images, only=("original",))
    originals = load_models(plan.folder / "original").numbered(range(int(n)))
    for rate in (0.0, *map(float, rates)):
        known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["zoo", "rate"])
        if not ((known["zoo"] == zoo) & np.isclose(known["rate"].astype(float), rate, rtol=1e-6, atol=0)).any():
            rows = pd.concat([known, rows_at(plan, originals, images, rate)], ignore_index=True)
            with atomic_path(path) as temporary:
                rows.round(5).to_csv(temporary, index=False)
        print((100 * pd.read_csv(path).groupby(["zoo", "rate"])[["running", "train", "test", "other"]].agg(
            ["mean", "std"])).round(2).to_string(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
