"""The second paper as a notebook: prose in front, code in a line or two, numbers of the prose in the kept tables."""
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from zootwins.soup_figures import one_story, read_stories, read_sweep
from zootwins.soup_questions import collapse_table, distance_correlations, middles, variational_gains

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "figures" / "soups"
CELLS = nbformat.read(ROOT / "nbs" / "paper_soups.ipynb", 4).cells
PROSE = "\n\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")


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


@pytest.fixture(scope="module")
def wide():
    usps = one_story(read_stories(FOLDER), zoo="usps_seed", selector="lamp", level=0.9, schedule="constant")
    return 100 * usps[usps["m"] == 3].pivot_table("test_acc", ["phase", "model"], ["row", "merge"])


def says(*numbers):
    "Whether the prose has these numbers next to each other, as in `1.04, 0.65 and 0.46`."
    return f"{', '.join(numbers[:-1])} and {numbers[-1]}" in PROSE


def test_gains_in_the_prose_are_those_of_the_story(wide):
    means = lambda left, right: [f"{abs(value):.2f}" for value in (wide[left] - wide[right]).groupby("phase").mean()]
    soup = ("SMS", "uniform")
    assert (
        says(*means(soup, ("mean candidate", "uniform")))
        and says(*means(soup, ("best candidate", "uniform")))
        and says(*means(soup, ("IMP_mx", "")))
    )
    lost = ((wide[soup] - wide[("IMP_mx", "")]).xs(3) < 0).mean()
    assert f"{lost:.0%}".replace("%", " %") in PROSE
    candidates = (wide[("mean candidate", "uniform")] - wide[("IMP", "")]).groupby("phase")
    assert all(f"{candidates.mean()[phase]:.2f} ± {candidates.sem()[phase]:.2f}" in PROSE for phase in (2, 3))


def test_numbers_of_the_sweeps_are_those_of_the_tables():
    lines = middles(read_sweep(FOLDER, "digits_seed", "lines")).xs("originals of other seeds")["middle"]
    assert (
        "{:.0%} in the middle as they are, {:.0%} permuted, {:.0%} permuted and flipped".format(*lines).replace(
            "%", " %"
        )
        in PROSE
    )
    variational = variational_gains(read_sweep(FOLDER, "digits_seed", "variational"))
    for epoch in (5, 10):
        row = variational.loc[epoch]
        assert (
            f"{row['sparsity, soup']:.1f}" in PROSE
            and f"{row['accuracy, soup']:.1f}" in PROSE
            and f"{row['sparsity']:.1f}" in PROSE
        )
    one_shot = read_sweep(FOLDER, "digits_seed", "one_shot").query("m == 5 and schedule == 'constant'")
    found = collapse_table(one_shot).xs(0.9, level="level")["candidates"].droplevel("schedule")
    assert f"{100 * found['lamp']:.1f} % and those of global pruning {100 * found['global']:.1f} %" in PROSE
    gain = distance_correlations(read_sweep(FOLDER, "digits_seed", "rates")).groupby("rate")["gain"].mean()
    assert (
        np.isclose(gain.iloc[0], 0.1, atol=0.05)
        and np.isclose(gain[5e-3], 0.5, atol=0.1)
        and f"{gain[1e-2]:.1f} at 1e-2" in PROSE
    )


def test_numbers_of_the_other_baselines_are_those_of_the_story():
    digits = one_story(read_stories(FOLDER), zoo="digits_seed", selector="lamp", level=0.9, schedule="constant")
    last = 100 * digits[(digits["phase"] == 3) & (digits["m"] == 3)].pivot_table("test_acc", "model", ["row", "merge"])
    soup, phases = last[("SMS", "uniform")], last[("IMP with m phases", "")]
    assert (
        f"end {(phases - last[('IMP_mx', '')]).mean():.1f} points above three phases of fifteen, "
        f"and {(phases - soup).mean():.1f} above the soup"
        in PROSE
    )
    for left, right in (("GMP+SMS", "GMP+SMS mean candidate"), ("GMP+SMS", "GMP")):
        difference = last[(left, "")] - last[(right, "")]
        assert f"{difference.mean():.2f} ± {difference.sem():.2f}" in PROSE
    together = soup - last[("prediction ensemble", "uniform")]
    assert (
        f"{abs(together.mean()):.2f} ± {together.sem():.2f} points" in PROSE
        and f"is {(last[('IMP ensemble', '')] - soup).mean():.1f} points better" in PROSE
    )


def test_a_falsified_gain_would_be_found(wide):
    assert not says("1.05", "0.65", "0.46") and isinstance(wide, pd.DataFrame)
