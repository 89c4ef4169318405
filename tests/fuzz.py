"""Mutated files for every reader: `python tests/fuzz.py --n 10000 --seed 0 [--reader NAME] [--only CASE]`.

Each input is a small valid one with one to four mutations, made from its seed and number alone. It is read in a
worker that may use one GiB more than it has, and five seconds of processor time, four times as many by the clock.
What may come of it:

- right: all numbers are those of the input before it was mutated
- reason: some are missing, or something beside them, and the reader says how many and why
- refused: one UserError on one line
- remade: checksums were made anew after the mutation, so that nobody can tell it from a file that was meant
- unnoticed: other numbers, from a format without checksums (metrics); in all other formats a failure

Anything else is a failure: another exception, more lines than one, a crash, more time or more memory. A new reader is
one more function with `@reader`, which writes a valid input and returns what reads it."""
import argparse
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from zootwins.core import UserError
from zootwins.metrics import METRIC_COLUMNS, read_metrics
from zootwins.population import load_population, sample_population, save_population
from zootwins.published import read_zoo, write_zoo
from zootwins.publishing import hashes
from zootwins.store import (
    Piece, add_file, pack, read_part, read_predictions, read_stage, read_stage_metrics, save_part, write_manifest,
)
from zootwins.untrusted import HASHES, check_hashes, read_checkpoint
from zootwins.zoos import get_zoo

SECONDS, MEMORY = 5, 2**30
READERS: dict[str, Callable[[Path], "Reader"]] = {}


@dataclass(frozen=True)
class Read:
    "What was read of an input."

    numbers: dict[str, str]  # hashes by name
    missing: int = 0         # reasons that were given for missing numbers
    passed: int = 0          # all that was passed over


@dataclass(frozen=True)
class Reader:
    "How an input is read, and judged."

    read: Callable[[Path], "Read"]
    name: str              # of the input in its folder
    checked: bool = True   # whether damage to weights must show


def reader(make: Callable[[Path], Reader]) -> Callable[[Path], Reader]:
    "Register a function that writes a valid input into a folder."
    READERS[make.__name__] = make
    return make


# ---- readers

def digest(value) -> str:
    return hashlib.sha1(value.tobytes() if isinstance(value, np.ndarray) else value.to_csv().encode()).hexdigest()


def weights_of(population, prefix="") -> dict[str, str]:
    "A hash for each model; models of published zoos are known by their folders."
    names = [str(name).rsplit("_", 2)[0] or i for i, name in enumerate(population.models.get("parent", ""))]
    whole = torch.cat([tensor.flatten(1) for tensor in population.weights.values()], 1).numpy()
    return {f"{prefix}{name}": digest(row) for name, row in zip(names, whole)}


def zoo_numbers(path: Path, records: bool = True) -> Read:
    "Weights by epoch and model, and what was recorded of each model."
    zoo = read_zoo(path, "all", limit=None, progress=False)
    if any(map(out_of_memory, zoo.left_out["reason"])):
        raise MemoryError(zoo.left_out["reason"].iloc[0])
    found, names = {}, {}
    for epoch, population in zoo.populations.items():
        found |= weights_of(population, f"{epoch} ")
        names |= dict(zip(population.models["model"], population.models["parent"]))
    if records:
        columns = ["epoch", "train_loss", "train_acc", "test_loss", "test_acc"]
        found |= {
            f"{names[model]} {row.epoch}": digest(pd.Series(row))
            for model, rows in zoo.metrics.groupby("model")
            for row in rows[columns].itertuples(index=False)
        }
    reasons = zoo.passed_over[zoo.passed_over["kind"].isin(["state", "part", "record", "value", "property"])][
        "times"
    ].sum()
    return Read(found, len(zoo.left_out) + int(reasons), int(zoo.passed_over["times"].sum()))


