"""What benchmarks/gpu.sh measures and compares; `--device cpu` tries the same on the host build, slowly."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zootwins import gpu, training
from zootwins.architectures import ACTIVATIONS
from zootwins.bench import STAGES, dense_operations, random_images, random_population
from zootwins.population import Population
from zootwins.streams import epoch_order, stream_keys
from zootwins.training import Recipe, State, begin
from zootwins.variational import deterministic

# Of differences between device and host after 5 steps, relative to numbers above 1; set before anything was measured.
LIMIT = 1e-5
MODELS = (132, 264, 1000, 4000)
SECONDS = 0.4   # that one measurement shall take at least


def some_state(
    architecture: str,   # a key of IMAGE_SHAPES
    stage: str,          # one of STAGES
    models: int,         # how many, all different
    device: str,         # "cpu" or "cuda"
    mixed: bool = False,  # whether they also differ in activation, optimizer and dropout
) -> State:              # before the first step
    "Make models by repeating eight of them, each with a random stream of its own."
    torch.manual_seed(0)
    population, masks = random_population(architecture, stage, 8)
    rows = [model % 8 for model in range(models)]
    population = population[rows]
    factors = population.models.assign(model=range(models), seed=range(models), lr=2.0**-10)
    if mixed:
        factors = factors.assign(
            activation=[list(ACTIVATIONS)[i % 4] for i in range(models)],
            optimizer=[("adam", "sgd")[i // 4 % 2] for i in range(models)],
            dropout=[(0.0, 0.3, 0.0)[i % 3] for i in range(models)], wd=2.0**-7,
        )
    keys = stream_keys("bench", stage, list(range(models)))
    masks = {name: mask[rows] for name, mask in masks.items()}
    return begin(Population(population.weights, factors, architecture), keys, masks, device)


def a_recipe(
    stage: str,   # one of STAGES
) -> Recipe:      # one epoch
    "Say how to train."
    return Recipe("bench", stage, epochs=1, variational=stage == "vd")


def difference(
    a: State,  # on any device
    b: State,  # likewise
) -> float:    # not a number if one of them has what is none
    "The largest difference between weights, relative to those above 1."
    pairs = [(tensor.cpu(), b.population.weights[name].cpu()) for name, tensor in a.population.weights.items()]
    return torch.stack([((one - other).abs() / one.abs().clamp(min=1)).max() for one, other in pairs]).max().item()


def check_against_host(
    architecture: str,  # a key of IMAGE_SHAPES
    stage: str,         # one of STAGES
    device: str,        # "cpu" or "cuda"
) -> dict:              # what was compared, and whether it is well
    "Compare the device with the host after five steps of eight different models, and in evaluation."
    x, y = random_images(architecture, 50)
    host, there = (some_state(architecture, stage, 8, where, mixed=True) for where in ("cpu", device))
    host.epoch = there.epoch = 9
    loss, right = gpu.train_epoch(host, x, y, a_recipe(stage))
    own_loss, own_right = gpu.train_epoch(there, x.to(device), y.to(device), a_recipe(stage))
    plain, activations = deterministic(host.population.weights), host.population.models["activation"]
    judged, classes = gpu.evaluate(plain, architecture, activations, x, y)
    own_judged, own_classes = gpu.evaluate(
        {name: tensor.to(device) for name, tensor in plain.items()}, architecture, activations, x.to(device),
        y.to(device),
    )
    found = {
        "weights": difference(host, there), "loss": (loss - own_loss.cpu()).abs().max().item(),
        "evaluation": (judged - own_judged.cpu()).abs().max().item(),
        "classes": (classes != own_classes.cpu()).sum().item(), "right": (right - own_right.cpu()).abs().max().item(),
    }
    return {
        "architecture": architecture, "stage": stage, **found,
        "well": found["weights"] < LIMIT and found["loss"] < LIMIT and found["evaluation"] < LIMIT,
    }


def check_orders(
    device: str,       # "cpu" or "cuda"
    n: int = 50_000,   # images
) -> bool:             # whether the orders are those of the streams
    "Compare the orders of an epoch."
    keys = stream_keys("bench", "original", [1, 2, 3])
    job = gpu.Job(models=3, samples=n, epoch=9)
    job.hold("keys", keys.to(device))
    for field in ("order", "room"):
        job.hold(field, torch.empty(3, n, dtype=torch.int32, device=device))
    gpu.program(gpu.VARIANTS[0], job.held["keys"].device, torch.float32).run("shuffle", job)
    return torch.equal(job.held["order"].long().cpu(), epoch_order(n, keys, 9))


def check_alone(
    architecture: str,  # a key of IMAGE_SHAPES
    stage: str,         # one of STAGES
    device: str,        # "cpu" or "cuda"
    models: int = 1000,  # how many together
    images: int = 200,  # of the epoch
) -> bool:              # whether the one in the middle has the same bits alone
    "Train one model among many, and alone."
    x, y = (tensor.to(device) for tensor in random_images(architecture, images))
    together, middle = some_state(architecture, stage, models, device, mixed=True), models // 2
    masks = {name: mask[[middle]] for name, mask in together.masks.items()}
    alone = begin(together.population[[middle]], together.keys[[middle]], masks, device)
    loss, _ = gpu.train_epoch(together, x, y, a_recipe(stage))
    own, _ = gpu.train_epoch(alone, x, y, a_recipe(stage))
    return torch.equal(loss[[middle]], own) and all(
        torch.equal(tensor[middle], alone.population.weights[name][0])
        for name, tensor in together.population.weights.items()
    )


def check(
    device: str,           # "cpu" or "cuda"
    models: int = 1000,    # how many together with one
    images: int = 200,     # for those
) -> dict:                 # all that was compared
    "Do all comparisons."
    cases = [(architecture, stage) for architecture in gpu.IMAGE_SHAPES for stage in STAGES]
    rows = [check_against_host(*case, device) for case in cases]
    for row, case in zip(rows, cases):
        row["alone"] = check_alone(*case, device, models, images)
        print(json.dumps(row))
    orders = check_orders(device)
    print("orders are those of the streams:", orders)
    return {"rows": rows, "orders": orders, "well": orders and all(row["well"] and row["alone"] for row in rows)}


def race(
    device: str,  # "cpu" or "cuda"
) -> None:
    "Run every kernel once, on little, for compute-sanitizer to look at."
    for architecture in gpu.IMAGE_SHAPES:
        x, y = (tensor.to(device) for tensor in random_images(architecture, 12))
        for stage in ("mp", "vd"):
            state = some_state(architecture, stage, 2, device, mixed=True)
            print(architecture, stage, gpu.train_epoch(state, x, y, a_recipe(stage))[0].tolist())
        print(
            architecture,
            "evaluation",
            gpu.evaluate(deterministic(state.population.weights), architecture, ["tanh", "relu"], x, y)[0].tolist(),
        )


def rate(
    epoch: Callable[[Tensor, Tensor], object],  # trains on images and labels
    architecture: str,  # a key of IMAGE_SHAPES
    models: int,        # how many
    device: str,        # "cpu" or "cuda"
    images: int,        # to begin with
    seconds: float,     # that the measurement shall take at least
) -> float:             # model-samples per second
    "Measure one epoch over so many images that it takes long enough; a first one warms up and shows how many that are."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for last in (False, False, True):
        x, y = (tensor.to(device) for tensor in random_images(architecture, images))
        wait()
        start = time.perf_counter()
        epoch(x, y)
        wait()
        took = time.perf_counter() - start
        if not last:
            images = max(images, min(60_000, int(images * seconds / took)) // 10 * 10)
    return models * len(x) / took


def peak(
    device: str,   # "cpu" or "cuda"
) -> float | None:  # operations per second in single precision; none on the CPU
    "Calculate a GPU's peak from its multiprocessors and its highest clock."
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(0)
    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0"], capture_output=True,
        text=True, check=True,
    ).stdout
    units = 64 if (properties.major, properties.minor) == (8, 0) else 128
    return properties.multi_processor_count * units * 2 * float(clock) * 1e6


def rates(
    device: str,                        # "cpu" or "cuda"
    counts: tuple[int, ...] = MODELS,   # numbers of models
    images: int = 100,                  # to begin with
    seconds: float = SECONDS,           # of each measurement
) -> list[dict]:                        # one row per net, stage and number of models
    "Measure all nets and stages, and the reference engine with a thousand models (or the largest number up to that)."
    rows, most = [], peak(device)
    for architecture in gpu.IMAGE_SHAPES:
        for stage in STAGES:
            operations = dense_operations(architecture, stage == "vd")
            for models in counts:
                state = some_state(architecture, stage, models, device)
                found = rate(
                    lambda x, y, state=state, stage=stage: gpu.train_epoch(state, x, y, a_recipe(stage)),
                    architecture, models, device, images, seconds,
                )
                share = found * operations / most if most else None
                rows.append(
                    {
                        "architecture": architecture, "stage": stage, "engine": "gpu", "models": models, "rate": found,
                        "share_of_peak": share,
                    }
                )
                print(json.dumps(rows[-1]))
            models = max(count for count in counts if count <= max(1000, min(counts)))
            state = some_state(architecture, stage, models, device)
            found = rate(
                lambda x, y, state=state, stage=stage: training.train_epoch(state, x, y, a_recipe(stage)),
                architecture, models, device, 20, seconds,
            )
            own = statistics.median(
                row["rate"]
                for row in rows
                if (row["architecture"], row["stage"], row["models"], row["engine"])
                == (architecture, stage, models, "gpu")
            )
            rows.append(
                {
                    "architecture": architecture, "stage": stage, "engine": "torch", "models": models, "rate": found,
                    "gpu_times": own / found,
                }
            )
            print(json.dumps(rows[-1]))
    return rows


def main() -> int:  # 0 if all is well
    "Do one part."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("build", "check", "race", "rates"))
    parser.add_argument("number", nargs="?", type=int, default=0, help="of the variant to build")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, help="folder for what was found")
    options = parser.parse_args()
    if options.part == "build":
        gpu.host_library(gpu.VARIANTS[options.number])
        gpu.program(gpu.VARIANTS[options.number], torch.zeros(1, device=options.device).device, torch.float32)
        return 0
    if options.part == "race":
        race(options.device)
        return 0
    found = check(options.device) if options.part == "check" else rates(options.device)
    if options.results:
        (options.results / f"{options.part}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if options.part == "rates" or found["well"] else 1


if __name__ == "__main__":
    sys.exit(main())
