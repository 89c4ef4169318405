"""Populations of tiny CNNs and their sparse twins; `from zootwins import get_zoo, make_plan, make_twins`."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {  # of the names that most work begins with: the module that has them
    "core": ("UserError",),
    "zoos": ("Zoo", "get_zoo", "list_zoos"),
    "datasets": ("Images", "load_images", "subset"),
    "population": ("Population", "from_modules", "sample_population"),
    "training": ("Recipe",),
    "engines": ("train",),
    "selectors": ("prune",),
    "averaging": ("sparse_soup",),
    "plans": ("Plan", "make_plan"),
    "twins": ("load_metrics", "load_models", "load_twins", "make_twins"),
    "soups": ("Chain", "make_soups"),
    "zoo_data": ("ZooDataset", "best", "load_zoo", "masks", "twins_of"),
    "architectures": ("register",),
    "module_soups": ("soup",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)

if (
    TYPE_CHECKING
):  # what editors and type checkers read; when it runs, a module is imported once a name of it is asked for
    from .architectures import register
    from .averaging import sparse_soup
    from .core import UserError
    from .datasets import Images, load_images, subset
    from .engines import train
    from .module_soups import soup
    from .plans import Plan, make_plan
    from .population import Population, from_modules, sample_population
    from .selectors import prune
    from .soups import Chain, make_soups
    from .training import Recipe
    from .twins import load_metrics, load_models, load_twins, make_twins
    from .zoo_data import ZooDataset, best, load_zoo, masks, twins_of
    from .zoos import Zoo, get_zoo, list_zoos


def __getattr__(name: str) -> object:
    "Import a name from its module when it is first used (PEP 562), so that `import zootwins` stays cheap."
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    "The names for tab completion, whether they were used already or not."
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
