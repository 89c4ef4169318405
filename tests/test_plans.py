"""What is asked, and what is said of that which cannot be."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from small import small_plan
from zootwins import lanes
from zootwins.core import UserError
from zootwins.engines import choose_engine, why_not
from zootwins.plans import fingerprint, make_plan, make_stages, parse_levels
from zootwins.training import TORCH


@pytest.mark.parametrize(
    "wrong,told",
    [
        ({"zoo": "usps"}, "usps_seed"), ({"n_models": 0}, "1 to"), ({"n_models": 2.0}, "whole number"),
        ({"n_models": True}, "whole number"), ({"methods": "mp,vdd"}, "Valid: mp, vd"),
        ({"levels": "0,100"}, "below 100"), ({"levels": "-5"}, "below 100"), ({"levels": "a"}, "percentages"),
        ({"levels": ""}, "at least one level"), ({"levels": " , "}, "at least one level"),
        ({"levels": "0.5,0.9"}, "write 50,90"), ({"levels": "nan"}, "levels of pruning"),
        ({"levels": "inf"}, "levels of pruning"), ({"engine": "lane"}, "auto, lanes, gpu, torch"),
        ({"device": "gpu"}, "cpu, cuda"), ({"seed": "x"}, "whole number"),
        ({"engine": "lanes", "device": "cuda"}, "CUDA|CPU only"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(wrong, told):
    with pytest.raises(UserError, match=told) as error:
        make_plan(**{"zoo": "digits_seed", **wrong})
    assert "\n" not in str(error.value)


def test_levels_are_sorted_and_counted_once():
    assert parse_levels("90, 50,50 ,0") == (0.0, 0.5, 0.9) and parse_levels("1") == (0.01,)


def test_without_methods_there_are_only_originals(tmp_path):
    plan = small_plan(tmp_path, methods="", levels="")
    assert [stage.name for stage in make_stages(plan)] == ["original"] and plan.levels == ()


def test_methods_are_taken_once_and_stages_keep_their_order(tmp_path):
    plan = small_plan(tmp_path, methods="vd,mp,vd")
    assert plan.methods == ("vd", "mp") and [stage.name for stage in make_stages(plan)] == ["original", "mp", "vd"]


def test_without_a_compiler_the_reference_engine_takes_over(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    lanes.library.cache_clear()
    try:
        assert choose_engine("auto", "cpu", "cnn_large") is TORCH
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "install g++ or clang++" in said
        with pytest.raises(UserError, match="install g"):
            choose_engine("lanes", "cpu", "cnn_large")
    finally:
        lanes.library.cache_clear()


def test_the_lanes_say_what_they_cannot_train(capsys):
    assert choose_engine("auto", "cpu", "mlp") is TORCH and "and not mlp" in capsys.readouterr().out
    assert "CPU only" in why_not("lanes", "cuda", "cnn_large") and "GPU only" in why_not("gpu", "cpu", "cnn_large")
    assert not why_not("torch", "cuda", "mlp")


def test_every_pixel_and_label_is_in_the_fingerprint(tmp_path, images):
    plan = small_plan(tmp_path)
    before = fingerprint(plan, images)
    for name in ("x_train", "x_test", "y_train", "y_test"):
        tensor = getattr(images, name)
        for place in (0, len(tensor) - 1):
            changed = tensor.clone()
            changed[place] = changed[place] + (1 if changed.dtype == torch.int64 else 1e-6)
            assert fingerprint(plan, replace(images, **{name: changed}))["images"] != before["images"]


def test_what_no_number_depends_on_is_not_in_the_fingerprint(tmp_path, images):
    plan = small_plan(tmp_path)
    alike = small_plan(tmp_path / "elsewhere", n=7, levels="10", methods="mp")
    assert fingerprint(plan, images) == fingerprint(alike, images)
    for changes in ({"seed": 1}, {"engine": "torch"}, {"epochs": 4}):
        assert fingerprint(small_plan(tmp_path, **changes), images) != fingerprint(plan, images)


def test_a_stage_has_a_row_for_each_model_and_level(tmp_path):
    original, mp, vd = make_stages(small_plan(tmp_path, n=3, levels="0,90"))
    assert mp.rows["level"].tolist() == [0.0] * 3 + [0.9] * 3 and mp.rows["model"].tolist() == [0, 1, 2] * 2
    assert all(np.isnan(stage.rows["level"]).all() and len(stage.rows) == 3 for stage in (original, vd))
