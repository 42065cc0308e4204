"""The README's five minutes: every command as it is written there, in a folder where the paths are. The Hub is a local server."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from support import ROOT
from support.commands import run, run_wina, succeeded
from support.hub import running_hub, use_endpoint
from support.hub_uploads import Account

TOUR = re.search(
    r"^## Five minutes\n.*?^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's way to send large files
def test_every_command_of_the_tour_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TOUR is not None
    there = tmp_path / "checkout"
    there.mkdir()
    (there / "tests").symlink_to(ROOT / "tests")
    shutil.copyfile(ROOT / "README.md", there / "README.md")
    monkeypatch.chdir(there)
    shown: dict[str, str] = {}
    with running_hub() as server:
        use_endpoint(server.url, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        server.uploads.root = tmp_path / "server"
        server.uploads.accounts["hf_secret"] = Account("YOU")
        for line in TOUR[1].splitlines():
            program, *words = shlex.split(line, comments=True)
            if program == "cp":
                shutil.copyfile(*words)
            elif program != "source":
                result = run(*words) if program == "wina-convert" else run_wina(*words)
                succeeded(result)
                shown[program if program == "wina-convert" else words[0]] = result.stdout + result.stderr
    assert [*shown] == ["wina-convert", "inspect", "eval", "generate", "bench", "verify", "push"]
    assert "Wrote tour-wina" in shown["wina-convert"]
    assert "Once upon a time" in shown["generate"]
    assert "YOU/tour-wina" in shown["push"]
    assert "YOU/tour-wina" in server.repositories
