"""The text of a row of data: what means text is taken, what carries none is passed over, anything else is refused."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import CalibrationError

FIELDS = ("text", "content")
CHATS = ("messages", "conversations", "conversation", "turns")
PAIRS = (("instruction", "input", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
NEEDED = f"needed is {', '.join(map(repr, FIELDS))}, {', '.join(map(repr, CHATS))} or an instruction with its answer"


def texts_of(rows: Iterable[Any], source: str) -> Iterator[str]:
    """The text of every row that has one.

    Raises:
        CalibrationError: a row is of no known form; the message has its number and the reason.
    """
    for number, row in enumerate(rows, start=1):
        try:
            text = _text(row)
        except ValueError as error:
            raise CalibrationError(f"{source}, row {number}: {error}; {NEEDED}") from error
        if text:
            yield whole(text)


def whole(text: str) -> str:
    """Text in which half a character, as a cut-off emoji leaves it, is the sign for an unreadable one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(row: Any) -> str:
    """The text of a row; empty where it is there and has none.

    Raises:
        ValueError: in words, why it has no text that could be found.
    """
    if row is None or isinstance(row, str):
        return row or ""
    if not isinstance(row, dict):
        raise ValueError(f"it is of type {type(row).__name__}")
    for field in FIELDS:
        if row.get(field) is not None:
            return _parts(row[field], field)
    for field in CHATS:
        if row.get(field) is not None:
            return _chat(row[field], field)
    for names in PAIRS:
        if names[0] in row and names[-1] in row:
            return "\n\n".join(filter(None, (_parts(row.get(name), name) for name in names)))
    if any(field in row for field in (*FIELDS, *CHATS)):  # null
        return ""
    raise ValueError(f"it has the fields {', '.join(map(repr, row)) or 'none'}")


def _parts(value: Any, field: str) -> str:
    """A text, or a list of texts and of parts such as {"type": "text", "text": ...}; parts of other types are no text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError(f"{field!r} is of type {type(value).__name__}")
    found = []
    for part in value:
        if isinstance(part, dict) and isinstance(part.get("type"), str):
            part = part.get("text") if part["type"] == "text" else None
        if not isinstance(part, str | None):
            raise ValueError(f"{field!r} holds a value of type {type(part).__name__}")
        found.append(part or "")
    return "\n\n".join(filter(None, found))


def _chat(turns: Any, field: str) -> str:
    """The turns of a chat that say something; a call of a tool says nothing."""
    if not isinstance(turns, list):
        raise ValueError(f"{field!r} is of type {type(turns).__name__}")
    said = []
    for turn in turns:
        role, content = (turn.get("role"), "content") if isinstance(turn, dict) else (None, "")
        if isinstance(turn, dict) and role is None:
            role, content = turn.get("from"), "value"
        if not isinstance(role, str):
            raise ValueError(f"{field!r} has a turn without 'role'")
        if text := _parts(turn.get(content), content):
            said.append(f"{role}: {text}")
    return "\n\n".join(said)
