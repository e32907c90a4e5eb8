"""Display times from timestamps that repeat, decrease, jump, are missing or in coding order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidmem_model.video.stamps import REORDER, PacketStamps, shown_times, steadied


def times(stamps, step=1.0, joinable=False, fell=(), reorder=REORDER):
    """Times of showing of pictures with these stamps, in steps; times of decoding fall before those of `fell`."""
    pictures = [(stamp, k in fell, k) for k, stamp in enumerate(stamps)]
    shown = list(shown_times(pictures, step, joinable, reorder))
    assert [picture for _, picture in shown] == list(range(len(stamps)))  # never in another order
    return [moment for moment, _ in shown]


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([], []),
        ([None], [0]),
        ([3], [3]),
        ([-2, -1, 0, 1], [-2, -1, 0, 1]),
        ([0, 1, 1, 3], [0, 1, 2, 3]),
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([0, 0, 2, 2, 4, 4], [0, 1, 2, 3, 4, 5]),
        ([None, None, None], [0, 1, 2]),
        ([5, None, None, 8], [5, 6, 7, 8]),
        ([0, 1, None, 2], [0, 1, 2, 3]),
        ([0, 3, 1, 2, 6, 4, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1, 2, 50, 51], [0, 1, 2, 50, 51]),
        ([0, 1, 2, 500, 3, 4], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, -500, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([0, 0.5, 0.7, 5, 5.1], [0, 0.5, 0.7, 5, 5.1]),
        ([*range(40), *range(40)], list(range(80))),
        ([*range(100, 140), *range(5), 9], [*range(100, 145), 149]),
        ([0, 1, 2, 2, 3.0005, 4], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_by_hand(stamps, expected):
    assert times(stamps) == pytest.approx(expected)


def test_a_jump_ahead_is_a_join_where_films_are_joined():
    stamps = [*range(5), *range(500, 505)]
    assert times(stamps, step=0.04, joinable=False) == stamps
    joined = [0, 1, 2, 3, 4, *(4 + 0.04 + k for k in range(5))]
    assert times(stamps, step=0.04, joinable=True) == pytest.approx(joined)
    assert times([0, 1, 2, 10], step=0.04, joinable=True) == [0, 1, 2, 10]


def test_a_film_that_overlaps_the_one_before():
    assert times([0, 1, 2, 3, 4, 2.5, 3.5, 4.5], fell=(3,)) == [0, 1, 2, 3, 4, 5, 6, 7]


@given(st.lists(st.floats(0.01, 1000), max_size=40), st.floats(-100, 100))
def test_stamps_that_rise_are_kept(gaps, start):
    stamps = [start + sum(gaps[:k]) for k in range(len(gaps) + 1)]
    if all(b < a + 16 for a, b in zip(stamps, stamps[1:], strict=False)):
        assert times(stamps) == stamps


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=60), st.booleans(), st.sets(st.integers(0, 59)))
def test_any_stamps_give_a_clock_that_rises(stamps, joinable, fell):
    shown = times(stamps, 0.04, joinable, fell)
    assert all(a < b for a, b in zip(shown, shown[1:], strict=False))


@given(st.data(), st.integers(1, 16), st.integers(1, 3))
def test_coding_order_is_undone(data, depth, repeated):
    """A first picture, then groups whose last is coded first, stamped in coding order, each stamp so many times."""
    sizes = [1] + data.draw(st.lists(st.integers(1, depth + 1), min_size=1, max_size=8))
    coded = []
    for size in sizes:
        begin = len(coded)
        coded += [begin + size - 1, *range(begin, begin + size - 1)]  # numbers of showing, as they are coded
    stamps = [coded.index(k) // repeated * repeated for k in range(len(coded))]
    assert times(stamps) == list(range(len(coded)))


def test_steady():
    stamps = [0, 1, 3, 3, 4, None, 4.5, 7, 30, 31]
    taken = steadied([(stamp, False, 1.0) for stamp in stamps], lambda length: length, 1)
    assert [stamp for stamp, *_ in taken] == [0, 1, 2, 3, 4, 5, 6, 7, 30, 31]


@pytest.mark.parametrize(
    ("packets", "sound"),
    [
        ([(1, 0), (3, 1), (2, 2), (4, 3)], True),
        ([(1, None), (3, None), (2, 2)], True),
        ([(1, 0), (3, 1), (1, 2)], False),
        ([(1, 0), (None, 1)], False),
        ([(1, 0), (2, 0)], False),
        ([(30, 29), (31, 30), (2, 31)], False),
        ([(1, 0), (2, 1), (300, 2)], True),
    ],
)
def test_packets_that_can_be_believed(packets, sound):
    stamps = PacketStamps(1, joinable=False, even=False)
    for shown, decoded in packets:
        stamps.add(shown, decoded)
    assert stamps.sound == sound
    assert stamps.reordered == (sound and packets[1][0] == 3)


def test_even_packets():
    for decoded, sound in (([0, 1, 2, 3.5], True), ([0, 1, 1.01], False), ([0, 1, 3], False)):
        stamps = PacketStamps(1, joinable=True, even=True)
        for moment in decoded:
            stamps.add(moment + 1, moment)
        assert stamps.sound == sound
