"""Who works: the threads of this machine."""
import threading
import time

import pytest

from zootwins import workers
from zootwins.workers import TOGETHER, take_turns


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 40])
def test_tasks_take_turns(tasks, workers):
    """All are worked through, a few at a time; a single worker does one step of each in turn."""
    steps, begun, most = [], set(), 0

    def task(number):
        nonlocal most
        begun.add(number)
        most = max(most, len(begun))
        for step in range(5):
            steps.append((number, step))
            yield step
        begun.discard(number)

    take_turns((task(number) for number in range(tasks)), workers)
    assert sorted(steps) == [(number, step) for number in range(tasks) for step in range(5)]
    assert most <= TOGETHER * workers + workers
    if workers == 1 and tasks <= TOGETHER:
        assert steps == [(number, step) for step in range(5) for number in range(tasks)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InterruptedError])
def test_one_failure_ends_all_tasks(error):
    interrupted, closed = threading.Event(), []

    def endless(name):
        try:
            while not interrupted.is_set():
                time.sleep(0.01)
                yield 0
            raise InterruptedError("ended")
        finally:
            closed.append(name)

    def failing():
        yield 0
        raise error("no more")

    with pytest.raises(error, match="no more"):
        take_turns([endless("a"), failing(), endless("b"), endless("c")], 2, interrupted.set)
    assert sorted(closed) == ["a", "b", "c"]


def test_a_task_in_nobodys_hands_is_closed(monkeypatch):
    """An interruption between taking a task and moving it."""
    closed = []

    def task():
        try:
            yield 0
            yield 1
        finally:
            closed.append(True)

    class Deque(workers.deque):
        taken = 0

        def popleft(self):
            found = super().popleft()
            Deque.taken += 1
            if Deque.taken == 2:
                raise KeyboardInterrupt
            return found

    monkeypatch.setattr(workers, "deque", Deque)
    with pytest.raises(KeyboardInterrupt):
        take_turns([task()], 1)
    assert closed == [True]


@pytest.mark.parametrize("start", [None, lambda function, arguments: 0])
def test_where_no_thread_can_be_started_one_does_all(monkeypatch, start):
    """Neither one that the system refuses, nor one that dies before it begins."""
    def refused(*_):
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(workers._thread, "start_new_thread", start or refused)
    steps = []

    def task(number):
        for _ in range(2):
            steps.append(number)
            yield number

    take_turns((task(number) for number in range(3)), 4)
    assert sorted(steps) == [0, 0, 1, 1, 2, 2]
