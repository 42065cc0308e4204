"""The table of types names each that transformers knows, and says why where one is refused."""

import re

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support import ROOT
from wina_convert.architectures import ARCHITECTURES, REFUSED

TABLE = (ROOT / "tests" / "benchmarks" / "model_types.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| (\w+) \| (.*) \|$", TABLE, flags=re.MULTILINE)


def test_every_type_stands_in_the_table_once() -> None:
    named = [name for name, _, _ in ROWS]
    assert len(named) == len(set(named))
    if f"transformers {transformers.__version__} knows" in TABLE:  # another version knows others
        assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(named)


def test_none_is_wrong_and_each_refusal_has_a_reason() -> None:
    assert {verdict for _, verdict, _ in ROWS} <= {"supported", "refused", "untried"}
    assert all(reason.strip() for _, verdict, reason in ROWS if verdict == "refused")


def test_the_first_line_counts_the_rows() -> None:
    (line,) = re.findall(r"^Of the .* knows: .*", TABLE, flags=re.MULTILINE)
    rows = [verdict for name, verdict, _ in ROWS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert line.startswith(f"Of the {len(rows)} types")
    assert all(f"{rows.count(verdict)} {verdict}" in line for verdict in set(rows))


def test_the_listed_families_are_supported_and_the_refused_types_refused() -> None:
    verdicts = {name: verdict for name, verdict, _ in ROWS}
    assert {verdicts[name] for name in ARCHITECTURES} == {"supported"}
    assert all(verdicts[name] == "refused" for name in REFUSED if name in verdicts)
