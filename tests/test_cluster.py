"""Blocks made by processes, Dask, Ray and on two hosts: always the bits of one machine's threads, nothing is left."""
import contextlib
import os
import pickle
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from zootwins import workers as w
from zootwins.blocks import train_block
from zootwins.core import UserError, cache_folder
from zootwins.datasets import images_fingerprint, load_images
from zootwins.module_soups import soup
from zootwins.plans import make_plan, make_stages
from zootwins.retraining import Rates
from zootwins.store import finished_files, read_predictions, read_stage, read_stage_metrics
from zootwins.twins import make_twins, make_zoos
from zootwins.workers import open_workers
from zootwins.zoos import get_zoo

HERE = Path(__file__).parent
EPOCHS = {
    "epochs": 2,
    "mp_epochs": 1,
    "vd_epochs": 1,
}  # the images have to be whole, because workers load them themselves


def plan_in(folder, n=32, **changes):
    "A plan of six blocks."
    zoo = replace(get_zoo("digits_seed"), **{**EPOCHS, **changes})
    return replace(
        make_plan("digits_seed", n, levels="90", store=str(folder / "zoos"), figures=str(folder / "figures")), zoo=zoo
    )


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, images):
    "The run that all others are compared with: made by the threads of this machine."
    plan = plan_in(tmp_path_factory.mktemp("alone"))
    make_twins(plan, images, progress=False)
    return plan


def assert_same_bits(one, other):
    "Weights at every epoch, metrics and predictions of all stages, and no unfinished work."
    for stage in make_stages(one):
        epochs = range(stage.recipe.epochs + 1) if stage.trajectory else [None]
        for epoch in epochs:
            left, right = (read_stage(plan.folder, stage.name, epoch) for plan in (one, other))
            assert len(left) == len(stage.rows) and left.models.equals(right.models)
            assert all(torch.equal(left.weights[name], tensor) for name, tensor in right.weights.items())
        left, right = (read_stage_metrics(plan.folder, stage.name) for plan in (one, other))
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    left, right = (read_predictions(plan.folder, "original") for plan in (one, other))
    assert left.keys() == right.keys() and all(torch.equal(left[number], right[number]) for number in left)
    for plan in (one, other):
        assert not list((plan.folder / "parts").glob("*")) and not list(plan.folder.rglob(".*"))


def made(plan):
    "How many blocks are finished."
    return sum(
        not path.name.startswith(".") for stage in make_stages(plan) for path in finished_files(plan.folder, stage.name)
    )


def wait_for(condition, process=None, seconds=90):
    "Wait until something is so, and no longer than it takes."
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


@pytest.mark.slow
def test_a_pool_of_processes_gives_the_same_bits(tmp_path, images, alone):
    plan = plan_in(tmp_path)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        reports = make_twins(plan, images, progress=False, workers=pool)
    assert [(report.made, report.model_samples > 0) for report in reports] == [(32, True)] * 3
    assert_same_bits(plan, alone)


def test_two_zoos_share_a_dask_cluster_one_bar_and_the_bits_of_threads(tmp_path, images, alone, capsys):
    pytest.importorskip("distributed")
    plan = plan_in(tmp_path)
    other = replace(
        plan_in(tmp_path / "b", n=2),
        zoo=replace(plan.zoo, name="mnist_seed"),
        folder=tmp_path / "b" / "zoos" / "mnist_seed",
    )
    with open_workers("dask") as executor:
        done = [
            one.zoo.name
            for one, _ in make_zoos([plan, other], {"digits_seed": images, "mnist_seed": images}, True, executor)
        ]
    assert sorted(done) == ["digits_seed", "mnist_seed"] and made(other) == 3
    told = capsys.readouterr().err
    assert (
        "2 zoos:" in told
        and "block 9 of 9" in told
        and "100 % of the run" in told
        and f" on {w.me().rpartition(':')[0]}" in told
    )
    assert_same_bits(plan, alone)


class Deaf:
    "An executor whose blocks never come back, but for the first."

    def __init__(self):
        self.futures = []

    def submit(self, function, /, *arguments):
        future = Future()
        if not self.futures:
            future.set_result(function(*arguments))
        self.futures.append(future)
        return future


