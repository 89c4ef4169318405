"""Kept runs with several selectors: the first paper's tables, figures and sentences take the zoo's own."""
import shutil
from pathlib import Path

import pandas as pd
import pytest

from zootwins.figures import FIGURES
from zootwins.kept import Kept, fact, kept_partners
from zootwins.metrics import with_selectors
from zootwins.reported import read_reported

ROOT = Path(__file__).resolve().parents[1]
ZOO = "usps_seed"
NAMES = ("run.json", "metrics.parquet", "claims.csv", "comparison.csv", "table_2.csv", "table_partners.csv")


def widened(table, selector="lamp"):
    "The table, with every row of magnitude pruning once more for another selector, under other numbers."
    own = with_selectors(table)
    other = own[own["method"] == "mp"].assign(selector=selector)
    return pd.concat(
        [other.assign(**{name: 0.5 * other[name] for name in ("test_acc", "value", "mean") if name in other}), own],
        ignore_index=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "The kept run of one zoo, and the same with twins by a second selector in front."
    runs = [tmp_path_factory.mktemp(name) for name in ("own", "wide")]
    for folder in runs:
        (folder / ZOO).mkdir()
        for name in NAMES:
            shutil.copy(ROOT / "figures" / ZOO / name, folder / ZOO / name)
    place = runs[1] / ZOO
    widened(pd.read_parquet(place / "metrics.parquet").astype({"method": object})).to_parquet(
        place / "metrics.parquet", index=False
    )
    for name in ("table_2.csv", "table_partners.csv"):
        widened(pd.read_csv(place / name)).to_csv(place / name, index=False)
    return [Kept(folder) for folder in runs]


@pytest.mark.parametrize(
    "key",
    [
        f"mean {ZOO} test_acc mp 0.8", f"std {ZOO} test_acc mp 0.8", f"lowest {ZOO} test_acc mp 0.9", f"lead {ZOO} 0.8",
        f"models {ZOO}", f"correlation {ZOO} mp pearson", f"partner {ZOO} mp 'its own original'",
    ],
)
def test_sentences_take_the_zoos_own_selector(both, key):
    one, two = (fact(kept, key) for kept in both)
    assert one == pytest.approx(two, abs=1e-9)


def test_figures_and_tables_take_the_zoos_own_selector(both):
    assert set(both[1].metrics.query("method == 'mp'")["selector"]) == {"global"} and len(both[0].metrics) == len(
        both[1].metrics
    )
    lines = lambda figure: [(line.get_label(), list(line.get_ydata())) for ax in figure.axes for line in ax.lines]
    one, two = (FIGURES["figure_5"](kept.of(ZOO), read_reported()) for kept in both)
    assert len(lines(one)) and str(lines(one)) == str(lines(two))
    assert kept_partners(both[0]).layout.equals(kept_partners(both[1]).layout)
