"""What may part from print at the end of variational dropout: the same twins with another noise or another clamp.

    python benchmarks/variational_end.py ZOO MODELS FILE.csv [VARIANT ...]

Twins of the first MODELS originals, which are taken from the store or made. A variant of the engine is its own C++
source with one line exchanged, so that nothing else differs; a variant that is in the file already is not made again.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from zootwins import lanes
from zootwins.architectures import build, layer_names
from zootwins.core import UserError, atomic_path, check_name
from zootwins.datasets import load_images
from zootwins.engines import train
from zootwins.metrics import sparsity
from zootwins.plans import make_plan
from zootwins.training import Recipe
from zootwins.twins import load_models, make_twins
from zootwins.variational import begin_variational, sparse_masks

CLAMP = (
    "inside = (raw >= -bound) & (raw <= bound);\n"
    "    return raw < -bound ? splat(-bound) : (raw > bound ? splat(bound) : raw);"
)
VARIANTS = {  # name -> the lines that replace CLAMP; none: the source as it is
    "as it is": None,
    "one noise for all twins": None,
    **{f"log alpha at most {most} in training": CLAMP.replace("raw <= bound", f"raw <= Scalar({most})")
       .replace("raw > bound ? splat(bound)", f"raw > Scalar({most}) ? splat({most})") for most in (3, 5, 7, 8)},
    "no clamp": CLAMP.replace("bound", "Scalar(40)"),
}


def use_source(
    variant: str,  # a key of VARIANTS
    folder: Path,  # for the changed source
) -> None:
    "Let the lanes be built from a variant of their source."
    text = lanes.SOURCE.read_text(encoding="utf-8")
    if text.count(CLAMP) != 1:
        raise UserError("lanes.cpp no longer has the lines that this script exchanges: bring CLAMP up to date.")
    for path in (lanes.SOURCE, lanes.HEADER):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / lanes.SOURCE.name).write_text(text.replace(CLAMP, VARIANTS[variant] or CLAMP), encoding="utf-8")
    lanes.SOURCE, lanes.HEADER = folder / lanes.SOURCE.name, folder / lanes.HEADER.name
    lanes.library.cache_clear()


def run(
    zoo: str,      # from the registry
    n: int,        # models
    variant: str,  # a key of VARIANTS
) -> pd.DataFrame:  # zoo, variant, model, epoch, train_acc, test_acc, sparsity
    "Train the twins of one variant."
    plan = make_plan(zoo, n, methods="", levels="0")
    images = load_images(plan.zoo.dataset, plan.zoo.image_size)
    make_twins(plan, images, only=["original"])
    with tempfile.TemporaryDirectory() as folder:
        source = lanes.SOURCE, lanes.HEADER
        use_source(variant, Path(folder))
        population = begin_variational(load_models(plan.folder / "original").numbered(range(n)))
        if variant == "one noise for all twins":
            population.models["seed"] = 0
        recipe = Recipe(zoo, "vd", plan.zoo.vd_epochs, plan.zoo.vd_learning_rate, plan.zoo.batch_size, True)
        trained = train(population, images, recipe, keep=tuple(range(plan.zoo.vd_epochs + 1)), engine="lanes")
        lanes.SOURCE, lanes.HEADER = source
    layers = layer_names(build(population.architecture))
    zeros = {
        epoch: sparsity(sparse_masks(then.weights), layers)["sparsity"].numpy()
        for epoch, then in trained.snapshots.items()
    }
    rows = trained.metrics[["model", "epoch", "train_acc", "test_acc"]]
    at = {number: place for place, number in enumerate(population.models["model"])}
    found = [zeros[epoch][at[model]] for model, epoch in zip(rows["model"], rows["epoch"])]
    return rows.assign(sparsity=found, zoo=zoo, variant=variant)


def summary(
    rows: pd.DataFrame,  # of all variants
) -> pd.DataFrame:       # by variant and epoch: means and standard deviations in %
    "Means over the models, and paired differences of the running training accuracy from the engine as it is."
    rows = rows.assign(ggap=rows["train_acc"] - rows["test_acc"])
    measures = ["train_acc", "test_acc", "ggap", "sparsity"]
    table = 100 * rows.groupby(["zoo", "variant", "epoch"], sort=False)[measures].agg(["mean", "std"])
    table.columns = [f"{name}_{what}" for name, what in table.columns]
    wide = rows.pivot_table("train_acc", ["zoo", "epoch", "model"], "variant")
    paired = 100 * wide.sub(wide["as it is"], axis=0)
    table["train_acc_change"] = (
        paired.groupby(["zoo", "epoch"]).mean().stack().reorder_levels(["zoo", "variant", "epoch"])
    )
    table["change_error"] = (
        (paired.groupby(["zoo", "epoch"]).std() / np.sqrt(rows["model"].nunique()))
        .stack()
        .reorder_levels(["zoo", "variant", "epoch"])
    )
    return table


def main(
    zoo: str, n: str, file: str, *variants: str,
) -> None:
    "Make what the file lacks."
    path = Path(file)
    for variant in variants or VARIANTS:
        check_name(variant, VARIANTS, "variant")
        known = (
            pd.read_parquet(path.with_suffix(".parquet"))
            if path.with_suffix(".parquet").exists()
            else pd.DataFrame(columns=["variant"])
        )
        if variant in set(known["variant"]):
            continue
        rows = pd.concat(
            [known, run(zoo, int(n), variant)] if len(known) else [run(zoo, int(n), variant)], ignore_index=True
        )
        with atomic_path(path.with_suffix(".parquet")) as temporary:
            rows.to_parquet(temporary, index=False)
        with atomic_path(path) as temporary:
            summary(rows).reset_index().round(4).to_csv(temporary, index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