def test_an_interrupted_driver_keeps_what_is_finished_and_cancels_the_rest(tmp_path, images):
    plan, executor, stop = plan_in(tmp_path), Deaf(), threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(InterruptedError):
        make_twins(plan, images, progress=False, workers=executor, stop=stop)
    assert made(plan) == 1 and [future.cancelled() for future in executor.futures] == [False, True]


class Here:
    "An executor that works in this process, with blocks as they would travel."

    def __init__(self, change=lambda block, terms: (block, terms), code=w.CODE):
        self.change, self.code, self.sizes, self.seconds = change, code, [], []

    def submit(self, function, /, code, task):
        self.sizes.append(len(task))
        future, begun = Future(), time.process_time()
        future.set_result(function(self.code, pickle.dumps(self.change(*pickle.loads(task)))))
        self.seconds.append(time.process_time() - begun)
        return future


@pytest.mark.parametrize(
    "change, code, told",
    [
        (lambda block, terms: (block, terms), "0" * 32, "another version of zootwins than the driver"),
        (
            lambda block, terms: (block, replace(terms, arithmetic="lanes on paper")),
            w.CODE,
            "lanes on paper, and their bits differ",
        ),
        (
            lambda block, terms: (block, replace(terms, images=terms.images | {"test": "0"})),
            w.CODE,
            "other images of digits than the driver (test differ)",
        ),
        (lambda block, terms: (block, replace(terms, dataset="dogs")), w.CODE, "no images of dogs"),
    ],
)
def test_a_worker_that_does_not_fit_is_told_in_one_sentence_and_mixes_nothing(tmp_path, images, change, code, told):
    plan = plan_in(tmp_path, n=2)
    with pytest.raises(UserError) as error:
        make_twins(plan, images, progress=False, workers=Here(change, code))
    assert (
        told in str(error.value)
        and str(error.value).startswith(f"Worker {w.me()} cannot take part. ")
        and "\n" not in str(error.value)
    )
    assert made(plan) == 0


def test_a_worker_goes_on_with_what_another_left_in_a_shared_folder(tmp_path, images):
    class Dying(Here):
        def submit(self, function, /, code, task):
            block, terms = pickle.loads(task)
            begun = train_block(block, images, w.check_terms(terms), parts=w.shared_parts(terms))
            while next(begun).epoch < block.stage.recipe.epochs - 1:
                pass
            begun.close()
            future = super().submit(function, code, task)
            self.seconds.append(future.result().skipped)
            return future

    changes = {"epochs": 3, "mp_epochs": 2, "vd_epochs": 2}
    plan, same, executor = plan_in(tmp_path, n=2, **changes), plan_in(tmp_path / "same", n=2, **changes), Dying()
    make_twins(plan, images, progress=False, workers=executor)
    make_twins(same, images, progress=False)
    assert executor.seconds[1::2] == [2 * 1200 * 2, 2 * 1200, 2 * 1200]
    assert_same_bits(plan, same)


def test_a_folder_of_the_same_name_on_another_host_is_not_shared(tmp_path, images):
    terms = w.Terms("digits", 28, {}, "torch", "", "cpu", str(tmp_path), "ours", "")
    assert w.shared_parts(terms) is None
    (tmp_path / "store.json").write_text("theirs")
    assert w.shared_parts(terms) is None
    (tmp_path / "store.json").write_text("ours")
    assert w.shared_parts(terms) == tmp_path / "parts"


@pytest.mark.parametrize(
    "error, told",
    [
        (ModuleNotFoundError("No module named 'zootwins'"), "A worker cannot load this version of zootwins"),
        (
            AttributeError("Can't get attribute 'work_off' on <module 'zootwins.workers'>"),
            "A worker cannot load this version of zootwins",
        ),
        (ConnectionError("gone"), r"The workers have failed \(ConnectionError: gone\)"),
    ],
)
def test_lost_workers_are_told_in_one_sentence(tmp_path, images, error, told):
    class Lost:
        def submit(self, function, /, *arguments):
            future = Future()
            future.set_exception(error)
            return future

    with pytest.raises(UserError, match=told):
        make_twins(plan_in(tmp_path, n=1), images, progress=False, workers=Lost())


