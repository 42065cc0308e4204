"""A checkpoint goes to the Hub whole or not at all, and comes back as it was. The Hub is a local server."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.cards import run_snippets
from support.commands import SMALLEST, contents, refused, run, run_wina, succeeded
from support.edits import edit_json, edit_tensor
from support.hub import Hub
from support.hub_uploads import Account, Fault
from support.loaded import logits
from wina_convert import load, push, set_sparsity
from wina_convert.errors import OptionError, UploadError
from wina_convert.models.upload import Destination, check_access
from wina_convert.verbs.retarget import retarget
from wina_convert.verbs.verify import verify_folder

MODEL = "kilobytes in shards"  # see support/shared.py

# huggingface_hub sends large files in a way that its HTTP client calls old
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

NAME, TOKEN = "lab/small-wina", "hf_secret"


@pytest.fixture
def hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """It knows a token of the user lab; who uploads has it in the environment."""
    hub.uploads.root = tmp_path / "server"
    hub.uploads.accounts[TOKEN] = Account("lab", orgs=("club",))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def on_hub(hub: Hub, name: str = NAME, ref: str = "main") -> Path:
    """What a revision holds now."""
    repository = hub.repositories[name]
    return repository.commits[repository.refs[ref]]


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != ".gitattributes"}


def asked(hub: Hub, method: str, part: str) -> list[str]:
    return [one.path for one in hub.requests if one.method == method and part in one.path]


# --- all goes well ---


def test_what_was_pushed_is_the_folder_with_a_card_that_names_its_place(hub: Hub, converted: Path):
    result = run_wina("push", converted, NAME)
    succeeded(result)
    assert result.stdout == f"{converted}: uploaded to {hub.url}/{NAME}\n"
    pushed, here = files(on_hub(hub)), contents(converted)
    assert set(pushed) == set(here)
    assert {name for name in here if pushed[name] != here[name]} == {"README.md", "wina_manifest.json"}
    assert f'from_pretrained("{NAME}")' in pushed["README.md"].decode()
    assert '"."' not in pushed["README.md"].decode()
    verify_folder(on_hub(hub))
    assert hub.uploads.messages == ["Upload WINA checkpoint"]
    assert not hub.repositories[NAME].private


def test_what_comes_back_is_the_model(hub: Hub, converted: Path, tmp_path: Path):
    push(converted, NAME)
    push(converted, NAME, revision="half", subfolder="checkpoints/small")
    dense = logits(load(converted, sparsity=0))
    expected = logits(load(converted))
    for place in ({}, {"revision": "half", "subfolder": "checkpoints/small"}):
        model = AutoModelForCausalLM.from_pretrained(NAME, **place)
        assert torch.equal(logits(model), expected)
        assert AutoTokenizer.from_pretrained(NAME, **place)("Once upon") == AutoTokenizer.from_pretrained(converted)(
            "Once upon"
        )
        assert torch.equal(logits(load(NAME, sparsity=0, **place)), dense)
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(NAME, subfolder="checkpoints/small")  # it is on the branch alone
    card = (on_hub(hub, ref="half") / "checkpoints" / "small" / "README.md").read_text()
    assert f'from_pretrained("{NAME}", revision="half", subfolder="checkpoints/small")' in card
    shutil.copytree(on_hub(hub, ref="half") / "checkpoints" / "small", tmp_path / "downloaded")
    verify_folder(tmp_path / "downloaded")
    push(tmp_path / "downloaded", "club/small")  # and on from there
    assert files(on_hub(hub, "club/small"))["README.md"] == files(on_hub(hub))["README.md"].replace(
        NAME.encode(), b"club/small"
    )


def test_the_snippets_of_a_card_on_the_hub_run_as_pasted(hub: Hub, converted: Path):
    push(converted, NAME)
    run_snippets(ModelCard.load(NAME).text)


def test_a_conversion_that_is_pushed_asks_first_and_uploads_last(hub: Hub, source: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run(
        source, "--out", out, *SMALLEST, "--push-to-hub", "club/small", "--push-revision", "v1", "--private", "--json"
    )
    succeeded(result)
    report = json.loads(result.stdout)
    assert report["pushed"] == f"{hub.url}/club/small/tree/v1"
    assert json.loads((out / "wina_report.json").read_text()) == {k: v for k, v in report.items() if k != "pushed"}
    assert hub.repositories["club/small"].private
    assert set(files(on_hub(hub, "club/small", "v1"))) == set(contents(out))
    assert files(on_hub(hub, "club/small")) == {}
    first = [one.path for one in hub.requests][:2]
    assert first == ["/api/whoami-v2", "/api/models/club/small"]
    assert "/api/repos/create" not in first


def test_a_second_push_replaces_weights_and_nothing_of_others(hub: Hub, source: Path, converted: Path, tmp_path: Path):
    push(converted, NAME)
    push(converted, NAME, subfolder="other")
    (on_hub(hub) / "notes.txt").write_text("of the owner")
    whole = tmp_path / "whole"
    succeeded(run(source, "--out", whole, *SMALLEST))  # one weight file instead of three and an index
    push(whole, NAME)
    after = files(on_hub(hub))
    assert {name for name in after if "/" not in name} == {
        *(n for n in contents(whole) if "/" not in n),
        "notes.txt",
        "other",
    }
    assert {name for name in after if name.startswith("other/model")} == {
        f"other/{name}" for name in contents(converted) if name.startswith("model")
    }
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(NAME)), logits(load(whole)))


def test_a_pull_request_needs_no_right_to_write(hub: Hub, copied: Path):
    push(copied, NAME)
    before = on_hub(hub)
    hub.uploads.accounts["hf_guest"] = Account("guest")
    retarget(copied, 0.25)
    with pytest.raises(UploadError, match="may not write"):
        push(copied, NAME, token="hf_guest")
    url = push(copied, NAME, token="hf_guest", create_pr=True, commit_message="Better")
    assert url == f"{hub.url}/{NAME}/discussions/1"
    assert on_hub(hub) == before
    assert hub.uploads.messages[-1] == "Better"


# --- a model ---


def test_a_model_pushes_the_checkpoint_it_came_from_with_its_own_default(hub: Hub, copied: Path):
    model = AutoModelForCausalLM.from_pretrained(copied)
    before = contents(copied)
    assert model.push_to_hub(NAME) == f"{hub.url}/{NAME}"
    assert set(files(on_hub(hub))) == set(before)
    set_sparsity(model, 0.25)
    model.push_to_hub(NAME, revision="quarter", private=True)
    assert contents(copied) == before
    succeeded(run_wina("retarget", copied, "--sparsity", 0.25))
    pushed = files(on_hub(hub, ref="quarter"))
    for name, data in contents(copied).items():
        if name not in ("README.md", "wina_manifest.json"):
            assert pushed[name] == data, name
    assert "By default 25.0% of" in pushed["README.md"].decode()
    verify_folder(on_hub(hub, ref="quarter"))


def changed_weight(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight_t[0, 0] += 1
    return model


def with_another_head(model: torch.nn.Module) -> torch.nn.Module:
    model.extra = torch.nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed_weight, r"layers\.1\.mlp\.down_proj\.weight_t has changed"),
        (with_another_head, r"gained extra\.weight"),
        (lambda model: model.to(torch.bfloat16), r"is now torch\.bfloat16 and was torch\.float32"),
    ],
)
def test_a_model_that_is_no_longer_its_checkpoint_is_refused(change: Callable, said: str, hub: Hub, converted: Path):
    model = change(AutoModelForCausalLM.from_pretrained(converted))
    with pytest.raises(UploadError, match=said):
        model.push_to_hub(NAME)
    assert NAME not in hub.repositories


def test_a_plain_model_and_one_loaded_as_another_class_are_refused(hub: Hub, source: Path, converted: Path):
    from transformers import AutoModel

    with pytest.raises(UploadError, match="not loaded from a WINA checkpoint"):
        push(AutoModelForCausalLM.from_pretrained(source), NAME)
    with pytest.raises(UploadError, match="it is a LlamaModel and was converted as LlamaForCausalLM"):
        AutoModel.from_pretrained(converted).push_to_hub(NAME)
    assert hub.repositories == {}


# --- what is not uploaded ---


@pytest.mark.parametrize(
    "edit",
    [
        edit_json("config.json", lambda config: config.update(pad_token_id=3)),
        edit_tensor("model.layers.0.self_attn.q_proj.weight_t", lambda weight: weight + 1),
        lambda folder: (folder / "LICENSE").unlink(),
        lambda folder: (folder / "wina_manifest.json").unlink(),
    ],
    ids=["config", "weight", "a file is gone", "manifest"],
)
def test_a_folder_that_was_edited_is_refused(edit: Callable[[Path], object], hub: Hub, copied: Path):
    edit(copied)
    refused(run_wina("push", copied, NAME, "--quiet"), str(copied))
    assert hub.repositories == {}


def test_what_another_program_saved_is_refused_and_what_is_no_checkpoint(
    hub: Hub, source: Path, copied: Path, tmp_path: Path
):
    load(copied).save_pretrained(tmp_path / "saved")
    refused(
        run_wina("push", tmp_path / "saved", NAME, "--quiet"), "saved again", "save_pretrained", "wina-convert wrote"
    )
    refused(run_wina("push", source, NAME, "--quiet"), "not a WINA checkpoint")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    "options",
    [
        {"repository": "small"},
        {"repository": "lab/small/wina"},
        {"repository": "lab/sm all"},
        {"repository": NAME, "subfolder": "../up"},
        {"repository": NAME, "subfolder": "a//b"},
        {"repository": NAME, "revision": "v1", "create_pr": True},
    ],
)
def test_a_destination_that_cannot_be_one_is_refused(options: dict):
    with pytest.raises(OptionError):
        Destination(**options)


def test_how_to_push_without_where_to_is_refused(source: Path, tmp_path: Path):
    for option in (("--private",), ("--push-revision", "v1")):
        refused(run(source, "--out", tmp_path / "out", *SMALLEST, *option), "give push to hub")


# --- access ---


def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def reading_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.uploads.accounts[TOKEN] = Account("lab", role="read")


def of_somebody_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.uploads.accounts[TOKEN] = Account("somebody")


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def down(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.uploads.faults.append(Fault("GET", "whoami", 503, message="Maintenance"))


REFUSED: list[tuple[Callable, tuple[str, ...]]] = [
    (no_token, ("no token", "hf auth login", "HF_TOKEN")),
    (wrong_token, ("does not accept the token", "401")),
    (reading_token, ("read but not write", "settings/tokens")),
    (of_somebody_else, ("does not exist", "somebody")),
    (offline, ("connection to the Hub",)),
    (down, ("503: Maintenance",)),
]


@pytest.mark.parametrize(("state", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_who_may_not_write_is_told_before_a_conversion_begins(
    state: Callable, words: tuple[str, ...], hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state(hub, monkeypatch)
    before = contents(tmp_path)
    line = refused(run(source, "--out", tmp_path / "out", *SMALLEST, "--push-to-hub", NAME), NAME, *words)
    assert TOKEN not in line
    assert contents(tmp_path) == before
    assert {one.method for one in hub.requests} <= {"GET"}


def test_a_dry_run_asks_whether_it_may_and_makes_nothing(hub: Hub, source: Path, tmp_path: Path):
    options = (source, "--out", tmp_path / "out", *SMALLEST, "--dry-run", "--push-to-hub")
    succeeded(run(*options, NAME))
    refused(run(*options, "somebody/small"), "somebody/small", "lab, club")
    assert hub.repositories == {}


def test_a_repository_of_others_is_refused_though_it_is_there(hub: Hub, converted: Path):
    hub.add("somebody/model", converted)
    with pytest.raises(UploadError, match=r"may not write to somebody/model \(403: You don't have write access\)"):
        check_access(Destination("somebody/model"))


# --- what breaks on the way ---

FAULTS = {
    "a connection that breaks": (
        lambda: Fault("PUT", "/lfs/", times=1000),
        ("connection to the Hub broke", "kept there"),
    ),
    "a store that fails": (lambda: Fault("PUT", "/lfs/", 500), ("500", "kept there")),
    "a store that refuses": (lambda: Fault("PUT", "/lfs/", 403, message="Quota exceeded"), ("403: Quota exceeded",)),
    "a commit that fails": (lambda: Fault("POST", "/commit/", 502), ("502", "kept there")),
    "a commit that comes second": (lambda: Fault("POST", "/commit/", 412, message="Conflict"), ("changed meanwhile",)),
    "a token that was taken back": (lambda: Fault("POST", "/preupload/", 401), ("does not accept the token", "401")),
    "no right to make a repository": (lambda: Fault("POST", "/repos/create", 403), ("may not write", "403")),
    "a card that the Hub refuses": (lambda: Fault("POST", "validate-yaml", 400), ("metadata in README.md",)),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_after_a_failure_nothing_is_half_there_and_a_second_run_completes(
    fault: Callable[[], Fault], words: tuple[str, ...], hub: Hub, converted: Path
):
    hub.uploads.faults.append(fault())
    before = contents(converted)
    line = refused(run_wina("push", converted, NAME, "--quiet"), NAME, *words, f"wina push {converted} {NAME}")
    assert TOKEN not in line
    assert contents(converted) == before
    assert NAME not in hub.repositories or files(on_hub(hub)) == {}
    hub.uploads.faults.clear()
    succeeded(run_wina("push", converted, NAME))
    verify_folder(on_hub(hub))


def test_a_connection_that_breaks_once_is_tried_again(hub: Hub, converted: Path):
    hub.uploads.faults += [Fault("PUT", "/lfs/", times=1), Fault("PUT", "/lfs/", 503, times=1)]
    succeeded(run_wina("push", converted, NAME))
    verify_folder(on_hub(hub))


def test_a_second_run_sends_what_is_missing_and_no_more(hub: Hub, converted: Path):
    shards = {entry["sha256"] for name, entry in manifest(converted).items() if name.endswith(".safetensors")}
    last = max(shards)
    hub.uploads.faults.append(Fault("PUT", last))
    refused(run_wina("push", converted, NAME, "--quiet"))
    assert set(hub.uploads.stored) == shards - {last}
    hub.uploads.faults.clear()
    hub.requests.clear()
    succeeded(run_wina("push", converted, NAME))
    assert asked(hub, "PUT", "/lfs/") == [f"/lfs/{last}"]
    hub.requests.clear()
    succeeded(run_wina("push", converted, NAME))
    assert asked(hub, "PUT", "/lfs/") == []
    assert len(hub.uploads.messages) == 1  # nothing has changed since


def manifest(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "wina_manifest.json").read_text())["files"]


def test_a_conversion_whose_upload_breaks_is_complete_and_says_how_to_go_on(hub: Hub, source: Path, tmp_path: Path):
    out = tmp_path / "out"
    hub.uploads.faults.append(Fault("POST", "/commit/", 500))
    options = ("--push-to-hub", NAME, "--push-revision", "v1", "--token", TOKEN)
    line = refused(
        run(source, "--out", out, *SMALLEST, *options),
        f"{out} is complete, but",
        f"wina push {out} {NAME} --revision v1",
    )
    assert TOKEN not in line
    verify_folder(out)
    hub.uploads.faults.clear()
    succeeded(run_wina("push", out, NAME, "--revision", "v1"))
    verify_folder(on_hub(hub, ref="v1"))
