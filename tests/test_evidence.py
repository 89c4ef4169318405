"""What is kept and what README says, made again from the metrics: a number that was changed by hand does not pass."""
import ast
import json
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from zootwins.claims import CLAIMS, tables_of
from zootwins.comparison import COMPARED, TESTED, beside_print, compare, distinct_states, headline, side_by_side
from zootwins.core import UserError, read_json
from zootwins.kept import TOLD, Kept, fact, fill, refill, written
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
    "What differs between a kept CSV and the numbers made again, in words; other processors may round the last digits."
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
    assert {"table_1", "table_2", "table_5", "table_6", "table_7", "table_8", "table_9", "claims"} <= set(
        made[zoo]
    ) and ("comparison" in made[zoo]) == ZOOS[zoo].in_paper
    wrong = {
        name: differences(pd.read_csv(ROOT / "figures" / zoo / f"{name}.csv"), saved(table.numbers))
        for name, table in made[zoo].items()
    }
    assert not any(wrong.values()), wrong


def test_the_papers_tables_follow_from_the_metrics(metrics, made, comparison):
    folder, every = ROOT / "figures" / "paper", pd.concat(metrics.values(), ignore_index=True)
    tables = {table.name: table.numbers for table in all_tables(every)} | {
        "comparison": side_by_side(comparison).numbers
    }
    tables |= {f"table_{number}_beside": beside_print(comparison, number).numbers for number in COMPARED}
    order = [claim.name for claim in CLAIMS]
    tables["claims"] = pd.concat([made[zoo]["claims"].numbers for zoo in KEPT]).sort_values(
        "claim", key=lambda names: names.map(order.index), kind="stable", ignore_index=True
    )
    wrong = {name: differences(pd.read_csv(folder / f"{name}.csv"), saved(numbers)) for name, numbers in tables.items()}
    assert not any(wrong.values()), wrong


def test_a_falsified_table_is_found(metrics):
    made = saved(
        next(table.numbers for table in tables_of(metrics["digits_seed"].query("model < 8")) if table.name == "table_6")
    )
    assert differences(made, made) == [] and differences(made.head(-1), made)
    for name in ("mean", "std", "n", "metric"):
        false = made.astype({"n": float})
        false.loc[7, name] = "ggap" if name == "metric" else made.loc[7, name] + 0.1
        assert len(differences(false, made.astype({"n": float}))) == 1


# --- README

def tables_in(text):
    "Tables of a page in Markdown: heading and rows as lists of cells."
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    lines = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
        for block in blocks
    ]
    return [(of[0], of[2:]) for of in lines if len(of) > 2]


def score_rows(comparison, models):
    "What a table of zoos may show: title -> column -> text."
    lines = headline(comparison)
    tested = comparison[comparison["verdict"].isin(TESTED) & (comparison["zoo"] != "")]
    rows = {}
    for zoo in [*KEPT, "all"]:
        of_zoo = tested if zoo == "all" else tested[tested["zoo"] == zoo]
        first = {
            column: str((of_zoo["first"] == word).sum())
            for column, word in (("agree", "agrees"), ("near", "near"), ("differ", "differs"))
        }
        row = {"models": "" if zoo == "all" else str(models[zoo]), "cells judged": str(len(of_zoo)), **first} | (
            lines.loc[zoo].to_dict() if zoo in lines.index else {}
        )
        rows[zoo_title(zoo)] = row | {"folder": f"`figures/{'paper' if zoo == 'all' else zoo}/`"}
    return rows


def state_cell(zoo, label, metric, metrics):
    "Ours and the printed cell of a row such as 'Pruned by 50 %, fine-tuned'."
    pruned, dropped = (
        re.match(r"Pruned by (\d+) %, (before fine-tuning|fine-tuned)", label),
        re.match(r"Variational dropout, epoch (\d+)", label),
    )
    rows = metrics[zoo]
    if pruned:
        level, epoch = int(pruned[1]) / 100, 0 if pruned[2].startswith("before") else ZOOS[zoo].mp_epochs
        rows, state = (
            rows[(rows["method"] == "mp") & np.isclose(rows["level"], level) & (rows["epoch"] == epoch)],
            ("mp", level, epoch),
        )
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
            wrong += [
                name for name in heading
                if "models" in name and f"{metrics[zoo]['model'].nunique():,} models" not in name
            ]
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
                original = next(
                    row
                    for row in text.split("\n")
                    if row.startswith("|") and [cell.strip() for cell in row.strip("|").split("|")] == line
                )
                for place in (
                    i for i, cell in enumerate(line) if i and re.search(r"\d", cell) and "figures" not in cell
                ):
                    false = [*line]
                    false[place] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), line[place], count=1)
                    falsified = text.replace(original, "| " + " | ".join(false) + " |")
                    assert wrong_cells(falsified, rows, metrics)[0], false