def test_a_fault_of_ours_stays_a_fault(tmp_path, images):
    class Faulty:
        def submit(self, function, /, *arguments):
            future = Future()
            future.set_exception(ZeroDivisionError("division by zero"))
            return future

    with pytest.raises(ZeroDivisionError):
        make_twins(plan_in(tmp_path, n=1), images, progress=False, workers=Faulty())


def test_only_the_last_data_set_stays_in_a_workers_memory(monkeypatch, images):
    loaded = []
    monkeypatch.setattr(w, "load_images", lambda name, size: loaded.append(size) or images)
    terms = w.Terms("digits", 28, images_fingerprint(images), "torch", "", "cpu", "", "", "")
    w._loaded.clear()
    for size in (28, 28, 32, 32, 28):
        w.images_for(replace(terms, image_size=size))
    assert loaded == [28, 32, 28] and len(w._loaded) == 1
    w._loaded.clear()


@pytest.mark.slow
def test_a_broken_pool_is_told_and_a_later_run_goes_on(tmp_path, images):
    plan, same = (plan_in(tmp_path / name, epochs=10) for name in ("plan", "same"))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        def kill():
            wait_for(lambda: made(plan) >= 1)
            os.kill(next(iter(pool._processes)), signal.SIGKILL)
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(UserError, match="The workers have failed .BrokenProcessPool"):
            make_twins(plan, images, progress=False, workers=pool)
        killer.join()
    assert 1 <= made(plan) < 6
    for one in (plan, same):
        make_twins(one, images, progress=False)
    assert_same_bits(plan, same)


DRIVER = """
import sys, threading, time
from pathlib import Path
from test_cluster import plan_in
from zootwins.datasets import load_images
from zootwins.twins import make_twins
from zootwins.workers import open_workers

if __name__ == "__main__":
    folder, workers, changes = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
    with open_workers(workers) as executor:
        print("open", flush=True)
        make_twins(plan_in(folder, **changes), load_images("digits"), workers=executor)
    print("done", flush=True)
"""


def script(folder):
    "The driver as a file: processes that are spawned import it."
    path = folder / "driver.py"
    path.write_text(DRIVER)
    return path


