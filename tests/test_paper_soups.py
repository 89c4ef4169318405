"""The second paper as a notebook: prose in front, little code, and numbers that are looked up in the kept tables."""
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from test_soup_figures import TOLD as SETTING
from test_soup_figures import story

from zootwins.core import UserError, write_json
from zootwins.kept import TOLD, fact, fill, written
from zootwins.soup_facts import SOUP_FACTS, KeptSoups
from zootwins.soup_figures import read_sweep
from zootwins.twins import save_metrics

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "figures" / "soups"
CELLS = nbformat.read(ROOT / "nbs" / "paper_soups.ipynb", 4).cells
TEXTS = [cell.source for cell in CELLS if cell.cell_type == "markdown"]
PROSE = re.sub("<!--.*?-->", "", "\n\n".join(TEXTS))


def test_it_is_prose_with_short_cells_of_code():
    code = [cell.source for cell in CELLS if cell.cell_type == "code"]
    assert (
        max(len(source.splitlines()) for source in code) <= 3
        and max(len(line) for source in code for line in source.splitlines()) <= 120
    )
    paragraphs = [line for line in PROSE.split("\n") if not line.startswith(("#", ">", "$", "|"))]
    assert len(PROSE.split()) >= 2500 and max(len(line.split()) for line in paragraphs) <= 90


def test_every_code_cell_that_shows_something_has_its_output():
    shown = [
        cell
        for cell in CELLS
        if cell.cell_type == "code" and "import" not in cell.source and " = " not in cell.source.splitlines()[-1]
    ]
    assert (
        len(shown) > 25
        and all(cell.outputs for cell in shown)
        and not any(out.output_type == "error" for cell in shown for out in cell.outputs)
    )


def test_the_answer_comes_first_and_with_numbers():
    headings = re.findall("^## (.*)$", PROSE, re.M)
    assert headings[0] == "When to cook a soup, and when to train longer"
    answer = next(text for text in TEXTS if text.startswith("**Train longer"))
    assert "**Cook a soup" in answer and len(TOLD.findall(answer)) >= 10 and len(TOLD.findall(TEXTS[0])) >= 4


@pytest.fixture(scope="module")
def kept():
    return KeptSoups(FOLDER)


@pytest.fixture(scope="module")
def facts(kept):
    return {found["key"]: fact(kept, found["key"], SOUP_FACTS) for text in TEXTS for found in TOLD.finditer(text)}


def false_numbers(text, facts):
    "Numbers of a text that their keys do not give."
    return [found[0] for found in TOLD.finditer(text) if written(facts[found["key"]], found["text"]) != found["text"]]


def test_numbers_in_the_prose_are_those_of_the_kept_results(facts):
    assert not [false for text in TEXTS for false in false_numbers(text, facts)] and len(facts) > 80
    assert all(text.count("<!--") == len(TOLD.findall(text)) for text in TEXTS)


def test_any_falsified_number_is_found(facts):
    for text in TEXTS:
        for found in TOLD.finditer(text):
            false = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), found["text"][::-1], count=1)[::-1]
            assert false_numbers(text[: found.start("text")] + false + text[found.end("text"):], facts), found[0]


def test_no_gain_in_points_is_said_without_a_key():
    "Two decimals are a result, and so is what stands beside an error; a section or a table is neither."
    bare = [TOLD.sub("", line) for text in TEXTS for line in text.split("\n") if not line.startswith((">", "|", "#"))]
    assert not [line for line in bare if re.search(r"\d\.\d\d|±\s*\d|\d\s*±", line)]


def kept_story(folder, results):
    "Keep a story as the notebook does."
    folder.mkdir(parents=True)
    save_metrics(results.drop(columns=[name for name in SETTING if name != "level"]), folder / "results.parquet")
    write_json(
        {
            "zoo": "digits_seed",
            "chains": [{"selector": "lamp", "schedule": "constant", "epochs": 5, "phases": 2, "lr": 5e-3}],
        },
        folder / "run.json",
    )


def test_facts_of_a_story_whose_answers_are_known(tmp_path):
    kept_story(tmp_path / "digits_seed" / "a", story(n=6))
    kept_story(tmp_path / "digits_seed" / "b", story(n=6, m=5, soup=0.03))
    made = KeptSoups(tmp_path)
    found = lambda key: fact(made, key, SOUP_FACTS)
    gain = "gain 'digits_seed lamp 90 constant' 'SMS (uniform)' 'mean candidate (uniform)'"
    assert (
        np.isclose(found(f"{gain} 3 2"), 2)
        and np.isclose(found(f"minus {gain} 5 1"), -3)
        and np.isclose(found(f"{gain} 3 2 wins"), 100)
    )
    assert np.isclose(found("last 'mean candidate' min"), 2) and np.isclose(
        found("last 'mean candidate' max constant"), 3
    )
    assert found("stories") == 1 and found("models 'digits_seed lamp 90 constant'") == 6
    assert found("holding 'soups beat longer training'") == 0 and found("tried 'soups beat longer training'") == 1
    assert np.isclose(found("accuracy 'digits_seed lamp 90 constant' 'SMS (uniform)' 5 1"), 100 * (0.8 + 0.025 + 0.03))


def test_facts_of_the_sweeps_are_those_of_their_tables(kept):
    rates = read_sweep(FOLDER, "digits_seed", "rates").query("rate == 0.01")
    assert np.isclose(
        fact(kept, "sweep digits_seed rates 'rate == 0.01' uniform 'mean candidate'", SOUP_FACTS),
        100 * (rates["uniform"] - rates["mean candidate"]).mean(),
    )
    assert np.isclose(
        fact(kept, "sweep digits_seed rates 'rate == 0.01' uniform", SOUP_FACTS), 100 * rates["uniform"].mean()
    )
    runs = read_sweep(FOLDER, "digits_seed", "variational").query("epoch == 5 and row == 'VD soup'")
    assert np.isclose(
        fact(kept, "variational digits_seed 5 'sparsity, soup'", SOUP_FACTS), 100 * runs["sparsity"].mean()
    )


@pytest.mark.parametrize(
    "key, problem",
    [
        ("gain 'digits_seed erk 90 constant' a b 3 3", "0 stories fit"), ("gains", "Valid: gain|did you mean 'gain'"),
        ("sweep digits_seed rates 'rate == 7' uniform", "No row of rates"),
        ("gain 'digits_seed lamp 90 constant' nothing IMP 3 3", "does not name"),
    ],
)
def test_a_key_that_names_nothing_is_refused(kept, key, problem):
    with pytest.raises(UserError, match=problem) as error:
        fact(kept, key, SOUP_FACTS)
    assert "\n" not in str(error.value)


def test_new_results_change_the_sentence(tmp_path, kept):
    text = "It gains 0.00<!-- gain 'digits_seed lamp 90 constant' 'SMS (uniform)' IMP 3 2 --> points."
    kept_story(tmp_path / "digits_seed" / "a", story(n=6))
    assert fill(KeptSoups(tmp_path), text, SOUP_FACTS).startswith("It gains 1.50<!--") and not fill(
        kept, text, SOUP_FACTS
    ).startswith("It gains 1.50<!--")


def test_kept_records_name_their_commit():
    commits = {path: json.loads(path.read_text())["commit"] for path in FOLDER.glob("*/*/run.json")}
    assert all(re.fullmatch("[0-9a-f]{40}", str(commit)) for commit in commits.values()), commits
