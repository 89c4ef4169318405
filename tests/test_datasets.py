"""Tests of zootwins.datasets: formats, folders, caches, mistakes; with the real files where they are at hand."""
import bz2
import errno
import gzip
import hashlib
import os
import pickle
import tarfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import rmtree
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from zootwins import datasets
from zootwins.core import UserError, data_folder
from zootwins.datasets import (
    DATA_SETS,
    ImageFile,
    decode_cifar,
    decode_files,
    decode_usps,
    load_images,
    resize,
    split_order,
    subset,
    to_grey,
)

CLOSED = "http://127.0.0.1:9/"  # nothing listens on this port


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has its own, empty user cache."""
    monkeypatch.setattr(datasets, "cache_folder", lambda: tmp_path / "user-cache")
    yield
    rmtree(tmp_path / "user-cache", ignore_errors=True)


def arrays(seed, counts, side, colour):
    """Random images and labels for the two halves."""
    rng = np.random.default_rng(seed)
    shape = (side, side) + (3,) * colour
    return [(rng.integers(0, 255, (count, *shape), np.uint8), rng.integers(0, 10, count, np.uint8)) for count in counts]


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def libsvm(x, y):
    lines = [
        f"{label + 1} " + " ".join(f"{i}:{(v + 0.5) / 255 * 2 - 1:.6f}" for i, v in enumerate(image.ravel(), 1))
        for image, label in zip(x, y, strict=True)
    ]
    return bz2.compress("\n".join(lines).encode())


def cifar(x, y):
    return pickle.dumps({b"data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072), b"labels": y.tolist()}, protocol=4)


def official_bytes(name, halves, folder):
    """The official files of a data set that holds the given images, by name."""
    (x, y), (u, v) = halves
    if name in ("mnist", "fmnist"):
        names = [file.name for file in DATA_SETS[name].train + DATA_SETS[name].test]
        return {key: gzip.compress(idx(values)) for key, values in zip(names, (x, y, u, v), strict=True)}
    if name == "usps":
        return {"usps.bz2": libsvm(x, y), "usps.t.bz2": libsvm(u, v)}
    if name == "svhn":
        for key, images, labels in [("train", x, y), ("test", u, v)]:
            savemat(
                folder / f"{key}.mat",
                {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)},
            )
        return {f"{key}_32x32.mat": (folder / f"{key}.mat").read_bytes() for key in ("train", "test")}
    if name == "cifar10":
        parts = np.array_split(np.arange(len(x)), 5)
        return {f"data_batch_{i}": cifar(x[part], y[part]) for i, part in enumerate(parts, 1)} | {
            "test_batch": cifar(u, v)
        }
    return {f"{key}_{kind}.bin": content for key, images, labels in [("train", x, y), ("test", u, v)]
            for kind, content in [("X", images.transpose(0, 3, 2, 1).tobytes()), ("y", bytes(labels + 1))]}


def tiny(name, folder, monkeypatch, url=CLOSED):
    """Put a data set of 13 + 5 images into the registry; returns its images and its official files."""
    entry = DATA_SETS[name]
    halves = arrays(1, (13, 5), entry.side, entry.colour)
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    contents = official_bytes(name, halves, folder / "scratch")

    def known(files):
        return tuple(
            ImageFile(file.name, hashlib.md5(contents[file.name]).hexdigest(), file.url and url + file.name)
            for file in files
        )

    archive = entry.archive and replace(entry.archive, url=url + entry.archive.name)
    monkeypatch.setitem(
        DATA_SETS,
        name,
        replace(
            entry, train=known(entry.train), test=known(entry.test), archive=archive, n_train=10, n_val=3, n_test=5
        ),
    )
    return halves, contents


def write(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def by_hand(images, entry, size):
    """Prepare images one by one with PIL and torch, as torchvision's transforms do."""
    result = []
    for image in images:
        picture = Image.fromarray(image)
        if entry.colour and entry.channels == 1:
            picture = picture.convert("L")
        if entry.crop:
            edge = (entry.side - size) // 2
            picture = picture.crop((edge, edge, edge + size, edge + size))
        elif size != entry.side:
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).reshape(size, size, -1).permute(2, 0, 1).float().div(255)
        result.append(pixels.sub(torch.tensor(entry.mean)).div(torch.tensor(entry.std)))
    return torch.stack(result)


