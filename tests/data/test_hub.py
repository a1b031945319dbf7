"""Datasets of the Hugging Face Hub: from a server on loopback, from the cache, and errors."""

import functools
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

pytestmark = pytest.mark.slow  # a process for each dataset

REVISION = "a" * 40
TRAIN = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20)).encode()
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n"
    b"  - split: train\n    path: main/train.jsonl\n  - split: test\n    path: main/test.jsonl\n"
    b"- config_name: socratic\n  data_files:\n  - split: train\n    path: socratic/train.jsonl\n"
    b"---\nA card.\n",
    "main/train.jsonl": TRAIN,
    "main/test.jsonl": b'{"text": "a test"}\n',
    "socratic/train.jsonl": b'{"text": "a question"}\n',
}
# A dataset whose code would have to run.
SCRIPT = {"script.py": b"raise SystemExit('it ran')\n"}


class Hub(http.server.BaseHTTPRequestHandler):
    """What `datasets` and `huggingface_hub` ask for."""

    requests: ClassVar[list[str]] = []

    def log_message(self, format, *args):
        self.requests.append(format % args)

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        self._answer(body)

    def _answer(self, body=None):
        path = self.path.partition("?")[0]
        name = next((n for n in ("me/set", "me/gated", "me/script") if n in path), None)
        if name is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        rest = path.partition(name)[2].strip("/")
        files = SCRIPT if name == "me/script" else FILES
        if path.startswith(f"/datasets/{name}/resolve/"):
            if name == "me/gated":
                return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            file = rest.split("/", 2)[2]
            if file not in files:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            content = files[file]
            etag = hashlib.sha1(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION})
        entries = [_entry(file, content) for file, content in files.items()]
        if "/paths-info/" in path:
            return self._send_json([e for e in entries if e["path"] in body["paths"]])
        if "/tree/" in path:
            folder = rest.partition(REVISION)[2].strip("/")
            entries = [e for e in entries if e["path"].startswith(folder)]
            folders = {e["path"].rpartition("/")[0] for e in entries if "/" in e["path"]}
            entries += [{"type": "directory", "path": f, "oid": "0", "size": 0} for f in folders]
            return self._send_json(entries)
        info = {"id": name, "sha": REVISION, "private": False, "gated": name == "me/gated"}
        info |= {"downloads": 0, "likes": 0, "tags": [], "disabled": False, "author": "me"}
        return self._send_json(info | {"siblings": [{"rfilename": file} for file in files]})

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(file: str, content: bytes) -> dict:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": oid}


@pytest.fixture(scope="module")
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import json, sys
from lomo_jax.data.sources import find
from lomo_jax.errors import UserError
try:
    [source] = find(sys.argv[1]).sources
    print(json.dumps([source.name, [r.columns["text"] for r in source.read()]]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def read(path: str, home: Path, endpoint: str, **environment: str):
    """Reads a dataset in a new process: the endpoint is read at import."""
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, path],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


DOCUMENTS = [f"document {i}" for i in range(20)]


def test_a_dataset_its_splits_and_its_configurations(tmp_path, endpoint):
    assert read("me/set", tmp_path, endpoint) == ["me/set:train", DOCUMENTS]
    assert read("me/set:test", tmp_path, endpoint) == ["me/set:test", ["a test"]]
    assert read("me/set:train[:2]", tmp_path, endpoint)[1] == DOCUMENTS[:2]
    assert read("me/set@socratic", tmp_path, endpoint)[1] == ["a question"]
    # Then without a network, from the cache.
    Hub.requests.clear()
    offline = functools.partial(read, home=tmp_path, endpoint=endpoint, HF_HUB_OFFLINE="1")
    assert offline("me/set@main")[1] == DOCUMENTS
    assert offline("me/set@socratic")[1] == ["a question"]
    assert re.search("multiple .*socratic.*; a path there is .*@CONFIG", offline("me/set"))
    assert not Hub.requests


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("me/none", "me/none: .*doesn't exist.*; check the name, or log in with `hf auth login`"),
        ("me/gated", "me/gated: .*gated.*; check the name, or log in with `hf auth login`"),
        ("me/script", "me/script .*cannot be read .*scripts are no longer supported"),
        ("me/set:dev", "me/set .*cannot be read .*Unknown split.*dev.*train.*test"),
        ("me/set@none", "me/set .*cannot be read .*none.* not found.*main.*socratic"),
    ],
)
def test_an_error_is_one_line(tmp_path, endpoint, path, words):
    message = read(path, tmp_path, endpoint)
    assert isinstance(message, str)
    assert "\n" not in message
    assert re.match(words, message), message


def test_no_network(tmp_path):
    message = read("me/set", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert message.startswith(
        "me/set is no file here, and cannot be read from the Hugging Face Hub"
    )
    assert "\n" not in message
