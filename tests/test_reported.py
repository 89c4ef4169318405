"""The paper's numbers: the file's form, cells typed by hand from the paper, and checks that find planted errors."""
import numpy as np
import pandas as pd
import pytest

from zootwins.core import UserError
from zootwins.layers import layer_sizes
from zootwins.reported import (
    CHECKS, EXISTING, SHIFTED, STATE, VERDICT, check_all, check_counts, check_statements, check_table_8_windows,
    dropout_states, layer_average, layer_spread, locate_states, missing_originals, printed_models, read_recorded,
    read_recorded_curves, read_reported, recorded_factors, reported, shifted_windows,
)
from zootwins.states import TABLE_1_STATES, TABLE_2_STATES
from zootwins.zoos import FACTORS, ZOOS


@pytest.fixture(scope="module")
def cells():
    return read_reported()


@pytest.fixture(scope="module")
def before(cells):
    return check_all(cells)


def test_schema(cells):
    assert list(cells.columns) == [
        "table", "row", "zoo", "method", "level", "epoch", "layer", "metric", "mean", "std", "doubtful",
    ]
    assert set(cells["method"]) == {"", "mp", "vd"} and set(cells["layer"]) == {
        "", "conv1", "conv2", "conv3", "fc1", "fc2",
    }
    assert cells["row"].ne("").all() and cells["metric"].ne("").all()
    assert cells["mean"].isna().equals(cells["doubtful"].eq("lost in the text extraction"))
    assert (cells["level"].notna() == (cells["method"] == "mp")).all() and cells["level"].dropna().between(0, 0.9).all()
    assert (cells["std"].isna() == (cells["table"].isin([2, 3]) | cells["mean"].isna())).all() and (
        cells["std"].dropna() >= 0
    ).all()
    assert (cells["layer"] != "").sum() == (8 * 6 + 10 * 3) * 5 and cells.loc[cells["layer"] != "", "metric"].eq(
        "sparsity"
    ).all()


def test_no_cell_stands_twice(cells):
    assert not cells.duplicated(["table", *STATE]).any()
    assert not cells.duplicated(["table", "row", *STATE[1:]]).any()


def test_every_zoo_is_registered(cells):
    named = set(cells["zoo"]) - {""}
    assert named == {zoo.name for zoo in ZOOS.values() if zoo.in_paper}
    assert set(cells.loc[cells["zoo"] == "", "row"]) == {"All"}
    assert cells[cells["zoo"] != ""].groupby(["table", "row"])["zoo"].nunique().eq(1).all()
    assert set(cells.loc[cells["table"] == 5, "zoo"]) - {""} == {zoo.name for zoo in ZOOS.values() if zoo.mp_in_paper}


@pytest.mark.parametrize(
    "table, count",
    [
        (1, 6 * 6), (2, 8 * 6), (3, 2 * 6), (5, 10 * 2 * 12 + 12), (6, 14 * 3 * 11), (7, 8 * 6 * 7), (8, 10 * 3 * 7),
        (9, 6 * 6),
    ],
)
def test_every_cell_of_a_table_is_there(cells, table, count):
    of_table = cells[cells["table"] == table]
    assert len(of_table) == count
    assert (
        of_table.groupby("row").size().nunique() == 1
        if table != 5
        else of_table.groupby("row").size().drop("All").eq(24).all()
    )


def test_epochs_and_levels_are_the_printed_ones(cells):
    shown = {table: sorted(group["epoch"].dropna().unique()) for table, group in cells.groupby("table")}
    assert (
        shown[6] == [0, 2, 4, 6, 8, 10, 13, 16, 19, 22, 25]
        and shown[7] == [0, 5, 10, 15, 20, 25]
        and shown[5] == [0, 15]
    )
    assert shown[1] == shown[2] == shown[3] == shown[8] == shown[9] == []
    levels = {table: sorted(group["level"].dropna().unique()) for table, group in cells.groupby("table")}
    assert levels[5] == [0, 0.5, 0.6, 0.7, 0.8, 0.9] and levels[8] == [0.5, 0.7, 0.9] and levels[2] == [0.8]


