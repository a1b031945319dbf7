"""Rows hold every target once, keep documents apart and waste little space."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_jax.data.packing import Batches, PackedRows, best_fit

capacities_and_lengths = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)


@given(capacities_and_lengths)
def test_best_fit(capacity_and_lengths: tuple[int, list[int]]):
    capacity, lengths = capacity_and_lengths
    row_of_piece = best_fit(np.array(lengths, int), capacity)
    assert set(row_of_piece) == set(range(max(row_of_piece, default=-1) + 1))
    filled = np.bincount(row_of_piece, lengths)
    assert all(filled <= capacity)
    # No two rows could be merged.
    assert all(a + b > capacity for a, b in itertools.pairwise(sorted(filled)))


def test_best_fit_chooses_the_fullest_row_with_room():
    # 6 and 5 do not fit together. 4 goes to 6, where it fits exactly, though 5 has room as well.
    assert best_fit(np.array([4, 5, 6, 3]), 10).tolist() == [0, 1, 0, 1]


def pack(lengths: list[int], sequence_length: int) -> tuple[PackedRows, set[int]]:
    """Packs documents of distinct tokens; also returns the tokens that are targets."""
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack([ends - np.array(lengths, np.int64), ends], axis=1)
    rows = PackedRows(np.arange(sum(lengths)), spans, sequence_length)
    return rows, {t for start, end in spans.tolist() for t in range(start + 1, end)}


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 16))
@settings(deadline=None)
def test_every_target_is_in_one_row(lengths: list[int], sequence_length: int):
    packed, expected = pack(lengths, sequence_length)
    rows = [packed[i] for i in range(len(packed))]
    assert packed.num_targets == len(expected)
    seen = [int(t) for row in rows for t in row["targets"][row["weights"] == 1]]
    assert len(seen) == len(set(seen))
    assert set(seen) == expected

    for row in rows:
        real = row["weights"] == 1
        assert {array.shape for array in row.values()} == {(sequence_length,)}  # pyright: ignore
        np.testing.assert_array_equal(real, row["segments"] > 0)
        np.testing.assert_array_equal(row["targets"][real], row["tokens"][real] + 1)
        assert not any(array[~real].any() for array in row.values())  # pyright: ignore
        # Tokens and positions increase by one within a segment; positions start at 0.
        for name in ("tokens", "positions"):
            steps = np.diff(row[name][real])
            same_piece = np.diff(row["segments"][real]) == 0
            assert all(steps[same_piece] == 1)
        starts = np.diff(row["segments"][real], prepend=0)
        assert set(starts.tolist()) <= {0, 1}
        assert not row["positions"][real][starts == 1].any()


def test_only_documents_longer_than_a_row_are_split():
    packed, _ = pack([9, 4, 21, 6], 8)
    pieces = [
        (int(row["tokens"][row["segments"] == s][0]), int(np.sum(row["segments"] == s)))
        for row in (packed[i] for i in range(len(packed)))
        for s in range(1, row["segments"].max() + 1)
    ]
    # 8, 3, 20 and 5 targets; only the third document, which starts at 13, is split.
    assert sorted(pieces) == [(0, 8), (9, 3), (13, 8), (21, 8), (29, 4), (34, 5)]
    assert len(packed) == 5


def test_a_row_for_each_document_without_packing():
    packed = PackedRows(np.arange(20), np.array([[0, 3], [3, 13], [13, 14]]), 8, packing=False)
    assert [row["targets"].tolist() for row in map(packed.__getitem__, range(len(packed)))] == [
        [1, 2, 0, 0, 0, 0, 0, 0],
        [4, 5, 6, 7, 8, 9, 10, 11],
        [12, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_the_loss_of_targets():
    loss = np.array([1, 0, 1, 1, 0, 1], np.bool_)
    packed = PackedRows(np.arange(6), np.array([[0, 3], [3, 6]]), 4, loss=loss)
    [row] = map(packed.__getitem__, range(len(packed)))
    assert row["targets"].tolist() == [1, 2, 4, 5]
    assert row["weights"].tolist() == [0, 1, 0, 1]
    assert row["segments"].tolist() == [1, 1, 2, 2]


def test_dtypes():
    packed, _ = pack([5], 8)
    dtypes = {name: str(array.dtype) for name, array in packed[0].items()}  # pyright: ignore
    assert dtypes.pop("weights") == "float32"
    assert set(dtypes.values()) == {"int32"}


@pytest.mark.parametrize("tail", [1, 5])
def test_short_documents_waste_little(tail: int):
    lengths = np.random.default_rng(0).geometric(0.01, 2000).tolist()
    packed, expected = pack([n + tail for n in lengths], 128)
    assert len(expected) > 0.99 * len(packed) * 128


def test_batches_hold_the_selected_rows():
    rows = [{"tokens": np.full(4, n), "weights": np.ones(4)} for n in range(5)]
    whole, part = Batches(rows, 3, range(3)), Batches(rows, 3, [0, 2])
    assert len(whole) == len(part) == 2
    np.testing.assert_array_equal(whole[0]["tokens"][:, 0], [0, 1, 2])
    np.testing.assert_array_equal(part[0]["tokens"], whole[0]["tokens"][[0, 2]])
    # Rows of weight 0 fill up the last batch.
    np.testing.assert_array_equal(whole[1]["weights"].sum(1), [4, 4, 0])
    np.testing.assert_array_equal(part[1]["weights"], whole[1]["weights"][[0, 2]])
