"""The project as a whole: every module has its notebook, and the package can be built and used elsewhere."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

import zootwins

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import groups  # noqa: E402


def default_exports():
    "Module -> notebook."
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for line in cell.source.splitlines():
                if cell.cell_type == "code" and line.startswith("#| default_exp"):
                    found[line.split()[-1]] = path.name
    return found


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    modules = {p.stem for p in (ROOT / "zootwins").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(default_exports())


def test_every_notebook_has_a_title_in_words_and_a_group():
    _, left = groups.grouped()
    assert not left, f"in no group of docs/groups.toml: {left}"
    titles = {name: groups.title_of(name) for name in groups.all_notebooks()}
    assert not [name for name, title in titles.items() if not title[:1].isupper() or "_" in title] and len(
        set(titles.values())
    ) == len(titles)


def test_readme_lists_every_notebook_as_the_site_does():
    listed = groups.table().replace("](", "](nbs/")
    assert listed in (ROOT / "README.md").read_text(encoding="utf-8"), "execute nbs/index.ipynb, then make readme"
    links = re.findall(r"\]\(((?:nbs|figures)/[^)]*|[A-Z]+\.md)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 40 and not [link for link in links if not (ROOT / link).exists()]


def test_importing_the_package_needs_neither_the_tools_it_is_written_with_nor_widgets_nor_extras():
    names = (
        "nbdev", "fastcore", "IPython", "tqdm.auto", "ipywidgets", "distributed", "ray", "huggingface_hub",
        "torch_geometric", "torch_pruning",
    )
    code = f"import sys, importlib, pkgutil, zootwins\nsys.modules.update(dict.fromkeys({names!r}))\n"
    code += "modules = [m.name for m in pkgutil.iter_modules(zootwins.__path__) if m.name != '_modidx'];"
    code += "[importlib.import_module(f'zootwins.{name}') for name in modules]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_the_wheel_holds_every_module_the_engines_source_the_notebook_and_the_command(tmp_path):
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
            str(tmp_path), str(ROOT),
        ],
        check=True,
    )
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    names = set(wheel.namelist())
    assert {f"zootwins/{module}.py" for module in default_exports()} | {
        "zootwins/lanes.cpp", "zootwins/elementary.h", "zootwins/gpu.cu", "zootwins/py.typed",
    } <= names
    assert (
        wheel.read("zootwins/notebooks/run_zoo.ipynb") == (ROOT / "nbs/run_zoo.ipynb").read_bytes()
        and not (ROOT / "zootwins/notebooks").exists()
    )
    assert (
        "zootwins = zootwins.cli:main"
        in wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    )
    assert not any(name.startswith(("tests", "nbs")) for name in names)


@pytest.mark.slow
def test_make_run_takes_blanks_and_keeps_what_the_log_it_writes_to_held(tmp_path):
    log = tmp_path / "log"
    log.write_text("earlier\n")
    folders = {"ZOOTWINS_STORE": str(tmp_path / "My Zoos"), "ZOOTWINS_FIGURES": str(tmp_path / "My Figures")}
    with log.open("a") as stream:
        subprocess.run(
            ["make", "run", "N=1", "LEVELS=50, 80", f"RUNS={tmp_path / 'My Runs'}"], check=True, cwd=ROOT,
            env=os.environ | folders, stdout=stream, stderr=stream,
        )
    text = log.read_text(encoding="utf-8")
    assert (
        text.startswith("earlier\n")
        and f"Tables and figures of digits_seed lie in {tmp_path / 'My Figures'}/digits_seed/" in text
    )
    assert (tmp_path / "My Runs" / "digits_seed.ipynb").exists()
    assert json.loads((tmp_path / "My Figures" / "digits_seed" / "run.json").read_text())["levels"] == [0.5, 0.8]


def test_a_run_that_cannot_be_is_one_sentence_in_the_shell(tmp_path):
    done = subprocess.run(
        ["make", "run", "ZOO=digits_sed", f"RUNS={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "did you mean 'digits_seed'" in done.stderr and "did not end well" in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("make")]) == 2


def test_twins_come_without_what_only_some_need():
    heavy = "('sklearn', 'scipy.io', 'matplotlib', 'ray', 'distributed')"
    code = f"import sys, zootwins.twins; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_importing_the_package_alone_is_cheap_and_completion_knows_its_nouns():
    code = "import sys, zootwins; print(sorted(set(zootwins.__all__) - set(dir(zootwins))), "
    code += "'torch' in sys.modules, 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "[]",
        "False",
        "False",
    ]


def test_every_noun_of_the_package_is_what_its_module_has_and_what_type_checkers_read():
    tree = ast.parse((ROOT / "zootwins" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert sorted(seen) == zootwins.__all__
    for name, module in seen.items():
        assert getattr(zootwins, name) is getattr(importlib.import_module(f"zootwins.{module}"), name)


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'populations'"):
        zootwins.populations  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'populations'"):
        from zootwins import populations  # noqa: F401
