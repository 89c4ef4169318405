"""The benchmark runs from end to end and writes numbers that fit each other."""

import json
import time

import pytest

from zootwins import bench, lanes

pytestmark = pytest.mark.skipif(lanes.compiler() is None, reason="no C++ compiler")


@pytest.mark.slow
def test_the_benchmark_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lanes, "IMAGE_SHAPES", {"cnn_small_1ch": (1, 28, 28)})
    monkeypatch.setattr(lanes, "processors", lambda: 1)
    monkeypatch.setattr(bench, "GROWTH", {"models": [4], "images": [50]})
    bench.main(["--rounds", "2", "--seconds", "0.02", "--folder", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png", "growth.png"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["stage"] for row in found["rates"]} == set(bench.STAGES) and {
        row["what"] for row in found["growth"]
    } == {"models", "images"}
    assert all(found["machine"].values()) and found["rounds"] == 2
    for row in found["rates"]:
        for name in (
            "stock", "vmap", "lanes", "stock_wall", "vmap_wall", "lanes_wall", "times_stock", "times_vmap",
            "share_of_peak", "peak",
        ):
            assert 0 < row[f"{name}_lowest"] <= row[name] <= row[f"{name}_highest"]
        assert (
            row["lanes_lowest"] / row["stock_highest"]
            <= row["times_stock"]
            <= row["lanes_highest"] / row["stock_lowest"]
        )
    assert capsys.readouterr().out.count("cnn_small_1ch") == len(found["rates"])


def test_a_rate_is_that_of_the_work_and_not_of_the_waiting():
    """Nine tenths of the time asleep: by CPU time the rate is that of somebody who works all the time."""
    def work():
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass
        time.sleep(0.09)
        return 1

    found = bench.rate(work, 0.05)
    assert 50 < found.cpu <= 100 and found.wall < 11
    assert (
        bench.rate(work, 0.01, threads=2).cpu > 100
    )  # two threads that took this time together would each have a core
