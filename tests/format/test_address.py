"""The snippets of a card name the place that the checkpoint is at, and no other call is touched."""

import pytest

from wina_convert.format.address import with_address

CARD = """A = AutoModel.from_pretrained("{here}")
B = wina_convert.load("{here}", sparsity=0.4)
C = AutoModel.from_pretrained("org/dense", revision="main")
D = "{here}"
"""


@pytest.mark.parametrize("here", [".", "PATH_OR_ID_OF_THIS_CHECKPOINT"])
@pytest.mark.parametrize(
    ("place", "named"),
    [
        ((None, None), '"me/it"'),
        (("half", None), '"me/it", revision="half"'),
        ((None, "a/b"), '"me/it", subfolder="a/b"'),
        (("half", "a"), '"me/it", revision="half", subfolder="a"'),
    ],
)
def test_calls_that_load_the_checkpoint_name_its_place(here: str, place: tuple[str | None, str | None], named: str):
    before = CARD.replace("{here}", here)
    lines = before.splitlines()
    after = with_address(before, "me/it", *place).splitlines()
    assert after[0] == f"A = AutoModel.from_pretrained({named})"
    assert after[1] == f"B = wina_convert.load({named}, sparsity=0.4)"
    assert after[2:] == lines[2:]
