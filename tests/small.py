"""Small plans, and what is needed to attack the stores that come of them."""
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from zootwins.datasets import load_images, subset
from zootwins import plans
from zootwins.plans import make_plan, make_stages
from zootwins.store import finished_files, read_manifest
from zootwins.twins import load_metrics, load_stage
from zootwins.zoos import get_zoo

STAGES = ("original", "mp", "vd")
ROOT = Path(__file__).resolve().parents[1]
IMAGES = subset(load_images("digits"), 80, 50)


def run_notebook(notebook, folder, cwd=ROOT, **parameters):
    "Run a notebook through papermill, in a process of its own; give the finished process."
    parameters = {"store": folder / "zoos", "figures": folder / "figures", **parameters}
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [
        sys.executable, "-m", "papermill", str(notebook), str(folder / "out.ipynb"), "--kernel", "python3",
        "--no-progress-bar", *options,
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def small_plan(folder, n=3, epochs=3, **changes):
    "A plan of some digits models with short stages."
    zoo = replace(get_zoo("digits_seed"), epochs=epochs, mp_epochs=2, vd_epochs=2)
    where = {"store": str(folder), "figures": str(Path(folder) / "figures")}
    return replace(make_plan("digits_seed", n, **{"levels": "0,90", **changes}, **where), zoo=zoo)


def different(one, other):
    "Name the first thing in which the stores of two equal plans differ bit by bit; none: nothing."
    for stage in [stage.name for stage in make_stages(one)]:
        for epoch in range(one.zoo.vd_epochs + 1) if stage == "vd" else [None]:
            left, right = (load_stage(plan, stage, epoch) for plan in (one, other))
            if not left.models.equals(right.models) or left.weights.keys() != right.weights.keys():
                return f"models of {stage}"
            if not all(torch.equal(left.weights[name], right.weights[name]) for name in right.weights):
                return f"weights of {stage} at epoch {epoch}"
    try:
        pd.testing.assert_frame_equal(load_metrics(one), load_metrics(other), check_exact=True)
    except AssertionError as error:
        return f"metrics: {error}"
    return None


def left_over(plan):
    "Name files that should not be in the store of a plan that is done."
    folder = plan.folder
    parts = list((folder / "parts").glob("*")) if (folder / "parts").exists() else []
    hidden = [path for path in folder.rglob(".*")]
    strange = [
        path
        for path in folder.iterdir()
        if path.suffix not in (".json", ".lock") and path.name not in (*plans.STAGES, "parts")
    ]
    unlisted = [
        path
        for stage in plans.STAGES
        for path in finished_files(folder, stage)
        if path.name not in read_manifest(folder, stage)["files"]
    ]
    return sorted({str(path.relative_to(folder)) for path in (*parts, *hidden, *strange, *unlisted)})


def in_child(function: Callable[[], object]) -> int:
    "Call a function in a forked process; give how it ended: 0, 1 for an exception, or minus the signal that killed it."
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")  # of Python's audit, raised before the operation


def killed_at(
    n: int,              # number of the file operation, from 1
    folder: Path,        # whose files count
    call: Callable[[], object],
) -> int:                # 0: there are not so many; -9: killed
    "Call a function in a process that is killed right before its n-th file operation in a folder."
    def run():
        seen, place, fsync = 0, str(folder), os.fsync

        def count():
            nonlocal seen
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event, arguments):
            if event in EVENTS and arguments and str(arguments[0]).startswith(place):
                writes = (
                    event != "open" or (arguments[1] or "r") != "r" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
                )
                if writes:
                    count()

        def synced(file):
            count()
            fsync(file)

        sys.addaudithook(audit)
        os.fsync = synced
        call()

    return in_child(run)


def says(error):
    "Whether an exception is one sentence on one line."
    return "\n" not in str(error) and len(str(error)) > 20


def store_json(plan):
    "What the store records of itself."
    return json.loads((plan.folder / "store.json").read_text())
