"""A hub that runs here speaks the few calls that fetching a model takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A hub with one model, `org/model`, whose weights it says to be of a SHA-256.

    Attributes:
        status: what it answers to all requests, if not 200.
        breaks: how many times it breaks off in the middle of the weights.
        wrong: whether it sends other weights than it says; headers that are asked for alone are right.
        slow: how many seconds it waits before it sends weights.
        sent: how many bytes of each file it sent, without headers that were asked for alone.
        asked: how often each path was asked for.
    """

    daemon_threads = True

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.status, self.breaks, self.wrong, self.slow = 200, 0, False, 0.0
        self.asked, self.sent = Counter(), Counter()


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
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(start), min(len(content), int(end) + 1) if end else len(content)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body and name.endswith(".safetensors") and not end:
            time.sleep(hub.slow)
            content = bytes(len(content)) if hub.wrong else content
            hub.sent[name] += len(content) - start
            if hub.breaks:
                hub.breaks -= 1
                self.wfile.write(content[start : start + len(content) // 2])
                self.close_connection = True
                return self.connection.close()
        return self.wfile.write(content[start:stop]) if body else None


@contextlib.contextmanager
def running_hub(directory, cache, monkeypatch):
    """Run a hub that has the files of a directory; what is fetched lies in a cache."""
    server = Hub(directory)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "ENDPOINT": here,
        "HUGGINGFACE_CO_URL_TEMPLATE": here + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield server
    server.shutdown()
    server.server_close()