@pytest.mark.parametrize(
    "table, state, mean, std",
    [
        (1, ("svhn_seed", "agreement", "mp", 0.6), 74.9, 2.5), (1, ("cifar10_seed", "agreement", "vd"), 61.0, 2.7),
        (1, ("mnist_seed", "sparsity", "vd"), 78.0, 1.1), (2, ("stl10_large_seed", "pearson", "mp", 0.8), 73.7, None),
        (2, ("mnist_seed", "kendall", "vd"), 35.2, None), (2, ("cifar10_large_seed", "sparsity", "vd"), 67.3, None),
        (3, ("svhn_seed", "r2_alphas", None), 74.2, None), (3, ("mnist_seed", "r2_ggap", None), 19.1, None),
        (5, ("mnist_fixed", "ggap", "mp", 0.8, 15), -7.2, 11.4),
        (5, ("usps_seed", "test_acc", "mp", 0.6, 0), 77.4, 7.6),
        (5, ("stl10_large_seed", "ggap", "mp", 0.0, 15), 29.5, 1.6),
        (6, ("fmnist_random", "sparsity", "vd", None, 22), 84.9, 19.8),
        (6, ("cifar10_large_fixed", "ggap", "vd", None, 2), 6.3, 7.5),
        (6, ("mnist_seed", "ggap", "vd", None, 8), -5.0, 0.6), (7, ("mnist_seed", "ggap", "vd", None, 5), -1.8, 0.4),
        (7, ("stl10_large_seed", "sparsity", "vd", None, 15, "fc2"), 68.7, 24.7),
        (7, ("usps_seed", "sparsity", "vd", None, 25, "conv3"), 88.8, 3.2),
        (8, ("mnist_random", "sparsity", "mp", 0.7, None, "fc1"), 62.4, 3.0),
        (8, ("stl10_seed", "test_acc", "mp", 0.9), 10.9, 3.5),
        (8, ("cifar10_large_seed", "sparsity", "mp", 0.5, None, "conv1"), 13.8, 2.2),
        (9, ("fmnist_seed", "agreement", "mp", 0.7), 79.7, 1.9), (9, ("stl10_seed", "test_acc", "vd"), 35.9, 1.2),
        (9, ("svhn_seed", "test_acc", "vd"), 62.2, 7.2),
    ],
)
def test_cells_typed_from_the_paper(table, state, mean, std):
    found = reported(*state, table=table)
    assert found[0] == mean and (np.isnan(found[1]) if std is None else found[1] == std)


def test_reported_prefers_cells_without_doubt():
    assert (
        reported("usps_seed", "test_acc", "mp", 0.9, table=9)
        == (72.8, 17.2)
        != reported("usps_seed", "test_acc", "mp", 0.9)
    )
    assert reported("mnist_fixed", "test_acc", "vd", epoch=0) == (73.8, 35.2)
    assert reported("usps_seed", "agreement", "mp", 0.9, table=9) is None
    assert reported("usps_seed", "sparsity", "vd", epoch=20) is None and reported(
        "usps_seed", "sparsity", "vd", epoch=19
    ) == (93.5, 0.5)


@pytest.mark.parametrize(
    "state",
    [
        ("usps", "test_acc", "mp"), ("", "sparsity", "mp"), ("usps_seed", "accuracy", "mp"),
        ("usps_seed", "test_acc", "vb"), ("usps_seed", "sparsity", "vd", None, 5, "conv4"),
    ],
)
def test_unknown_names_are_refused(state):
    with pytest.raises(UserError):
        reported(*state)


def test_the_states_chosen_for_tables_1_and_2_are_the_printed_ones(cells):
    for table, states in ((1, TABLE_1_STATES), (2, TABLE_2_STATES)):
        sparsity = cells[(cells["table"] == table) & (cells["metric"] == "sparsity")].pivot(
            index="zoo", columns="method", values="mean"
        )
        assert {zoo: (mp / 100, pytest.approx(vd / 100)) for zoo, mp, vd in sparsity.itertuples()} == states