def environment(**changes):
    "Of a process on this machine that finds the package and these tests."
    return os.environ | {
        "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1", "ZOOTWINS_BARS": "text", **changes,
    }


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_driver_and_its_local_cluster_within_seconds(tmp_path, images, alone, sent):
    pytest.importorskip("distributed")
    plan = plan_in(tmp_path)
    process = subprocess.Popen(
        [sys.executable, script(tmp_path), tmp_path, "dask", "{}"], env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    wait_for(lambda: made(plan) >= 2, process)
    begun = time.monotonic()
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert process.returncode != 0 and "done" not in out and "Interrupted: what is done is kept" in err, err
    assert 2 <= made(plan) < 6
    make_twins(plan, images, progress=False)
    assert_same_bits(plan, alone)


class Host:
    "A host of its own: a network namespace with a name, HOME, TMPDIR and data, blind to the other host's files."

    def __init__(self, name, folder, address):
        self.name, self.folder, self.address, self.space = name, folder, address, f"zt{secrets.token_hex(3)}{name}"
        self.processes, self.hidden = [], []
        for part in ("home", "tmp", "data"):
            (folder / part).mkdir(parents=True)
        if (cache_folder() / "lanes").exists():  # the compiled engine: half a minute of every test otherwise
            shutil.copytree(cache_folder() / "lanes", folder / "home/.cache/zootwins/lanes")
        subprocess.run(["ip", "netns", "add", self.space], check=True, capture_output=True)
        subprocess.run(["ip", "-n", self.space, "link", "set", "lo", "up"], check=True)

    def start(self, *command, **changes):
        "Begin a process on this host; its id is that of the command itself."
        where = {
            "HOME": self.folder / "home", "TMPDIR": self.folder / "tmp", "ZOOTWINS_DATA": self.folder / "data",
            **changes,
        }
        hide = " && ".join(["true", *(f"mount -t tmpfs none '{path}'" for path in self.hidden)])
        words = [
            "ip", "netns", "exec", self.space, "unshare", "--mount", "--uts", "sh", "-c",
            f'hostname {self.name} && {hide} && exec "$@"', "sh",
        ]
        process = subprocess.Popen(
            [*words, *map(str, command)], env=environment(**{name: str(value) for name, value in where.items()}),
            cwd=self.folder, stdout=(self.folder / f"{len(self.processes)}.log").open("w"), stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    def log(self, number):
        "What a process has said so far."
        return (self.folder / f"{number}.log").read_text()

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", self.space], check=True)


@pytest.fixture
def hosts(tmp_path):
    "Two hosts with a wire between them."
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces need iproute2 and root")
    with contextlib.ExitStack() as stack:
        try:
            anna = Host("anna", tmp_path / "anna", "10.77.0.1")
            stack.callback(anna.close)
            berta = Host("berta", tmp_path / "berta", "10.77.0.2")
            stack.callback(berta.close)
            subprocess.run(
                [
                    "ip", "-n", anna.space, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns",
                    berta.space,
                ],
                check=True,
                capture_output=True,
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        for host, other in ((anna, berta), (berta, anna)):
            subprocess.run(["ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", "wire"], check=True)
            subprocess.run(["ip", "-n", host.space, "link", "set", "wire", "up"], check=True)
            host.hidden.append(other.folder)
        yield anna, berta


def dask_worker(host, scheduler, **changes):
    "A worker of one thread that is not begun anew when it is killed."
    return host.start(
        sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", 1, "--no-nanny", "--no-dashboard",
        "--host", host.address, **changes,
    )


def dask_hosts(anna, berta):
    "A scheduler and a worker on one host, a worker on the other: the address and the worker there."
    pytest.importorskip("distributed")
    scheduler = f"tcp://{anna.address}:8786"
    anna.start(
        sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", scheduler, "--no-dashboard", "--no-show"
    )
    return scheduler


BUSY = """
def busy(executor, address):
    "Say so when a worker at an address has finished a block and is at another one."
    while not any(address in worker and keys for worker, keys in executor._client.processing().items()):
        time.sleep(0.05)
    time.sleep(0.3)
    print("busy", flush=True)
"""


@pytest.mark.slow
def test_two_hosts_without_a_shared_folder_and_one_worker_killed_in_the_middle(tmp_path, images, hosts):
    anna, berta = hosts
    scheduler = dask_hosts(anna, berta)
    dask_worker(anna, scheduler)
    victim = dask_worker(berta, scheduler)
    slow = {"epochs": 8}
    driver = DRIVER.replace("if __name__", BUSY + "\nif __name__").replace(
        'print("open"',
        f'threading.Thread(target=busy, args=(executor, "{berta.address}"), daemon=True).start(); print("open"',
    )
    (anna.folder / "driver.py").write_text(driver)
    process = anna.start(sys.executable, anna.folder / "driver.py", anna.folder, scheduler, repr(slow))
    wait_for(lambda: "busy" in anna.log(2), process)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert process.wait(120) == 0, anna.log(2)
    assert "done" in anna.log(2) and "on anna" in anna.log(2)
    plan, same = plan_in(anna.folder, **slow), plan_in(tmp_path / "same", **slow)
    make_twins(same, images, progress=False)
    assert_same_bits(plan, same)
    assert not (berta.folder / "zoos").exists()


def other_package(folder):
    "A copy of the package that differs in a comment."
    shutil.copytree(HERE.parent / "zootwins", folder / "zootwins", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "zootwins" / "core.py").open("a") as file:
        file.write("# another version\n")
    return {"PYTHONPATH": f"{folder}:{HERE}"}


def other_digits(folder):
    "A scikit-learn whose digits differ."
    (folder / "sitecustomize.py").write_text(
        "from sklearn import datasets\nload = datasets.load_digits\n"
        "def changed(*args, **kwargs):\n    found = load(*args, **kwargs)\n    found[0][0, 10] += 1\n    return found\n"
        "datasets.load_digits = changed\n")
    return {"PYTHONPATH": f"{folder}:{HERE.parent}:{HERE}"}


def no_compiler(folder):
    "A machine on which the fast engine cannot be built."
    return {"HOME": folder, "XDG_CACHE_HOME": folder, "CXX": shutil.which("false")}


@pytest.mark.slow
@pytest.mark.parametrize("spoil, told", [
    (other_package, "another version of zootwins than the driver: install the same one everywhere"),
    (other_digits, "other images of digits than the driver ("),
    (no_compiler, "could not be built with"),
])
def test_a_dask_worker_that_does_not_fit_ends_the_run_in_one_sentence(tmp_path, images, alone, spoil, told):
    distributed = pytest.importorskip("distributed")
    plan, begin = (
        plan_in(tmp_path),
        [
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
            "--scheduler-file", tmp_path / "scheduler.json", "--no-dashboard", "--no-show",
        ],
    )
    (tmp_path / "other").mkdir()
    with contextlib.ExitStack() as stack, (tmp_path / "log").open("w") as log:
        def start(command, **changes):
            process = subprocess.Popen(
                list(map(str, command)), env=environment(**{name: str(value) for name, value in changes.items()}),
                stdout=log, stderr=log, cwd=tmp_path / "other",
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        start(begin)
        wait_for((tmp_path / "scheduler.json").exists)
        start(
            [
                sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", tmp_path / "scheduler.json",
                "--nthreads", 1, "--no-nanny", "--no-dashboard",
            ],
            **spoil(tmp_path / "other"),
        )
        with distributed.Client(scheduler_file=str(tmp_path / "scheduler.json")) as client:
            address = client.scheduler.address
        with open_workers(address) as executor, pytest.raises(UserError) as error:
            make_twins(plan, images, progress=False, workers=executor)
    assert told in str(error.value) and str(error.value).startswith("Worker ") and "\n" not in str(error.value)
    assert made(plan) == 0 and not list((plan.folder / "parts").glob("*"))
    make_twins(plan, images, progress=False)
    assert_same_bits(plan, alone)


def tagged(tag, start):
    "The processes that inherited a tag in their environment, and whose command line begins so."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(start) and tag.encode() in (
                folder / "environ"
            ).read_bytes():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_ray_goes_on_when_one_of_its_workers_is_killed_in_the_middle(tmp_path, images):
    pytest.importorskip("ray")
    slow, tag = {"epochs": 40}, f"tag{secrets.token_hex(8)}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script(tmp_path), tmp_path, "ray", repr(slow)], env=environment(ZOOTWINS_TEST=tag),
            stdout=log, stderr=log,
        )
    wait_for(lambda: tagged(tag, b"ray::work_off"), process, 200)
    time.sleep(0.5)
    os.kill(tagged(tag, b"ray::work_off")[0], signal.SIGKILL)
    assert process.wait(200) == 0 and "done" in (tmp_path / "log").read_text()
    assert not tagged(tag, b"ray::")
    plan, same = plan_in(tmp_path, **slow), plan_in(tmp_path / "same", **slow)
    make_twins(same, images, progress=False)
    assert_same_bits(plan, same)


@pytest.mark.slow
def test_copies_of_a_module_on_ray_go_on_when_a_worker_is_killed_in_the_middle(tmp_path, monkeypatch, images):
    pytest.importorskip("ray")
    tag, x, y = f"tag{secrets.token_hex(8)}", images.x_train[:64], images.y_train[:64]
    monkeypatch.setenv("ZOOTWINS_TEST", tag)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    log = tmp_path / "begun"

    def retrain(model, seed, rates):
        with log.open("a") as file:
            file.write(f"{seed}\n")
        generator, optimizer = (
            torch.Generator().manual_seed(seed),
            torch.optim.SGD(model.parameters(), rates(0), momentum=0.9),
        )
        for _ in range(rates.epochs):
            rows = torch.randint(64, (32,), generator=generator)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            time.sleep(0.05)  # so that the blow falls in the middle
        return model

    def blow():
        wait_for(lambda: tagged(tag, b"ray::retrain_copy"), seconds=200)
        time.sleep(0.5)
        os.kill(tagged(tag, b"ray::retrain_copy")[0], signal.SIGKILL)

    make = partial(soup, net, level=0.6, m=3, retrain=retrain, rates=Rates(0.05, 60))
    killer = threading.Thread(target=blow, daemon=True)
    with open_workers("ray") as executor:
        killer.start()
        found = make(workers=executor, folder=tmp_path / "kept")
    killer.join()
    begun = log.read_text().split()
    assert len(begun) == 4 and len(set(begun)) == 3 and len(list((tmp_path / "kept").glob("copy-*"))) == 3
    with ThreadPoolExecutor(3) as threads:
        same = make(workers=threads)
    for one, other in zip(
        (found.model, *found.phases[0].candidates), (same.model, *same.phases[0].candidates), strict=True
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert not tagged(tag, b"ray::")


@pytest.fixture
def ray_hosts(hosts):
    "A Ray head on one host and a node on the other; all that they begin carries a tag, and is ended."
    pytest.importorskip("ray")
    ray, tags = Path(sys.executable).with_name("ray"), [f"tag{secrets.token_hex(8)}" for _ in hosts]
    before = set(tagged("", b"ray::"))  # Ray's own agents overwrite their environment
    common = (
        "--num-cpus", 1, "--min-worker-port", 20000, "--max-worker-port", 20100, "--disable-usage-stats", "--block",
    )
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as sockets:  # their names must be short
        try:
            head = ("--head", "--port", 6379, "--include-dashboard", "false", "--temp-dir", sockets)
            for host, tag, words in zip(hosts, tags, (head, ("--address", f"{hosts[0].address}:6379"))):
                process = host.start(
                    ray, "start", *words, "--node-ip-address", host.address, *common, ZOOTWINS_TEST=tag
                )
                wait_for(lambda host=host: "Ray runtime started" in host.log(0), process)
            yield *hosts, tags[1]
        finally:
            for pid in [pid for tag in tags for pid in tagged(tag, b"")] + list(set(tagged("", b"ray::")) - before):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_hosts_under_ray_and_one_worker_killed_in_the_middle(tmp_path, images, ray_hosts):
    (anna, berta, there), slow = ray_hosts, {"epochs": 40}
    process = anna.start(
        sys.executable, script(anna.folder), anna.folder, "ray", repr(slow), RAY_ADDRESS=f"{anna.address}:6379"
    )
    wait_for(lambda: tagged(there, b"ray::work_off"), process, 120)
    time.sleep(0.5)
    os.kill(tagged(there, b"ray::work_off")[0], signal.SIGKILL)
    assert process.wait(200) == 0 and "done" in anna.log(1), anna.log(1)
    plan, same = plan_in(anna.folder, **slow), plan_in(tmp_path / "same", **slow)
    make_twins(same, images, progress=False)
    assert_same_bits(plan, same)
    assert not (berta.folder / "zoos").exists()


def test_the_recipe_for_slurm_gives_jobs_of_single_threaded_workers(tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue")
    import dask

    text = next(
        cell.source for cell in nbformat.read(HERE.parent / "nbs/29_workers.ipynb", 4).cells if "```yaml" in cell.source
    )
    recipe = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])["jobqueue"]["slurm"]
    with (
        dask.config.set({f"jobqueue.slurm.{name}": value for name, value in recipe.items()}),
        jobqueue.SLURMCluster(log_directory=str(tmp_path)) as cluster,
    ):
        script = cluster.job_script()
    assert (
        "#SBATCH --cpus-per-task=32" in script
        and "#SBATCH -p short" in script
        and "--nthreads 1 " in script
        and "--nworkers 32 " in script
    )
    assert script.index("activate") < script.index("distributed.cli.dask_worker")