LAYOUTS = [
    ("mnist", ""), ("mnist", "mnist"), ("mnist", "MNIST/raw"), ("fmnist", "fmnist"), ("fmnist", "FashionMNIST/raw"),
    ("svhn", ""), ("svhn", "svhn"), ("usps", ""), ("usps", "usps"), ("cifar10", ""), ("cifar10", "cifar-10-batches-py"),
    ("stl10", "stl10_binary"), ("stl10", "stl10"),
]


@pytest.mark.parametrize("name,place", LAYOUTS)
def test_files_in_their_layouts_give_the_images_prepared_and_split(name, place, tmp_path, monkeypatch):
    ((x, y), (u, v)), contents = tiny(name, tmp_path / "elsewhere", monkeypatch)
    write(tmp_path / "data" / place, contents)
    entry = DATA_SETS[name]
    order = torch.utils.data.random_split(range(13), [10, 3], generator=torch.Generator().manual_seed(42))
    for size in entry.sizes:
        images = load_images(name, size, tmp_path / "data")
        assert torch.equal(images.x_train, by_hand(x[order[0].indices], entry, size))
        assert torch.equal(images.x_val, by_hand(x[order[1].indices], entry, size))
        assert torch.equal(images.x_test, by_hand(u, entry, size))
        assert (
            images.y_train.tolist() == y[order[0].indices].tolist()
            and images.y_val.tolist() == y[order[1].indices].tolist()
        )
        assert images.y_test.tolist() == v.tolist() and images.y_test.dtype == torch.int64
        assert images.x_train.shape == (10, entry.channels, size, size) and images.x_train.is_contiguous()


def test_unpacked_idx_files_are_used(tmp_path, monkeypatch):
    ((x, _), _), contents = tiny("fmnist", tmp_path / "elsewhere", monkeypatch)
    write(
        tmp_path / "FashionMNIST" / "raw",
        {name.removesuffix(".gz"): gzip.decompress(content) for name, content in contents.items()},
    )
    assert (decode_files(DATA_SETS["fmnist"], (tmp_path,))["x_train"] == x).all()


def pack(name, contents, path, monkeypatch, folder):
    """Make the archive of a data set and register its checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.parent / folder, contents)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.parent / folder, folder)
    for member in contents:
        (path.parent / folder / member).unlink()
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(DATA_SETS, name, replace(DATA_SETS[name], archive=replace(DATA_SETS[name].archive, md5=md5)))


@pytest.mark.parametrize("name,folder", [("cifar10", "cifar-10-batches-py"), ("stl10", "stl10_binary")])
def test_archives_are_read_where_they_lie(name, folder, tmp_path, monkeypatch):
    ((x, _), (u, _)), contents = tiny(name, tmp_path / "elsewhere", monkeypatch)
    pack(name, contents, tmp_path / "data" / DATA_SETS[name].archive.name, monkeypatch, folder)
    decoded = decode_files(DATA_SETS[name], (tmp_path / "data",))
    assert (decoded["x_train"] == x).all() and (decoded["x_test"] == u).all()


def test_archive_that_lacks_a_member_is_named(tmp_path, monkeypatch):
    _, contents = tiny("cifar10", tmp_path / "elsewhere", monkeypatch)
    del contents["data_batch_3"]
    pack("cifar10", contents, tmp_path / "data" / "cifar-10-python.tar.gz", monkeypatch, "cifar-10-batches-py")
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz lacks data_batch_3"):
        load_images("cifar10", folder=tmp_path / "data")


def test_archive_that_is_cut_short_is_named(tmp_path, monkeypatch):
    _, contents = tiny("stl10", tmp_path / "elsewhere", monkeypatch)
    path = tmp_path / "data" / "stl10_binary.tar.gz"
    pack("stl10", contents, path, monkeypatch, "stl10_binary")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"stl10_binary\.tar\.gz is not the official file of STL-10"):
        load_images("stl10", folder=tmp_path / "data")
    with pytest.raises(UserError, match=r"stl10_binary\.tar\.gz cannot be unpacked"):
        datasets.read_archive(path, DATA_SETS["stl10"].train)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine; yields its folder, its address and the list of what was asked for."""
    asked = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "served").mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=httpd.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{httpd.server_port}/", asked
    httpd.shutdown()
    httpd.server_close()


