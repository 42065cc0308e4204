"""The snippets of a card name the place that the checkpoint is at, and no other call is touched."""

import pytest

from wina_convert.format.address import with_address

CARD = """A = AutoModel.from_pretrained("{here}")
model = wina_convert.load("{here}", sparsity=0.4)
C = AutoModel.from_pretrained("org/dense", revision="main")
D = "{here}"
"""


PLACES = [
    ((None, None), '"me/it"'),
    (("half", None), '"me/it", revision="half"'),
    ((None, "a/b"), '"me/it", subfolder="a/b"'),
    (("half", 'a"b'), '"me/it", revision="half", subfolder="a\\"b"'),
]


@pytest.mark.parametrize("here", [".", "PATH_OR_ID_OF_THIS_CHECKPOINT"])
@pytest.mark.parametrize(("place", "named"), PLACES)
def test_calls_that_load_the_checkpoint_name_its_place(here: str, place: tuple[str | None, str | None], named: str):
    before = CARD.replace("{here}", here)
    lines = before.splitlines()
    after = with_address(before, "me/it", *place).splitlines()
    assert after[0] == f"A = AutoModel.from_pretrained({named})"
    assert after[1] == f"model = wina_convert.load({named}, sparsity=0.4)"
    assert after[2:] == lines[2:]


@pytest.mark.parametrize(("place", "_"), PLACES)
@pytest.mark.parametrize(("old", "__"), PLACES)
def test_a_card_that_comes_from_a_place_follows_to_the_next(
    old: tuple[str | None, str | None], place: tuple[str | None, str | None], _: str, __: str
):
    moved = with_address(CARD.replace("{here}", "."), "them/that", *old)
    assert with_address(moved, "me/it", *place) == with_address(CARD.replace("{here}", "."), "me/it", *place)


def test_a_call_of_the_reader_to_another_place_of_the_same_repository_stays():
    card = CARD.replace("{here}", "them/that") + 'E = AutoModel.from_pretrained("them/that", revision="old")\n'
    after = with_address(card, "me/it").splitlines()
    assert after[1] == 'model = wina_convert.load("me/it", sparsity=0.4)'
    assert after[4] == 'E = AutoModel.from_pretrained("them/that", revision="old")'
