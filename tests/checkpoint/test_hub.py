"""Models from a hub: a server here speaks its few calls, also when it breaks off, refuses, or sends something else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch

from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A hub with one model, `org/model`, whose weights it says to be of a SHA-256.

    Attributes:
        status: what it answers to all requests, if not 200.
        breaks: how many times it breaks off in the middle of the weights.
        wrong: whether it sends other weights than it says.
        asked: how often each path was asked for.
    """

    daemon_threads = True

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.status, self.breaks, self.wrong, self.asked = 200, 0, False, Counter()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, (path, _, _) = self.server, self.path.partition("?")
        hub.asked[path] += body
        if hub.status != 200:
            self.send_error(hub.status)
        elif path.startswith("/api/models/org/model/revision/") and path.endswith(("/main", "/v1", COMMIT)):
            siblings = [{"rfilename": name} for name in sorted(hub.files)]
            self.send_json(200, {"id": "org/model", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            sizes = {name: len(content) for name, content in sorted(hub.files.items())}
            self.send_json(200, [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in sizes.items()])
        elif path.startswith("/api/models/org/model/revision/"):
            self.send_json(404, {"error": "no revision"}, "RevisionNotFound")
        elif path.startswith("/org/model/resolve/"):
            self.send_file(path.rpartition("/")[2], body)
        else:
            self.send_json(404, {"error": "no model"}, "RepoNotFound")

    def send_json(self, status, content, code=None):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(text)

    def send_file(self, name, body):
        hub, content = self.server, self.server.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body and name.endswith(".safetensors"):
            content = bytes(len(content)) if hub.wrong else content
            if hub.breaks:
                hub.breaks -= 1
                self.wfile.write(content[start : start + len(content) // 2])
                self.close_connection = True
                return self.connection.close()
        return self.wfile.write(content[start:]) if body else None


@pytest.fixture
def hub(one_layer, tmp_path, monkeypatch):
    """Return a hub that runs here, with an empty cache beside it."""
    server = Hub(one_layer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": here,
        "HUGGINGFACE_CO_URL_TEMPLATE": here + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_fetched_once_and_goes_on_where_it_broke_off(hub, one_layer):
    hub.breaks = 1
    found, name = open_checkpoint("org/model"), "model.norm.weight"
    assert torch.equal(found.tensor(name), open_checkpoint(one_layer).tensor(name))
    asked = Counter(hub.asked)
    assert open_checkpoint("org/model@v1").directory.name == COMMIT
    weights = "/org/model/resolve/" + COMMIT + "/model.safetensors"
    assert hub.asked[weights] == asked[weights] == 2


def test_weights_that_are_not_what_the_hub_says(hub):
    hub.wrong = True
    with pytest.raises(QuantizeError, match=r"model.safetensors has not the SHA-256 that the hub gives for it; remove"):
        open_checkpoint("org/model")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (429, "the hub takes no more requests from you for now"),
        (500, "the hub answers with the error 500; start again later"),
        (403, "the hub answers with the error 403"),
    ],
)
def test_a_hub_that_refuses(hub, status, words):
    hub.status = status
    with pytest.raises(UsageError, match=words):
        open_checkpoint("org/model")


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have():
    with pytest.raises(UsageError, match="the hub has no model of that id for you; if it is private, log in"):
        open_checkpoint("org/other")
    with pytest.raises(UsageError, match="org/model has no revision v2 on the hub; give a branch, a tag or a commit"):
        open_checkpoint("org/model@v2")


def test_no_network(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UsageError, match="the hub cannot be reached to fetch it; give a model's directory"):
        open_checkpoint("org/model")