def test_average_of_layers_weighs_by_their_size(cells):
    found = layer_average(cells, 7).set_index(["zoo", "epoch"])["mean"]
    assert layer_sizes("cnn_small_1ch") == {"conv1": 200, "conv2": 1200, "conv3": 96, "fc1": 720, "fc2": 200}
    assert found["svhn_seed", 15] == pytest.approx(
        (200 * 31.7 + 1200 * 51.3 + 96 * 53.3 + 720 * 89.4 + 200 * 72.3) / 2416
    )


def test_states_of_table_1_are_found(cells):
    found = locate_states(cells).set_index(["table", "zoo"])[["epoch_before", "epoch_after"]]
    assert found.loc[(1, "svhn_seed")].tolist() == [15, 15] and found.loc[(1, "fmnist_seed")].tolist() == [16, 16]
    assert found.loc[(1, "usps_seed")].tolist() == [10, 13] and found.loc[(2, "cifar10_large_seed")].tolist() == [6, 8]
    states = dropout_states(cells).groupby("zoo")["epoch"]
    assert states.apply(lambda epochs: epochs.is_monotonic_increasing).all() and states.size()["usps_seed"] == 14


def test_verdicts_have_one_form(cells):
    for check in CHECKS:
        found = check(cells)
        assert list(found.columns) == VERDICT and len(found) > 0


def test_doubts_are_the_contradictions(cells, before):
    found = before[~before["agrees"]]
    contradicted = set(zip(found["zoo"], found["metric"]))
    contradicting = cells[~cells["doubtful"].isin(["", "lost in the text extraction"])]
    assert set(zip(contradicting["zoo"], contradicting["metric"])) == contradicted
    layered = found[found["check"] == "Table 8, average of layers = level"]
    marked = cells[(cells["table"] == 8) & cells["doubtful"].str.startswith("layers average")]
    assert set(zip(marked["zoo"], marked["level"])) == set(zip(layered["zoo"], layered["level"])) and len(
        marked
    ) == 5 * len(layered)


def test_lost_cells_are_not_compared(cells):
    tables = cells["table"].isin([1, 9])
    assert len(CHECKS[0](cells)) == 36 - cells.loc[tables, "mean"].isna().sum() == 33


@pytest.mark.parametrize("table, zoo, state, amount, check", [
    (9, "mnist_seed", {"metric": "agreement", "method": "mp"}, 0.1, "Table 1 = Table 9"),
    (8, "mnist_random", {"metric": "ggap", "level": 0.9}, -0.1, "Table 8 = Table 5"),
    (7, "usps_seed", {"metric": "test_acc", "epoch": 10}, 1.0, "Table 7 = Table 6"),
    (6, "cifar10_seed", {"metric": "test_acc", "epoch": 0}, 0.1, "Table 5, level 0 = Table 6, epoch 0"),
    (7, "mnist_seed", {"layer": "conv2", "epoch": 25}, 1.0, "Table 7, average of layers = Table 6"),
    (7, "stl10_seed", {"layer": "conv2", "epoch": 15}, -90.0, "Table 7, average of layers, between epochs of Table 6"),
    (8, "usps_seed", {"layer": "fc1", "level": 0.5}, 1.0, "Table 8, average of layers = level"),
    (8, "svhn_seed", {"layer": "conv3", "level": 0.5}, 0.3, "Table 8, sparsity without spread = whole weights"),
    (5, "fmnist_seed", {"metric": "test_acc", "level": 0.7, "epoch": 15}, 0.1, "Table 1 = Table 5"),
    (1, "svhn_seed", {"metric": "test_acc", "method": "vd"}, 0.1, "Table 1 = Table 6 or 7"),
    (1, "usps_seed", {"metric": "test_acc", "method": "vd"}, 1.2, "Table 1, between epochs of Tables 6 and 7"),
])
def test_a_planted_error_is_found(cells, before, table, zoo, state, amount, check):
    chosen = (cells["table"] == table) & (cells["zoo"] == zoo)
    for column, value in state.items():
        chosen &= (cells[column] == value).fillna(False).astype(bool)
    assert chosen.sum() == 1
    after = check_all(cells.assign(mean=cells["mean"].mask(chosen, cells["mean"] + amount)))
    of_zoo = lambda found: found[(found["check"] == check) & (found["zoo"] == zoo)]["agrees"].tolist()
    assert of_zoo(before).count(False) + 1 == of_zoo(after).count(False)
    assert before[before["zoo"] != zoo].equals(after[after["zoo"] != zoo])


