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


def test_a_verb_downloads_no_weights_of_what_is_no_checkpoint(hub: Hub, source: Path):
    hub.add(NAME, source)
    refused(run_wina("inspect", NAME), NAME, "not a WINA checkpoint")
    assert not [request.path for request in hub.requests if request.path.endswith(".safetensors")]
