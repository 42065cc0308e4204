"""A checkpoint goes to the Hub: whether it may is asked before anything long, and it arrives in one commit or not at all.

huggingface_hub sends the weights first, tries again where a connection breaks, and skips what the Hub has already; the commit
that makes them visible comes last. A reader of the repository never sees half of a checkpoint, and a second run goes on.
"""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import OptionError, UploadError, one_line
from ..format.address import with_address
from ..format.manifest import read_manifest, renewed_manifest
from ..format.names import CARD, MANIFEST, holds_weights
from ..progress import Progress, silent
from .hub import unreachable

TOKENS = "https://huggingface.co/settings/tokens"
MAIN = "main"


@dataclass(frozen=True)
class Destination:
    """Where on the Hub a checkpoint is to go.

    Attributes:
        repository: USER/NAME or ORGANISATION/NAME; made where it does not exist.
        revision: branch, made where it does not exist, or refs/pr/N; None: main.
        private: whether a repository that is made is private; None: as its owner's are.
        subfolder: folder of the repository to write to; None: its top.
        create_pr: open a pull request instead of writing to a branch.
        token: access token; None: that of `hf auth login`.

    Raises:
        OptionError: repository, revision or subfolder cannot be one.
    """

    repository: str
    revision: str | None = None
    private: bool | None = None
    subfolder: str | None = None
    create_pr: bool = False
    token: str | None = None

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise OptionError(f"{self.repository!r} is no name of a repository; give USER/NAME") from error
        if "/" not in self.repository:
            raise OptionError(f"{self.repository!r} names no owner; give USER/NAME")
        if self.create_pr and self.revision:
            raise OptionError(f"a pull request is opened on {MAIN}; give either it or revision {self.revision!r}")
        if self.subfolder is not None and not _inside(self.subfolder):
            raise OptionError(f"{self.subfolder!r} is no folder of a repository; give names between single slashes")

    @property
    def api(self) -> HfApi:
        """The client that writes there."""
        return HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=self.token)

    @property
    def branch(self) -> str | None:
        """The branch it is written to; None: main, or a pull request."""
        named = self.revision not in (None, MAIN) and not str(self.revision).startswith("refs/")
        return self.revision if named else None

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        place = [self.revision or MAIN, self.subfolder] if self.revision or self.subfolder else []
        parts = [huggingface_hub.constants.ENDPOINT, self.repository, *(["tree"] if place else []), *place]
        return "/".join(part for part in parts if part)

    def command(self, folder: Path) -> str:
        """What uploads a folder there; the token is not told."""
        words = ["wina", "push", str(folder), self.repository]
        for name, value in (("--revision", self.revision), ("--subfolder", self.subfolder)):
            words += [name, value] if value else []
        words += ["--private"] if self.private else []
        return shlex.join([*words, *(["--create-pr"] if self.create_pr else [])])


def _inside(folder: str) -> bool:
    return folder.isprintable() and not {"", ".", "..", ".git"} & set(folder.split("/")) and "\\" not in folder


def check_access(to: Destination) -> None:
    """Ask the Hub whether the token may write there; nothing is written.

    Raises:
        UploadError: there is no token or not a valid one, it may not write there, or the Hub does not answer.
    """
    with _explained(to):
        api = to.api
        account = api.whoami()
        if _access_token(account).get("role") == "read":
            raise UploadError(f"the token may read but not write to {to.repository}; make one that may at {TOKENS}")
        try:
            api.model_info(to.repository)
        except RepositoryNotFoundError:
            if to.create_pr:
                raise
            owner = to.repository.partition("/")[0]
            orgs = [one["name"] for one in account.get("orgs") or () if one.get("roleInOrg") != "read"]
            owners = [str(account.get("name")), *orgs]
            if owner not in owners:
                raise UploadError(
                    f"the repository {to.repository} does not exist, and the token's owner may make none for {owner!r}, only "
                    f"for {', '.join(owners)}"
                ) from None
        else:
            if not to.create_pr:  # anybody may open one
                api.auth_check(to.repository, write=True)