def test_a_wrong_spread_is_found(cells):
    chosen = (cells["table"] == 8) & (cells["zoo"] == "usps_seed") & (cells["metric"] == "test_acc")
    found = check_all(cells.assign(std=cells["std"] + 0.1 * chosen))
    assert found[found["check"] == "Table 8 = Table 5"]["agrees"].value_counts().to_dict() == {True: 57, False: 3}


def test_the_text_is_counted_again(cells):
    found = check_counts(cells)
    models = found[found["quantity"] == "sparsified models"].set_index("place")
    assert models["counted"].eq(33_920).all() and models["agrees"].to_dict() == {
        "Introduction": True,
        "Conclusion": False,
    }
    fewer = check_counts(cells[cells["level"] != 0.6])
    states = fewer["quantity"] == "states, levels of Table 5"
    assert (found["counted"] - fewer["counted"])[states].tolist() == [15 * 13_120] * 2


def test_exceptions_to_statements_are_counted(cells):
    found = check_statements(cells)
    assert found["cells"].tolist() == [8, 16, 12]
    better = cells.assign(
        mean=cells["mean"].mask(
            (cells["metric"] == "pearson") & (cells["zoo"] == "usps_seed") & (cells["method"] == "mp"), 90.1
        )
    )
    assert (
        check_statements(better)["agrees"].iloc[0]
        and found["exceptions"].iloc[0] - check_statements(better)["exceptions"].iloc[0] == 1
    )
    assert pd.api.types.is_bool_dtype(found["agrees"])


def test_layers_scatter_over_weights_as_printed_and_not_over_models(cells):
    found = layer_spread(cells).set_index(["zoo", "layer"])
    assert len(found) == 8 * 5
    p = 0.009
    assert found.loc[("usps_seed", "conv2"), ["over_models", "over_weights"]].tolist() == pytest.approx(
        [100 * (p * (1 - p) / 1200) ** 0.5, 100 * (p * (1 - p) / 1000) ** 0.5]
    )
    small = found[found["mean"] < 2]
    assert (
        len(small) == 36
        and (small["std"] - small["over_weights"]).abs().max()
        < 0.11
        < (small["std"] - small["over_models"]).abs().max()
    )


def test_windows_begin_200_weights_too_early():
    assert SHIFTED == ["cifar10_seed", "stl10_seed"]
    sizes, windows = layer_sizes("cnn_small_3ch"), shifted_windows("cnn_small_3ch")
    assert [last - first for first, last in windows.values()] == [
        sizes["conv1"] - 200,
        *list(sizes.values())[1:],
    ] and windows["fc2"] == (2416, 2616)


@pytest.mark.parametrize("zoo", ["cifar10_seed", "stl10_seed"])
def test_a_shifted_row_is_a_mixture_and_a_wrong_one_is_found(cells, zoo):
    assert check_table_8_windows(cells, [zoo])["agrees"].tolist() == [True] * 3
    of = cells[(cells["table"] == 8) & (cells["zoo"] == zoo) & (cells["level"] == 0.5)].set_index("layer")
    mixed = (200 * of.loc["conv1", "mean"] + 1000 * of.loc["conv3", "mean"]) / 1200
    scatter = np.hypot(200 / 1200 * of.loc["conv1", "std"] / 200**0.5, 1000 / 1200 * of.loc["conv3", "std"] / 96**0.5)
    chosen = (cells["table"] == 8) & (cells["zoo"] == zoo) & (cells["level"] == 0.5) & (cells["layer"] == "conv2")
    for sign in (-1, 1):
        for hair, agrees in ((-1e-6, True), (1e-6, False)):
            moved = cells.assign(mean=cells["mean"].mask(chosen, mixed + sign * (0.1 + 2 * scatter + hair)))
            assert check_table_8_windows(moved, [zoo])["agrees"].tolist() == [agrees, True, True]


