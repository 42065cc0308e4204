"""A stand-in for the Hugging Face Hub on the loopback interface, as far as a download or an upload of a model needs one."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from support import hub_uploads
from support.hub_uploads import Uploads, blob_id

ROUTE = re.compile(
    r"/api/models/(?P<info>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+)|/tree/(?P<tree>[^/]+)(/(?P<inner>.+))?)?$"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")


@dataclass
class Repository:
    """A model repository: one folder for each commit.

    Attributes:
        commits: commit hash -> folder.
        refs: branch or tag -> commit hash.
        token: the only token that opens it; None: it is public.
        gated: whether its files are refused although it can be seen.
        status: an HTTP status that every request gets; None: requests are answered.
        private: whether it was made so by an upload.
        short: bytes that every GET of a file leaves out, while the headers keep their word to each other.
    """

    commits: dict[str, Path]
    refs: dict[str, str]
    token: str | None = None
    gated: bool = False
    status: int | None = None
    short: int = 0
    private: bool = False


@dataclass
class Request:
    """A request as the server saw it."""

    method: str
    path: str
    authorization: str | None
    byte_range: str | None
    sent: int = 0  # bytes of the body


@dataclass
class Hub:
    """The running server: its address, what it serves and what was asked of it."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    uploads: Uploads = field(default_factory=Uploads)

    def add(self, name: str, folder: Path, **options: Any) -> str:
        """Serve a folder as the branch main of a repository, and return the commit hash."""
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.commits[commit] = folder
        repository.refs[options.pop("ref", "main")] = commit
        for option, value in options.items():
            setattr(repository, option, value)
        return commit

    def sent(self) -> dict[str, int]:
        """Bytes sent of each file, all requests together."""
        total: dict[str, int] = {}
        for request in self.requests:
            if found := FILE.match(request.path):
                total[found["path"]] = total.get(found["path"], 0) + request.sent
        return total


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.log = Request(self.command, path, self.headers.get("Authorization"), self.headers.get("Range"))
            hub.requests.append(self.log)
            if hub_uploads.answer(self, hub, path, urlsplit(self.path).query):
                return
            found = ROUTE.match(path) or FILE.match(path)
            groups = found.groupdict() if found else {}
            repository = hub.repositories.get(groups.get("info") or groups.get("repo") or "")
            if repository is None:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            if repository.status:
                return self.refuse(repository.status, None, "Something went wrong on our side")
            if repository.token and self.log.authorization != f"Bearer {repository.token}":
                if self.log.authorization:
                    return self.refuse(401, None, "Invalid credentials in Authorization header")
                return self.refuse(401, "RepoNotFound", "Repository not found")
            asked = groups.get("rev") or groups.get("tree") or "main"
            commit = repository.refs.get(asked, asked)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {asked}")
            folder = repository.commits[commit]
            if "path" in groups:
                if repository.gated:
                    return self.refuse(403, "GatedRepo", "Access to this model is restricted")
                return self.send_file(folder / groups["path"], commit, repository.short)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if groups.get("inner") and not (folder / groups["inner"]).is_dir():
                return self.refuse(404, "EntryNotFound", f"{groups['inner']} does not exist on {asked}")
            if groups.get("tree"):
                files = [path for path in files if path.is_relative_to(folder / (groups.get("inner") or ""))]
                return self.send_json([_entry(folder, path) for path in files])
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            return self.send_json({"id": groups["info"], "sha": commit, "siblings": siblings, "tags": []})

        def send_file(self, path: Path, commit: str, short: int) -> None:
            if not path.is_file():
                return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            data = path.read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
            status = 200
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.log.byte_range or ""):
                start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                status, data = 206, data[start : end + 1]
            if short and self.command == "GET":
                data = data[:-short]
            return self.send_body(status, data, headers)

        def send_json(self, content: Any) -> None:
            self.send_body(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
            errors = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self.send_body(status, json.dumps({"error": message}).encode(), {**errors, **(headers or {})})

        def send_body(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.log.sent = len(data)
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Not on stderr."""

    return Handler


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(data), "oid": blob_id(data)}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server on a free port of 127.0.0.1, for the length of a with-block."""
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        close_session()  # its connections, which the server's threads wait for
        server.shutdown()
        server.server_close()
        thread.join()


def use_endpoint(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, imported already, to another endpoint and to an empty cache, without a stored token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses"), raising=False)  # not in 1.5
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    # the functions of the package's top level are methods of this object
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    # it waits between attempts
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))
    close_session()
