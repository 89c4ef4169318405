"""The benchmark runs from end to end and writes numbers that fit each other."""

import json

import pytest

from zootwins import bench, lanes

pytestmark = pytest.mark.skipif(lanes.compiler() is None, reason="no C++ compiler")


def test_the_benchmark_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lanes, "IMAGE_SHAPES", {"cnn_small_1ch": (1, 28, 28)})
    monkeypatch.setattr(lanes, "processors", lambda: 1)
    monkeypatch.setattr(bench, "GROWTH", {"models": [4], "images": [50]})
    bench.main(["--rounds", "2", "--seconds", "0.02", "--folder", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png", "growth.png"]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["stage"] for row in found["rates"]} == set(bench.STAGES) and {row["what"] for row in found["growth"]} == {"models", "images"}
    assert all(found["machine"].values()) and found["rounds"] == 2
    for row in found["rates"]:
        for name in ("stock", "vmap", "lanes", "times_stock", "times_vmap", "share_of_peak", "peak"):
            assert 0 < row[f"{name}_lowest"] <= row[name] <= row[f"{name}_highest"]
        assert row["lanes_lowest"] / row["stock_highest"] <= row["times_stock"] <= row["lanes_highest"] / row["stock_lowest"]
    assert capsys.readouterr().out.count("cnn_small_1ch") == len(found["rates"])
