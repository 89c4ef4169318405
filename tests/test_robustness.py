"""Corruptions, calibration, groups and drift."""
import io

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from small import IMAGES, says
from zootwins.averaging import copies
from zootwins.core import UserError
from zootwins.lanes import LANES
from zootwins.population import sample_population
from zootwins.robustness import (
    CORRUPTIONS, Grain, calibration_error, celeba_groups, class_recall, contrast, corrupt, corrupted_accuracy,
    corrupted_sets, elastic_transform, fairness, figure_pairs, fractal, impulse_noise, instability, judge, magnify,
    ood_accuracy, ood_cells, pair_averages, probabilities, read_corrupted, reliability, sample, shot_noise,
    soup_populations, table_15,
)
from zootwins.style import style
from zootwins.reported_soups import soup_table
from zootwins.streams import stream_keys
from zootwins.training import TORCH, Recipe, accuracy
from zootwins.zoos import ZOOS

RNG = np.random.default_rng(7)


def pictures(n, *shape):
    "Smooth random images, so that blurs and noise can be told apart."
    x = np.cumsum(np.cumsum(RNG.normal(size=(n, *shape)), 1), 2)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    return np.rint(255 * (x - low) / (high - low)).astype(np.uint8)


def grain(name, n, seed=0):
    return Grain(stream_keys("corruptions", name, [seed])[0], torch.arange(n))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(20, 24), (24, 24, 3)])
def test_an_image_is_corrupted_alone_as_beside_others(name, shape):
    x = pictures(3, *shape)
    together = corrupt(x, name, 5, first=10)
    alone = np.concatenate([corrupt(x[i : i + 1], name, 5, first=10 + i) for i in range(3)])
    assert together.shape == x.shape and together.dtype == np.uint8
    assert (together == alone).all()
    assert (together != x).any(axis=tuple(range(1, x.ndim))).all()


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_noise", "fog", "elastic_transform", "motion_blur", "snow", "frost", "glass_blur", "shot_noise",
        "impulse_noise",
    ],
)
def test_noise_depends_on_the_image_and_on_the_seed(name):
    x = np.repeat(pictures(1, 16, 16), 2, axis=0)
    one, other = corrupt(x, name, 5)
    assert (one != other).any()
    assert (corrupt(x, name, 5, seed=1)[0] != one).any()
    assert (corrupt(x[:1], name, 5, first=1)[0] == other).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_5_is_worse_than_severity_1(name):
    x = pictures(8, 32, 32)
    damage = [np.abs(corrupt(x, name, severity).astype(float) - x).mean() for severity in (1, 5)]
    assert damage[1] > damage[0] if name != "elastic_transform" else damage[0] > 0


def test_strengths_are_what_they_say():
    x = np.full((40, 32, 32, 1), 0.5, np.float32)
    assert np.std(CORRUPTIONS["gaussian_noise"].change(x, 0.1, grain("gaussian_noise", 40))) == pytest.approx(
        0.1, rel=0.02
    )
    lost = impulse_noise(x, 0.2, grain("impulse_noise", 40))
    assert (lost == 0).mean() == pytest.approx(0.1, abs=0.01) and (lost == 1).mean() == pytest.approx(0.1, abs=0.01)
    photons = 50 * shot_noise(x, 50, grain("shot_noise", 40))
    assert photons.mean() == pytest.approx(50 * 128 / 255, rel=0.01) and photons.var() == pytest.approx(
        50 * 128 / 255, rel=0.05
    )
    assert (np.rint(photons) == np.rint(photons.round(3))).all()
    y = pictures(1, 8, 8)[..., None].astype(np.float32) / 255
    assert contrast(y, 0.25, None).std() == pytest.approx(0.25 * y.std(), rel=1e-5)
    assert contrast(y, 0.25, None).mean() == pytest.approx(y.mean(), abs=1e-6)


