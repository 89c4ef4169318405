"""What several tests share: models that were trained once."""
import shutil
import signal

import pytest

from small import IMAGES, small_plan
from zootwins.published import write_zoo
from zootwins.twins import load_metrics, load_stage, make_twins


def pytest_configure():
    "A shell lets its background jobs ignore Ctrl-C, and what they start with them; the tests send it."
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def images():
    return IMAGES


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "Five trained models and their twins, made in one go; not to be changed."
    plan = small_plan(tmp_path_factory.mktemp("trained"), n=5, epochs=6, levels="0,50,90")
    make_twins(plan, IMAGES, progress=False)
    return plan


@pytest.fixture
def copied(trained, tmp_path):
    "A plan whose store is a copy of the trained one."
    shutil.copytree(trained.folder, tmp_path / "digits_seed")
    return small_plan(tmp_path, n=5, epochs=6, levels="0,50,90")


@pytest.fixture(scope="session")
def published(tmp_path_factory, trained):
    "The trained zoo as its authors would have published it: a folder, and a zip of it beside."
    folder = tmp_path_factory.mktemp("published") / "tune_zoo_digits"
    metrics = load_metrics(trained)
    write_zoo({6: load_stage(trained, "original")}, metrics[metrics["method"] == "original"], folder)
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return folder
