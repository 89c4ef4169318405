"""A short run of the fuzzer (`python tests/fuzz.py --n 10000` is the long one); it finds what it looks for."""
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402
from zootwins.core import UserError  # noqa: E402


@pytest.mark.parametrize("name", fuzz.READERS)
def test_mutated_inputs_end_well(name):
    counts, failures = fuzz.run(name, list(range(25)), seed=7)
    assert failures == [] and counts.total() == 25 and counts["refused"] + counts["reason"] > 5


def ends(reader, action):
    "What the fuzzer says of a reader that does something wrong with every input."
    def make(folder):
        made = fuzz.READERS["checkpoint"](folder)
        calls = []
        def read(path):
            calls.append(path)
            return made.read(path) if len(calls) == 1 else action(made, path)  # the first time it reads what is right
        return replace(made, read=read)
    return make


def with_one_more(made, path):
    return fuzz.Read({"another weight": "0"})


def hogs(made, path):
    return fuzz.Read({"sum": str(np.ones(2**28).sum())})


def dies(made, path):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(made, path):
    while True:
        time.sleep(0.1)


def complains(made, path):
    error = UserError("x")
    error.args = ("two\nlines",)
    raise error


@pytest.mark.parametrize(
    "action,verdict",
    [
        (with_one_more, "FAILURE other numbers"), (hogs, "MemoryError"), (dies, "hung or crashed"),
        (hangs, "more than"), (complains, "more than one line"), (lambda made, path: {}["x"], "KeyError"),
    ],
)
def test_the_fuzzer_finds_what_it_looks_for(monkeypatch, action, verdict):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "spoil", lambda *_: False)
    monkeypatch.setitem(fuzz.READERS, "broken", ends("checkpoint", action))
    counts, failures = fuzz.run("broken", [0])
    assert counts == {"FAILURE": 1} and verdict in failures[0]


def test_a_case_is_made_of_its_seed_and_number_alone(tmp_path):
    made = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        reader = fuzz.checkpoint(tmp_path / folder)
        fuzz.spoil(tmp_path / folder, reader.name, fuzz.random.Random(f"0/checkpoint/{5 if folder == 'c' else 4}"))
        made.append([(path.name, path.read_bytes()) for path in sorted((tmp_path / folder).iterdir())])
    assert made[0] == made[1] != made[2]
