"""What the stand-in for the Hub does with uploads: accounts, new repositories and branches, large files, commits.

It answers as huggingface.co does to huggingface_hub without xet: who am I, may I write, preupload, LFS batch, PUT, commit. Faults
break a connection or refuse a request, where a test asks for it.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from support.hub import Hub, Repository

MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Account:
    """Who a token belongs to, and what it may do.

    Attributes:
        name: the user.
        role: of the token: write or read.
        orgs: organisations that the user may write to.
    """

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass
class Fault:
    """What goes wrong with a request.

    Attributes:
        method: of the request.
        path: a pattern that its path holds.
        status: the answer; None: the connection is cut in the middle of the body.
        times: how often.
        message: what the answer says.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1000
    message: str = "Something went wrong"


@dataclass
class Uploads:
    """What the server knows of uploads.

    Attributes:
        root: where the folders of commits are made.
        accounts: by token.
        faults: the first that fits a request is what happens to it.
        stored: large files that have arrived whole, by SHA-256.
        messages: of commits.
    """

    root: Path = Path("unused")
    accounts: dict[str, Account] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def blob_id(data: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def body_of(handler: Any, most: int | None = None) -> bytes:
    """The body of a request, or its first `most` bytes."""
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        length = int(handler.headers.get("Content-Length") or 0)
        return bytes(handler.rfile.read(length if most is None else min(most, length)))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
        if most is not None and len(body) >= most:
            return body
    handler.rfile.readline()
    return body


def answer(handler: Any, hub: "Hub", path: str, query: str) -> bool:
    """Answer a request that belongs to an upload; False: it is another."""
    for fault in hub.uploads.faults:
        if fault.times and fault.method == handler.command and re.search(fault.path, path):
            fault.times -= 1
            if fault.status is None:
                body_of(handler, 1000)
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
            else:
                body_of(handler)
                handler.refuse(fault.status, None, fault.message)
            return True
    for method, pattern, work in ROUTES:
        if method == handler.command and (found := re.fullmatch(pattern, path)):
            token = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
            body = body_of(handler)
            account = hub.uploads.accounts.get(token)
            if account is None and not path.startswith("/lfs/"):
                handler.refuse(401, None, "Invalid credentials in Authorization header")
            elif repo := found.groupdict().get("repo"):
                _on_repository(handler, hub, account, repo, work, found, body, query)
            else:
                work(handler, hub, account, body, **found.groupdict())
            return True
    return False


def _on_repository(handler: Any, hub: "Hub", account: Any, repo: str, work: Any, found: Any, body: bytes, query: str):
    if repo not in hub.repositories:
        return handler.refuse(404, "RepoNotFound", "Repository not found")
    if work is not _batch and "create_pr=1" not in query and not _may_write(account, repo.partition("/")[0]):
        return handler.refuse(403, None, "You don't have write access")
    places = {key: value for key, value in found.groupdict().items() if key != "repo"}
    work(
        handler, hub, repo, hub.repositories[repo], body, **({"query": query} if "commit" in found[0] else {}), **places
    )


def _may_write(account: Account, owner: str) -> bool:
    return account.role == "write" and owner in (account.name, *account.orgs)


def _whoami(handler: Any, hub: "Hub", account: Account, body: bytes) -> None:
    orgs = [{"name": name, "roleInOrg": "write"} for name in account.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
    handler.send_json({"type": "user", "name": account.name, "orgs": orgs, "auth": auth})


def _create(handler: Any, hub: "Hub", account: Account, body: bytes) -> None:
    asked = json.loads(body)
    owner, name = asked["organization"] or account.name, asked["name"]
    url = {"url": f"{hub.url}/{owner}/{name}"}
    if not _may_write(account, owner):
        return handler.refuse(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
    if f"{owner}/{name}" in hub.repositories:
        return handler.send_body(
            409, json.dumps(url).encode(), {"X-Error-Message": "You already created this model repo"}
        )
    folder = hub.uploads.root / f"{owner}--{name}" / "0"
    folder.mkdir(parents=True)
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    hub.add(f"{owner}/{name}", folder)
    hub.repositories[f"{owner}/{name}"].private = asked.get("visibility") == "private" or bool(asked.get("private"))
    handler.send_json(url)


def _validate(handler: Any, hub: "Hub", account: Account, body: bytes) -> None:
    """The rules of the Hub that a generated card could break: fields of the right form, licences with a name."""
    data = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    errors = []
    if "pipeline_tag" in data and data["pipeline_tag"] != "text-generation":
        errors.append('"pipeline_tag" must be a known task')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required')
    if data.get("base_model_relation") not in (None, "quantized", "finetune", "adapter", "merge"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(result["dataset"]):
                errors.append('"model-index" is incomplete')
    answered = {"errors": [{"message": error} for error in errors], "warnings": []}
    handler.send_body(400 if errors else 200, json.dumps(answered).encode(), {"Content-Type": "application/json"})


def _authorized(handler: Any, hub: "Hub", repo: str, repository: "Repository", body: bytes) -> None:
    handler.send_json({})


def _branch(handler: Any, hub: "Hub", repo: str, repository: "Repository", body: bytes, branch: str) -> None:
    if branch in repository.refs:
        return handler.refuse(409, None, "Reference already exists")
    repository.refs[branch] = repository.refs["main"]
    handler.send_json({})


def _preupload(handler: Any, hub: "Hub", repo: str, repository: "Repository", body: bytes, rev: str) -> None:
    if rev not in repository.refs:
        return handler.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    folder, files = repository.commits[repository.refs[rev]], []
    for path in (file["path"] for file in json.loads(body)["files"]):
        large = path.endswith((".safetensors", ".png"))
        told = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if (folder / path).is_file():
            data = (folder / path).read_bytes()
            told["oid"] = hashlib.sha256(data).hexdigest() if large else blob_id(data)
        files.append(told)
    handler.send_json({"files": files})


def _batch(handler: Any, hub: "Hub", repo: str, repository: "Repository", body: bytes) -> None:
    objects = []
    for one in json.loads(body)["objects"]:
        upload = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
        objects.append(one if one["oid"] in hub.uploads.stored else one | {"actions": upload})
    handler.send_json({"transfer": "basic", "objects": objects})


def _store(handler: Any, hub: "Hub", account: object, body: bytes, oid: str) -> None:
    if hashlib.sha256(body).hexdigest() != oid:
        return handler.refuse(400, None, "The file is not what its hash says")
    hub.uploads.stored[oid] = body
    handler.send_json({})


def _commit(handler: Any, hub: "Hub", repo: str, repository: "Repository", body: bytes, rev: str, query: str) -> None:
    if rev not in repository.refs:
        return handler.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
    lines = [json.loads(line) for line in body.splitlines()]
    before = repository.commits[repository.refs[rev]]
    folder = hub.uploads.root / repo.replace("/", "--") / str(len(repository.commits))
    shutil.copytree(before, folder)
    for key, value in ((line["key"], line["value"]) for line in lines):
        if key == "header":
            hub.uploads.messages.append(value["summary"])
            continue
        path = folder / value["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            path.write_bytes(hub.uploads.stored[value["oid"]])
        elif key == "deletedFile":
            path.unlink()
    pull = f"refs/pr/{len(repository.commits)}" if "create_pr=1" in query else None
    commit = hub.add(repo, folder, ref=pull or rev)
    answered = {"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit}
    handler.send_json(answered | {"pullRequestUrl": f"{hub.url}/{repo}/discussions/1" if pull else None})


ROUTES = (
    ("GET", "/api/whoami-v2", _whoami),
    ("GET", MODEL + "/auth-check/write", _authorized),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("POST", MODEL + "/branch/(?P<branch>.+)", _branch),
    ("POST", MODEL + "/preupload/(?P<rev>.+)", _preupload),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _store),
    ("POST", MODEL + "/commit/(?P<rev>.+)", _commit),
)
