"""What needs no model does not wait for transformers' models, for numba or for the Hub's client."""

import json
import shutil
from pathlib import Path

import pytest

from support.edits import edit_config
from support.processes import in_new_process

pytestmark = pytest.mark.slow

MODEL = "kilobytes"
HEAVY = (
    "transformers.modeling_utils",
    "transformers.models",
    "transformers.core_model_loading",
    "numba",
    "huggingface_hub",
)
CODE = """
import json, sys
from click.testing import CliRunner
from wina_convert.cli import wina, wina_convert
found = []
for program, code, *args in json.loads(sys.argv[1]):
    result = CliRunner().invoke(wina if program == "wina" else wina_convert, args)
    assert result.exit_code == code, (args, result.output, result.exception)
    found.append([args, [name for name in json.loads(sys.argv[2]) if name in sys.modules]])
print(json.dumps(found))
"""


@pytest.mark.parametrize("discovery", ["1", "0"])
def test_what_runs_no_model_imports_nothing_heavy(discovery: str, source: Path, converted: Path, tmp_path: Path):
    folder, other, edited = (str(tmp_path / name) for name in ("wina", "other", "edited"))
    shutil.copytree(converted, folder)
    shutil.copytree(converted, edited)
    Path(edited, "LICENSE").write_text("another")
    shutil.copytree(source, other)
    edit_config(model_type="mamba")(Path(other))
    out = str(tmp_path / "out")
    steps = [
        ["wina", 0, "inspect", folder],
        ["wina", 0, "retarget", folder, "--sparsity", "0.4"],
        ["wina", 2, "inspect", str(source)],
        ["wina", 2, "verify", edited],
        ["wina-convert", 2, other, "--out", out],
        ["wina-convert", 2, folder, "--out", out],
        ["wina-convert", 2, str(source), "--out", folder],
        ["wina-convert", 2, str(source), "--out", out, "--sparsity", "2"],
        ["wina-convert", 2, str(source), "--out", out, "--device", "nonsense"],
        ["wina-convert", 2, str(tmp_path / "nothing"), "--out", out],
    ]
    found, _ = in_new_process(CODE, json.dumps(steps), json.dumps(HEAVY), TORCH_DEVICE_BACKEND_AUTOLOAD=discovery)
    assert found == [[step[2:], []] for step in steps]


GENERATE = """
import json, sys
from click.testing import CliRunner
from wina_convert.cli import wina
result = CliRunner().invoke(wina, ["generate", sys.argv[1], "--prompt", "a", "--max-new-tokens", "2"])
print(json.dumps([result.exit_code, result.stderr]))
"""


def test_a_new_process_shows_no_bars_of_other_libraries(converted: Path):
    (code, shown), _ = in_new_process(GENERATE, converted)
    assert code == 0
    assert len(shown.splitlines()) == 1
    assert shown.startswith("[2 tokens")
