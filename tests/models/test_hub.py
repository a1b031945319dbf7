"""Models from the hub, by a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import chex
import pytest
from small_models import CONFIG, graphdef_of, random_params

from lomo_jax import models
from lomo_jax.errors import UserError

COMMIT = "a" * 40
NAME = "people/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the model `NAME`, and can break a download in its middle."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.requested = folder, [], []
        self.truncate = set()  # names of files whose next download ends early
        self.error = None  # (status, X-Error-Code) of every answer


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self.server.error is not None:
            status, code = self.server.error
            return self.answer(status, b"{}", {"X-Error-Code": code})
        if path.startswith(f"/api/models/{NAME}/tree/"):
            files = sorted(self.server.folder.iterdir())
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            return self.answer(200, json.dumps(entries).encode())
        if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            return self.answer(200, json.dumps({"id": NAME, "sha": COMMIT}).encode())
        if path.startswith(f"/api/models/{NAME}/revision/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            return self.send_file(path.rpartition("/")[2])
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name):
        content = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
        if self.command == "GET":
            self.server.requested.append(name)
        if (wanted := self.headers.get("Range")) is not None:
            self.server.ranges.append((name, wanted))
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], headers)
        if self.command == "GET" and name in self.server.truncate:
            self.server.truncate.remove(name)
            return self.answer(200, content, headers, sent=len(content) // 2)
        return self.answer(200, content, headers)

    def answer(self, status, content, headers=None, sent=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])
        self.close_connection = sent is not None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    models.save(tmp_path / "model", graphdef_of(CONFIG), random_params(CONFIG))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"never read")
    server = Hub(tmp_path / "model")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("name", [NAME, f"{NAME}@main", f"{NAME}@{COMMIT}"])
def test_a_model_is_downloaded_once(hub, name):
    for _ in range(2):
        _, params = models.load(name)
        chex.assert_trees_all_equal(params, random_params(CONFIG))
    assert sorted(hub.requested) == [
        "config.json",
        "generation_config.json",
        "lomo_jax_export.json",
        "model.safetensors",
    ]


def test_the_shape_alone_needs_no_weights(hub):
    assert models.load_config(NAME) == CONFIG
    assert "model.safetensors" not in hub.requested


def test_a_broken_download_continues(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # bytes
    hub.truncate.add("model.safetensors")
    _, params = models.load(NAME)
    chex.assert_trees_all_equal(params, random_params(CONFIG))
    half = (hub.folder / "model.safetensors").stat().st_size // 2
    ((name, wanted),) = hub.ranges
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    assert name == "model.safetensors"
    assert half - 1024 <= start <= half


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ((404, "RepoNotFound"), "people/tiny is neither a folder here nor a model on the hub"),
        ((401, "RepoNotFound"), "run hf auth login if it is private"),
        ((403, "GatedRepo"), "people/tiny is gated; accept its terms"),
    ],
)
def test_a_refusal_is_one_line(hub, error, message):
    hub.error = error
    with pytest.raises(UserError, match=message) as caught:
        models.load(NAME)
    assert "\n" not in str(caught.value)


def test_an_unknown_revision_is_named(hub):
    with pytest.raises(UserError, match="people/tiny has no revision 'v9'"):
        models.load(f"{NAME}@v9")


def test_offline_the_cache_is_enough(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor in the cache"):
        models.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    models.load(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    chex.assert_trees_all_equal(models.load(NAME)[1], random_params(CONFIG))