def small_zoo(folder: Path) -> Path:
    "Three models with two epochs in the authors' layout."
    populations = {epoch: sample_population(get_zoo("mnist_fixed"), 3, epoch) for epoch in (0, 1)}
    rows = [
        {
            "zoo": "z", "method": "original", "level": np.nan, "model": m, "epoch": e, "train_loss": 1.0,
            "train_acc": 0.5, "test_loss": 1.1, "test_acc": 0.4, "sparsity": 0.0,
        }
        for m in range(3)
        for e in (0, 1)
    ]
    return write_zoo(populations, pd.DataFrame(rows), folder / "zoo")


@reader
def raw_folder(folder: Path) -> Reader:
    "Its JSON has no checksums, so that only weights can be judged."
    small_zoo(folder)
    return Reader(lambda path: zoo_numbers(path, records=False), "zoo")


@reader
def raw_zip(folder: Path) -> Reader:
    zoo = small_zoo(folder)
    with zipfile.ZipFile(folder / "zoo.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for file in sorted(path for path in zoo.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(folder))
    shutil.rmtree(zoo)
    return Reader(zoo_numbers, "zoo.zip")


class ModelDatasetBase:
    "Stands in for the authors' class."


@reader
def preprocessed(folder: Path) -> Reader:
    population = sample_population(get_zoo("mnist_fixed"), 3)
    parts = {name: ModelDatasetBase() for name in ("trainset", "testset")}
    for part, indices in zip(parts.values(), ((0, 1), (2,))):
        states = [(i, epoch) for i in indices for epoch in (0, 1)]
        part.data_in = [
            OrderedDict((key, tensor[i] * (1 + epoch)) for key, tensor in population.weights.items())
            for i, epoch in states
        ]
        part.labels_in = [f"/zoos/model_{i}_x_y#_#epoch_{epoch}#_#layer_[0, 3]" for i, epoch in states]
        part.properties = {
            "test_acc": [np.float64(0.5)] * len(states), "ggap": [0.01] * len(states),
            "training_iteration": [e for _, e in states], "model::nlin": ["tanh"] * len(states),
            "optim::lr": [1e-3] * len(states),
        }
    torch.save(parts, folder / "dataset.pt")
    return Reader(zoo_numbers, "dataset.pt")


@reader
def checkpoint(folder: Path) -> Reader:
    module = sample_population(get_zoo("mnist_seed"), 1).to_module(0)
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save(
        {"epoch": 3, "state_dict": state, "optimizer": torch.optim.Adam(module.parameters()).state_dict()},
        folder / "model.pt",
    )
    return Reader(
        lambda path: Read({name: digest(tensor.numpy()) for name, tensor in read_checkpoint(path).items()}), "model.pt"
    )


def population_numbers(path: Path) -> dict[str, str]:
    population = load_population(path)
    return {name: digest(tensor.numpy()) for name, tensor in population.weights.items()} | {
        "factors": digest(population.models)
    }


@reader
def population(folder: Path) -> Reader:
    (folder / "files").mkdir()
    save_population(sample_population(get_zoo("mnist_fixed"), 3), folder / "files" / "original")
    return Reader(lambda path: Read(population_numbers(path / "original")), "files")


def write_metrics(path: Path) -> None:
    rows = [
        ("z", "original", "", np.nan, model, epoch, *(0.05 * i for i in range(len(METRIC_COLUMNS) - 6)))
        for model in range(50)
        for epoch in range(5)
    ]
    pd.DataFrame(rows, columns=METRIC_COLUMNS).to_parquet(path)


@reader
def metrics(folder: Path) -> Reader:
    write_metrics(folder / "metrics.parquet")
    return Reader(lambda path: Read({"rows": digest(read_metrics(path))}), "metrics.parquet", checked=False)


@reader
def publication(folder: Path) -> Reader:
    public = folder / "twins"
    public.mkdir()
    save_population(sample_population(get_zoo("mnist_fixed"), 3), public / "original")
    write_metrics(public / "metrics.parquet")
    for name, text in (("README.md", "# Twins\n"), ("store.json", "{}\n")):
        (public / name).write_text(text)
    (public / HASHES).write_text(hashes(public))

    def read(path: Path) -> Read:
        extra = check_hashes(path)
        return Read(
            population_numbers(path / "original") | {"rows": digest(read_metrics(path / "metrics.parquet"))},
            passed=len(extra),
        )

    return Reader(read, "twins")


@reader
def store(folder: Path) -> Reader:
    "A stage with a trajectory, and a block that was left half way."
    zoo, models, later = (
        folder / "digits_seed",
        *(sample_population(get_zoo("digits_seed"), 3, seed) for seed in (0, 1)),
    )
    models.models["level"] = later.models["level"] = np.nan
    rows = [
        ("z", "vd", "", np.nan, model, epoch, *(0.05 * i for i in range(len(METRIC_COLUMNS) - 6)))
        for model in range(3)
        for epoch in (0, 1)
    ]
    metrics = pd.DataFrame(rows, columns=METRIC_COLUMNS)
    add_file(
        zoo / "vd", "vd-block", pack(Piece({0: models, 1: later}, metrics, 0, torch.zeros(3, 50, dtype=torch.uint8)))
    )
    write_manifest(zoo, "vd", {"made": 3})
    save_part(zoo / "parts", "mp-block", {"weights/a": torch.ones(3)}, metrics, {"epoch": 1, "steps": 8})

    def read(path: Path) -> Read:
        found, left = read_stage(path, "vd", 0), read_part(path / "parts", "mp-block")
        numbers = {name: digest(tensor.numpy()) for name, tensor in found.weights.items()} | {
            "factors": digest(found.models)
        }
        numbers |= {
            "rows": digest(read_stage_metrics(path, "vd")),
            "predictions": digest(torch.stack(list(read_predictions(path, "vd").values())).numpy()),
        }
        if left is None:  # said, and begun again
            return Read(numbers, missing=1)
        return Read(numbers | {"left": digest(left[0]["weights/a"].numpy()), "epoch": str(left[2])})

    return Reader(read, "digits_seed")


# ---- mutations

EXTREMES = [0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
VALUES = [
    None, True, -1, 0, 0.5, 93.5, 1600.0, 1e400, float("nan"), 10**400, "", "x", "93 %", "\n\x1b[2J", [], [[]], {},
    {"a": {}},
]
PICKLES = [
    b"\x80\x02}K\x01K\x01\x86" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", b"\x80\x02Nr\xff\xff\xff\x7f.",
    b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00:;\x85R.",
    b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x02cpathlib\nPosixPath\nK\x01K\x01\x86" + b"q\x00h\x00\x86" * 60 + b"\x85R.",
]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    "One mutation that knows nothing of the format."
    data, at, width = bytearray(data), draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 8, 64, 1000))
    kind = draw.choice(("flip", "byte", "number", "cut", "delete", "double", "zero", "insert", "move", "grow"))
    if kind == "flip" and data:
        data[at % len(data)] ^= 1 << draw.randrange(8)
    elif kind == "byte" and data:
        data[at % len(data)] = draw.randrange(256)
    elif kind == "number":
        size = draw.choice((1, 2, 4, 8))
        data[at : at + size] = (draw.choice(EXTREMES) % 256**size).to_bytes(size, draw.choice(("little", "big")))
    elif kind == "cut":
        del data[at:]
    elif kind == "delete":
        del data[at : at + width]
    elif kind == "double":
        data[at:at] = data[at : at + width]
    elif kind == "zero":
        data[at : at + width] = bytes(len(data[at : at + width]))
    elif kind == "insert":
        data[at:at] = draw.randbytes(width)
    elif kind == "move":
        part = data[at : at + width]
        del data[at : at + width]
        to = draw.randrange(len(data) + 1)
        data[to:to] = part
    elif kind == "grow":
        data += draw.choice((bytes(1), bytes(5000), draw.randbytes(100), data[:5000]))
    return bytes(data)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    "Another key or value somewhere in lines of JSON."
    try:
        lines = [json.loads(data)] if data.startswith(b"{\n") else [json.loads(line) for line in data.splitlines()]
        record = draw.choice(lines)
        key = draw.choice(list(record))
        if draw.random() < 0.3:
            record[draw.choice(("lr", "epoch", "x", "wd", "a" * 3000))] = record.pop(key)
        else:
            record[key] = draw.choice(VALUES)
        return "\n".join(json.dumps(line) for line in lines).encode()
    except (ValueError, IndexError, AttributeError, TypeError):
        return mutate_bytes(data, draw)


