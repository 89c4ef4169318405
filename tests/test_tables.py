"""Tables of a small run whose numbers are known by hand."""
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from zootwins.core import UserError
from zootwins.metrics import LAYERS, tidy
from zootwins.states import TABLE_1_STATES, choose_states
from zootwins.tables import (
    LATEX, PACKAGES, TABLE_4_COLUMNS, TABLES, all_tables, latex_table, latex_text, mean_std, save_table, states_text,
    table_1, table_2, table_4, table_5, table_6, table_7, table_8, table_9,
)
from zootwins.zoos import CALIBRATED, ZOOS, list_zoos


def rows(zoo, method, level, epoch, test_acc, sparsity=0.0, gap=0.01, agreement=None):
    n = len(test_acc)
    test_acc = torch.tensor(test_acc, dtype=torch.float64)
    parts = {"sparsity": torch.full((n,), sparsity)} | {
        f"sparsity_{layer}": torch.full((n,), sparsity * (i + 1) / 5) for i, layer in enumerate(LAYERS)
    }
    agreement = None if agreement is None else torch.tensor(agreement)
    return tidy(zoo, method, level, epoch, range(n), (test_acc, test_acc + gap), (test_acc, test_acc), parts, agreement)


def run(zoo="usps_seed", levels=(0.0, 0.5, 0.9), mp_epochs=15, vd_epochs=25):
    before = [0.90, 0.80, 0.85]
    parts = [rows(zoo, "original", None, epoch, [acc * epoch / 50 for acc in before]) for epoch in (0, 50)]
    for level in levels:
        after = [[acc - level * drop for acc in before] for drop in (0.6, *[0.3] * mp_epochs)]
        parts += [
            rows(zoo, "mp", level, epoch, accuracies, level, agreement=[0.7, 0.8, 0.9])
            for epoch, accuracies in enumerate(after)
        ]
    parts += [
        rows(zoo, "vd", None, epoch, [acc - 0.01 * epoch for acc in before], 0.04 * epoch, -0.05, [0.6, 0.7, 0.8])
        for epoch in range(vd_epochs + 1)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def metrics():
    return run()


def test_table_5_has_the_papers_layout(metrics):
    layout = table_5(metrics).layout
    assert layout.index.tolist() == [("All", "Spar"), ("USPS (s) Seed", "Acc"), ("USPS (s) Seed", "GGap")]
    assert layout.columns.tolist() == [(level, epoch) for level in ("0%", "50%", "90%") for epoch in (0, 15)]
    assert (
        layout.loc[("USPS (s) Seed", "Acc"), ("50%", 0)] == "55.0 (5.0)"
        and layout.loc[("USPS (s) Seed", "Acc"), ("50%", 15)] == "70.0 (5.0)"
    )
    assert (
        layout.loc[("All", "Spar"), ("90%", 15)] == "90.0 (0.0)"
        and layout.loc[("USPS (s) Seed", "GGap"), ("0%", 0)] == "1.0 (0.0)"
    )


def test_table_6_shows_the_papers_epochs(metrics):
    layout = table_6(metrics).layout
    assert layout.columns.tolist() == [0, 2, 4, 6, 8, 10, 13, 16, 19, 22, 25]
    assert layout[10].tolist() == ["75.0 (5.0)", "40.0 (0.0)", "-5.0 (0.0)"]
    assert layout.index.get_level_values("Metric").tolist() == ["Acc", "Spar", "GGap"]


def test_tables_7_and_8_go_by_layer(metrics):
    seven, eight = table_7(metrics).layout, table_8(metrics).layout
    headings = ["Conv 1", "Conv 2", "Conv 3", "FC 1", "FC 2", "Accuracy", "GGAP"]
    assert seven.columns.tolist() == eight.columns.tolist() == headings
    assert seven.index.get_level_values("Epoch").tolist() == [0, 5, 10, 15, 20, 25]
    assert eight.index.get_level_values("Spars").tolist() == ["50%", "90%"]
    assert seven.loc[("USPS (s) Seed", 10)].tolist() == [
        "8.0 (0.0)", "16.0 (0.0)", "24.0 (0.0)", "32.0 (0.0)", "40.0 (0.0)", "75.0 (5.0)", "-5.0 (0.0)",
    ]
    assert eight.loc[("USPS (s) Seed", "90%"), "Accuracy"] == "58.0 (5.0)"


def test_states_are_the_printed_ones_or_the_nearest(metrics):
    assert choose_states(metrics)[["level", "epoch"]].fillna(-1).to_numpy().tolist() == [[0.9, 15], [-1, 22]]
    assert TABLE_1_STATES["usps_seed"] == (0.9, 0.885)
    assert choose_states(metrics, level=0.6)["target"].tolist() == [0.6, 0.5] and choose_states(metrics, level=0.6)[
        "epoch"
    ][1] in (12, 13)
    assert choose_states(metrics, level=0.6, target=0.2)["epoch"].tolist() == [15, 5]
    assert choose_states(metrics.assign(zoo="my_zoo"))["target"].tolist() == [0.8, 0.9]


def test_table_1_and_2_put_the_methods_side_by_side(metrics):
    one, two = table_1(metrics).layout, table_2(metrics).layout
    assert one.loc["USPS (s) Seed"].tolist() == [
        "15", "58.0 (5.0)", "90.0 (0.0)", "80.0 (10.0)", "22", "63.0 (5.0)", "88.0 (0.0)", "70.0 (10.0)",
    ]
    assert one.columns.get_level_values("Method").unique().tolist() == ["Magnitude pruning", "Variational dropout"]
    assert two.loc["USPS (s) Seed", ("Variational dropout", "Pearson's r")] == "100.0 [100.0, 100.0]"
    assert two.loc["USPS (s) Seed", ("Magnitude pruning", "Sparsity")] == "90.0"


def test_zoos_with_different_runs_share_a_table(metrics):
    both = pd.concat([metrics, run("mnist_seed", levels=(0.5,), mp_epochs=3, vd_epochs=3)], ignore_index=True)
    five, six = table_5(both).layout, table_6(both).layout
    assert (
        five.loc[("MNIST (s) Seed", "Acc"), ("50%", 3)] == "70.0 (5.0)"
        and five.loc[("MNIST (s) Seed", "Acc"), ("50%", 15)] == ""
    )
    assert six.columns.tolist() == [0, 2, 3, 4, 6, 8, 10, 13, 16, 19, 22, 25]
    assert table_1(both).layout.index.tolist() == ["USPS (s) Seed", "MNIST (s) Seed"]
    assert "USPS (s) Seed: 3 models; MNIST (s) Seed: 3 models." in table_6(both).caption


@pytest.mark.parametrize("methods", [(), ("original",), ("original", "mp"), ("original", "vd"), ("mp", "vd")])
def test_what_a_run_lacks_is_left_out(metrics, methods):
    part = metrics[metrics["method"].isin(methods)]
    for name, table in TABLES.items():
        made = table(part)
        needs = {"table_5": "mp", "table_6": "vd", "table_7": "vd", "table_8": "mp"}.get(name)
        assert made.name == name and made.caption and "<table" in made._repr_html_()
        assert needs is None or (len(made.layout) > 0) == (needs in methods)


def test_one_model_has_no_spread(metrics):
    alone = metrics[metrics["model"] == 0]
    assert table_6(alone).layout[0].tolist() == ["90.0 (-)", "0.0 (-)", "-5.0 (-)"]
    assert table_2(alone).layout.loc["USPS (s) Seed", ("Magnitude pruning", "Kendall's tau")] == "-"
    assert mean_std(float("nan"), float("nan")) == ""


def test_tables_on_disk_are_numbers(metrics, tmp_path):
    for name, table in TABLES.items():
        save_table(table(metrics), tmp_path / name, formats=("csv", "md", "tex", "png"))
        again = pd.read_csv(tmp_path / f"{name}.csv")
        values = again[{"table_2": "value", "table_4": "n", "table_empty": "models"}.get(name, "mean")]
        assert (
            np.issubdtype(values.dtype, np.number)
            and set(again["zoo"]) <= {"usps_seed", "All"}
            and len(again) == len(table(metrics).numbers)
        )
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == table(metrics).to_markdown()
        assert (tmp_path / f"{name}.tex").read_text(encoding="utf-8") == table(metrics).to_latex()
    assert len(list(tmp_path.iterdir())) == 3 * len(TABLES)


def test_table_4_describes_the_zoos_of_the_run(metrics):
    both = pd.concat([metrics, run("mnist_random"), run("my_zoo")], ignore_index=True)
    layout = table_4(both).layout
    assert layout.loc["USPS (s) Seed"].tolist() == [
        "2416", "T", "AD", "3e-4", "1e-3", "1e-3", "0", "3 of 1,000", "", "",
    ]
    assert layout.loc["MNIST (s) Random", "Optim"] == "AD, SGD" and layout.loc["my_zoo"].tolist() == [""] * 7 + [
        "3",
        "",
        "",
    ]
    fitted = table_4(run("cifar10_seed", levels=(0.5,))).layout.loc["CIFAR-10 (s) Seed"]
    assert fitted["LR VD"] == "1e-5" and fitted["Printed"] == "LR VD 5e-6" and "Table 6" in fitted["Remark"]


TABLE_4 = """
MNIST (s) Seed|2416|T|AD|3e-4|1e-3|0|0
MNIST (s) Random|2416|T, S, R, G|AD, SGD|1e-3, 1e-4|1e-3, 1e-4|1e-3, 1e-4|0, 0.5
MNIST (s) Fixed|2416|T, S, R, G|AD, SGD|1e-3, 1e-4|1e-3, 1e-4|1e-3, 1e-4|0, 0.5
SVHN (s) Seed|2416|T|AD|3e-3|1e-3|0|0
FMNIST (s) Seed|2416|T|AD|3e4|1e-3|0|0
FMNIST (s) Random|2416|T, S, R, G|AD, SGD|1e-6|-|1e-3, 1e-4|0, 0.5
FMNIST (s) Fixed|2416|T, S, R, G|AD, SGD|1e-6|-|1e-3, 1e-4|0, 0.5
CIFAR-10 (l) Seed|10760|G|AD|1e-5|1e-4|1e-2|0
CIFAR-10 (l) Random|10760|T, S, R, G|AD, SGD|5e-6|-|1e-2, 1e-3|0, 0.5
CIFAR-10 (l) Fixed|10760|T, S, R, G|AD, SGD|5e-6|-|1e-2, 1e-3|0, 0.5
CIFAR-10 (s) Seed|2816|G|AD|5e-6|1e-4|1e-2|0
USPS (s) Seed|2416|T|AD|3e-4|1e-3|1e-3|0
STL-10 (l) Seed|10760|T|AD|1e-4|1e-3|1e-3|0
STL-10 (s) Seed|2816|T|AD|1e-4|1e-3|1e-3|0
"""  # as printed


def test_table_4_is_the_printed_one():
    """Every printed value is the registry's, or stands in `printed` beside the one that is used instead."""
    columns = ["Model Zoo", *TABLE_4_COLUMNS[:7]]
    rows = list_zoos(paper_only=True)
    for (name, row), line in zip(rows.iterrows(), TABLE_4.strip().split("\n"), strict=True):
        printed = dict(zip(columns, line.split("|"), strict=True))
        assert printed == {column: str(row[column]) for column in columns} | dict(ZOOS[name].printed), name
        assert bool(ZOOS[name].printed) <= bool(ZOOS[name].remark)
    used = {name: (zoo.lr, zoo.vd_learning_rate) for name, zoo in ZOOS.items() if zoo.printed}
    assert used == {
        "fmnist_seed": ((3e-4,), 3e-4),
        "cifar10_seed": ((1e-4,), 1e-5),
        "cifar10_large_seed": ((1e-4,), 5e-6),
        "fmnist_fixed": ((1e-3, 1e-4), None),
        "fmnist_random": ((1e-3, 1e-4), None),
        "cifar10_large_fixed": ((1e-3,), None),
        "cifar10_large_random": ((1e-3,), None),
    }
    grids = {f"{data}_{kind}": "vd" for data in ("fmnist", "cifar10_large") for kind in ("fixed", "random")}
    assert CALIBRATED == {"cifar10_seed": "vd", "cifar10_large_seed": "vd"} | grids


def test_grids_are_those_of_the_published_zoos():
    """From the configurations of the published zoos, those outside the paper too; digits are ours."""
    ten = {"lr": (1e-3, 1e-4), "optimizer": ("adam", "sgd"), "dropout": (0.0, 0.5)}
    large = ten | {"wd": (1e-2, 1e-3)}
    svhn = {
        "lr": (1e-2, 1e-3, 1e-4), "optimizer": ("sgd",), "wd": (0.0, 1e-3, 1e-1), "dropout": (0.0, 0.3, 0.5),
    }
    grids = {
        "mnist": ten | {"wd": (1e-3, 1e-4)}, "fmnist": ten | {"wd": (1e-3, 1e-4)}, "svhn": svhn, "usps": large,
        "cifar10": large | {"lr": (1e-3,)}, "cifar10_large": large | {"lr": (1e-3,)}, "stl10": large,
        "stl10_large": large,
    }
    for stem, factors in grids.items():
        for kind in ("fixed", "random"):
            zoo = ZOOS[f"{stem}_{kind}"]
            assert {name: getattr(zoo, name) for name in factors} == factors
            assert (zoo.dataset, zoo.kind, zoo.seeds) == (stem.removesuffix("_large"), kind, 10)
            assert zoo.image_size == (32 if stem.endswith("_large") else 28) and zoo.title.endswith(kind.capitalize())
            shuffled = zoo.name in ("mnist_fixed", "fmnist_fixed", "fmnist_random")
            assert zoo.draw == ("shuffled" if shuffled else "balanced")
    digits = ZOOS["digits_seed"]
    assert (digits.dataset, digits.lr, digits.wd, digits.epochs) == ("digits", (1e-3,), (1e-3,), 30)
    assert digits.mp_learning_rate == digits.vd_learning_rate == 2e-3


def test_recipes_that_table_4_does_not_print():
    """From the scripts and configurations of the published zoos, and the paper's text."""
    lr = {name: zoo.lr for name, zoo in ZOOS.items() if zoo.kind == "seed" and zoo.in_paper}
    slow = ["cifar10_seed", "cifar10_large_seed", "stl10_seed", "stl10_large_seed"]
    assert lr == {
        "mnist_seed": (3e-4,), "fmnist_seed": (3e-4,), "svhn_seed": (3e-3,), "usps_seed": (3e-4,),
        **dict.fromkeys(slow, (1e-4,)),
    }
    paper = [zoo for zoo in ZOOS.values() if zoo.in_paper]
    assert {(zoo.epochs, zoo.batch_size, zoo.mp_epochs, zoo.vd_epochs) for zoo in paper} == {(50, 10, 15, 25)}
    large = ["cifar10_large_seed", "cifar10_large_fixed", "cifar10_large_random", "stl10_large_seed"]
    assert {zoo.name: zoo.image_size for zoo in paper if zoo.image_size != 28} == dict.fromkeys(large, 32)
    assert {zoo.seeds for zoo in paper if zoo.kind == "seed"} == {1000} and {
        zoo.seeds for zoo in ZOOS.values() if zoo.kind != "seed"
    } == {10}
    init = {zoo.name: zoo.init for zoo in paper if zoo.kind == "seed"}
    uniform = ["mnist_seed", "fmnist_seed", "svhn_seed", "usps_seed"]
    assert init == dict.fromkeys(uniform, ("uniform",)) | {
        name: ("kaiming_uniform",) for name in init if name not in uniform
    }
    assert {zoo.name for zoo in ZOOS.values() if zoo.mp_selector == "layerwise"} == {"svhn_seed"}


def test_emptied_layers_are_named_in_the_caption(metrics):
    near, empty = (
        metrics.assign(sparsity_conv2=metrics["sparsity_conv2"].where(metrics["level"] != 0.9, share))
        for share in (0.999, 0.9991)
    )
    assert table_8(empty).caption.endswith(
        " Emptied layers (USPS (s) Seed, global at 90%: conv2): "
        "a collapse there is the selector's choice of weights, not their number."
    )
    assert "Emptied" not in table_8(near).caption and "Emptied" not in table_8(metrics.assign(sparsity_fc2=0.0)).caption


def test_table_9_is_table_1_in_one_line(metrics):
    one, nine = table_1(metrics), table_9(metrics)
    assert nine.layout.columns.tolist() == ["Acc MP", "Spar MP", "Aggr MP", "Acc VD", "Spar VD", "Aggr VD"]
    assert nine.layout.loc["USPS (s) Seed"].tolist() == [
        cell for cell in one.layout.loc["USPS (s) Seed"] if "(" in cell
    ]
    assert nine.numbers.equals(one.numbers)


def test_captions_tell_models_and_chosen_epochs(metrics):
    tables = {table.name: table for table in all_tables(metrics)}
    assert list(tables) == list(TABLES) and all(
        "USPS (s) Seed: 3 models." in table.caption for table in tables.values()
    )
    for name in ("table_1", "table_9"):
        assert (
            "pruned by 90% (selector global, epoch 15), variational dropout at epoch 22 (nearest to 88.5% sparsity)"
            in tables[name].caption
        )
    assert states_text(choose_states(metrics[metrics["method"] == "original"])) == "No twins."


def test_markdown_has_one_cell_per_heading(metrics):
    for table in all_tables(metrics):
        lines = table.to_markdown().split("\n\n")[1].strip().split("\n")
        assert len(lines) == 2 + len(table.layout) and len({line.count(" | ") for line in lines}) == 1
    assert "| All | Spar | 0.0 (0.0) |" in tables_text(metrics, "table_5") and "| USPS (s) Seed | Acc |" in tables_text(
        metrics, "table_5"
    )
    assert "|  | GGap |" in tables_text(metrics, "table_5") and "50%, Epoch 15" in tables_text(metrics, "table_5")


def tables_text(metrics, name):
    return TABLES[name](metrics).to_markdown()


@given(some.text(alphabet="".join(chr(code) for code in [*LATEX, 65, 32]), max_size=8))
def test_escaped_text_holds_no_command_of_its_own(text):
    plain = re.sub(r"\\text[a-z]+\{\}|\\[&%$#_{}]", "", latex_text(text))
    assert not set(plain) & {chr(code) for code in LATEX}


def test_without_formats_a_table_is_its_numbers(metrics, tmp_path):
    save_table(table_6(metrics), tmp_path / "table_6.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["table_6.csv"]
    with pytest.raises(UserError, match="no format 'xlsx'.*csv, md, tex"):
        save_table(table_6(metrics), tmp_path / "table_6.xlsx")
    assert [path.name for path in tmp_path.iterdir()] == ["table_6.csv"]


def test_a_table_in_latex_leaves_its_number_to_latex(metrics):
    for table in (
        table for table in all_tables(metrics) if table.name != "table_empty"
    ):  # which the paper does not have
        assert (
            table.caption.startswith("Table")
            and r"\caption{Table" not in table.to_latex()
            and r"\label{tab:table-" in table.to_latex()
        )
    beside = replace(table_5(metrics), caption="Table 5, ours / printed: mean (std) in %.")
    assert r"\caption{The paper's Table 5, ours / printed: mean (std) in \%.}" in beside.to_latex()


def frame(rows, width, columns=3):
    "A layout of that many rows, with cells of that many characters."
    return pd.DataFrame(
        {f"column {i}": ["word " * (width // 5)] * rows for i in range(columns)},
        index=pd.Index([f"row {i}" for i in range(rows)], name="Row"),
    )


@pytest.mark.parametrize("rows,width,long", [(40, 10, False), (41, 10, True), (3, 45, False), (3, 55, True)])
def test_a_table_runs_over_pages_if_it_does_not_fit_one(rows, width, long):
    text = latex_table(frame(rows, width), "A caption", "tab:one")
    assert ("longtable" in text.split("\n", 1)[1]) == long and "None" not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles_and_fits_the_page(metrics, tmp_path):
    odd = pd.concat([metrics, run("50%_of & {all} #1~^\\x<y>")], ignore_index=True)
    texts = [table.to_latex() for table in all_tables(odd)] + [
        latex_table(frame(*size), "A caption", "tab:one") for size in ((100, 20), (5, 120, 4), (39, 10))
    ]
    document = (
        "\\documentclass{article}\n"
        + PACKAGES.removeprefix("% ")
        + "\n\\begin{document}\n"
        + "\n\\clearpage\n".join(texts)
        + "\n\\end{document}\n"
    )
    (tmp_path / "all.tex").write_text(document, encoding="utf-8")
    for _ in range(3):  # longtable finds its widths over several runs
        made = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=tmp_path, capture_output=True,
            text=True, errors="replace",
        )
    assert made.returncode == 0, made.stdout[-2000:]
    assert (
        "Overfull" not in made.stdout
        and "Float too large" not in made.stdout
        and (tmp_path / "all.pdf").stat().st_size > 10_000
    )
