"""Tables and figures of soups: from made-up results whose answers are known, and what is kept made again."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_evidence import differences, saved

from zootwins.core import UserError, write_json
from zootwins.reported_soups import ROWS
from zootwins.soup_figures import (
    STORY, difference_cell, figure_4, figure_9, figure_10, figure_pairs, figure_when, last_gains, one_story,
)
from zootwins.soup_figures import (
    paired_table, read_stories, read_sweep, setting_title, shot_story, table_1, table_6, table_16, table_17, table_18,
)
from zootwins.soups import story_gains
from zootwins.twins import save_metrics
from zootwins.zoos import ZOOS

ROOT = Path(__file__).resolve().parents[1]
KEPT = sorted((ROOT / "figures" / "soups").glob("*/*/run.json"))
STORIES = [path.parent for path in KEPT if (path.parent / "gains.csv").exists()]
TOLD = {
    "zoo": "digits_seed", "selector": "lamp", "level": 0.9, "schedule": "constant", "rate": 5e-3, "epochs": 5,
    "phases": 3, "varied": "seed",
}


def story(n=6, phases=2, m=3, soup=0.02, longer=0.03, **told):
    "A story in which the soup gains `soup` over its mean candidate and a longer run `longer` over that."
    base = 0.8 + 0.01 * np.arange(n)
    values = {
        ("SMS", "uniform"): soup, ("best candidate", "uniform"): 0.01, ("mean candidate", "uniform"): 0.0,
        ("IMP_mx", ""): soup + longer, ("IMP", ""): 0.005, ("IMP with m phases", ""): soup,
    }
    rows = [
        {
            "row": row, "merge": merge, "m": m, "level": 0.9, "phase": phase, "sparsity": phase * 0.9 / phases,
            "model": model, "test_acc": base[model] + plus,
        }
        for phase in range(1, phases + 1)
        for (row, merge), plus in values.items()
        for model in range(n)
    ]
    return pd.DataFrame(rows).assign(**TOLD | told)


def sweep(n=6, levels=(0.7, 0.9), schedules=("constant", "LLR"), numbers=(3, 5), epochs=(5,)):
    "A sweep whose uniform soups gain a point more for every copy and lose it with decay."
    random, frames = np.random.default_rng(0), []
    for level in levels:
        for schedule in schedules:
            for m in numbers:
                for length in epochs:
                    mean = 0.9 - 0.1 * (level > 0.8) + random.normal(0, 0.01, n)
                    gain = 0.01 * m * (schedule == "constant")
                    columns = {
                        "mean candidate": mean, "best candidate": mean + 0.01, "best by validation": mean,
                        "uniform": mean + gain, "greedy": mean + 0.01, "IMP": mean, "IMP + SWA": mean - 0.02,
                        "IMP_mx": mean + 0.03, "original": mean, "pruned": mean,
                        "distance": level + random.normal(0, 0.01, n), "farthest": 2 * level, "relative": level / 5,
                        "empty": 0, "kept": 2, "candidate_loss": 0.5, "soup_loss": 0.4, "spread": 0.01,
                    }
                    frames.append(
                        pd.DataFrame(
                            {
                                "model": range(n), "m": m, **columns, **TOLD, "level": level, "schedule": schedule,
                                "epochs": length,
                            }
                        )
                    )
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("folder", STORIES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kept_gains_follow_from_the_results(folder):
    results = pd.read_parquet(folder / "results.parquet")
    merges = list(dict.fromkeys(results.loc[results["row"] == "SMS", "merge"]))
    made = pd.concat({how: story_gains(results, how) for how in merges}, names=["soup"]).reset_index()
    assert not differences(pd.read_csv(folder / "gains.csv"), saved(made))
    false = made.assign(gain=made["gain"] + 0.01)
    assert differences(pd.read_csv(folder / "gains.csv"), saved(false))


@pytest.mark.parametrize("folder", [path.parent for path in KEPT], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kept_results_say_what_made_them(folder):
    assert {path.name for path in folder.iterdir()} <= {
        "run.json",
        "results.parquet",
        "gains.csv",
    } and folder.parent.name in ZOOS
    results = pd.read_parquet(folder / "results.parquet")
    values = results.select_dtypes(float)
    shares = [
        name
        for name in values
        if name in ("test_acc", "uniform", "greedy", "best candidate", "mean candidate", "soup", "better", "sparsity")
    ]
    assert len(results) and shares and values[shares].stack().between(0, 1).all()


def test_there_are_stories_of_two_zoos_and_every_one_can_be_told():
    stories = read_stories(ROOT / "figures" / "soups")
    assert {"usps_seed", "digits_seed"} <= set(stories["zoo"])
    for _, results in stories.groupby(STORY, dropna=False):
        assert table_1(results).layout.shape[0] >= 5 and len(paired_table(results).numbers)


def test_stories_are_read_once_and_named_by_their_setting(tmp_path):
    results = story().drop(columns=[name for name in TOLD if name != "level"])
    for place, rate in (("a", 5e-3), ("b", None)):
        folder = tmp_path / "digits_seed" / place
        folder.mkdir(parents=True)
        save_metrics(results, folder / "results.parquet")
        write_json(
            {
                "zoo": "digits_seed",
                "chains": [{"selector": "lamp", "schedule": "LLR", "epochs": 5, "phases": 3, "lr": rate}],
            },
            folder / "run.json",
        )
    write_json({"zoo": "digits_seed", "experiment": "pairs"}, tmp_path / "digits_seed" / "c.json")
    again = tmp_path / "digits_seed" / "d"
    again.mkdir()
    save_metrics(results.head(3), again / "results.parquet")
    write_json(
        {
            "zoo": "digits_seed",
            "chains": [{"selector": "lamp", "schedule": "LLR", "epochs": 5, "phases": 3, "lr": 5e-3}],
        },
        again / "run.json",
    )
    found = read_stories(tmp_path)
    assert len(found) == 2 * len(results) and found["rate"].isna().sum() == len(results)
    assert setting_title(found.iloc[0]) == "Digits (s) Seed, LAMP to 90%, LLR 0.005"
    assert setting_title(one_story(found, rate=None).iloc[0]).endswith("LLR the zoo's rate")
    with pytest.raises(UserError, match="2 stories fit"):
        one_story(found, selector="lamp")
    with pytest.raises(UserError, match="0 stories fit"):
        one_story(found, selector="erk")
    with pytest.raises(UserError, match="no stories of soups under"):
        read_stories(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a readable table"):
        read_sweep(tmp_path, "digits_seed", "pairs")


def test_table_1_has_the_papers_rows_and_one_bold_cell_per_column():
    table = table_1(story().query("row != 'IMP with m phases'"))
    there = {
        ("SMS", "uniform"), ("best candidate", "uniform"), ("mean candidate", "uniform"), ("IMP_mx", ""), ("IMP", ""),
    }
    assert list(table.layout.index) == [
        f"{row} ({merge})" if merge else row for row, merge in ROWS if (row, merge) in there
    ]
    assert [[name for name, cell in column.items() if "**" in cell] for _, column in table.layout.items()] == [
        ["IMP_mx"],
        ["IMP_mx"],
    ]
    assert table.layout.iloc[0, 0] == "84.50 ± 1.87"


def test_paired_differences_are_those_of_the_models():
    table = paired_table(story())
    rows = table.numbers.set_index(["over", "phase"])
    assert np.allclose(rows.loc["mean candidate (uniform)", "gain"], 2) and np.allclose(rows.loc["IMP_mx", "gain"], -3)
    assert (
        (rows.loc["IMP_mx", "wins"] == 0).all()
        and (rows.loc["mean candidate (uniform)", "wins"] == 1).all()
        and (rows["n"] == 6).all()
    )
    assert table.layout.loc["IMP", ("45.0%, phase 1", "m = 3")].startswith("+1.50 [+1.50, +1.50], 100% win")
    uneven = story()
    uneven.loc[(uneven["row"] == "SMS") & (uneven["model"] == 0), "test_acc"] -= 0.06
    cell = paired_table(uneven).layout.loc["mean candidate (uniform)"].iloc[0]
    assert cell.startswith("+1.00 [-1.57, +3.57], 83% win, 0% tie")
    with pytest.raises(UserError, match="no greedy soups"):
        paired_table(story(), "greedy")


def test_a_single_model_has_no_interval():
    assert "nan" in difference_cell(pd.Series({"gain": 1.0, "error": np.nan, "wins": 1.0, "ties": 0.0}), 1)


def test_a_sweep_is_table_6():
    rows = sweep(schedules=("constant",), numbers=(3,))
    told = shot_story(rows).groupby(["row", "merge"])["test_acc"].mean()
    assert np.isclose(told["SMS", "uniform"], rows["uniform"].mean()) and np.isclose(
        told["IMP_mx", ""], rows["IMP_mx"].mean()
    )
    layout = table_6(rows).layout
    assert [heading for heading, _ in layout.columns] == [
        "70.0%, phase 1",
        "90.0%, phase 1",
    ] and "best by validation" not in layout.index


def test_tables_16_to_18():
    table = table_16(story())
    assert (
        table.layout.loc["difference", "m = 3"].startswith("-3.00")
        and table.layout.loc["IMP_mx", "m = 3"] == "87.5 (1.9)"
    )
    with pytest.raises(UserError, match="baseline phases"):
        table_16(story().query("row != 'IMP with m phases'"))
    table = table_17(sweep(), 0.9)
    assert list(table.layout) == ["constant", "LLR"] and all(
        cell.startswith("-2.00") for cell in table.layout.loc["difference"]
    )
    assert len(table.numbers) == 2 * 6
    table = table_18(sweep(schedules=("LLR",), numbers=(5,)))
    assert table.layout.loc["max L2 distance"].tolist() == ["1.40", "1.80"] and table.layout.loc[
        "mean distance / norm"
    ].tolist() == ["14.0%", "18.0%"]


def test_figures_draw_what_the_tables_say():
    def curves(ax):
        return {container.get_label(): container[0].get_ydata() for container in ax.containers}

    rows = sweep()
    fig = figure_9(rows)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["m = 3", "m = 5"]
    assert np.allclose(curves(fig.axes[1])["constant"], 4) and np.allclose(curves(fig.axes[0])["LLR"], -1)
    assert np.allclose(curves(figure_9(rows, "mean candidate").axes[1])["constant"], 5)
    lengths = sweep(schedules=("constant",), numbers=(3,), epochs=(1, 5))
    assert np.allclose(curves(figure_10(lengths).axes[0])["1 epoch"], 2)
    left, right = figure_4(rows.query("schedule == 'constant' and m == 5"), lengths).axes
    assert np.allclose(left.lines[0].get_ydata(), 4) and all(
        np.allclose(values, 0) for values in curves(right).values()
    )


def test_the_figure_of_pairs_counts_wins():
    pairs = pd.DataFrame(
        {
            "model": range(4), "first": 0, "second": 1, "varied": "seed", "level": 0.7, "schedule": "LLR",
            "better": 0.9, "soup": [0.91, 0.92, 0.9, 0.8],
        }
    )
    fig = figure_pairs(pd.concat([pairs, pairs.assign(schedule="constant", soup=1.0)]))
    texts = [ax.get_legend().get_texts()[0].get_text() for ax in fig.axes]
    assert texts == ["seed: 50% win", "seed: 100% win"]


def test_when_to_cook():
    stories = pd.concat([story(), story(longer=-0.01, rate=1e-3)])
    table = last_gains(stories).set_index(["title", "over"])
    assert np.allclose(table.xs("one run, m times as long", level="over")["gain"], [1, -3]) and (table["n"] == 6).all()
    assert np.allclose(table.xs("IMP", level="over")["gain"], 1.5)
    fig = figure_when(stories)
    titles = list(dict.fromkeys(table.index.get_level_values("title")))
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == [f"{title}, m = 3" for title in titles]


def test_every_number_of_copies_level_and_length_is_a_line_of_its_own():
    stories = pd.concat(
        [
            story(), story(m=10, soup=0.03), story(level=0.8), story(epochs=10),
            story(phases=1, epochs=10).assign(phases=1),
        ]
    )
    table = last_gains(stories)
    lines = table[["title", "m"]].drop_duplicates()
    assert len(lines) == 5 == len(figure_when(stories).axes[0].get_yticklabels()) and sorted(lines["m"]) == [
        3, 3, 3, 3, 10,
    ]
    assert {title.partition("0.005")[2] for title in lines["title"]} == {"", ", 3 x 10 epochs", ", 1 x 10 epochs"}
    assert np.allclose(table[(table["m"] == 10) & (table["over"] == "mean candidate")]["gain"], 3)


def test_differences_are_over_the_models_that_have_both():
    results = story()
    some = results[(results["row"] != "IMP_mx") | (results["model"] < 2)]
    table = last_gains(some).set_index("over")
    assert table["n"].to_dict() == {
        "mean candidate": 6, "IMP": 6, "best candidate (oracle)": 6, "one run, m times as long": 2,
    }
    assert paired_table(some).numbers.query("over == 'IMP_mx'")["n"].tolist() == [2, 2]


def test_of_one_setting_the_folder_with_most_models_is_read(tmp_path):
    chain = {"selector": "lamp", "schedule": "LLR", "epochs": 5, "phases": 2, "lr": 5e-3}
    made = {"few": story(n=3, soup=0.05), "many": pd.concat([story(n=8), story(n=8, m=5)])}
    made["few"] = pd.concat([made["few"], made["few"].query("row == 'SMS'").assign(merge="greedy")])
    for name, results in made.items():
        folder = tmp_path / "digits_seed" / name
        folder.mkdir(parents=True)
        save_metrics(results.drop(columns=[column for column in TOLD if column != "level"]), folder / "results.parquet")
        write_json({"zoo": "digits_seed", "chains": [chain]}, folder / "run.json")
    found = read_stories(tmp_path)
    assert found.groupby(["row", "merge", "m"])["model"].nunique().to_dict()["SMS", "uniform", 3] == 8
    assert (
        found.query("merge == 'greedy'")["model"].nunique() == 3
        and set(found["m"]) == {3, 5}
        and set(found["phases"]) == {2}
    )
    assert np.allclose(last_gains(found).query("over == 'mean candidate'")["gain"], 2)
