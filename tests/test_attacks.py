"""The same attacks at every moment: slow, run by `make test-all`."""
import multiprocessing
import random
import shutil
import signal
import threading
import time

import pytest

from small import IMAGES, STAGES, different, in_child, killed_at, left_over, says, small_plan
from zootwins import blocks
from zootwins.core import UserError
from zootwins.store import finished_files
from zootwins.twins import Interrupted, load_epoch, load_metrics, load_models, make_twins

pytestmark = pytest.mark.slow


def run(plan):
    return make_twins(plan, IMAGES, progress=False)


def begins(folder):
    return small_plan(folder, 2, levels="0,80")


GROWN = {
    "begins": lambda folder: small_plan(folder, 2, levels="0,80"),
    "more models": lambda folder: small_plan(folder, 4, levels="0,80"),
    "more levels": lambda folder: small_plan(folder, 2, levels="0,50,80"),
}


@pytest.mark.parametrize("kind", GROWN)
def test_a_run_may_be_killed_before_any_file_operation(tmp_path, monkeypatch, kind):
    """And, every third time, the run that resumes it as well."""
    monkeypatch.setattr(blocks, "SAVE_EVERY", 0.0)
    whole = GROWN[kind](tmp_path / "whole")
    run(whole)
    base, n, wrong = tmp_path / "base", 0, []
    base.mkdir()
    if kind != "begins":
        run(begins(base))
    while True:
        n += 1
        place = tmp_path / "killed"
        shutil.copytree(base, place)
        plan = GROWN[kind](place)
        if killed_at(n, place, lambda plan=plan: run(plan)) == 0:
            break
        if n % 3 == 0:
            killed_at(1 + n % 11, place, lambda plan=plan: run(plan))
        try:
            run(plan)
            what = different(plan, whole) or ", ".join(left_over(plan))
        except Exception as error:
            what = repr(error)
        if what:
            wrong.append((n, what))
        shutil.rmtree(place)
    assert n > 30 and not wrong


@pytest.mark.parametrize("pair", ["equal", "different"])
def test_fifty_rounds_of_two_runs_and_a_reader_at_once(tmp_path, pair):
    whole, fork = small_plan(tmp_path / "whole", 4, levels="0,50,80"), multiprocessing.get_context("fork")
    run(whole)
    for number in range(50):
        place = tmp_path / str(number)
        plan = small_plan(place, 4, levels="0,50,80")
        others = (
            [plan, plan]
            if pair == "equal"
            else [small_plan(place, 4, levels="50"), small_plan(place, 2, levels="0,80")]
        )
        processes = [fork.Process(target=run, args=(other,)) for other in others]
        for process in processes:
            process.start()
            time.sleep(random.Random(number).random() / 10)
        while any(process.is_alive() for process in processes):
            for stage in STAGES:
                try:
                    assert len(load_models(plan.folder / stage)) in (2, 4, 8, 12)
                except UserError as error:
                    assert says(error) and "no finished stage" in str(error)
        assert [process.exitcode for process in processes] == [0, 0]
        run(plan)
        assert different(plan, whole) is None and not left_over(plan), number
        shutil.rmtree(place)


@pytest.mark.parametrize("engine,rounds", [("auto", 30), ("torch", 4)])
def test_a_run_may_be_interrupted_at_any_moment(tmp_path, engine, rounds):
    """By Ctrl-C and SIGTERM in turn, again and again until it is done; then everything is as if nothing had been."""
    whole = small_plan(tmp_path / "whole", 3, epochs=40, engine=engine)
    started = time.monotonic()
    run(whole)
    lasts, chance, number = time.monotonic() - started, random.Random(0), 0
    while number < rounds:
        plan, samples, tries = small_plan(tmp_path / "stopped", 3, epochs=40, engine=engine), 0, 0
        while number < rounds:
            number, tries = number + 1, tries + 1
            timer = threading.Timer(chance.random() * lasts, signal.pthread_kill,
                                    (threading.main_thread().ident, (signal.SIGINT, signal.SIGTERM)[number % 2]))
            try:
                timer.start()
                samples += sum(report.model_samples for report in run(plan))
                timer.cancel()
                break
            except (Interrupted, KeyboardInterrupt) as error:
                assert isinstance(error, Interrupted) and says(error)
            finally:
                timer.cancel()
        run(plan)
        assert different(plan, whole) is None and not left_over(plan), number
        shutil.rmtree(plan.folder.parent)


def test_any_byte_of_a_store_may_change(tmp_path, trained):
    """Flipped, cut off or doubled: what is read is right, or one sentence says why it is not."""
    chance, before = random.Random(0), load_metrics(trained)
    files = [
        path for stage in STAGES for path in (*finished_files(trained.folder, stage), trained.folder / f"{stage}.json")
    ]
    for number in range(200):
        place = tmp_path / str(number)
        shutil.copytree(trained.folder, place / "digits_seed")
        plan = small_plan(place, n=5, epochs=6, levels="0,50,90")
        path = plan.folder / chance.choice(files).relative_to(trained.folder)
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(chance.choice([content, content[:at], content + content[at:]]))
        try:
            assert load_metrics(plan).equals(before) and len(load_epoch(plan, 1)) == 5
        except UserError as error:
            assert says(error)
        shutil.rmtree(place)


@pytest.mark.parametrize("extra", range(0, 400, 20))
def test_any_limit_on_memory_ends_in_a_run_or_a_sentence(tmp_path, extra):
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (now + extra * 2**20,) * 2)
        signal.alarm(100)
        try:
            run(small_plan(tmp_path, n=2))
        except UserError as error:
            assert says(error)
    assert in_child(limited) == 0