def _access_token(account: dict[str, object]) -> dict[str, object]:
    """What the Hub tells of the token; the form differs for tokens of other kinds."""
    auth = account.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    return token if isinstance(token, dict) else {}


def upload(
    folder: Path,
    to: Destination,
    changed: Mapping[str, bytes] | None = None,
    message: str | None = None,
    progress: Progress = silent,
) -> str:
    """Upload a verified checkpoint with all its files in one commit; its card there names the repository in its snippets.

    Weight files that an earlier checkpoint left at the same place, and this one does not have, are deleted by the commit.

    Args:
        folder: the checkpoint; nothing in it is changed.
        to: where to.
        changed: files that go with other contents than the folder's, the manifest aside.
        message: of the commit.
        progress: how to report it.

    Returns:
        the URL, of the pull request where there is one.

    Raises:
        UploadError: it did not get there; what was sent need not be sent again.
    """
    changed = dict(changed or {})
    names = [*read_manifest(folder), MANIFEST]
    if CARD in names:
        card = (changed.get(CARD) or (folder / CARD).read_bytes()).decode(errors="surrogateescape")
        placed = with_address(card, to.repository, to.branch, to.subfolder)
        changed[CARD] = placed.encode(errors="surrogateescape")
    if changed:
        changed[MANIFEST] = renewed_manifest(folder, changed)
    prefix = f"{to.subfolder}/" if to.subfolder else ""
    with progress(f"Uploading to {to.repository}", 1, "model") as advance, _explained(to, folder):
        api = to.api
        if not to.create_pr:
            api.create_repo(to.repository, private=to.private, exist_ok=True)
            if to.branch:
                api.create_branch(to.repository, branch=to.branch, exist_ok=True)
        there = api.list_repo_files(to.repository, revision=to.revision)
        stale = {name for name in there if holds_weights(name) and name.rpartition("/")[0] == prefix.rstrip("/")}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in sorted(stale - {prefix + name for name in names})
        ]
        operations += [CommitOperationAdd(prefix + name, changed.get(name, folder / name)) for name in names]
        done = api.create_commit(
            to.repository,
            operations,
            commit_message=message or "Upload WINA checkpoint",
            revision=to.revision,
            create_pr=to.create_pr,
        )
        advance(1)
    return done.pr_url or to.url


@contextmanager
def _explained(to: Destination, folder: Path | None = None) -> Iterator[None]:
    """Within the block, whatever keeps a checkpoint from the Hub is an UploadError that says what to do.

    Args:
        to: where it is to go.
        folder: what is uploaded; None: access is asked for.
    """
    again = f"; what arrived is kept there, so run again: {to.command(folder)}" if folder else ""
    try:
        yield
    except UploadError:
        raise
    except Exception as error:  # huggingface_hub and hf_xet raise errors of many kinds, some with the cause behind them
        raise UploadError(f"{_reason(to, _cause(error))}{again}") from error


def _cause(error: Exception) -> Exception:
    """What is behind an error that only says which file it was."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _reason(to: Destination, error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token to write to {to.repository}; run `hf auth login`, or give --token or HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{to.repository} has no revision {to.revision!r}; give a branch, or the refs/pr/N of a pull request"
    if isinstance(error, RepositoryNotFoundError):
        return f"{to.repository} is not there, or hidden from this token; check the name and the token's access at {TOKENS}"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status, said = error.response.status_code, error.server_message or ""
        shown = f"{status}: {' '.join(said.split())}" if said else str(status)
        if status == 401:
            return (
                f"the Hub does not accept the token for {to.repository} ({shown}); make one that may write at {TOKENS}"
            )
        if status == 403:
            return f"the token may not write to {to.repository} ({shown}); change its access at {TOKENS}"
        if status in (409, 412):
            return f"{to.repository} was changed meanwhile ({shown})"
        if status == 429 or status >= 500:
            return f"the Hub cannot take {to.repository} now ({shown})"
        return f"the Hub refused {to.repository} ({shown})"
    if unreachable(error) or isinstance(error, OSError):
        return f"the connection to the Hub broke, or cannot be made, for {to.repository} ({one_line(error)})"
    return f"the upload to {to.repository} failed ({one_line(error)})"
