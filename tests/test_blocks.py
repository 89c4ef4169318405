"""Rows that are trained together: cut anyhow, interrupted anywhere, the same bits."""
from dataclasses import replace

import pandas as pd
import pytest
import torch

from small import small_plan
from zootwins import blocks
from zootwins.blocks import Block, cut_blocks, cut_rows, halved, keep, restored, resume, start_of, train_block
from zootwins.plans import make_stages
from zootwins.population import sample_population
from zootwins.store import Piece
from zootwins.training import TORCH, groups
from zootwins.zoos import get_zoo, model_table

STEPS = 8  # of an epoch: 80 images, ten at a time


def drawn(folder, n=3, epochs=3):
    "The originals of a small plan, as one block."
    return Block(make_stages(small_plan(folder, n, epochs))[0], None, None, pd.DataFrame())


def noisy(folder):
    "Variational twins of untrained models, whose every epoch is kept."
    return next(
        iter(cut_blocks(make_stages(small_plan(folder))[2], TORCH, sample_population(get_zoo("digits_seed"), 3)))
    )


def equal(one: Piece, other: Piece):
    "Whether two pieces are the same bits."
    weights = all(torch.equal(one.populations[epoch].weights[name], tensor)
                  for epoch, population in other.populations.items() for name, tensor in population.weights.items())
    predictions = one.predictions is other.predictions is None or torch.equal(one.predictions, other.predictions)
    return (
        weights
        and predictions
        and one.metrics.equals(other.metrics)
        and one.populations.keys() == other.populations.keys()
    )


@pytest.mark.parametrize(
    "engine, width, kinds", [(TORCH, 256, 1), (replace(TORCH, mixes=True, width=lambda: 16), 16, 2)]
)
def test_blocks_hold_what_an_engine_can_train_together(engine, width, kinds):
    models = model_table(get_zoo("mnist_fixed"), 400)
    parts = cut_rows(models.assign(level=float("nan")), engine)
    assert sorted(m for part in parts for m in part["model"]) == list(range(400))
    assert max(len(part) for part in parts) == min(width, max(map(len, groups(models, engine))))
    assert max(part[["activation", "optimizer", "dropout"]].drop_duplicates().shape[0] for part in parts) == kinds


def test_a_block_takes_its_originals_by_number(tmp_path):
    """A population in any order, with numbers that are no positions."""
    stage = make_stages(small_plan(tmp_path, n=5))[1]
    stage = replace(stage, rows=stage.rows[stage.rows["model"].isin([1, 4])].reset_index(drop=True))
    originals = sample_population(get_zoo("digits_seed"), 5)[[4, 0, 1]]
    predictions = {number: torch.full((50,), number, dtype=torch.uint8) for number in (0, 1, 4)}
    block, = cut_blocks(stage, replace(TORCH, mixes=True), originals, predictions)
    assert block.originals.models["model"].tolist() == [1, 4] and restored(block.reference, 50)[:, 0].tolist() == [1, 4]
    begun, whole = start_of(block).population, sample_population(get_zoo("digits_seed"), 5)
    at_0 = [row for row, level in enumerate(block.stage.rows["level"]) if level == 0]
    assert torch.equal(begun.weights["module_list.0.weight"][at_0], whole.weights["module_list.0.weight"][[1, 4]])


@pytest.mark.parametrize("kind", [drawn, noisy])
@pytest.mark.parametrize("saving", [0.0, 1e9])
def test_a_block_that_is_interrupted_after_any_epoch_goes_on_to_the_same_bits(
    tmp_path, images, engine, monkeypatch, kind, saving
):
    monkeypatch.setattr(blocks, "SAVE_EVERY", saving)
    block = kind(tmp_path)
    whole = list(train_block(block, images, engine))[-1]
    for stop in range(block.stage.recipe.epochs + 2):
        parts, task = tmp_path / f"parts{stop}", train_block(block, images, engine, parts=tmp_path / f"parts{stop}")
        steps = [next(task) for _ in range(stop + 1)]
        task.close()
        assert len(list(parts.glob("*"))) == (stop > 0)  # before the first epoch there is nothing to keep
        resumed = list(train_block(block, images, engine, parts=parts))
        assert equal(resumed[-1], whole), stop
        trained = sum(step.samples for step in (*steps, *resumed) if not isinstance(step, Piece))
        assert trained == len(block.stage.rows) * block.stage.recipe.epochs * len(images.x_train)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return small_plan(tmp_path_factory.mktemp("engine")).engine