def test_readme_counts_the_cells_that_differ(comparison):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    off = comparison[(comparison["verdict"] == "different") & ~comparison["calibrated"].astype(bool)]
    of_fmnist = off.query("zoo == 'fmnist_seed' and metric == 'ggap' and method == 'mp' and epoch == 15")
    said = re.search(
        r"The (\d+) cells that are different are (\d+) numbers.*?: (\d+) correlations.*?, (\d+) generalisation gaps, "
        r"(\d+) agreements, (\d+) accuracies and (\d+) sparsities", text,
    )
    gaps = re.search(r"gaps that differ, (\d+) are of FMNIST Seed after.*? The other (\d+) are of CIFAR", text)
    of_large = off.query("zoo == 'cifar10_large_seed' and metric == 'ggap' and epoch == 15")
    pruned = (off["table"] == 2) & (off["method"] == "mp")
    counts = pd.Series({metric: distinct_states(rows) for metric, rows in off.groupby("metric")})
    assert said and tuple(map(int, said.groups())) == (
        len(off), distinct_states(off), pruned.sum(),
        *counts[["ggap", "agreement", "test_acc", "sparsity"]],
    )
    assert gaps and (int(gaps[1]), int(gaps[2])) == (distinct_states(of_fmnist), distinct_states(of_large))
    assert int(gaps[1]) + int(gaps[2]) == counts["ggap"] and pruned.sum() + counts.drop(
        ["pearson", "kendall"]).sum() == distinct_states(off)


@pytest.fixture(scope="module")
def told():
    """What the cells behind README's tables and lists say when they run anew: id -> (their text, the stored one).

    Cells that train are left out, and none of these reads what they made.
    """
    names, found = {}, {}
    for cell in read_json(ROOT / "nbs" / "index.ipynb")["cells"]:
        if cell["cell_type"] == "code" and not re.search(r"sample_population|train\(", "".join(cell["source"])):
            tree = ast.parse("".join(cell["source"]))
            shown = isinstance(tree.body[-1], ast.Expr) and "hide_input" in cell["metadata"].get("tags", [])
            last = ast.Expression(tree.body.pop().value) if shown else None
            exec(compile(tree, cell["id"], "exec"), names)
            if last is not None:
                stored = "".join(cell["outputs"][0]["data"]["text/markdown"])
                found[cell["id"]] = eval(compile(last, cell["id"], "eval"), names).data, stored
    return found


def readme():
    "README, with links as in the notebook that it comes from."
    return (ROOT / "README.md").read_text(encoding="utf-8").replace("](nbs/", "](")


def not_said(text, told):
    "Cells whose words do not stand on a page."
    return [name for name, (made, _) in told.items() if made.strip() not in text]


def test_readme_says_what_its_cells_give(told):
    """Every word of README's tables and of the list of what speaks against us, computed again from what is kept."""
    assert len(told) == 5 and any("speaks against" in made for made, _ in told.values())
    assert [name for name, (made, stored) in told.items() if made != stored] == []
    assert not_said(readme(), told) == []


def test_any_falsified_digit_of_what_the_cells_give_is_found(told):
    text = readme()
    for name, (made, _) in told.items():
        start = text.index(made.strip())
        for place in (found.start() for found in re.finditer(r"\d", made.strip())):
            digit = str((int(text[start + place]) + 1) % 10)
            assert name in not_said(text[: start + place] + digit + text[start + place + 1:], told)


# --- the paper's prose

