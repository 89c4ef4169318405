"""The second paper's numbers: the file's form, cells typed by hand from the paper, checks that find planted errors."""
import numpy as np
import pandas as pd
import pytest

from zootwins.claims import FAILS, HOLDS, OPEN
from zootwins.core import UserError
from zootwins.reported_soups import (
    ALWAYS, CHECK, MOSTLY, ONCE, SLIPS, SOUP_CLAIMS, check_all_soups, distances_part, judge_pairs, judge_soups, pairs,
    read_reported_soups, soup_table,
)


@pytest.fixture(scope="module")
def cells():
    return read_reported_soups()


def test_schema(cells):
    assert list(cells.columns) == [
        "table", "setting", "pruning", "row", "merge", "level", "phase", "sparsity", "m", "schedule", "metric", "mean",
        "std", "doubtful",
    ]
    assert set(cells["merge"]) == {"", "uniform", "greedy"} and set(cells["pruning"]) == {"", "weights", "filters"}
    assert set(cells["m"].dropna()) == {3, 5, 10} and set(cells["phase"].dropna()) == {1, 2, 3}
    assert (
        cells["mean"].notna().all()
        and cells["std"].isna().eq(cells["table"] == 18).all()
        and (cells["std"].dropna() >= 0).all()
    )
    assert cells["level"].between(0, 1).all() and cells["sparsity"].dropna().between(0.2, 0.99).all()


def test_no_cell_stands_twice(cells):
    assert not cells.duplicated(
        ["table", "setting", "row", "merge", "level", "phase", "sparsity", "m", "schedule", "metric"]
    ).any()


@pytest.mark.parametrize("table, count", [
    (1, 2 * 69), (2, 10 * 6), (3, 7), (4, 2 * 69), (5, 69), (6, 24), (7, 24), (8, 32), (9, 32), (10, 24),
    (11, 2 * 69), (12, 24), (13, 2 * 42), (14, 42), (15, 7 * 6), (16, 6), (17, 12), (18, 14),
])
def test_every_cell_of_a_table_is_there(cells, table, count):
    assert (cells["table"] == table).sum() == count


@pytest.mark.parametrize(
    "state, mean, std",
    [
        ({"table": 1, "level": 0.98, "row": "SMS", "merge": "uniform", "phase": 3, "m": 10}, 73.05, 0.45),
        ({"table": 1, "level": 0.98, "row": "SMS", "merge": "greedy", "phase": 1, "m": 3}, 76.06, 0.69),
        ({"table": 1, "level": 0.9, "row": "best candidate", "merge": "greedy", "phase": 3, "m": 5}, 74.21, 0.00),
        ({"table": 1, "level": 0.9, "row": "IMP-RePrune", "phase": 3, "m": 10}, 72.08, 0.12),
        ({"table": 1, "level": 0.9, "row": "IMP", "phase": 2}, 75.19, 0.14),
        ({"table": 1, "level": 0.98, "row": "IMP_mx", "phase": 2, "m": 10}, 74.74, 0.06),
        ({"table": 2, "row": "GMP+SMS", "level": 0.9, "metric": "speedup"}, 7.7, 0.0),
        ({"table": 2, "row": "LC", "level": 0.9, "metric": "test_acc"}, 67.57, 2.71),
        ({"table": 2, "row": "DST", "level": 0.8, "metric": "speedup"}, 9.7, 0.3),
        ({"table": 3, "setting": "PSPNet, CityScapes"}, 58.3, 0.5),
        ({"table": 4, "level": 0.9, "row": "SMS", "merge": "uniform", "phase": 3, "m": 10}, 76.67, 0.02),
        ({"table": 4, "level": 0.9, "row": "IMP_mx", "phase": 1, "m": 3}, 76.30, 0.42),
        ({"table": 4, "level": 0.9, "row": "IMP", "phase": 3}, 74.91, 0.71),
        ({"table": 5, "row": "mean candidate", "merge": "greedy", "phase": 2, "m": 3}, 94.80, 0.15),
        ({"table": 5, "row": "IMP-RePrune", "m": 5}, 94.24, 0.13),
        ({"table": 6, "row": "IMP_mx", "sparsity": 0.95}, 94.72, 0.24),
        ({"table": 7, "row": "SMS", "merge": "greedy", "sparsity": 0.85}, 77.45, 0.13),
        ({"table": 8, "row": "IMP", "phase": 2}, 58.89, 0.23),
        ({"table": 8, "row": "IMP_mx", "phase": 1, "m": 3}, 57.39, 0.06),
        ({"table": 8, "row": "IMP-RePrune", "m": 3}, 58.10, 0.24),
        ({"table": 9, "row": "IMP_mx", "sparsity": 0.7}, 58.09, 1.04),
        ({"table": 10, "row": "SMS", "merge": "uniform", "sparsity": 0.7}, 24.51, 0.43),
        ({"table": 11, "level": 0.8, "row": "IMP-RePrune", "m": 5}, 68.60, 2.94),
        ({"table": 11, "level": 0.6, "row": "IMP-RePrune", "m": 3}, 74.65, 0.63),
        ({"table": 11, "level": 0.6, "row": "SMS", "merge": "uniform", "phase": 2, "m": 5}, 76.23, 0.35),
        ({"table": 12, "row": "IMP", "sparsity": 0.6}, 93.96, 0.34),
        ({"table": 13, "level": 0.98, "row": "IMP_mx", "phase": 3, "m": 5}, 41.62, 1.55),
        ({"table": 13, "level": 0.9, "row": "IMP", "phase": 1}, 49.41, 0.22),
        ({"table": 14, "row": "SMS", "phase": 3, "m": 10}, 39.70, 0.02),
        ({"table": 14, "row": "IMP", "phase": 3}, 36.64, 0.00),
        ({"table": 15, "row": "IMP", "level": 0.97, "metric": "recall_mb"}, 87.42, 1.17),
        ({"table": 15, "row": "SMS", "level": 0.95, "metric": "balanced_acc"}, 98.08, 0.05),
        ({"table": 16, "row": "IMP with m phases", "m": 10}, 74.70, 0.02),
        ({"table": 17, "row": "IMP + SWA", "schedule": "FT"}, 22.11, 0.36),
        ({"table": 17, "row": "IMP", "schedule": "CLR"}, 73.36, 0.02),
        ({"table": 18, "metric": "l2_max", "level": 0.995}, 40.18, None),
        ({"table": 18, "metric": "l2_mean", "level": 0.94}, 29.61, None),
    ],
)
def test_cells_typed_from_the_paper(cells, state, mean, std):
    found = cells
    for name, value in state.items():
        found = found[found[name].eq(value).fillna(False)]
    assert len(found) == 1 and found["mean"].item() == mean
    assert np.isnan(found["std"].item()) if std is None else found["std"].item() == std