def test_sampling_reads_between_pixels_and_goes_on_at_the_edge():
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    at = sample(x, np.array([[[0.5, 0.0, 9.0]]]), np.array([[[1.0, 0.25, -3.0]]]))
    assert at[0, 0, :, 0].tolist() == [2.5, 0.25, 3.0]
    assert np.array_equal(magnify(x, 1), x)


def test_an_affine_map_without_shift_changes_nothing():
    x = pictures(2, 15, 15)[..., None].astype(np.float32) / 255
    assert np.allclose(elastic_transform(x, (0, 0, 0), grain("elastic_transform", 2)), x, atol=1e-6)


def test_an_affine_map_moves_its_three_points_as_drawn():
    columns = np.broadcast_to(np.arange(33, dtype=np.float32)[None, None, :, None], (1, 33, 33, 1))
    moved = elastic_transform(columns, (0, 0, 0.05), grain("elastic_transform", 1))
    shift = (2 * grain("elastic_transform", 1).uniform(3, 2)[0] - 1) * 0.05 * 33
    for (row, column), by in zip([(27, 27), (27, 5), (5, 5)], shift):
        assert moved[0, row, column, 0] == pytest.approx(column + by[1], abs=1e-3)


def test_fractals_are_rough_as_they_decay():
    x = np.zeros((4, 32, 32, 1), np.float32)
    rough, soft = (np.abs(np.diff(fractal(x, decay, grain("fog", 4)), axis=1)).mean() for decay in (1.3, 3))
    assert rough > 1.2 * soft


@pytest.mark.parametrize("wrong, told", [
    (lambda x: corrupt(x, "rain", 1), "no corruption 'rain'"), (lambda x: corrupt(x, "fog", 0), "from 1 to 5"),
    (lambda x: corrupt(x, "fog", 6), "from 1 to 5"), (lambda x: corrupt(x.astype(float), "fog", 1), "float64"),
    (lambda x: corrupt(x[..., None].repeat(2, 3), "fog", 1), r"\[1, 8, 8, 2\]"),
])
def test_what_cannot_be_corrupted(wrong, told):
    with pytest.raises(UserError, match=told) as error:
        wrong(pictures(1, 8, 8))
    assert says(error.value)


def files(folder, n=10, name="fog"):
    x = RNG.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8)
    np.save(folder / f"{name}.npy", x)
    np.save(folder / "labels.npy", np.tile(np.arange(n, dtype=np.uint8) % 10, 5))
    return x


def test_files_of_cifar_10_c(tmp_path):
    x = files(tmp_path)
    for severity in range(1, 6):
        pixels, labels = read_corrupted(tmp_path, "fog", severity)
        assert (pixels == x[10 * severity - 10 : 10 * severity]).all() and labels.tolist() == list(range(10))


def test_files_are_prepared_as_a_data_set_is(tmp_path):
    files(tmp_path)
    images = IMAGES.__class__(
        "cifar10", *[torch.zeros(2, 3, 28, 28), torch.zeros(2, dtype=torch.long)] * 2, torch.zeros(10, 3, 28, 28),
        torch.zeros(10).long(),
    )
    (key, found), = corrupted_sets(images, ["fog"], [3], tmp_path)
    assert key == ("fog", 3) and found.x_test.shape == (10, 3, 28, 28) and found.y_test.tolist() == list(range(10))
    assert found.x_test.min() >= -1 and found.x_test.max() <= 1


def pickled(folder):
    np.save(folder / "fog.npy", np.array([print], dtype=object), allow_pickle=True)


