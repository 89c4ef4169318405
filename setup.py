"""Package metadata, read from settings.ini so that nothing is stated twice."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {name: settings[f"{name}_requirements"].split() for name in ("dask", "ray", "hub", "graphs", "filters", "docs", "dev")}
NOTEBOOKS = ("run_zoo.ipynb",)  # that the command line runs; in a checkout it finds them in nbs/


class BuildWithNotebooks(build_py):
    "Copies notebooks into what is built, so that they are in git only once."

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / settings["lib_name"] / "notebooks"
            folder.mkdir(parents=True, exist_ok=True)
            for name in NOTEBOOKS:
                shutil.copy(Path(settings["nbs_path"]) / name, folder / name)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras | {"dev": [word for name in ("dev", "dask", "hub", "filters") for word in extras[name]]},
    cmdclass={"build_py": BuildWithNotebooks},
    packages=find_packages(include=["zootwins", "zootwins.*"]),
    package_data={"zootwins": ["*.cpp", "*.cu", "*.h", "*.csv", "py.typed"]},
    include_package_data=True,
    entry_points={
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
        "console_scripts": settings["console_scripts"].split(),
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    zip_safe=False,
)
