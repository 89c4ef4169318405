"""What is kept and what README says, made again from the metrics: a number that was changed by hand does not pass."""
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from zootwins.claims import CLAIMS, tables_of
from zootwins.comparison import COMPARED, TESTED, beside_print, compare, headline, side_by_side
from zootwins.metrics import read_metrics
from zootwins.reported import reported
from zootwins.tables import all_tables, mean_std, zoo_title
from zootwins.zoos import ZOOS

ROOT = Path(__file__).resolve().parents[1]
KEPT = [zoo for zoo in ZOOS if (ROOT / "figures" / zoo / "run.json").exists()]


def saved(numbers):
    "A frame as its CSV file says it."
    return pd.read_csv(StringIO(numbers.to_csv(index=False, float_format="%.6g")))


def differences(kept, made):
    "What differs between a kept CSV and the numbers made again, in words; other processors may round the last digits differently."
    if list(kept) != list(made) or len(kept) != len(made):
        return [f"columns or rows: {kept.shape} for {made.shape}"]
    found = []
    for name in kept:
        one, two = kept[name], made[name]
        numeric = pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(two)
        same = np.isclose(one.astype(float), two.astype(float), rtol=1e-4, atol=1e-6,
            equal_nan=True) if numeric else (one.fillna("").astype(str) == two.fillna("").astype(str)).to_numpy()
        found += [f"{name}, line {line + 2}: {one[line]} for {two[line]}" for line in np.flatnonzero(~same)]
    return found


@pytest.fixture(scope="module")
def metrics():
    return {zoo: read_metrics(ROOT / "figures" / zoo / "metrics.parquet") for zoo in KEPT}


@pytest.fixture(scope="module")
def made(metrics):
    return {zoo: {table.name: table for table in tables_of(of_zoo)} for zoo, of_zoo in metrics.items()}


@pytest.fixture(scope="module")
def comparison(metrics):
    return compare(pd.concat(metrics.values(), ignore_index=True))


@pytest.fixture(scope="module")
def rows(comparison, metrics):
    return score_rows(comparison, {zoo: of_zoo["model"].nunique() for zoo, of_zoo in metrics.items()})


@pytest.mark.parametrize("zoo", KEPT)
def test_kept_tables_follow_from_the_metrics(zoo, made):
    assert {"table_1", "table_2", "table_5", "table_6", "table_7", "table_8", "table_9", "claims"} <= set(made[zoo]) and ("comparison" in made[zoo]) == ZOOS[zoo].in_paper
    wrong = {name: differences(pd.read_csv(ROOT / "figures" / zoo / f"{name}.csv"), saved(table.numbers)) for name, table in made[zoo].items()}
    assert not any(wrong.values()), wrong


def test_the_papers_tables_follow_from_the_metrics(metrics, made, comparison):
    folder, every = ROOT / "figures" / "paper", pd.concat(metrics.values(), ignore_index=True)
    tables = {table.name: table.numbers for table in all_tables(every)} | {"comparison": side_by_side(comparison).numbers}
    tables |= {f"table_{number}_beside": beside_print(comparison, number).numbers for number in COMPARED}
    order = [claim.name for claim in CLAIMS]
    tables["claims"] = pd.concat([made[zoo]["claims"].numbers for zoo in KEPT]).sort_values("claim", key=lambda names: names.map(order.index), kind="stable", ignore_index=True)
    wrong = {name: differences(pd.read_csv(folder / f"{name}.csv"), saved(numbers)) for name, numbers in tables.items()}
    assert not any(wrong.values()), wrong


def test_a_falsified_table_is_found(metrics):
    made = saved(next(table.numbers for table in tables_of(metrics["digits_seed"].query("model < 8")) if table.name == "table_6"))
    assert differences(made, made) == [] and differences(made.head(-1), made)
    for name in ("mean", "std", "n", "metric"):
        false = made.astype({"n": float})
        false.loc[7, name] = "ggap" if name == "metric" else made.loc[7, name] + 0.1
        assert len(differences(false, made.astype({"n": float}))) == 1


# --- README

def tables_in(text):
    "Tables of a page in Markdown: heading and rows as lists of cells."
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    lines = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")] for block in blocks]
    return [(of[0], of[2:]) for of in lines if len(of) > 2]