def test_what_differs_within_the_paper_is_what_the_slips_say(cells):
    found = check_all_soups(cells)
    assert list(found.columns) == CHECK
    wrong = found[~found["agrees"]].groupby("check").size()
    assert wrong.to_dict() == {
        "Table 17 = Table 1": 1, "Table 15 = Table 3": 1, "candidates of phase 1, uniform = greedy": 38,
        "sparsity after a phase, rounded": 7,
    }
    odd = found[~found["agrees"] & (found["check"] == "sparsity after a phase, rounded")]
    assert set(odd["left"]) == {72.8, 68.3, 26.2, 45.6}
    assert len(SLIPS) == 9 and SLIPS.notna().all(axis=None)


@pytest.mark.parametrize(
    "state, amount, check",
    [
        ({"table": 4, "level": 0.98, "row": "SMS", "merge": "greedy", "phase": 2, "m": 5}, 0.01, "Table 4 = Table 1"),
        ({"table": 16, "row": "IMP_mx", "m": 5}, 0.1, "Table 16 = Table 1"),
        (
            {"table": 7, "row": "mean candidate", "merge": "uniform", "sparsity": 0.75},
            1.0,
            "best candidate >= mean candidate",
        ),
        ({"table": 15, "row": "SMS", "level": 0.9, "metric": "recall_fn"}, 0.5, "balanced accuracy = mean of recalls"),
        (
            {"table": 12, "row": "best candidate", "merge": "greedy", "sparsity": 0.4},
            0.01,
            "candidates of phase 1, uniform = greedy",
        ),
    ],
)
def test_a_planted_error_is_found(cells, state, amount, check):
    chosen = pd.Series(True, index=cells.index)
    for name, value in state.items():
        chosen &= cells[name].eq(value).fillna(False).astype(bool)
    assert chosen.sum() == 1
    wrong = lambda frame: (~check_all_soups(frame).set_index("check").loc[[check], "agrees"]).sum()
    assert wrong(cells.assign(mean=cells["mean"] + amount * chosen)) == wrong(cells) + 1


