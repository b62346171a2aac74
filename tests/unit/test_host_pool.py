"""Which evicted blocks have a place in host memory, and who has to go where there is none."""

from __future__ import annotations

from vllm_semantic.engine.host_pool import HostPool
from vllm_semantic.messages import BlockCopy, HostCopies, Owner

A, B = Owner(0, "a"), Owner(1, "b")


def test_a_block_is_copied_once_however_often_it_goes() -> None:
    pool = HostPool(4)
    assert pool.keep(A, 7, 30, None) == (1, 0)
    assert pool.take_copies() == HostCopies([BlockCopy(0, 30, 0)], [])
    pool.recall(A, 7, 12)
    assert pool.take_copies() == HostCopies([], [BlockCopy(0, 12, 0)])
    assert pool.keep(A, 7, 12, None) == (0, 0)
    assert pool.take_copies() is None
    assert dict(pool.blocks_of(A)) == {7: 0}


def test_equal_blocks_share_a_slot_and_outlive_their_owners() -> None:
    pool = HostPool(4)
    pool.keep(A, 1, 30, b"same")
    pool.take_copies()
    pool.keep(B, 1, 31, b"same")
    assert pool.take_copies() is None
    pool.forget(A)
    pool.forget(B)
    assert pool.num_used == 1
    pool.keep(A, 1, 32, b"same")
    assert pool.take_copies() is None
    assert dict(pool.blocks_of(A)) == {1: 0}
    pool.forget_contents()
    pool.keep(B, 1, 33, b"same")
    assert pool.take_copies() == HostCopies([BlockCopy(1, 33, 1)], [])
    pool.forget(A)
    assert pool.num_used == 1


def test_what_was_wanted_the_longest_time_ago_goes_first() -> None:
    pool = HostPool(3)
    for index in range(3):
        assert pool.keep(A, index, 10 + index, None) == (1, 0)
    pool.take_copies()
    pool.recall(A, 0, 20)
    pool.take_copies()
    assert pool.keep(B, 9, 30, None) == (1, 1)
    assert sorted(pool.blocks_of(A)) == [0, 2]
    assert pool.take_copies() == HostCopies([BlockCopy(1, 30, 1)], [])


def test_what_nobody_has_goes_before_what_somebody_may_recall() -> None:
    pool = HostPool(3)
    pool.keep(A, 0, 10, None)
    pool.keep(B, 1, 11, b"one")
    pool.keep(B, 2, 12, b"two")
    pool.forget(B)
    pool.keep(A, 2, 13, b"two")  # it is somebody's again
    assert pool.keep(A, 5, 14, None) == (1, 0)
    assert sorted(pool.blocks_of(A)) == [0, 2, 5]
    assert pool.keep(A, 6, 15, None) == (1, 1)


def test_what_is_about_to_be_read_stays() -> None:
    pool = HostPool(2)
    pool.keep(A, 0, 10, None)
    pool.keep(A, 1, 11, None)
    pool.take_copies()
    pool.recall(A, 0, 20)
    pool.recall(A, 1, 21)
    assert pool.keep(B, 5, 30, None) == (0, 1), "it is the new block that has no place"
    assert not pool.blocks_of(B)
    copies = pool.take_copies()
    assert copies is not None
    assert [copy.slot for copy in copies.back] == [0, 1]
    assert not copies.out


def test_copies_of_a_request_that_ends_are_not_made() -> None:
    pool = HostPool(2)
    pool.keep(A, 0, 10, None)
    pool.take_copies()
    pool.recall(A, 0, 20)
    pool.keep(A, 1, 11, None)
    pool.forget(A)
    assert pool.take_copies() is None
    assert pool.num_used == 0
    pool.keep(B, 0, 12, None)
    pool.recall(B, 0, 21)
    pool.undo_recall(B, 0)
    (slot,) = pool.blocks_of(B).values()
    assert pool.take_copies() == HostCopies([BlockCopy(1, 12, slot)], [])
    pool.recall(B, 0, 22)
    pool.undo_recall(B, 0)
    assert pool.take_copies() is None
