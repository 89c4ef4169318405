"""Agreement of variational twins with their originals, pruned and without noise, and with the noise of training.

    python benchmarks/noisy_agreement.py ZOO MODELS FILE.csv

The twins of the first MODELS originals at the state of Table 1, taken from the store or made. A network left in train
mode predicts with noise and with all of its weights; one in eval mode as everywhere else in this project. Rows of a
zoo that the file has are replaced.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from zootwins.architectures import build
from zootwins.core import atomic_path
from zootwins.datasets import load_images
from zootwins.plans import make_plan
from zootwins.population import Population
from zootwins.states import TABLE_1_STATES, choose_states
from zootwins.twins import load_epoch, load_metrics, load_models, make_twins
from zootwins.variational import sparsify

SEED = 0  # of the noise


def predictions(
    population: Population,  # as trained, with any log_sigma2
    model: int,              # its place
    x: torch.Tensor,         # test images
    noisy: bool,             # train mode
) -> torch.Tensor:           # classes
    "What one network answers, in eval or in train mode."
    row = population.models.iloc[model]
    network = build(population.architecture, row["activation"])
    if any("log_sigma2" in name for name in population.weights):
        network = sparsify(network)
    network.load_state_dict({name: tensor[model] for name, tensor in population.weights.items()})
    with torch.no_grad():
        return torch.cat([network.train(noisy)(part).argmax(1) for part in x.split(1000)])


def rows_of(
    zoo: str,  # from the registry
    n: int,    # models
) -> pd.DataFrame:  # zoo, epoch, model, and agreement and test accuracy of the pruned and of the noisy network
    "Measure the twins of Table 1."
    plan = make_plan(zoo, n, methods="vd", levels="0")
    images = load_images(plan.zoo.dataset, plan.zoo.image_size)
    make_twins(plan, images)
    states = choose_states(load_metrics(plan), TABLE_1_STATES)
    epoch = int(states.loc[states["method"] == "vd", "epoch"].iloc[0])
    originals, twins = load_models(plan.folder / "original").numbered(range(n)), load_epoch(plan, epoch)
    x, y, found = images.x_test.float(), images.y_test, []
    torch.manual_seed(SEED)
    for model in range(n):
        before = predictions(originals, model, x, False)
        row = {"zoo": zoo, "epoch": epoch, "model": model}
        for name, noisy in (("pruned", False), ("noisy", True)):
            after = predictions(twins, model, x, noisy)
            row |= {f"{name}_agreement": (before == after).float().mean().item(),
                    f"{name}_accuracy": (after == y).float().mean().item()}
        found.append(row)
    return pd.DataFrame(found)


def main(
    zoo: str, n: str, file: str,
) -> None:
    "Measure one zoo and write it to the file."
    path, rows = Path(file), rows_of(zoo, int(n))
    if path.exists():
        known = pd.read_csv(path)
        rows = pd.concat([known[known["zoo"] != zoo], rows], ignore_index=True)
    with atomic_path(path) as temporary:
        rows.round(4).to_csv(temporary, index=False)
    print((100 * rows.groupby("zoo").mean()).round(2).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