PROSE = [(name, cell["id"], "".join(cell["source"])) for name in ("paper", "paper_appendix", "index")
         for cell in read_json(ROOT / "nbs" / f"{name}.ipynb")["cells"] if cell["cell_type"] == "markdown"]
UNKEYED = {
    "settings and levels": "2,416 2,560 1,000 15 25 3e-4 1e-3 0 50 60 70 80 90", "rules": "5 20 60 95 1.96",
    "printed, and tested in test_reported": "75.1 73.8 72.8 33,920 23,920 1,721,600 1,726,000 14 200",
}  # what a sentence may say without a key: nothing that a run has found


@pytest.fixture(scope="module")
def kept():
    return Kept(ROOT / "figures")


@pytest.fixture(scope="module")
def facts(kept):
    return {found["key"]: fact(kept, found["key"]) for _, _, text in PROSE for found in TOLD.finditer(text)}


def false_numbers(text, facts):
    "Numbers and verdicts of a sentence that their keys do not give."
    return [found[0] for found in TOLD.finditer(text) if written(facts[found["key"]], found["text"]) != found["text"]]


def test_the_prose_says_what_the_metrics_say(facts):
    assert not [false for _, _, text in PROSE for false in false_numbers(text, facts)] and len(facts) > 100
    assert all(text.count("<!--") == len(TOLD.findall(text)) for _, _, text in PROSE)


def test_any_falsified_number_in_the_prose_is_found(facts):
    for _, _, text in PROSE:
        for found in TOLD.finditer(text):
            said = found["text"]
            false = (
                re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), said[::-1], count=1)[::-1]
                if re.search(r"\d", said)
                else "never holds"
            )
            assert false_numbers(text[: found.start("text")] + false + text[found.end("text"):], facts), said


def unkeyed(text):
    "Numbers of a text without a key; quotations, equations, code, links and names such as 'Table 5' do not count."
    text = TOLD.sub("", text)
    text = re.sub(
        r"^>.*$|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|\[\d\d_\w+", "", text,
        flags=re.M | re.S if "$$" in text else re.M,
    )
    text = re.sub(
        r"\b(Tables?|Figures?|Equations?|Sections?|epochs?) \d[\d.]*((, | to | and )\d+(?!\.?\d))*|\b(CIFAR|STL)-10\b",
        "",
        text,
    )
    text = re.sub(r"\b20\d\d\b|^#+ \d.*$|\barXiv\S*|\d\d_\w+", "", text, flags=re.M)
    return set(re.findall(r"\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-\d)?", text))


def test_no_number_is_said_without_a_key(facts):
    allowed = set(" ".join(UNKEYED.values()).split())
    assert unkeyed("At 50 % they keep 88.7 %, and 12.3<!-- mean x --> more in Table 5 of $n=7$.") == {"50", "88.7"}
    said = {number: text[:60] for name, _, text in PROSE if name != "index" for number in unkeyed(text) - allowed}
    assert not said


def test_what_the_prose_reads_is_what_the_metrics_give(kept, comparison, made):
    """Keys read kept files; these are compared with the metrics above, and the score with a new comparison here."""
    ours = headline(kept.comparison)
    pd.testing.assert_frame_equal(ours.sort_index(), headline(comparison).sort_index())  # in any order of zoos
    for zoo in KEPT:
        assert not differences(kept.table(zoo, "claims"), saved(made[zoo]["claims"].numbers))


def test_statements_are_counted_in_zoos_that_have_all_their_numbers(kept):
    """Fashion-MNIST's grids were never pruned, so nothing is said there about both methods."""
    rows = kept.claims[kept.claims["claim"] == "agreement is high"]
    verdicts = {zoo: dict(zip(of["of"], of["verdict"])) for zoo, of in rows.groupby("zoo")}
    both = [zoo for zoo, of in verdicts.items() if {"MP", "VD"} <= set(of)]
    assert "fmnist_fixed" not in both and fact(kept, "tried 'agreement is high'") == len(both) < len(verdicts)
    holds = lambda verdict: sum(set(verdicts[zoo].values()) == {verdict} for zoo in both)
    assert fact(kept, "holding 'agreement is high'") == holds("holds") > 0
    assert fact(kept, "holding 'agreement is high' '' 'does not hold'") == holds("does not hold") == 0
    dropped = [of["VD"] for of in verdicts.values()]
    assert fact(kept, "holding 'agreement is high' VD 'does not hold'") == dropped.count("does not hold") > 0
    assert fact(kept, "tried 'agreement is high' VD") == len(verdicts)


