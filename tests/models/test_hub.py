"""A model from the Hub: what is downloaded, what is recorded, and what is refused. The Hub is a local server."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import enable_progress_bars

from support.commands import SMALL, Terminal, contents, refused, run, run_wina, succeeded
from support.families import make_model
from support.hub import Hub, use_endpoint
from wina_convert.models.source import open_source

pytestmark = pytest.mark.slow

NAME = "lab/tiny-llama"
CARD = """---
license: apache-2.0
language:
- de
- en
tags:
- stories
---
# Tiny
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model repository holds: shards, sidecars, and weights in formats that nobody needs here."""
    folder = make_model("llama", tmp_path_factory.mktemp("repository"), max_shard_size="500KB")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Apache License 2.0\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "docs").mkdir()
    (folder / "docs" / "usage.md").write_text("nested\n")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    others = ("consolidated.safetensors", "model.fp32.safetensors", "adapter_model.safetensors", "archive.tar.gz")
    for name in (*others, "pytorch_model.bin", "tf_model.h5", "model.gguf", "model.onnx", "flax_model.msgpack"):
        (folder / name).write_bytes(b"other weights")
    return folder


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model-0*.safetensors")}


def test_a_hub_id_becomes_a_checkpoint_that_says_where_it_came_from(hub: Hub, repository: Path, tmp_path: Path):
    commit = hub.add(NAME, repository)
    out = tmp_path / "out"
    result = run(NAME, "--out", out, *SMALL, "--json", "--quiet")
    succeeded(result)
    report = json.loads(result.stdout)
    assert report["source"] == {"name": NAME, "revision": commit}
    assert json.loads((out / "wina_report.json").read_text())["source"] == report["source"]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["source"] == report["source"]
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == NAME
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["de", "en"]
    assert {"stories", "wina", "activation-sparsity"} <= set(card.data.tags)
    assert commit in card.text
    for sidecar in ("LICENSE", "chat_template.jinja", "docs/usage.md", "tokenizer.json", "generation_config.json"):
        assert (out / sidecar).read_bytes() == (repository / sidecar).read_bytes()


def test_weights_in_other_formats_are_neither_downloaded_nor_written(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository)
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL))
    unwanted = (".bin", ".h5", ".gguf", ".onnx", ".msgpack", ".pth", ".gz")
    assert not [request.path for request in hub.requests if request.path.endswith(unwanted)]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(unwanted)]
    assert {name for name in hub.sent() if name.endswith(".safetensors")} == weights(repository)


def test_a_revision_is_the_one_converted(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository)
    other = shutil.copytree(repository, tmp_path / "other")
    (other / "NOTICE").write_text("only in v2\n")
    commit = hub.add(NAME, other, ref="v2")
    out = tmp_path / "out"
    succeeded(run(NAME, "--out", out, *SMALL, "--revision", "v2"))
    assert json.loads((out / "wina_report.json").read_text())["source"]["revision"] == commit
    assert (out / "NOTICE").is_file()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_a_token_goes_with_every_request(dry: tuple[str, ...], hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository, token="hf_secret")
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL, "--token", "hf_secret", *dry))
    asked = [request for request in hub.requests if NAME in request.path]
    assert asked
    assert {request.authorization for request in asked} == {"Bearer hf_secret"}
    assert all(b"hf_secret" not in data for data in contents(tmp_path).values())


def test_no_token_is_sent_where_none_was_given(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository)
    succeeded(run(NAME, "--out", tmp_path / "out", "--dry-run"))
    assert {request.authorization for request in hub.requests} == {None}


def test_a_dry_run_reads_headers_only_and_touches_nothing(hub: Hub, repository: Path, tmp_path: Path):
    commit = hub.add(NAME, repository)
    result = run(NAME, "--out", tmp_path / "out", "--dry-run", "--json", "--quiet")
    succeeded(result)
    plan = json.loads(result.stdout)
    assert plan["source"] == {"name": NAME, "revision": commit}
    sent = hub.sent()
    assert weights(repository) <= set(sent)  # the headers of all
    for name in weights(repository):
        assert sent[name] < (repository / name).stat().st_size, f"{name} was downloaded"
    assert contents(tmp_path) == {}
    local = json.loads(run(repository, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    same = ("layers", "bytes_per_token", "disk_bytes", "projections", "dtype", "sparsity")
    assert [plan[field] for field in same] == [local[field] for field in same]


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize("change", [{"model_type": "mamba"}, {"architectures": ["BertForMaskedLM"]}])
def test_an_unsupported_model_costs_no_download_of_weights(
    dry: tuple[str, ...], change: dict, hub: Hub, repository: Path, tmp_path: Path
):
    folder = shutil.copytree(repository, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    hub.add(NAME, folder)
    refused(run(NAME, "--out", tmp_path / "out", "--quiet", *dry), NAME, "not")
    assert not [request.path for request in hub.requests if request.path.endswith(".safetensors")]
    assert not (tmp_path / "out").exists()


def gated(hub: Hub) -> None:
    hub.repositories[NAME].gated = True


def private(hub: Hub) -> None:
    hub.repositories[NAME].token = "hf_secret"


def broken(hub: Hub) -> None:
    hub.repositories[NAME].status = 500


def unavailable(hub: Hub) -> None:
    hub.repositories[NAME].status = 503


def missing(hub: Hub) -> None:
    hub.repositories.clear()


def ready(hub: Hub) -> None:
    pass


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize(
    ("prepare", "options", "words"),
    [
        pytest.param(missing, (), (NAME, "neither", "check the name", "--token"), id="missing"),
        pytest.param(gated, (), (NAME, "gated", "accept its licence at http", "--token", "hf auth login"), id="gated"),
        pytest.param(private, (), (NAME, "--token"), id="private"),
        pytest.param(private, ("--token", "hf_wrong"), (NAME, "--token"), id="wrong token"),
        pytest.param(
            ready, ("--revision", "v9"), (NAME, "no revision 'v9'", "see the branches at http"), id="revision"
        ),
        pytest.param(broken, (), (NAME, "Hub", "500", "try again later"), id="500"),
        pytest.param(unavailable, (), (NAME, "Hub", "503", "try again later"), id="503"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    prepare, options, words, dry, hub: Hub, repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    hub.add(NAME, repository)
    prepare(hub)
    refused(run(NAME, "--out", tmp_path / "out", *options, *dry), *words)
    assert not (tmp_path / "out").exists()
    assert not caplog.messages  # huggingface_hub prints what it logs, on lines of their own


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize("name", ["lab/no such name", "lab/..", "a" * 120])
def test_what_cannot_be_a_hub_id_is_refused(name: str, dry: tuple[str, ...], hub: Hub, tmp_path: Path):
    refused(run(name, "--out", tmp_path / "out", *dry), "local folder")
    assert not hub.requests


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_without_a_network_the_line_says_so(
    dry: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    use_endpoint(closed, tmp_path / "home", monkeypatch)
    refused(run(NAME, "--out", tmp_path / "out", *dry), NAME, "cannot be reached", "check the network", "local folder")
    assert not (tmp_path / "out").exists()
    refused(run_wina("inspect", NAME), NAME, "cannot be reached")
    assert not caplog.messages


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_in_offline_mode_the_line_says_so(
    dry: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = (constants.HF_HUB_CACHE, "HF_HUB_OFFLINE", "local folder")
    refused(run(NAME, "--out", tmp_path / "out", *dry), NAME, "not in the Hub's cache", *words)
    assert not hub.requests


def test_what_was_downloaded_once_is_planned_without_a_network(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = hub.add(NAME, repository)
    options = (NAME, "--out", tmp_path / "out", "--dry-run", "--json", "--quiet", "--basis", "none")
    open_source(NAME)
    online = json.loads(run(*options).stdout)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run(*options)
    succeeded(result)
    offline = json.loads(result.stdout)
    assert offline["source"] == {"name": NAME, "revision": commit}
    assert {name: value for name, value in offline.items() if name != "seconds"} == {
        name: value for name, value in online.items() if name != "seconds"
    }


def test_what_was_downloaded_once_converts_without_a_network(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = hub.add(NAME, repository)
    succeeded(run(NAME, "--out", tmp_path / "first", *SMALL))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    succeeded(run(NAME, "--out", tmp_path / "second", *SMALL))
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "wina_report.json").read_text())["source"]["revision"] == commit


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({"config.json": None}, ("config.json",), id="no config"),
        pytest.param({"config.json": b"{"}, ("config.json", "not JSON"), id="broken config"),
        pytest.param({"*.safetensors": None, "*.index.json": None}, ("safetensors",), id="pickles only"),
        pytest.param({"*-00001-of-*": None}, ("00001-of-", "missing"), id="shard missing"),
        pytest.param({"*-00001-of-*": b"0123456789"}, ("00001-of-", "safetensors"), id="garbage shard"),
        pytest.param({"*-00001-of-*": b""}, ("00001-of-", "safetensors"), id="empty shard"),
        pytest.param({"*.index.json": b"{"}, ("index.json",), id="broken index"),
        pytest.param({"*.index.json": b'{"weight_map": {"x": "../x"}}'}, ("'../x'", "outside"), id="index leads out"),
    ],
)
def test_a_broken_repository_is_refused_in_one_line(
    files: dict[str, bytes | None], words, dry, hub: Hub, repository: Path, tmp_path: Path
):
    folder = shutil.copytree(repository, tmp_path / "source")
    for pattern, data in files.items():
        for path in list(folder.glob(pattern)):
            path.unlink() if data is None else path.write_bytes(data)
    hub.add(NAME, folder)
    refused(run(NAME, "--out", tmp_path / "out", "--quiet", *dry), *words)
    assert not (tmp_path / "out").exists()


def test_a_download_that_comes_short_is_refused_in_one_line(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository, short=1)
    refused(run(NAME, "--out", tmp_path / "out", "--quiet"), NAME)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.add(NAME, repository)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    refused(run(NAME, "--out", tmp_path / "out", "--quiet"), str(tmp_path / "file"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_quiet_shows_no_bars_of_a_download(
    dry: tuple[str, ...], hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    enable_progress_bars()
    hub.add(NAME, repository)
    terminal = Terminal(monkeypatch)
    assert terminal.run(NAME, "--out", tmp_path / "out", *SMALL, "--quiet", *dry) == 0
    assert terminal.stderr == ""


def test_a_terminal_shows_bars_of_a_download(
    hub: Hub, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    enable_progress_bars()
    hub.add(NAME, repository)
    terminal = Terminal(monkeypatch)
    assert terminal.run(NAME, "--out", tmp_path / "out", *SMALL) == 0
    assert "ownload" in terminal.stderr.partition("Writing")[0]


def test_a_download_is_reported_in_plain_lines_where_there_is_no_terminal(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository)
    result = run(NAME, "--out", tmp_path / "out", *SMALL)
    succeeded(result)
    assert "\r" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("Downloading")], result.stderr


def test_eval_compares_with_a_source_on_the_hub(hub: Hub, repository: Path, tmp_path: Path):
    hub.add(NAME, repository, token="hf_secret", ref="v2")
    succeeded(run(repository, "--out", tmp_path / "out", *SMALL))
    options = ("--text", "bundled", "--samples", 4, "--seq-len", 32, "--json", "--quiet", "--source")
    local = run_wina("eval", tmp_path / "out", *options, repository)
    remote = run_wina("eval", tmp_path / "out", *options, NAME, "--revision", "v2", "--token", "hf_secret")
    succeeded(remote)
    assert json.loads(remote.stdout) == json.loads(local.stdout)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("ran")


class OwnConfig(LlamaConfig):
    pass


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model with Python code of its own, and the file that this code writes when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, marker = shutil.copytree(repository, tmp_path / "source"), tmp_path / "marker"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["convert", "dry-run"])
def test_code_of_a_model_does_not_run_by_default(
    dry: tuple[str, ...], own_code: tuple[Path, Path], hub: Hub, tmp_path: Path
):
    folder, marker = own_code
    hub.add(NAME, folder)
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL, *dry))
    assert not marker.exists()


def test_code_of_a_model_runs_where_the_user_allows_it(own_code: tuple[Path, Path], hub: Hub, tmp_path: Path):
    folder, marker = own_code
    hub.add(NAME, folder)
    succeeded(run(NAME, "--out", tmp_path / "out", *SMALL, "--trust-remote-code"))
    assert marker.exists()


def test_a_local_conversion_opens_no_connection(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def connect(*args: object) -> None:
        raise AssertionError(f"a connection to {args[1:]}")

    use_endpoint("http://127.0.0.1:9", tmp_path / "home", monkeypatch)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    succeeded(run(tiny, "--out", tmp_path / "out", *SMALL))
