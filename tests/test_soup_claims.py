"""Claims about soups: the rule at its edges, and each claim on tables whose answer is known."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_soup_figures import story, sweep

from zootwins.claims import FAILS, HOLDS, OPEN
from zootwins.reported_soups import ALWAYS, MOSTLY, ONCE, SOUP_CLAIMS
from zootwins.kept import SIGNS
from zootwins.soup_claims import (
    SWEEP_CLAIMS, judge_cells, judge_story, judge_sweep, printed_verdicts, row_differences, story_verdicts,
    sweep_verdicts,
)
from zootwins.soup_claims import verdict_matrix, verdict_text

ROOT = Path(__file__).resolve().parents[1]
NOISE = pd.Series(np.random.default_rng(0).normal(0, 0.5, 40))
NOISE -= NOISE.mean()
HALF = stats.t.ppf(0.975, 39) * NOISE.std() / 40**0.5  # of its interval


def verdict(cells, quantifier, margin=0.0):
    return [found.verdict for found in judge_cells(cells, quantifier, "gain", margin)]


def test_one_cell_is_judged_by_its_interval():
    for shift, right in ((HALF + 0.01, HOLDS), (HALF - 0.01, OPEN), (-HALF + 0.01, OPEN), (-HALF - 0.01, FAILS)):
        assert verdict({"a": NOISE + shift}, ALWAYS) == verdict({"a": NOISE + shift}, ONCE) == [right]
        assert verdict({"a": NOISE + shift + 2}, ALWAYS, 2) == [right]
    assert verdict({}, ALWAYS) == verdict({"a": NOISE[:1]}, MOSTLY) == []


def test_always_asks_the_worst_cell_and_once_the_best_both_widened():
    cells = {"good": NOISE + 1, "bad": NOISE - 1, "flat": NOISE}
    assert verdict(cells, ALWAYS) == [FAILS] and verdict(cells, ONCE) == [HOLDS]
    alone = judge_cells({"flat": NOISE}, ALWAYS, "gain")[0]
    among = judge_cells({"flat": NOISE, "good": NOISE + 1}, ALWAYS, "gain")[0]
    assert among.low < alone.low and among.high > alone.high and "smallest of 2" in among.quantity
    edge = {"flat": NOISE + HALF + 0.01}
    assert verdict(edge, ALWAYS) == [HOLDS] and verdict(edge | {"good": NOISE + 5}, ALWAYS) == [OPEN]


def test_often_counts_models_and_leaves_ties_out():
    wins = pd.Series([1.0] * 30 + [-1.0] * 6)
    assert verdict({"a": wins}, MOSTLY) == [HOLDS] and verdict({"a": -wins}, MOSTLY) == [FAILS]
    assert verdict({"a": pd.Series([1.0] * 19 + [-1.0] * 17)}, MOSTLY) == [OPEN]
    tied = pd.concat([wins, pd.Series([0.0] * 60)], ignore_index=True)
    assert verdict({"a": tied}, MOSTLY) == [HOLDS] and verdict({"a": tied}, MOSTLY, 0.5) == [FAILS]
    assert np.isclose(judge_cells({"a": tied}, MOSTLY, "")[0].value, 30 / 36)


def test_rows_are_paired_within_phase_and_number():
    claims = {claim.name: claim for claim in SOUP_CLAIMS}
    results = story()
    found = row_differences(results, claims["soups beat longer training"])
    assert list(found) == ["phase 1, m = 3", "phase 2, m = 3"] and all(
        np.allclose(values, -3) and len(values) == 6 for values in found.values()
    )
    assert list(row_differences(results, claims["mean candidates from a soup beat IMP"])) == ["phase 2, m = 3"]
    assert row_differences(results, claims["soups help GMP"]) == {}
    assert list(row_differences(pd.concat([results, story(m=5)]), claims["by two points with three copies"])) == [
        "phase 1, m = 3",
        "phase 2, m = 3",
    ]


def test_a_story_where_all_is_known():
    random = np.random.default_rng(1)
    results = story(n=30)
    results["test_acc"] += random.normal(0, 0.001, len(results))
    found = judge_story(results).set_index("claim")["verdict"]
    assert found["soups beat the best candidate"] == HOLDS and found["soups beat longer training"] == FAILS
    assert found["by a point"] == OPEN and found["mean candidates from a soup beat IMP"] == FAILS
    assert found["best candidates from a soup beat IMP"] == HOLDS and found["by two points with three copies"] == OPEN
    assert not {"soups are more robust than IMP", "soups are fairer"} & set(found.index)
    assert found["longer phases beat more phases"] == HOLDS and "uniform beats greedy" not in found
    other = story(n=30, soup=0.005, longer=-0.02)
    other["test_acc"] += random.normal(0, 0.001, len(other))
    turned = judge_story(other).set_index("claim")["verdict"]
    assert turned["soups beat the best candidate"] == FAILS and turned["soups beat longer training"] == HOLDS


def noisy(table, seed=0):
    "The same with noise in every accuracy."
    random = np.random.default_rng(seed)
    names = ["mean candidate", "best candidate", "uniform", "greedy", "IMP", "IMP + SWA", "IMP_mx"]
    return table.assign(**{name: table[name] + random.normal(0, 0.001, len(table)) for name in names})


def test_each_claim_about_a_sweep_can_hold_and_fail():
    lengths = noisy(sweep(n=20, schedules=("constant",), numbers=(3,), epochs=(1, 20)))
    decayed = noisy(sweep(n=20, schedules=("LLR",), numbers=(5,)))
    constant = noisy(sweep(n=20, schedules=("constant",), numbers=(5,)))
    found = {}
    for setting, table, experiment in (
        ("constant", constant, "one_shot"), ("LLR", decayed, "one_shot"),
        ("all", pd.concat([constant, decayed]), "schedules"), ("constant", constant, "schedules"),
        ("constant", lengths, "lengths"),
    ):
        for row in judge_sweep(table, experiment).itertuples():
            found[row.claim, row.of, setting, experiment] = row.verdict
    assert (
        found["up to two points", "uniform", "constant", "one_shot"] == HOLDS
        and found["up to two points", "uniform", "LLR", "one_shot"] == FAILS
    )
    assert found["uniform soups collapse", "", "constant", "one_shot"] == FAILS
    assert (
        found["all schedules", "best", "all", "schedules"] == FAILS
        and found["all schedules", "best", "constant", "schedules"] == HOLDS
    )
    assert found["averaging along the way", "", "all", "schedules"] == HOLDS
    assert (
        found["soups instead of longer training", "", "constant", "lengths"] == OPEN
        and found["one epoch is enough", "", "constant", "lengths"] == HOLDS
    )
    lower = constant.assign(
        uniform=constant["uniform"] - 0.3 * (constant["level"] > 0.8),
        greedy=constant["greedy"] - 0.02,
        relative=0.5 - constant["level"] / 5,
    )
    fallen = judge_sweep(lower, "one_shot").set_index("claim")["verdict"]
    assert (
        fallen["uniform soups collapse"] == HOLDS
        and fallen["the gain declines"] == HOLDS
        and fallen["greedy soups are safe"] == FAILS
    )
    assert judge_sweep(constant, "one_shot").set_index("claim")["verdict"]["greedy soups are safe"] == OPEN
    better = lengths.assign(
        IMP_mx=lengths["uniform"] - 0.01 * (lengths["epochs"] - 2),
        uniform=lengths["uniform"] - 0.001 * lengths["epochs"],
    )
    turned = judge_sweep(better, "lengths").set_index("claim")["verdict"]
    assert turned["soups instead of longer training"] == FAILS and turned["not when brief and sparse"] == HOLDS
    assert turned["break-even"] == HOLDS and turned["returns diminish"] == HOLDS
    swa = constant.assign(**{"IMP + SWA": constant["IMP"] + 0.01})
    assert judge_sweep(swa, "schedules").set_index("claim")["verdict"]["averaging along the way"] == FAILS


def test_distances_need_a_level_beyond_90():
    table = sweep(levels=(0.7, 0.9, 0.98), schedules=("constant",), numbers=(5,))
    judged = judge_sweep(table, "one_shot").set_index("claim")["verdict"]
    assert judged["copies part"] == HOLDS
    assert (
        judge_sweep(table.assign(relative=1 - table["relative"]), "one_shot").set_index("claim")["verdict"][
            "copies part"
        ]
        == FAILS
    )
    assert "copies part" not in set(judge_sweep(table.query("level < 0.95"), "one_shot")["claim"])


def test_sparsities_at_which_candidates_guess_are_left_out():
    table = noisy(sweep(n=20, schedules=("constant",), numbers=(5,)))
    guessing = table["level"] > 0.8
    table.loc[guessing, ["mean candidate", "best candidate", "uniform", "greedy"]] = 0.1
    assert "the gain declines" not in set(judge_sweep(table, "one_shot")["claim"])
    assert judge_sweep(table, "one_shot").set_index("claim").loc["greedy soups are safe", "n"] == 20


def pairs(**gain):
    "Pairs of two copies, by what was varied."
    random = np.random.default_rng(0)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "model": np.tile(range(12), 3), "first": np.repeat([0, 0, 1], 12),
                    "second": np.repeat([1, 2, 2], 12), "varied": name, "level": 0.7, "schedule": "LLR", "better": 0.9,
                    "soup": 0.9 + plus + random.normal(0, 0.002, 36),
                }
            )
            for name, plus in gain.items()
        ]
    )


def test_pairs():
    found = judge_sweep(pairs(seed=0.01, length=0.005), "pairs")
    assert found["verdict"].tolist() == [HOLDS] * 3 and found["of"].tolist() == ["seed", "length", ""]
    assert judge_sweep(pairs(seed=-0.01, length=0.005), "pairs")["verdict"].tolist() == [FAILS, HOLDS, FAILS]


def test_every_sweep_claim_is_about_an_experiment():
    assert {claim.experiment for claim in SWEEP_CLAIMS} == {"one_shot", "schedules", "lengths", "pairs"}
    assert len({claim.name for claim in SWEEP_CLAIMS} | {claim.name for claim in SOUP_CLAIMS}) == len(
        SWEEP_CLAIMS
    ) + len(SOUP_CLAIMS)


def test_the_matrix_has_the_printed_verdicts_beside_ours():
    verdicts = story_verdicts(pd.concat([story(n=10), story(n=10, rate=1e-3, longer=-0.02)]))
    matrix = verdict_matrix(verdicts)
    assert (
        list(matrix.columns) == ["place", "printed tables", *verdicts["setting"].unique()]
        and len(verdicts["setting"].unique()) == 2
    )
    assert (
        matrix.loc["soups beat the best candidate", "printed tables"]
        == SIGNS[HOLDS]
        == SIGNS[printed_verdicts()["soups beat the best candidate"]]
    )
    assert matrix.loc["soups beat longer training"].tolist()[2:] == [SIGNS[HOLDS], SIGNS[FAILS]]
    assert all("(10 models; m = 3)" in setting for setting in verdicts["setting"])


def test_verdicts_say_which_stories_they_rest_on():
    verdicts = story_verdicts(pd.concat([story(n=10), story(n=10, m=5), story(n=4, level=0.8)]))
    assert sorted(verdicts["setting"].unique()) == [
        "Digits (s) Seed, LAMP to 80%, constant 0.005 (4 models; m = 3)",
        "Digits (s) Seed, LAMP to 90%, constant 0.005 (10 models; m = 3, 5)",
    ]
    text = verdict_text(verdicts, "soups beat longer training")
    assert "- Digits (s) Seed, LAMP to 90%, constant 0.005 (10 models; m = 3, 5): **does not hold**." in text
    assert "to 80%, constant 0.005 (4 models; m = 3)" in text


@pytest.mark.parametrize("experiment", ["one_shot", "lengths"])
def test_kept_sweeps_can_be_judged(experiment):
    found = sweep_verdicts(ROOT / "figures" / "soups", "digits_seed")
    assert found["setting"].str.startswith("Digits (s) Seed, ").all()
    claims = {claim.name for claim in SWEEP_CLAIMS if claim.experiment == experiment}
    assert claims <= set(found["claim"]) and set(found["verdict"]) <= {HOLDS, FAILS, OPEN}