def mutate_zip(data: bytes, draw: random.Random) -> tuple[bytes, bool]:
    "Change a part of a zip and give it the right checksum, so that the mutation gets behind the first line of defence."
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = {member.filename: archive.read(member) for member in archive.infolist()}
            kinds = {member.filename: member.compress_type for member in archive.infolist()}
    except Exception:
        return mutate_bytes(data, draw), False
    name = draw.choice([name for name in parts if name.endswith(("data.pkl", ".json", "checkpoints"))] or list(parts))
    remade = True
    if name.endswith("data.pkl") and draw.random() < 0.2:
        parts[name] = draw.choice(PICKLES)
    elif draw.random() < 0.05:
        parts[name], kinds[name] = bytes(20_000_000), zipfile.ZIP_DEFLATED
    else:
        inside = parts[name].startswith(b"PK")
        parts[name], remade = mutate(name, parts[name], draw)
        remade |= not inside
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content, kinds[name], 1)
    return buffer.getvalue(), remade


def mutate(name: str, data: bytes, draw: random.Random) -> tuple[bytes, bool]:
    "One mutation, sometimes one that knows the format; and whether checksums were made anew."
    if draw.random() < 0.5:
        return mutate_bytes(data, draw), False
    if data.startswith(b"PK"):
        return mutate_zip(data, draw)
    return (mutate_json if name.endswith(".json") else mutate_bytes)(data, draw), False


