"""Settings of the site; `docs/build.py` copies this file beside the notebooks and runs Sphinx."""

import re
from configparser import ConfigParser
from pathlib import Path

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).resolve().parents[2] / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
copyright = settings["copyright"]
root_doc = "index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
html_theme, html_title = "furo", settings["title"]
html_theme_options = {
    "source_repository": settings["git_url"],
    "source_branch": settings["branch"],
    "source_directory": "nbs/",
}
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

nb_execution_mode = "off"  # outputs are those that the notebooks have
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables and links in outputs that are Markdown
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "literal"
suppress_warnings = ["ref.python"]  # two modules may have a class of one name


def as_text(app, what, name, obj, options, lines):
    "Docstrings are plain text with names in backticks: nothing else in them is markup."
    for place, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[place] = "".join(
            part if part.startswith("`") else re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", part) for part in parts
        )


def setup(app):
    app.connect("autodoc-process-docstring", as_text, priority=100)  # before napoleon reads the sections