def score_rows(comparison, models):
    "What a table of zoos may show: title -> column -> text."
    lines = headline(comparison)
    tested = comparison[comparison["verdict"].isin(TESTED) & (comparison["zoo"] != "")]
    rows = {}
    for zoo in [*KEPT, "all"]:
        of_zoo = tested if zoo == "all" else tested[tested["zoo"] == zoo]
        first = {column: str((of_zoo["first"] == word).sum()) for column, word in (("agree", "agrees"), ("near", "near"), ("differ", "differs"))}
        row = {"models": "" if zoo == "all" else str(models[zoo]), "cells judged": str(len(of_zoo)), **first} | (lines.loc[zoo].to_dict() if zoo in lines.index else {})
        rows[zoo_title(zoo)] = row | {"folder": f"`figures/{'paper' if zoo == 'all' else zoo}/`"}
    return rows


def state_cell(zoo, label, metric, metrics):
    "Ours and the printed cell of a row such as 'Pruned by 50 %, fine-tuned'."
    pruned, dropped = re.match(r"Pruned by (\d+) %, (before fine-tuning|fine-tuned)", label), re.match(r"Variational dropout, epoch (\d+)", label)
    rows = metrics[zoo]
    if pruned:
        level, epoch = int(pruned[1]) / 100, 0 if pruned[2].startswith("before") else ZOOS[zoo].mp_epochs
        rows, state = rows[(rows["method"] == "mp") & np.isclose(rows["level"], level) & (rows["epoch"] == epoch)], ("mp", level, epoch)
    else:
        epoch = int(dropped[1]) if dropped else 0
        rows, state = rows[(rows["method"] == "vd") & (rows["epoch"] == epoch)], ("vd", None, epoch)
    return mean_std(100 * rows[metric].mean(), 100 * rows[metric].std()), mean_std(*reported(zoo, metric, *state))


def wrong_cells(text, rows, metrics):
    "Cells of README's tables that the metrics do not give, and the number of cells that were looked at."
    wrong, seen, titles = [], 0, {zoo_title(zoo): zoo for zoo in KEPT}
    for heading, lines in tables_in(text):
        if heading[:2] == ["zoo", "models"]:
            for title, *cells in lines:
                for column, cell in zip(heading[1:], cells):
                    seen += 1
                    wrong += [f"{title}, {column}: {cell}"] if cell not in (rows.get(title, {}).get(column),
                        "-" if title in titles and not ZOOS[titles[title]].in_paper else None) else []
            wrong += [f"{title} is missing" for title in set(titles) - {line[0] for line in lines}]
        elif heading[0] in titles and any(name.startswith("accuracy") for name in heading):
            zoo = titles[heading[0]]
            wrong += [name for name in heading if "models" in name and f"{metrics[zoo]['model'].nunique()} models" not in name]
            for label, *cells in lines:
                wanted = [*state_cell(zoo, label, "test_acc", metrics), *state_cell(zoo, label, "ggap", metrics)]
                seen += len(cells)
                wrong += [f"{label}: {cell} for {right}" for cell, right in zip(cells, wanted) if cell != right]
    return wrong, seen


def test_readme_says_what_the_metrics_say(rows, metrics):
    wrong, seen = wrong_cells((ROOT / "README.md").read_text(encoding="utf-8"), rows, metrics)
    assert not wrong and seen > 20, wrong


def test_any_falsified_number_in_readme_is_found(rows, metrics):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, lines in tables_in(text):
        if heading[:2] == ["zoo", "models"] or heading[0] in {zoo_title(zoo) for zoo in KEPT}:
            for line in lines:
                original = next(row for row in text.split("\n") if row.startswith("|") and [cell.strip() for cell in row.strip("|").split("|")] == line)
                for place in (i for i, cell in enumerate(line) if i and re.search(r"\d", cell) and "figures" not in cell):
                    false = [*line]
                    false[place] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), line[place], count=1)
                    falsified = text.replace(original, "| " + " | ".join(false) + " |")
                    assert wrong_cells(falsified, rows, metrics)[0], false


def test_readme_counts_the_cells_that_differ(comparison):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tested = comparison[comparison["verdict"].isin(TESTED)]
    for word, column in (("differ", "first"), ("are different", "verdict")):
        for count, correlations in re.findall(rf"Of the (\d+) cells that {word}, (\d+) are correlations", text):
            off = tested[tested[column] == ("differs" if column == "first" else "different")]
            assert (int(count), int(correlations)) == (len(off), ((off["table"] == 2) & (off["method"] == "mp")).sum())