def test_first_use_downloads_and_later_ones_do_not(server, tmp_path, monkeypatch):
    served, url, asked = server
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch, url)
    write(served, contents)
    first = load_images("usps", folder=tmp_path / "data")
    assert sorted(asked) == ["/usps.bz2", "/usps.t.bz2"]
    assert (tmp_path / "data" / "usps" / "usps.bz2").read_bytes() == contents["usps.bz2"]
    second = load_images("usps", folder=tmp_path / "data")
    (tmp_path / "data" / "usps.npz").unlink()
    third = load_images("usps", folder=tmp_path / "data")
    assert len(asked) == 2
    assert torch.equal(first.x_train, second.x_train) and torch.equal(first.x_train, third.x_train)


def test_archive_is_downloaded(server, tmp_path, monkeypatch):
    served, url, asked = server
    ((x, _), _), contents = tiny("cifar10", tmp_path / "elsewhere", monkeypatch, url)
    pack("cifar10", contents, served / "cifar-10-python.tar.gz", monkeypatch, "cifar-10-batches-py")
    load_images("cifar10", 28, tmp_path / "data")
    assert asked == ["/cifar-10-python.tar.gz"] and sorted(path.name for path in (tmp_path / "data").glob("*.npz")) == [
        "cifar10-28.npz",
        "cifar10.npz",
    ]
    assert (np.load(tmp_path / "data" / "cifar10.npz")["x_train"] == x).all()
    assert (np.load(tmp_path / "data" / "cifar10-28.npz")["x_train"] == resize(x, 28)).all()


def test_download_with_another_checksum_is_refused_and_not_kept(server, tmp_path, monkeypatch):
    served, url, _ = server
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch, url)
    write(served, contents | {"usps.bz2": b"something else"})
    with pytest.raises(UserError, match=r"usps\.bz2 did not deliver the official file") as caught:
        load_images("usps", folder=tmp_path / "data")
    assert DATA_SETS["usps"].train[0].md5 in str(caught.value)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["usps", "stl10"])
def test_no_network_names_address_file_checksum_and_folder(name, tmp_path, monkeypatch):
    tiny(name, tmp_path / "elsewhere", monkeypatch)
    file = DATA_SETS[name].archive or DATA_SETS[name].train[0]
    with pytest.raises(UserError) as caught:
        load_images(name, folder=tmp_path / "data")
    for part in (file.url, file.name, file.md5, str(tmp_path / "data" / name)):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_on_the_server_is_an_error_too(server, tmp_path, monkeypatch):
    _, url, _ = server
    tiny("usps", tmp_path / "elsewhere", monkeypatch, url)
    with pytest.raises(UserError, match="HTTPError"):
        load_images("usps", folder=tmp_path / "data")


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name != "digits"])
def test_damaged_official_file_is_named(name, tmp_path, monkeypatch):
    _, contents = tiny(name, tmp_path / "elsewhere", monkeypatch)
    victim = next(iter(contents))
    place = tmp_path / "data" / DATA_SETS[name].places[0]
    write(place, contents | {victim: contents[victim][:-7]})
    with pytest.raises(UserError) as caught:
        load_images(name, folder=tmp_path / "data")
    assert str(place / victim) in str(caught.value) and "MD5" in str(caught.value)
    assert not list((tmp_path / "data").glob("*.npz"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1], lambda content: b"\0" * 99, lambda content: b"",
        lambda content: content[:4] + b"\0\0\0\1" + content[8:],
    ],
)
def test_damaged_unpacked_file_is_named(damage, tmp_path, monkeypatch):
    _, contents = tiny("mnist", tmp_path / "elsewhere", monkeypatch)
    plain = {name.removesuffix(".gz"): gzip.decompress(content) for name, content in contents.items()}
    plain["train-images-idx3-ubyte"] = damage(plain["train-images-idx3-ubyte"])
    write(tmp_path / "data", plain)
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        load_images("mnist", folder=tmp_path / "data")


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize(
    "damage",
    [
        flip, lambda content: content[:-30], lambda content: content[:50], lambda content: b"",
        lambda content: b"no zip at all",
    ],
)
def test_damaged_cache_is_named_and_kept(damage, tmp_path, monkeypatch):
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    write(tmp_path, contents)
    load_images("usps", folder=tmp_path)
    cache = tmp_path / "usps.npz"
    damaged = damage(cache.read_bytes())
    cache.write_bytes(damaged)
    with pytest.raises(UserError, match=r"usps\.npz cannot be read as decoded images"):
        load_images("usps", folder=tmp_path)
    assert cache.read_bytes() == damaged