def cut(folder):
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil",
    [
        pickled, cut, lambda folder: (folder / "fog.npy").unlink(),
        lambda folder: (folder / "fog.npy").write_text("no array"),
        lambda folder: np.save(folder / "fog.npy", np.zeros((50, 32, 32, 3))),
        lambda folder: np.save(folder / "labels.npy", np.zeros(45, np.uint8)),
        lambda folder: np.save(folder / "fog.npy", np.zeros((51, 32, 32, 3), np.uint8)),
        lambda folder: np.save(folder / "fog.npy", np.zeros((50, 32, 32, 4), np.uint8)),
    ],
)
def test_files_that_are_none(tmp_path, spoil):
    files(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        read_corrupted(tmp_path, "fog", 1)
    assert says(error.value)


@pytest.fixture(scope="module")
def zoo():
    return sample_population(ZOOS["digits_seed"], 4)


def test_a_population_and_its_modules_are_judged_alike(zoo):
    modules = [zoo.to_module(i) for i in range(4)]
    sets = dict(corrupted_sets(IMAGES, ["contrast", "fog"], [1, 5]))
    one, other = (corrupted_accuracy(models, sets.items()) for models in (zoo, modules))
    assert len(one) == 4 * 4 and np.allclose(one["loss"], other["loss"], rtol=1e-4)
    pd.testing.assert_frame_equal(one.drop(columns="loss"), other.drop(columns="loss"))
    assert ood_accuracy(one)[2] == pytest.approx(one.loc[one["place"] == 2, "accuracy"].mean())
    assert torch.allclose(probabilities(zoo, IMAGES), probabilities(modules, IMAGES), atol=1e-6)


def test_corrupted_pixels_are_those_of_the_images():
    (_, same), = corrupted_sets(IMAGES, ["contrast"], [1])
    again = dict(corrupted_sets(IMAGES, ["contrast"], [1]))["contrast", 1]
    assert torch.equal(same.x_test, again.x_test) and torch.equal(same.x_train, IMAGES.x_train)
    assert same.x_test.std() == pytest.approx(0.75 * IMAGES.x_test.std().item(), rel=0.1)


def test_a_module_keeps_its_mode():
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    judge(module, IMAGES)
    assert module.training and all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_calibration_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    found = calibration_error(p[None], torch.tensor([0, 1, 0, 1]))
    assert found["ECE"][0] == pytest.approx(0.25) and found["MCE"][0] == pytest.approx(0.4)
    sure = torch.eye(3)[[0, 1, 2]]
    assert calibration_error(torch.stack([sure, sure]), torch.tensor([0, 1, 2])).eq(0).all(axis=None)
    assert calibration_error(sure[None], torch.tensor([1, 2, 0]))["ECE"][0] == 1
    assert reliability(sure, torch.tensor([0, 1, 2])).index.tolist() == [15]
    edge = torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64)
    assert reliability(edge, torch.tensor([0]), bins=3).index.tolist() == [2]


def test_recall_and_fairness_by_hand():
    y, guess = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([[0, 1, 1, 1, 0, 0]])
    assert class_recall(guess, y, y)[0].tolist() == pytest.approx([1 / 2, 2 / 3, 0])
    found = fairness(guess, y).iloc[0]
    assert found.tolist() == pytest.approx([3 / 6, (1 / 2 + 2 / 3) / 3, 0, 2 / 3])
    halves = torch.tensor([0, 0, 0, 1, 1, 1])
    assert fairness(guess, y, halves).iloc[0].tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 3])


ATTRIBUTES = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Young"]


def celeba(folder, count="4", rows=4):
    values = ["-1  1 -1  1", " 1 -1  1 -1", "-1  1  1  1", "-1 -1 -1  1"][:rows]
    lines = [count, " ".join(ATTRIBUTES) + " ", *(f"{i:06d}.jpg {value}" for i, value in enumerate(values, start=1))]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{i:06d}.jpg {i % 3}\n" for i in range(1, 5)))