def test_other_zoos_rows_are_no_mixtures(cells):
    others = [
        zoo.name
        for zoo in ZOOS.values()
        if zoo.mp_in_paper and zoo.architecture == "cnn_small_1ch" and zoo.mp_selector == "global"
    ]
    found = check_table_8_windows(cells, others)
    assert len(found) == 3 * len(others) == 15 and not found["agrees"].any()


def test_records_are_of_every_model():
    recorded, curves = read_recorded(), read_recorded_curves()
    assert recorded.groupby("zoo")["trial"].agg(["size", "min", "max"]).to_numpy().tolist() == [
        [2560, 0, 2559],
        [2560, 0, 2559],
        [1000, 0, 999],
    ]
    at = recorded.set_index(["zoo", "trial"])["test_acc"]
    assert [
        at["mnist_seed", 0], at["mnist_seed", 3], at["mnist_fixed", 0], at["mnist_fixed", 2541], at["mnist_random", 15],
    ] == [0.915, 0.885, 0.982, 0.829, 0.933]
    first = curves[(curves["zoo"] == "mnist_seed") & (curves["model"] == 0)].sort_values("epoch")
    assert first["test_acc"].tolist() == [0.6233, 0.7722, 0.8559, 0.9065, 0.9225] and set(curves["epoch"]) == {
        10, 20, 30, 40, 50,
    }


def test_trials_of_a_grid_are_in_the_order_of_their_folders():
    factors = recorded_factors("mnist_fixed")
    assert list(factors) == [*FACTORS, "seed_place"] and not factors.duplicated().any() and len(factors) == 2560
    row = lambda trial: factors.loc[
        trial, ["dropout", "init", "activation", "lr", "optimizer", "wd", "seed_place"]
    ].tolist()
    assert row(3) == [0.5, "normal", "tanh", 1e-3, "adam", 1e-3, 0] and row(12) == [
        0.0, "kaiming_uniform", "relu", 1e-3, "adam", 1e-3, 0,
    ]
    assert (
        row(2541) == [0.5, "kaiming_uniform", "relu", 1e-4, "sgd", 1e-4, 9]
        and row(64)[4] == "sgd"
        and row(128)[5] == 1e-4
        and row(256)[6] == 1
    )


def test_the_number_of_models_behind_a_cell():
    assert (
        [printed_models(table, "mnist_fixed") for table in (5, 6, 7)] == [2560, 2493, 2560]
        and printed_models(6, "usps_seed") == 1000
        and printed_models(5, "") == 13_120
    )
    assert all(0.94 < EXISTING[zoo] / printed_models(5, zoo) < 1 for zoo in EXISTING)


def test_missing_twins_cannot_explain_table_6(cells):
    found = missing_originals(cells).set_index("zoo")
    assert set(found.index) == {"mnist_seed", "mnist_fixed", "mnist_random"} and found["missing"].to_dict() == {
        "mnist_seed": 4,
        "mnist_fixed": 67,
        "mnist_random": 69,
    }
    assert (
        found.loc["mnist_fixed", "needed"] == pytest.approx((75.05 * 2560 - 73.85 * 2493) / 67)
        and not found.loc["mnist_fixed", "possible"]
    )
    mild = cells.assign(
        mean=cells["mean"].mask(
            (cells["table"] == 6)
            & (cells["zoo"] == "mnist_fixed")
            & (cells["epoch"] == 0)
            & (cells["metric"] == "test_acc"),
            75.0,
        )
    )
    assert missing_originals(mild).set_index("zoo").loc["mnist_fixed", "possible"]