def test_cells_are_counted_by_table_measure_method_and_verdict(kept):
    cells = kept.comparison
    first = cells[(cells["table"] == 1) & (cells["metric"] == "agreement")]
    for verdict in TESTED:
        assert fact(kept, f"counted 1 agreement '' {verdict}") == (first["verdict"] == verdict).sum()
    dropped = first[(first["method"] == "vd") & (first["verdict"] == "undecided")]
    assert fact(kept, "counted 1 agreement vd undecided") == len(dropped) > 0
    lines = headline(cells)["predicted"].astype(int)
    assert fact(kept, "score seeds predicted") + fact(kept, "score grids predicted") == lines["all"]
    assert fact(kept, "score grids predicted") == lines[lines.index.str.contains("_fixed|_random")].sum() > 0
    assert fact(kept, "score usps_seed predicted") == lines["usps_seed"]
    assert 0 < fact(kept, "recorded mnist_seed p") <= 1 and fact(kept, "matched mnist_random error") > 0


@pytest.mark.parametrize(
    "key, problem",
    [
        ("mean usps_seed test_acc mp 0.85", "has no mp at 0.85"), ("mean usps_sed test_acc mp 0.8", "usps_sed"),
        ("men usps_seed", "Valid: mean"), ("claim usps_seed 'agreement is high' XY value", "names 0 numbers"),
        ("printed mnist_fixed agreement mp 0.8", "prints no"), ("mean usps_seed", "does not name"),
    ],
)
def test_a_key_that_names_nothing_is_refused(kept, key, problem):
    with pytest.raises(UserError, match=problem) as error:
        fact(kept, key)
    assert "\n" not in str(error.value)


def test_numbers_keep_their_form(kept, tmp_path):
    assert [written(1234.5678, like) for like in ("0", "0.0", "+0.00", "9,999")] == [
        "1,235", "1,234.6", "+1,234.57", "1,235",
    ]
    assert written(-0.001, "0.0") == "0.0" and written("holds", "fails") == "holds"
    text = (
        "It is 0.0<!-- mean usps_seed test_acc mp 0.8 --> %, "
        "and **no<!-- claim usps_seed 'agreement is high' VD verdict -->**."
    )
    filled = fill(kept, text)
    assert fill(kept, filled) == filled and "holds<!--" in filled
    tuned = kept.metrics.query("zoo == 'usps_seed' and method == 'mp' and epoch == 15 and abs(level - 0.8) < 1e-6")
    assert f"It is {100 * tuned['test_acc'].mean():.1f}<!--" in filled
    path = tmp_path / "some.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {"cell_type": "markdown", "id": "a", "source": [text]},
                    {"cell_type": "code", "id": "b", "source": [text]},
                ]
            }
        )
    )
    assert refill(kept, path) == ["a"] and refill(kept, path) == []
    assert ["".join(cell["source"]) for cell in read_json(path)["cells"]] == [filled, text]


def test_the_notebook_is_one_that_is_read():
    code = [cell for cell in read_json(ROOT / "nbs" / "paper.ipynb")["cells"] if cell["cell_type"] == "code"]
    assert max(len(cell["source"]) for cell in code) <= 3 and (ROOT / "nbs" / "paper.ipynb").stat().st_size < 1_000_000
    prose = [re.sub(r"<!--.*?-->|^>.*$", "", text, flags=re.M) for name, _, text in PROSE if name == "paper"]
    paragraphs = [paragraph for text in prose for paragraph in text.split("\n\n") if not paragraph.startswith("$$")]
    assert sum(len(paragraph.split()) for paragraph in paragraphs) > 2500
    assert max(len(paragraph.split()) for paragraph in paragraphs if not paragraph.startswith("- ")) <= 90
    equations = " ".join(text for name, _, text in PROSE if name == "paper")
    assert all(f"\\tag{{{number}}}" in equations for number in range(1, 7))