def test_the_papers_table_in_its_form(cells):
    shown = soup_table(cells, 1, "WRN-20, CIFAR-100").layout
    assert (
        shown.shape == (9, 9)
        and shown.loc["SMS (uniform)"].str.startswith("**").all()
        and (shown.loc["IMP-RePrune"] == "").sum() == 6
    )
    assert shown.loc["IMP"].iloc[3] == "74.09 ± 0.13" and list(shown.columns.get_level_values(0).unique()) == [
        "72.8%, phase 1",
        "92.6%, phase 2",
        "98.0%, phase 3",
    ]
    structured = soup_table(cells, 11, "WRN-20, CIFAR-100", 0.8).layout
    assert (
        structured.iloc[:, 6:]
        .apply(lambda column: column[column.str.startswith("**")].index.tolist())
        .map(lambda name: name == "IMP_mx")
        .all(axis=None)
    )
    assert len(soup_table(cells, 8, "PSPNet, CityScapes").layout.columns) == 4
    for table, setting in ((1, "MaxViT, ImageNet"), (2, "ResNet-50, ImageNet")):
        with pytest.raises(UserError, match="no table"):
            soup_table(cells, table, setting)


@pytest.mark.parametrize(
    "differences, quantifier, margin, verdict",
    [
        ([0.0, 1.0], ALWAYS, 0.0, HOLDS), ([-0.4, 1.0], ALWAYS, 0.0, OPEN), ([-0.6, 1.0], ALWAYS, 0.0, FAILS),
        ([], ALWAYS, 0.0, OPEN), ([1.0, 0.1, 0.0], MOSTLY, 0.0, HOLDS), ([1.0, 0.0], MOSTLY, 0.0, OPEN),
        ([1.0, 0.0, -0.1], MOSTLY, 0.0, FAILS), ([1.0, 1.0, 0.9], MOSTLY, 1.0, HOLDS),
        ([1.0, 0.99, 0.9], MOSTLY, 1.0, FAILS), ([2.0, -3.0], ONCE, 2.0, HOLDS), ([1.99, -3.0], ONCE, 2.0, FAILS),
    ],
)
def test_the_rule_on_either_side_of_its_bounds(differences, quantifier, margin, verdict):
    found = judge_pairs(
        pd.Series(differences, dtype=float), pd.Series(0.5, index=range(len(differences))), quantifier, margin
    )
    assert found.verdict == verdict and found.pairs == len(differences)


def test_clear_pairs_exceed_the_joint_deviation():
    found = judge_pairs(pd.Series([0.5, 0.51, -0.5, -0.51]), pd.Series([0.5] * 4), ALWAYS)
    assert (found.favourable, found.clearly_for, found.clearly_against) == (2, 1, 1)


def test_pairs_by_hand(cells):
    found = pairs(cells, ("SMS", "uniform"), ("IMP", ""), lambda frame: frame["table"] == 8)
    assert found["difference"].round(2).tolist() == [0.60, 0.55, -0.16, -0.49] and found["spread"].iloc[
        0
    ] == pytest.approx((0.15**2 + 0.04**2) ** 0.5)
    assert len(pairs(cells, ("IMP", ""), ("IMP-RePrune", ""), lambda frame: frame["table"] == 5)) == 3
    assert pairs(cells, ("IMP_mx", ""), ("IMP with m phases", ""), lambda frame: frame["table"] == 16)[
        "difference"
    ].round(2).tolist() == [0.65, 0.48, -0.20]


def test_verdicts_on_the_papers_own_tables(cells):
    found = judge_soups(cells).set_index("claim")
    assert len(found) == len(SOUP_CLAIMS) and (found["pairs"] > 0).all()
    fails = {
        "by a point", "soups beat IMP", "soups beat longer training",
        "best candidates from a soup beat longer training", "mean candidates from a soup beat longer training",
        "longer phases beat more phases", "soups are more robust than re-pruning",
    }
    assert set(found.index[found["verdict"] == FAILS]) == fails and set(found.index[found["verdict"] == OPEN]) == {
        "greedy is as good as the best",
        "re-pruning degrades",
    }
    assert found.loc["soups beat the best candidate", ["pairs", "favourable", "clearly_against"]].tolist() == [
        74,
        74,
        0,
    ]


def test_a_claim_turns_with_its_cells(cells):
    turned = cells["table"].eq(16) & cells["row"].eq("IMP with m phases") & cells["m"].eq(10).fillna(False).astype(bool)
    before, after = (
        judge_soups(frame).set_index("claim").loc["longer phases beat more phases", "verdict"]
        for frame in (cells, cells.assign(mean=cells["mean"] - 0.3 * turned))
    )
    assert (before, after) == (FAILS, HOLDS)


def test_distances(cells):
    assert (
        distances_part(cells)["verdict"].eq(HOLDS).all()
        and distances_part(cells, 0.11)["verdict"].eq(FAILS).all()
        and distances_part(cells, 0.03)["verdict"].eq(FAILS).all()
    )