def mutate_file(path: Path, others: list[Path], draw: random.Random) -> bool:
    "Mutate a file in its folder; returns whether checksums were made anew."
    kind = draw.choices(
        ("content", "gone", "empty", "another", "folder", "pipe", "device", "name"), (40, 1, 1, 1, 1, 1, 1, 1)
    )[0]
    before, remade = path.read_bytes(), False
    if kind == "content":
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            content, anew = mutate(path.name, path.read_bytes(), draw)
            path.write_bytes(content)
            remade |= anew
        return remade
    if kind == "another":
        path.write_bytes(draw.choice(others).read_bytes())
        return path.read_bytes() != before
    if kind == "name":
        path.rename(path.with_name(draw.choice(("checkpoints", "x\ny", "params.json", "a" * 200))))
        return True
    path.unlink()
    make = {
        "gone": lambda: None, "empty": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    return False


def spoil(folder: Path, name: str, draw: random.Random) -> bool:
    "Mutate one or two files of an input; returns whether it may count as a new valid input."
    remade = False
    for _ in range(draw.choice((1, 1, 1, 2))):
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        )
        if files:
            remade |= mutate_file(draw.choice(files), files, draw)
    return remade


# ---- judging

class Late(BaseException):
    "Too slow; no reader's `except Exception` takes it for a reason."


def late(*_):
    raise Late