@pytest.mark.parametrize("change,problem", [
    ({"x_train": np.zeros((13, 16, 16))}, "float64"),
    ({"x_train": np.zeros((12, 16, 16), np.uint8)}, r"\(12, 16, 16\)"),
    ({"x_test": np.zeros((5, 16, 16, 3), np.uint8)}, r"\(5, 16, 16, 3\)"),
    ({"y_train": np.zeros(12, np.uint8)}, r"labels are uint8 of shape \(12,\)"),
    ({"y_train": np.zeros(13)}, "labels are float64"),
    ({"y_test": np.full(5, 10, np.uint8)}, "0 to 9"),
    ({"y_test": np.full(5, -1, np.int8)}, "0 to 9"),
    ({"x_test": np.array([object()] * 5)}, "allow_pickle"),
])
def test_cache_with_other_arrays_is_refused(change, problem, tmp_path, monkeypatch):
    ((x, y), (u, v)), _ = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    np.savez(tmp_path / "usps.npz", **({"x_train": x, "y_train": y, "x_test": u, "y_test": v} | change))
    with pytest.raises(UserError, match=problem) as caught:
        load_images("usps", folder=tmp_path)
    assert str(tmp_path / "usps.npz") in str(caught.value)


def test_cache_without_an_array_is_refused(tmp_path, monkeypatch):
    ((x, y), _), _ = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    np.savez(tmp_path / "usps.npz", x_train=x, y_train=y)
    with pytest.raises(UserError, match="x_test"):
        load_images("usps", folder=tmp_path)


def test_decoded_file_is_used_as_it_is(tmp_path, monkeypatch):
    ((x, y), (u, v)), _ = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    np.savez_compressed(tmp_path / "usps.npz", x_train=x, y_train=y.astype(np.int64), x_test=u, y_test=v)
    before = (tmp_path / "usps.npz").read_bytes()
    images = load_images("usps", folder=tmp_path)
    assert images.y_test.tolist() == v.tolist() and (tmp_path / "usps.npz").read_bytes() == before


def test_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    write(tmp_path / "data", contents)

    def full(path, **arrays):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.np, "savez", full)
    with pytest.raises(UserError, match=r"No space left to write .*usps\.npz"):
        load_images("usps", folder=tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["usps.bz2", "usps.t.bz2"]


def test_full_disk_during_a_download_is_told(server, tmp_path, monkeypatch):
    import pooch

    served, url, _ = server
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch, url)
    write(served, contents)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **kwargs: full)
    with pytest.raises(UserError, match=r"No space left to write .*usps\.bz2"):
        load_images("usps", folder=tmp_path / "data")


def test_read_only_folder_stays_untouched(tmp_path, monkeypatch):
    _, contents = tiny("cifar10", tmp_path / "elsewhere", monkeypatch)
    data = tmp_path / "data"
    write(data / "cifar-10-batches-py", contents)
    for folder in (data / "cifar-10-batches-py", data):
        folder.chmod(0o555)
    first = load_images("cifar10", folder=data)
    assert [path.name for path in data.iterdir()] == ["cifar-10-batches-py"]
    cache = tmp_path / "user-cache" / "data"
    assert sorted(path.name for path in cache.iterdir()) == ["cifar10-28.npz", "cifar10.npz"]
    monkeypatch.setattr(datasets, "read_files", None)
    assert torch.equal(load_images("cifar10", folder=data).x_train, first.x_train)
    for folder in (data, data / "cifar-10-batches-py"):
        folder.chmod(0o755)


