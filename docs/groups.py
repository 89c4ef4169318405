"""The groups of notebooks: for README, the sidebar of the site, and the test that none is left out."""

import json
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Group:
    "Notebooks that belong together."

    title: str
    about: str
    notebooks: list[str]  # patterns as read, names when they are sorted in: "run_zoo", "tutorials/bring_your_own"


def all_notebooks() -> list[str]:
    "Every notebook but the front page, without copies that `make lab` made."
    found = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")]
    return sorted(
        name
        for name in found
        if name != "index" and not name.rpartition("/")[2].startswith(("_", ".")) and "checkpoints" not in name
    )


def title_of(name: str) -> str:
    "The first heading of a notebook."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return (
        next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        .split("\n")[0]
        .removeprefix("# ")
    )


def grouped() -> tuple[list[Group], list[str]]:
    "The groups with their notebooks, and the notebooks that belong to none."
    groups = [Group(**of) for of in tomllib.loads((ROOT / "docs" / "groups.toml").read_text(encoding="utf-8"))["group"]]
    left = all_notebooks()
    for group in groups:
        fitting = {}
        for pattern in group.notebooks:
            fitting |= {
                name: None for name in left if fnmatch(name, pattern) and (pattern.count("/") == name.count("/"))
            }
        group.notebooks = list(fitting)
        left = [name for name in left if name not in fitting]
    return groups, left


def table() -> str:
    "The groups as README shows them."
    groups, _ = grouped()
    links = lambda group: ", ".join(f"[{title_of(name)}]({name}.ipynb)" for name in group.notebooks)
    return "\n".join(
        [
            "| group | what it is about | notebooks |",
            "|---|---|---|",
            *(f"| **{g.title}** | {g.about} | {links(g)} |" for g in groups),
        ]
    )
