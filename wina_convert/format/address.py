"""Where the snippets of a card load the checkpoint from: its own folder as written, its repository once it is on the Hub."""

import json
import re

HERE = "."  # the folder that the card is in

_BEFORE = "PATH_OR_ID_OF_THIS_CHECKPOINT"  # what earlier cards had there

_TEXT = r'"(?:[^"\\\n]|\\.)+"'
_PLACE = rf"{_TEXT}(?:, revision={_TEXT})?(?:, subfolder={_TEXT})?"
_CALL = re.compile(rf"((?:from_pretrained|wina_convert\.load)\()({_PLACE})")
_OWN = re.compile(rf"^model = wina_convert\.load\(({_PLACE}), sparsity=", re.MULTILINE)  # as every card has it


def with_address(card: str, repository: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """A card whose snippets load from a place on the Hub, where they loaded from the folder or from another place before.

    Calls that name another model than the card's own snippets stay.

    Args:
        card: the text.
        repository: the Hub id.
        revision: branch; None: main.
        subfolder: folder of the repository; None: its top.
    """
    place = json.dumps(repository)
    place += f", revision={json.dumps(revision)}" if revision else ""
    place += f", subfolder={json.dumps(subfolder)}" if subfolder else ""
    own = {f'"{HERE}"', f'"{_BEFORE}"', *_OWN.findall(card)[:1]}
    return _CALL.sub(lambda call: call[1] + (place if call[2] in own else call[2]), card)