def test_celeba_in_its_true_form(tmp_path):
    celeba(tmp_path)
    found = celeba_groups(tmp_path)
    assert found["group"].tolist() == ["FB", "MN", "MB", "FN"] and found["split"].tolist() == [
        "valid", "test", "train", "valid",
    ]
    assert found["image"][0] == "000001.jpg" and found["blonde"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: celeba(folder, count="5"),
        lambda folder: celeba(folder, count="many"),
        lambda folder: celeba(folder, "3", 3),
        lambda folder: (folder / "list_eval_partition.txt").unlink(),
        lambda folder: (folder / "list_attr_celeba.txt").write_text("1\nMale\n000001.jpg 1\n"),
        lambda folder: (folder / "list_attr_celeba.txt").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "list_attr_celeba.txt").write_text(""),
        lambda folder: (folder / "list_eval_partition.txt").write_text(
            "".join(f"{i:06d}.jpg 7\n" for i in range(1, 5))
        ),
        lambda folder: (folder / "list_eval_partition.txt").write_text("000001.jpg\n"),
    ],
)
def test_celeba_that_is_none(tmp_path, spoil):
    celeba(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match="Celeb-A's text files") as error:
        celeba_groups(tmp_path)
    assert says(error.value)


def test_table_15_by_hand():
    y, groups = torch.tensor([1, 0, 1, 0]), ["MB", "MN", "FB", "FN"]
    table = table_15({("IMP", 0.9): torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0]])}, y, groups)
    cells = table.numbers.set_index("measure")
    assert cells.loc["MB", "mean"] == 50 and cells.loc["MB", "std"] == pytest.approx(70.71, abs=0.01)
    assert cells.loc["Balanced acc.", "mean"] == 87.5 and table.layout.loc[("IMP", "90%"), "FN"] == "100.00 ± 0.00"


def test_everybody_of_table_13(zoo):
    recipe = Recipe("digits_seed", "imp", epochs=1, lr=1e-3, batch_size=40)
    found = soup_populations(zoo[:2], IMAGES, 0.5, recipe, phases=2, m=2, engine=LANES)
    zeros = {
        key: sum((w == 0).flatten(1).sum(1).float() for name, w in p.weights.items() if name.endswith("weight"))
        for key, p in found.items()
    }
    total = sum(w[0].numel() for name, w in zoo.weights.items() if name.endswith("weight"))
    assert all(
        (zeros[row, 2] == round(total / 2)).all() for row in ("SMS", "candidates", "IMP_mx", "IMP", "IMP-RePrune")
    )
    assert len(found["candidates", 1]) == 4 and ("IMP-RePrune", 1) not in found
    right = lambda models: accuracy(judge(models, IMAGES)[1], IMAGES.y_test)
    cells = ood_cells(found, 0.5, right, "test")
    by_hand = 100 * right(found["candidates", 2]).reshape(2, 2)
    at = cells[(cells["phase"] == 2)].set_index("row")["mean"]
    assert at["best candidate"] == pytest.approx(by_hand.max(1).values.mean()) and at[
        "mean candidate"
    ] == pytest.approx(by_hand.mean())
    rows = {"SMS (uniform)", "best candidate (uniform)", "mean candidate (uniform)", "IMP_mx", "IMP-RePrune", "IMP"}
    assert set(soup_table(cells, 13, "test").layout.index) == rows


def test_pairs_of_copies(zoo):
    many = copies(zoo[:2], 3)
    norm = lambda p: p.weights["module_list.0.weight"].flatten(1).norm(dim=1)
    many.weights["module_list.0.weight"][1] *= -1
    found = pair_averages(many, norm).set_index(["model", "first", "second"])
    assert len(found) == 6 and found.loc[(0, 0, 1), "average"] == pytest.approx(0, abs=1e-6)
    assert found.loc[(0, 0, 2), "average"] == pytest.approx(found.loc[(0, 0, 2), "best"])
    with style():
        figure_pairs({"seed": found}).savefig(io.BytesIO())
    with pytest.raises(UserError, match="at least two copies") as error:
        pair_averages(copies(zoo[:2], 1), norm)
    assert says(error.value)


def test_drift_grows_with_the_rate(zoo):
    recipe = Recipe("digits_seed", "imp", epochs=1, batch_size=20)
    found = instability(zoo[:2], IMAGES, [0.5], [1e-4, 1e-2], recipe, m=2, engine=TORCH)
    assert (
        found["relative"][1] > 5 * found["relative"][0] > 0 and (found["max distance"] >= found["mean distance"]).all()
    )
