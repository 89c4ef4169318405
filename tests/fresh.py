"""Is what is generated up to date?

`fresh.py clean-check | export-check | readme-check` compare, `fresh.py package | readme` write.

The checks work on a copy in a temporary folder, so that they neither change the checkout nor depend on commits."""

import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from docments import write_docstrings

ROOT = Path(__file__).resolve().parents[1]


def copy_of_project() -> Path:
    "Copy notebooks, package and settings to a temporary folder."
    copy = Path(tempfile.mkdtemp())
    for name in ("nbs", "zootwins"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def differing(copy: Path, folder: str, pattern: str) -> list[str]:
    "Names of files that differ between the checkout and the copy, or are in one only."
    names = {
        p.relative_to(base)
        for base in (ROOT, copy)
        for p in (base / folder).rglob(pattern)
        if ".ipynb_checkpoints" not in p.parts and "__pycache__" not in p.parts
    }
    same = lambda name: (
        (ROOT / name).exists() and (copy / name).exists() and filecmp.cmp(ROOT / name, copy / name, shallow=False)
    )
    return sorted(str(name) for name in names if not same(name))


def readme() -> str:
    "The README that nbs/index.ipynb gives: hidden cells and inputs left out, links made relative to the root."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "nbconvert",
                "--to",
                "markdown",
                "--log-level",
                "ERROR",
                r"--RegexRemovePreprocessor.patterns=^#\|\s*hide",
                "--TagRemovePreprocessor.enabled=True",
                "--TagRemovePreprocessor.remove_input_tags=hide_input",
                "--output-dir",
                folder,
                "--output",
                "README",
                str(ROOT / "nbs" / "index.ipynb"),
            ],
            check=True,
        )
        text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!\.\./|https?:|#)", "](nbs/", text)  # other notebooks
    return re.sub(r"\]\(\.\./", "](", text).strip() + "\n"


def export(project: Path) -> None:
    "Make the modules from the notebooks, with what stands beside parameters in their docstrings."
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=project, check=True)
    write_docstrings(project / "zootwins")


def stale(task: str) -> tuple[list[str], str]:
    "What is out of date, and the command that mends it."
    if task == "readme-check":
        return (["README.md"] if (ROOT / "README.md").read_text(encoding="utf-8") != readme() else []), "make readme"
    copy = copy_of_project()
    try:
        if task == "export-check":
            export(copy)
            return differing(copy, "zootwins", "*.py"), "make package"
        subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=copy, check=True)
        return differing(copy, "nbs", "*.ipynb"), ".venv/bin/nbdev_clean"
    finally:
        shutil.rmtree(copy)


if __name__ == "__main__":
    if sys.argv[1] == "readme":
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    elif sys.argv[1] == "package":
        export(ROOT)
    else:
        names, remedy = stale(sys.argv[1])
        print(f"{sys.argv[1]}: " + (f"not up to date: {', '.join(names)}; run {remedy}" if names else "ok"))
        sys.exit(bool(names))