def test_a_piece_that_was_taken_in_leaves_nothing_and_one_that_was_not_is_kept(tmp_path, images, engine):
    block, parts = drawn(tmp_path), tmp_path / "parts"
    assert isinstance(list(train_block(block, images, engine, parts=parts))[-1], Piece) and not list(parts.glob("*"))
    task = train_block(block, images, engine, parts=parts)
    while not isinstance(next(task), Piece):
        pass
    task.close()
    assert len(list(parts.glob("*"))) == 1
    steps = list(train_block(block, images, engine, parts=parts))
    assert len(steps) == 1 and isinstance(steps[0], Piece)


def test_an_engine_that_fails_in_an_epoch_leaves_the_last_whole_one(tmp_path, images, engine):
    """Even one that has changed the state before it failed."""
    def spoiled(state, *arguments):
        if state.epoch == 2:
            state.population.weights["module_list.0.bias"] = state.population.weights["module_list.0.bias"] + 1
            state.epoch = 3
            raise KeyboardInterrupt
        return engine.train_epoch(state, *arguments)
    block, parts = drawn(tmp_path), tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        list(train_block(block, images, replace(engine, train_epoch=spoiled), parts=parts))
    state = start_of(block)
    resume(parts, block, state, STEPS)
    assert state.epoch == 2 and equal(
        list(train_block(block, images, engine, parts=parts))[-1], list(train_block(block, images, engine))[-1]
    )


def changes(block, state, frames):
    "Unfinished work that is well formed and does not fit."
    name, metrics = "module_list.0.weight", frames[0]
    weights = state.population.weights
    of = lambda **other: replace(state, **other)
    with_weights = lambda **other: of(population=replace(state.population, weights=weights | other))
    yield "another shape", with_weights(**{name: weights[name][:, :4]}), frames
    yield "fewer models", with_weights(**{name: weights[name][:2]}), frames
    yield "another type", with_weights(**{name: weights[name].double()}), frames
    yield "whole numbers", with_weights(**{name: weights[name].to(torch.int32)}), frames
    yield "one more", with_weights(strange=weights[name].clone()), frames
    yield "one less", of(first={key: tensor for key, tensor in state.first.items() if key != name}), frames
    yield "no moments", of(first={}, second={}), frames
    yield "epoch 0", of(epoch=0, steps=0), frames
    yield "an epoch after the last", of(epoch=99, steps=99 * STEPS), frames
    yield "other steps", of(steps=STEPS + 1), frames
    yield "negative", of(epoch=-1, steps=-STEPS), frames
    yield "metrics of a later epoch", state, [metrics.assign(epoch=metrics["epoch"] + 1)]
    yield "metrics of other models", state, [metrics.assign(model=metrics["model"] + 1)]
    yield "metrics that lack a row", state, [metrics.iloc[1:]]
    yield "metrics twice", state, [metrics, metrics]
    yield "no such column", state, [metrics.drop(columns="epoch").assign(model=1, level=0.5)]


def test_unfinished_work_that_does_not_fit_is_begun_again(tmp_path, images, engine, capsys):
    block = drawn(tmp_path)
    task, whole = (
        train_block(block, images, engine, parts=tmp_path / "parts"),
        list(train_block(block, images, engine))[-1],
    )
    next(task), next(task)
    task.close()
    state = start_of(block)
    frames, _ = resume(tmp_path / "parts", block, state, STEPS)
    assert state.epoch == 1 and capsys.readouterr().out == ""
    for what, other, told in changes(block, state, frames):
        keep(tmp_path / "wrong", block, other, told, {})
        fresh = start_of(block)
        assert resume(tmp_path / "wrong", block, fresh, STEPS) == ([], {}) and fresh.epoch == 0, what
        assert capsys.readouterr().out.count("\n") == 1, what
    assert equal(list(train_block(block, images, engine, parts=tmp_path / "wrong"))[-1], whole)


def test_a_trajectory_that_has_a_gap_does_not_fit(tmp_path, images, engine, capsys):
    block, parts = noisy(tmp_path), tmp_path / "parts"
    task = train_block(block, images, engine, parts=parts)
    next(task), next(task)
    task.close()
    state = start_of(block)
    frames, kept = resume(parts, block, state, STEPS)
    assert sorted(kept) == [0, 1]
    keep(tmp_path / "gap", block, state, frames, {1: kept[1]})
    assert resume(tmp_path / "gap", block, start_of(block), STEPS) == ([], {})
    assert "starts again" in capsys.readouterr().out


@pytest.mark.parametrize("images", [1, 2, 7, 8])
@pytest.mark.parametrize("classes", [10, 16, 17, 256])
def test_predictions_that_travel_come_out_again(images, classes):
    predictions = (torch.arange(3 * images).reshape(3, images) % classes).to(torch.uint8)
    predictions[0, 0] = classes - 1
    packed = halved(predictions)
    assert torch.equal(restored(packed, images), predictions) and packed.shape[1] == (
        images if classes > 16 else (images + 1) // 2
    )
