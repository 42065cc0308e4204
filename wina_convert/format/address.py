"""Where the snippets of a card load the checkpoint from: its own folder as written, its repository once it is on the Hub."""

import re

HERE = "."  # the folder that the card is in

_CALL = re.compile(r'((?:from_pretrained|wina_convert\.load)\()"[^"\n]*"(?:, (?:revision|subfolder)="[^"\n]*")*')


def with_address(card: str, repository: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """A card whose snippets load from a place on the Hub.

    Args:
        card: the text.
        repository: the Hub id.
        revision: branch; None: main.
        subfolder: folder of the repository; None: its top.
    """
    place = f'"{repository}"'
    place += f', revision="{revision}"' if revision else ""
    place += f', subfolder="{subfolder}"' if subfolder else ""
    return _CALL.sub(lambda call: call[1] + place, card)