def judge(reader: Reader, path: Path, right: Read, remade: bool) -> str:
    "Read an input, and say what came of it; whatever begins with FAILURE is one."
    try:
        found = reader.read(path)
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or not text.isprintable():
            return f"FAILURE more than one line: {text!r}"
        return "FAILURE memory: " + text if out_of_memory(text) else "refused"
    except Late:
        return f"FAILURE more than {SECONDS} s"
    except BaseException as error:
        return f"FAILURE {type(error).__name__}: {error} | " + " < ".join(
            f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-4:])
        )
    if found.numbers == right.numbers:
        return "right" if found.passed == right.passed and found.missing == right.missing else "reason"
    if found.numbers.items() <= right.numbers.items() and found.missing > right.missing:
        return "reason"
    return "remade" if remade else "unnoticed" if not reader.checked else "FAILURE other numbers"


def out_of_memory(text: str) -> bool:
    return any(sign in text for sign in ("MemoryError", "Unable to allocate", "bad_alloc", "malloc", "out of memory"))


def set_clocks(seconds: float) -> None:
    "Ring after so much processor time, or four times as much by the clock, which neighbours share; 0: not at all."
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)


def work(name: str, template: Path, reader: Reader, right, cases: list[int], seed: int, pipe) -> None:
    "A worker: reads one input after the other, and tells what came of each."
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    sys.stderr = open(os.devnull, "w")
    for case in cases:
        scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
        pipe.send((case, str(scratch)))
        draw = random.Random(f"{seed}/{name}/{case}")
        shutil.copytree(template, scratch / "input")
        remade = spoil(scratch / "input", reader.name, draw)
        set_clocks(SECONDS)
        verdict = judge(reader, scratch / "input" / reader.name, right, remade)
        set_clocks(0)
        pipe.send((case, verdict))
        shutil.rmtree(scratch, ignore_errors=True)
    pipe.send(None)


def run(name: str, cases: list[int], seed: int = 0) -> tuple[Counter, list[str]]:
    "Fuzz one reader; returns what came of its inputs, and the failures."
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        template = Path(folder) / "template"
        template.mkdir()
        reader = READERS[name](template)
        right = reader.read(template / reader.name)
        while cases:
            here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
            worker = multiprocessing.get_context("fork").Process(
                target=work, args=(name, template, reader, right, cases, seed, there), daemon=True
            )
            worker.start()
            there.close()
            cases = listen(here, worker, name, cases, counts, failures)
    return counts, failures


def listen(pipe, worker, name: str, cases: list[int], counts: Counter, failures: list[str]) -> list[int]:
    "Take a worker's answers until it ends or falls silent; returns the cases that are left."
    case, verdict, scratch = cases[0], "FAILURE did not start", ""
    try:
        while pipe.poll(4 * SECONDS + 5):
            answer = pipe.recv()
            if answer is None:
                worker.join()
                return []
            case, text = answer
            if text.startswith("/"):
                scratch, verdict = text, "FAILURE hung or crashed"
                continue
            verdict, scratch = "", ""
            counts["FAILURE" if text.startswith("FAILURE") else text] += 1
            failures += [f"{name} {case}: {text}"] if text.startswith("FAILURE") else []
    except EOFError:
        pass
    worker.kill()
    worker.join()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    if verdict:
        counts["FAILURE"] += 1
        failures.append(f"{name} {case}: {verdict} ({worker.exitcode})")
    return cases[cases.index(case) + 1 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="inputs, shared among the readers (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--only", type=int, help="only this case")
    options = parser.parse_args()
    names = [options.reader] if options.reader else list(READERS)
    table, failures = {}, []
    for i, name in enumerate(names):
        n, started = options.n // len(names) + (i < options.n % len(names)), time.perf_counter()
        counts, failed = run(name, [options.only] if options.only is not None else list(range(n)), options.seed)
        table[name] = {"inputs": counts.total(), **counts, "seconds": round(time.perf_counter() - started, 1)}
        failures += failed
        print(name, table[name], flush=True)
    print(pd.DataFrame(table).T.fillna(0).convert_dtypes().to_string())
    print("\n".join(failures) or "No failures.")
    sys.exit(bool(failures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
