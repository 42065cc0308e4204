"""A WINA checkpoint on the Hub, for the verbs that take its id. The Hub is a local server."""

import json
from pathlib import Path

import pytest

from support.commands import refused, run_wina, succeeded
from support.hub import Hub

MODEL = "kilobytes"
NAME = "lab/small"


@pytest.mark.parametrize(
    "verb", [("inspect",), ("generate", "--prompt", "Once", "--max-new-tokens", 2)], ids=lambda v: v[0]
)
def test_a_verb_takes_a_checkpoint_on_the_hub(verb: tuple[object, ...], hub: Hub, wina_tiny: Path):
    name, *options = verb
    hub.add("lab/tiny-wina", wina_tiny, ref="v2", token="hf_secret")
    access = ("--revision", "v2", "--token", "hf_secret")
    remote = run_wina(name, "lab/tiny-wina", *options, *access, "--json", "--quiet")
    succeeded(remote)
    found, expected = (
        json.loads(result.stdout) for result in (remote, run_wina(name, wina_tiny, *options, "--json", "--quiet"))
    )
    different = {"name", "tokens_per_second"}
    assert {key: value for key, value in found.items() if key not in different} == {
        key: value for key, value in expected.items() if key not in different
    }
    refused(run_wina(name, "lab/tiny-wina", *options), "lab/tiny-wina", "--token")


def test_checkpoints_and_their_dense_model_on_the_hub_are_compared(
    hub: Hub, wina_tiny: Path, tiny: Path, tmp_path: Path
):
    text = tmp_path / "harvest.txt"
    text.write_text("".join(f"In year {year} the harvest was {year % 7} times as large.\n" for year in range(60)))
    options = ("--text", text, "--seq-len", 32, "--samples", 2, "--json", "--quiet")
    hub.add("lab/dense", tiny, token="hf_secret", ref="v1")
    hub.add("lab/tiny-wina", wina_tiny, token="hf_secret")
    found = run_wina(
        "eval", "lab/tiny-wina", "--source", "lab/dense", "--revision", "v1", "--token", "hf_secret", *options
    )
    expected = run_wina("eval", wina_tiny, "--source", tiny, *options)
    succeeded(found)
    rows, same = json.loads(found.stdout), json.loads(expected.stdout)
    assert [row.pop("checkpoint") for row in rows] == ["lab/tiny-wina"]
    assert [row.pop("checkpoint") for row in same] == [str(wina_tiny)]
    assert rows == same
    assert rows[0]["kl"] > 0
    hub.add("lab/tiny-wina", wina_tiny, ref="v2")
    refused(run_wina("eval", "lab/tiny-wina", "--revision", "v3", "--token", "hf_secret", *options), "no revision 'v3'")
    succeeded(run_wina("eval", "lab/tiny-wina", "--revision", "v2", "--token", "hf_secret", *options))
    refused(
        run_wina("eval", "lab/dense", "--revision", "v1", "--token", "hf_secret", *options), "not a WINA checkpoint"
    )


def test_a_verb_downloads_no_weights_of_what_is_no_checkpoint(hub: Hub, source: Path):
    hub.add(NAME, source)
    refused(run_wina("inspect", NAME), NAME, "not a WINA checkpoint")
    assert not [request.path for request in hub.requests if request.path.endswith(".safetensors")]