def test_environment_names_the_folder(tmp_path, monkeypatch):
    _, contents = tiny("usps", tmp_path / "elsewhere", monkeypatch)
    write(tmp_path / "named", contents)
    monkeypatch.setenv("ZOOTWINS_DATA", str(tmp_path / "named"))
    load_images("usps")
    assert (tmp_path / "named" / "usps.npz").is_file()


def test_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(UserError, match="is a file"):
        load_images("usps", folder=tmp_path / "data")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_batch_is_refused_unexecuted(tmp_path, monkeypatch):
    _, contents = tiny("cifar10", tmp_path / "elsewhere", monkeypatch)
    contents["test_batch"] = pickle.dumps({b"data": Hostile(tmp_path / "made"), b"labels": []}, protocol=4)
    pickle.loads(pickle.dumps(Hostile(tmp_path / "proof")))
    assert (tmp_path / "proof").is_dir()
    md5 = hashlib.md5(contents["test_batch"]).hexdigest()
    monkeypatch.setitem(DATA_SETS, "cifar10", replace(DATA_SETS["cifar10"], test=(ImageFile("test_batch", md5),)))
    write(tmp_path / "data", contents)
    with pytest.raises(UserError, match=r"test_batch cannot be decoded .*mkdir"):
        load_images("cifar10", folder=tmp_path / "data")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "line",
    [
        b"cbuiltins\neval\n", b"cos\nsystem\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nscalar\n",
        b"c_codecs\nencode\n",
    ],
)
def test_other_names_are_refused(line):
    with pytest.raises(pickle.UnpicklingError, match="no image file needs"):
        decode_cifar(b"\x80\x02" + line + b".")


def test_libsvm_lines_must_be_whole():
    x, y = np.zeros((2, 16, 16), np.uint8), np.zeros(2, np.uint8)
    text = bz2.decompress(libsvm(x, y))
    for wrong in (text.replace(b" 7:", b" 8:"), text[:-30], text.replace(b"-0.9", b"x")):
        with pytest.raises(ValueError):
            decode_usps(bz2.compress(wrong))


@pytest.mark.parametrize(
    "shape,size",
    [
        ((41, 8, 8), 28), ((41, 16, 16), 28), ((41, 32, 32, 3), 28), ((11, 96, 96, 3), 28), ((11, 96, 96, 3), 32),
        ((1, 16, 16), 28),
    ],
)
def test_resize_equals_single_calls_of_pil(shape, size):
    x = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    alone = np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in x]
    )
    for at_once in (1, 10, 2000):
        assert (resize(x, size, at_once) == alone).all()


def test_grey_is_the_weighted_sum_for_every_primary():
    values = (
        np.array(np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 5), np.arange(0, 256, 5)))
        .reshape(3, -1)
        .T.astype(np.uint8)
    )
    x = values[:140_608].reshape(1, 208, 676, 3)
    assert (to_grey(x) == (x.astype(int) @ [19595, 38470, 7471] + 2**15) >> 16).all()


@pytest.mark.parametrize("entry", [entry for entry in DATA_SETS.values() if entry.test], ids=lambda entry: entry.name)
def test_split_is_torchs_random_split(entry):
    sizes = [entry.n_train, entry.n_val]
    theirs = torch.utils.data.random_split(range(sum(sizes)), sizes, generator=torch.Generator().manual_seed(42))
    ours = split_order(sum(sizes), *sizes)
    assert all(list(a.indices) == b.tolist() for a, b in zip(theirs, ours, strict=True))


def test_split_sizes_are_those_of_the_zoos():
    sizes = {name: (entry.n_train, entry.n_val, entry.n_test) for name, entry in DATA_SETS.items()}
    assert sizes == {
        "mnist": (50_000, 10_000, 10_000), "fmnist": (50_000, 10_000, 10_000), "svhn": (60_000, 13_257, 26_032),
        "usps": (6_000, 1_291, 2_007), "cifar10": (42_000, 8_000, 10_000), "stl10": (4_200, 800, 8_000),
        "digits": (1_200, 97, 500),
    }


