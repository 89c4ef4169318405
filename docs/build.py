"""Builds the site in _docs/html: the notebooks with their outputs, and the functions of every module."""

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser

from groups import ROOT, all_notebooks, grouped

SOURCE, SITE = ROOT / "_docs" / "source", ROOT / "_docs" / "html"
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
REPOSITORY = f"{config['DEFAULT']['git_url']}/blob/{config['DEFAULT']['branch']}"


def shown(cell: dict) -> bool:
    "Whether a cell is for readers."
    return not re.match(r"#\|\s*(hide|default_exp)", "".join(cell["source"]))


def linked(text: str, depth: int) -> str:
    "Markdown whose pictures lie on the site, and whose other links lead into the repository."
    up = "../" * depth
    for picture in re.findall(rf"\]\({re.escape(up)}\.\./(figures/[^)]*\.png)\)", text):
        (SOURCE / picture).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / picture, SOURCE / picture)
    text = re.sub(rf"\]\({re.escape(up)}\.\./(figures/[^)]*\.png)\)", rf"]({up}\1)", text)
    return re.sub(rf"\]\({re.escape(up)}\.\./", f"]({REPOSITORY}/", text)


def prepared(cell: dict, depth: int) -> dict:
    "A cell for the site: without directives, with links to what the site or the repository has."
    text = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return cell | {"source": linked(text, depth)}
    for output in cell["outputs"]:
        if "text/markdown" in output.get("data", {}):
            output["data"]["text/markdown"] = linked("".join(output["data"]["text/markdown"]), depth)
    text = re.sub(r"\A#\|\s*exporti?\n", "", text)
    tags = ["remove-input" if tag == "hide_input" else tag for tag in cell["metadata"].get("tags", [])]
    return cell | {"source": text, "metadata": {"tags": tags}}


def copy_notebook(name: str, more: str = "") -> None:
    "Copy a notebook to the source of the site, with more Markdown at its end."
    notebook = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [prepared(cell, name.count("/")) for cell in notebook["cells"] if shown(cell)]
    cells += [{"cell_type": "markdown", "id": "sidebar", "metadata": {}, "source": more}] if more else []
    target = SOURCE / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook | {"cells": cells}), encoding="utf-8")


def toctree(caption: str, pages: list[str]) -> str:
    "A part of the sidebar."
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n\n"


def write_api() -> None:
    "A page for every module, and one that lists them."
    modules = sorted(path.stem for path in (ROOT / "zootwins").glob("*.py") if not path.stem.startswith("_"))
    (SOURCE / "api").mkdir()
    for name in modules:
        page = f"# zootwins.{name}\n\n```{{eval-rst}}\n.. automodule:: zootwins.{name}\n   :members:\n```\n"
        (SOURCE / "api" / f"{name}.md").write_text(page, encoding="utf-8")
    listed = (
        "# Modules\n\nEvery public function, with its parameters.\n\n```{toctree}\n" + "\n".join(modules) + "\n```\n"
    )
    (SOURCE / "api" / "index.md").write_text(listed, encoding="utf-8")


def build() -> int:
    "Make the site anew; the exit status is not 0 if anything is amiss, a broken link for example."
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    SOURCE.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "conf.py", SOURCE)
    shutil.copytree(ROOT / "docs" / "static", SOURCE / "static")
    for name in all_notebooks():
        copy_notebook(name)
    groups, left = grouped()
    sidebar = "".join(toctree(group.title, group.notebooks) for group in groups)
    copy_notebook("index", sidebar + toctree("Every function", ["api/index"]))
    if left:
        print(f"These notebooks are in no group of docs/groups.toml: {', '.join(left)}", file=sys.stderr)
    write_api()
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--quiet",
        "--fail-on-warning",
        "--keep-going",
        "-d",
        str(ROOT / "_docs" / "doctrees"),
        str(SOURCE),
        str(SITE),
    ]
    return subprocess.run(command).returncode or bool(left)


if __name__ == "__main__":
    sys.exit(build())
