"""A publication goes to a hub and back, through the hub's own client and a stand-in of the addresses it asks for."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from small import says
from zootwins.core import UserError
from zootwins.publishing import publish
from zootwins.zoo_data import ZooDataset, fetch, load_zoo, push


class Repositories(BaseHTTPRequestHandler):
    "Keeps data sets in memory as the hub's addresses have them: {repository: {path: content}}."

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.command, path))
        repository = re.search(r"datasets/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/|$)", path)
        files = server.repositories.get(repository[1]) if repository else None
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            known = name in server.repositories
            server.repositories.setdefault(name, {})
            return self.answer({"url": f"{server.url}/datasets/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith("/objects/"):
            server.objects[path.rpartition("/")[2]] = body
            return self.answer()
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if "/preupload/" in path:
            return self.answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".parquet")) else "regular",
                            "shouldIgnore": False,
                        }
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = lambda oid: (
                {}
                if oid in server.objects
                else {"actions": {"upload": {"href": f"{server.url}/objects/{oid}", "header": {}}}}
            )
            return self.answer({"transfer": "basic", "objects": [o | upload(o["oid"]) for o in wanted]})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = server.objects[value["oid"]]
            return self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{server.url}/datasets/{repository[1]}/commit/{'0' * 40}",
                }
            )
        if "/tree/" in path:
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        if found := re.search(r"/resolve/([0-9a-f]{40})/(.+)", path):
            content = files[found[2]]
            return self.answer(
                content, **{"X-Repo-Commit": found[1], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            )
        siblings = [{"rfilename": name, "size": server.claim or len(content)} for name, content in files.items()]
        return self.answer(
            {
                "id": repository[1], "sha": sha, "siblings": siblings, "private": False, "tags": [], "downloads": 0,
                "likes": 0,
            }
        )

    do_GET = do_POST = do_PUT = do_HEAD = do

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub on this machine."
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Repositories)
    server.url, server.claim = f"http://127.0.0.1:{server.server_port}", None
    server.repositories, server.objects, server.asked = {}, {}, []
    monkeypatch.setenv("HF_TOKEN", "hf_example")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def public(trained, tmp_path_factory):
    return publish(trained.folder, tmp_path_factory.mktemp("public") / "digits-twins", ["original", "vd"])


def test_what_is_pushed_is_loaded_in_one_line(hub, public, trained):
    address = push(public, "me/digits-twins")
    assert address.startswith(hub.url) and push(public, "me/digits-twins").startswith(
        hub.url
    )  # a second time, onto the first
    assert set(hub.repositories["me/digits-twins"]) == {
        path.relative_to(public).as_posix() for path in public.rglob("*") if path.is_file()
    }
    there, here = load_zoo("hf://me/digits-twins"), load_zoo(public)
    assert there.states.drop(columns="file").equals(here.states.drop(columns="file"))
    one, other = ZooDataset("hf://me/digits-twins", "vd"), ZooDataset(trained.folder, "vd")
    assert len(one) == 5 and all((one[i][0] == other[i][0]).all() for i in range(5))
    assert not any(path.endswith((".pkl", ".pt", ".py")) for _, path in hub.asked)


def test_files_of_other_kinds_are_neither_fetched_nor_counted(hub, public):
    push(public, "me/digits-twins")
    hub.repositories["me/digits-twins"]["weights.pkl"] = b"\x80\x04cos\nsystem\n" * 1000
    folder = fetch(
        "hf://me/digits-twins", limit=sum(path.stat().st_size for path in public.rglob("*") if path.is_file())
    )
    assert not (folder / "weights.pkl").exists() and not any(path.endswith("weights.pkl") for _, path in hub.asked)


def test_more_than_the_limit_is_not_fetched(hub, public):
    push(public, "me/digits-twins")
    total = sum(path.stat().st_size for path in public.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=f"{total:,} bytes") as told:
        fetch("hf://me/digits-twins", limit=total - 1)
    assert says(told.value) and not any("resolve" in path for _, path in hub.asked)
    hub.claim = 5 << 40
    with pytest.raises(UserError, match="no more than"):
        load_zoo("hf://me/digits-twins")


def test_what_the_hub_changes_is_found(hub, public):
    push(public, "me/digits-twins")
    hub.repositories["me/digits-twins"]["vd.safetensors"] = (
        hub.repositories["me/digits-twins"]["vd.safetensors"][:-1] + b"\0"
    )
    with pytest.raises(UserError, match="vd.safetensors differs"):
        load_zoo("hf://me/digits-twins")


def test_what_cannot_be_is_a_sentence(hub, public, tmp_path):
    for call in (
        lambda: load_zoo("hf://me/nothing"), lambda: load_zoo("hf://digits"), lambda: push(public, "../x"),
        lambda: push(tmp_path, "me/x"),
    ):
        with pytest.raises(UserError) as told:
            call()
        assert says(told.value)
    assert hub.repositories == {}


def test_without_the_client_it_says_what_to_install(monkeypatch, public):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    for call in (lambda: push(public, "me/x"), lambda: load_zoo("hf://me/x")):
        with pytest.raises(UserError, match=r"zootwins\[hub\]"):
            call()
