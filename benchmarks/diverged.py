"""Which models of a grid diverge in their first epochs: one of every combination of the generating factors.

    python benchmarks/diverged.py ZOO FILE.csv [EPOCHS]

One row per combination: its factors, the seed of its first model, and whether that model has diverged, which means
that its training loss is not finite after EPOCHS (one, if not given).
"""

import sys
from pathlib import Path

import numpy as np

from zootwins.core import atomic_path
from zootwins.datasets import load_images
from zootwins.engines import train
from zootwins.population import initial_population
from zootwins.training import Recipe
from zootwins.zoos import FACTORS, get_zoo, model_table

if __name__ == "__main__":
    zoo, path, epochs = get_zoo(sys.argv[1]), Path(sys.argv[2]), int([*sys.argv, 1][3])
    models = model_table(zoo).drop_duplicates(list(FACTORS), ignore_index=True)
    population = initial_population(models, zoo.architecture, zoo.name)
    images = load_images(zoo.dataset, zoo.image_size)
    metrics = train(population, images, Recipe(zoo.name, "original", epochs=epochs)).metrics
    loss = metrics[metrics["epoch"] == epochs].set_index("model")["train_loss"]
    rows = models[[*FACTORS, "seed"]].assign(diverged=~np.isfinite(loss.reindex(models["model"]).to_numpy()))
    with atomic_path(path) as temporary:
        rows.to_csv(temporary, index=False)
    print(f"{rows['diverged'].sum()} of {len(rows)} combinations diverged")