def test_digits_are_each_used_once_and_need_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOOTWINS_DATA", str(tmp_path / "nowhere"))
    images = load_images("digits")
    entry, (x, y) = DATA_SETS["digits"], datasets.decode_digits()
    parts = split_order(1797, 1200, 97, 500)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert torch.equal(images.x_test, by_hand(x[parts[2]], entry, 28)) and torch.equal(
        images.x_train, by_hand(x[parts[0]], entry, 28)
    )
    assert images.y_val.tolist() == y[parts[1]].tolist()
    assert not (tmp_path / "nowhere").exists()


def test_subset_takes_the_first_and_leaves_the_rest():
    images = load_images("digits")
    few = subset(images, 32, 10)
    assert torch.equal(few.x_train, images.x_train[:32]) and torch.equal(few.y_test, images.y_test[:10])
    assert few.x_val is images.x_val and subset(images, n_test=10).x_train.shape == images.x_train.shape
    for wrong in (0, -1, 1201):
        with pytest.raises(UserError, match=f"{wrong} are not available"):
            subset(images, wrong)


def test_wrong_names_and_sizes_list_the_valid_ones():
    with pytest.raises(UserError, match="usps.*mnist, fmnist, svhn, usps, cifar10, stl10, digits"):
        load_images("upss")
    with pytest.raises(UserError, match="28, 32"):
        load_images("stl10", 96)
    with pytest.raises(UserError, match="Valid: 28"):
        load_images("digits", 8)


def test_published_checksums_are_md5_sums_and_unique():
    files = [
        file for entry in DATA_SETS.values() for file in (*entry.train, *entry.test, *filter(None, [entry.archive]))
    ]
    assert len({file.md5 for file in files}) == len(files) == 24
    assert all(len(file.md5) == 32 and int(file.md5, 16) for file in files)


def real(*names):
    """Skip unless the data folder holds these files."""
    missing = [name for name in names if not (data_folder() / name).is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"ZOOTWINS_DATA does not hold {', '.join(missing)}")


@real("usps/usps.t.bz2")
def test_real_usps_test_file_decodes_as_in_torchvision():
    content = (data_folder() / "usps" / "usps.t.bz2").read_bytes()
    assert hashlib.md5(content).hexdigest() == DATA_SETS["usps"].test[0].md5
    lines = [line.split() for line in bz2.decompress(content).decode().splitlines()]
    values = np.asarray([[pair.split(":")[-1] for pair in line[1:]] for line in lines], np.float32)
    x, y = decode_usps(content)
    assert (x == ((values + 1) / 2 * 255).astype(np.uint8).reshape(-1, 16, 16)).all()
    assert y.tolist() == [int(line[0]) - 1 for line in lines]


@real("usps.npz", "usps/usps.t.bz2")
def test_real_usps_cache_is_the_official_file_but_for_rounding():
    x, y = decode_usps((data_folder() / "usps" / "usps.t.bz2").read_bytes())
    with np.load(data_folder() / "usps.npz") as known:
        assert (y == known["y_test"]).all()
        different = np.argwhere(x != known["x_test"]).tolist()
        assert different in ([], [[185, 13, 6]])  # none if the file was decoded in float32, this pixel if in float64
        assert np.abs(x.astype(int) - known["x_test"]).max() <= 1


@real("usps.npz")
def test_real_usps():
    images = load_images("usps")
    assert images.x_train.shape == (6000, 1, 28, 28) and images.x_test.shape == (2007, 1, 28, 28)
    assert np.bincount(images.y_test).tolist() == [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]
    assert (np.bincount(images.y_train) + np.bincount(images.y_val)).tolist() == [
        1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644,
    ]


@real("mnist/train-images-idx3-ubyte.gz")
def test_real_mnist():
    images = load_images("mnist")
    everything = torch.cat([images.x_train, images.x_val])
    assert abs(everything.mean()) < 1e-3 and abs(everything.std() - 1) < 1e-3
    assert np.bincount(images.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.y_test[:5].tolist() == [7, 2, 1, 0, 4]


@real("cifar-10-batches-py/test_batch")
def test_real_cifar10():
    images = load_images("cifar10", 32)
    assert (np.bincount(images.y_train) + np.bincount(images.y_val)).tolist() == [5000] * 10
    assert images.y_test[:5].tolist() == [3, 8, 8, 0, 6]
    pixels = torch.cat([images.x_train, images.x_val]) / 2 + 0.5
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
