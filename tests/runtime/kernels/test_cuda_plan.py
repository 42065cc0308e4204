"""How the GPU kernel's work is divided; needs no GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina_convert.runtime.kernels.cuda import CHUNK, COUNTERS, LANES, WARPS, plan

H100 = (132, 232448 - 128)  # multiprocessors, bytes of shared memory
SMALL = (24, 101376 - 128)


@pytest.mark.parametrize(
    ("n_in", "outs", "itemsize", "expected"),  # lanes, splits, tiles
    [
        (4096, (4096, 1024, 1024), 2, (8, 1, 96)),
        (4096, (4096,), 2, (4, 1, 128)),
        (4096, (14336, 14336), 2, (32, 1, 112)),
        (14336, (4096,), 2, (32, 16, 16)),
        (4096, (1024,), 2, (16, 16, 8)),
        (4096, (14336,), 2, (16, 1, 112)),
        (2048, (2048,), 2, (4, 1, 64)),
        (8192, (28672, 28672), 2, (32, 1, 224)),
        (28672, (8192,), 2, (32, 8, 32)),
        (4096, (4096, 1024, 1024), 4, (16, 1, 96)),
        (4096, (14336, 14336), 4, (32, 1, 224)),
        (14336, (4096,), 4, (32, 8, 32)),
    ],
)
def test_the_measured_shapes_keep_the_division_that_was_measured(n_in, outs, itemsize, expected):
    chosen = plan(n_in, outs, itemsize, 1, *H100)
    assert (chosen.lanes, chosen.splits, chosen.tiles) == expected


cards = st.sampled_from([H100, SMALL, (108, 166912 - 128), (188, 101376 - 128)])


@given(
    st.integers(1, 200_000),
    st.lists(st.integers(1, 60_000), min_size=1, max_size=3).map(tuple),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    cards,
)
def test_every_output_has_a_tile_and_every_block_an_input_and_its_memory(n_in, outs, itemsize, rows, card):
    chosen = plan(n_in, outs, itemsize, rows, *card)
    if chosen is None:  # what is added up across blocks has a counter for each tile
        assert sum(-(-out * itemsize // (16 * max(LANES))) for out in outs) > COUNTERS
        return
    width = chosen.lanes * 16 // itemsize
    ends = [*chosen.first[1:], chosen.tiles]
    for out, first, end in zip(outs, chosen.first, ends, strict=True):
        assert (end - first - 1) * width < out <= (end - first) * width
    chunks = -(-n_in // CHUNK)
    assert chosen.lanes in LANES
    assert 1 <= chosen.splits <= chunks
    assert chosen.splits & (chosen.splits - 1) == 0
    # sums of each warp, then x of each row and the index of each input of the first split, which has the most
    listed = -(-chunks // chosen.splits) * CHUNK
    assert chosen.shared == 4 * (WARPS * width + (1 + rows) * listed) <= card[1]
    assert chosen.partial == (rows * chosen.splits * chosen.tiles * width if chosen.splits > 1 else 0)
    assert chosen.splits == 1 or chosen.tiles <= COUNTERS


@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_are_split_no_further_than_two_blocks_a_multiprocessor_unless_shared_memory_asks_for_it(rows):
    for n_in in (8192, 14336, 20000, 28672, 53248):
        for out in (1024, 4096, 8192, 16384, 65536):
            chosen = plan(n_in, (out,), 2, rows, *H100)
            halved = plan(n_in, (out,), 2, rows, H100[0], 1 << 30)
            assert halved.splits * halved.tiles <= 2 * H100[0] or halved.splits == 1
            assert chosen.splits >= halved.splits


def test_a_product_with_more_tiles_than_counters_has_no_plan():
    assert plan(1 << 22, (1 << 20,), 2, 1, *H100) is None
