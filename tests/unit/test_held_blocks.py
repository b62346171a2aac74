"""Block tables without holes, against lists of what each request holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_semantic.engine.backend import CompactingBuilder, StepBuffers
from vllm_semantic.engine.held_blocks import HeldBlocks

MAX_HELD = 6
"""Blocks that a request holds at most."""
MAX_BLOCKS = 14
"""Blocks of the longest request."""
MAX_REQS = 4

repeatable = settings(deadline=None, derandomize=True, max_examples=300)


class Builder(CompactingBuilder):
    """Compaction alone."""

    def __init__(self, held: HeldBlocks, kernel_block_size: int) -> None:
        self.kv_cache_spec = SimpleNamespace(block_size=kernel_block_size)
        num_columns = MAX_HELD * held.kernel_blocks
        self.buffers = StepBuffers(MAX_REQS + 1, num_columns, None, torch.device("cpu"))
        # As a step finds them: full of an earlier one.
        self.buffers.block_table.fill_(-1)
        self.buffers.seq_lens.fill_(-1)

    def compact(self, held: HeldBlocks, request_ids: list[str], common: Any) -> Any:
        rows = held.rows(request_ids, common.seq_lens_cpu_upper_bound.numpy())
        assert self.buffers is not None
        return None if rows is None else self._compact(common, self.buffers, rows)


@dataclass
class Life:
    """A request: its own block table, as vLLM keeps it, and what is left of it."""

    table: list[int] = field(default_factory=list)
    seq_len: int = 0
    gone: set[int] = field(default_factory=set)
    back: dict[int, int] = field(default_factory=dict)
    """Where a block is that came back."""

    def block_id(self, index: int) -> int:
        return self.back.get(index, self.table[index])

    def kept(self) -> list[int]:
        return [i for i in range(len(self.table)) if i not in self.gone]


def metadata(
    lives: list[Life], block_size: int, kernel_blocks: int, num_padding: int
) -> CommonAttentionMetadata:
    """A batch as the runner lays it out, with padding rows, in kernel blocks."""
    table = torch.zeros(len(lives) + num_padding, MAX_BLOCKS * kernel_blocks, dtype=torch.int32)
    for row, life in enumerate(lives):
        ids = [i * kernel_blocks + j for i in life.table for j in range(kernel_blocks)]
        table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    seq_lens = torch.tensor([life.seq_len for life in lives] + [0] * num_padding).int()
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(seq_lens),
        num_actual_tokens=len(lives),
        max_query_len=1,
        max_seq_len=MAX_BLOCKS * block_size,
        block_table_tensor=table,
        slot_mapping=starts.long(),
        seq_lens_cpu_upper_bound=seq_lens.clone(),
    )


@repeatable
@given(data=st.data())
def test_against_lists(data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([2, 4, 32]))
    kernel_blocks = data.draw(st.sampled_from([1, 2]))
    held = HeldBlocks(MAX_REQS, MAX_HELD * kernel_blocks, block_size, kernel_blocks)
    builder = Builder(held, block_size // kernel_blocks)
    lives: dict[str, Life] = {}
    ids = iter(range(1, 10_000))
    for step in range(data.draw(st.integers(1, 12))):
        if len(lives) < MAX_REQS and data.draw(st.booleans()):
            lives[f"r{step}"] = Life()
        if lives and data.draw(st.integers(0, 5)) == 0:
            gone = data.draw(st.sampled_from(sorted(lives)))
            del lives[gone]
            held.forget([gone, "unknown"])
        for request_id, life in lives.items():
            num_full = life.seq_len // block_size
            full = [i for i in life.kept() if i < num_full]
            if full and data.draw(st.booleans()):
                evicted = sorted(data.draw(st.sets(st.sampled_from(full), min_size=1)))
                held.evict(request_id, evicted)
                life.gone |= set(evicted)
            room = MAX_HELD - len(life.kept())
            if life.gone and room and data.draw(st.booleans()):
                some = st.sets(st.sampled_from(sorted(life.gone)), min_size=1, max_size=room)
                back = {i: next(ids) for i in sorted(data.draw(some))}
                held.recall(request_id, back)
                life.gone -= back.keys()
                life.back |= back
            room = (MAX_HELD - len(life.kept())) * block_size + len(life.table) * block_size
            life.seq_len = data.draw(
                st.integers(life.seq_len, min(room, MAX_BLOCKS * block_size)),
            )
            while len(life.table) * block_size < life.seq_len:
                life.table.append(next(ids))
        batch = data.draw(st.permutations(sorted(lives)))
        batch = batch[: data.draw(st.integers(0, len(batch)))]
        if batch:
            check(held, builder, batch, [lives[r] for r in batch], data.draw(st.integers(0, 1)))


def check(
    held: HeldBlocks, builder: Builder, batch: list[str], lives: list[Life], num_padding: int
) -> None:
    block_size, kernel_blocks = held.block_size, held.kernel_blocks
    common = metadata(lives, block_size, kernel_blocks, num_padding)
    before = common.block_table_tensor.clone(), common.seq_lens.clone()
    compacted = builder.compact(held, batch, common)
    assert torch.equal(common.block_table_tensor, before[0])
    assert torch.equal(common.seq_lens, before[1])
    assert (compacted is None) == (not any(life.gone or life.back for life in lives))
    if compacted is None:
        return
    lengths = [life.seq_len - len(life.gone) * block_size for life in lives]
    assert compacted.seq_lens.tolist() == lengths + [0] * num_padding
    assert compacted.seq_lens_cpu_upper_bound.tolist() == compacted.seq_lens.tolist()
    assert compacted.max_seq_len == max(lengths)
    table = compacted.block_table_tensor
    assert table.data_ptr() == builder.buffers.block_table.data_ptr()  # type: ignore[union-attr]
    for row, life, length in zip(table.tolist(), lives, lengths, strict=False):
        ids = [
            life.block_id(i) * kernel_blocks + j for i in life.kept() for j in range(kernel_blocks)
        ]
        num_read = -(-length * kernel_blocks // block_size)
        assert row[:num_read] == ids[:num_read]
        assert length <= len(ids) * block_size // kernel_blocks


def test_a_step_costs_what_is_held() -> None:
    """However long a request has become, its row is as wide as what is left of it."""
    held = HeldBlocks(2, MAX_HELD, 16, 1)
    for block in range(1, 100_000):
        if block > 3:
            held.evict("long", [block - 3])
    rows = held.rows(["long", "short"], np.array([100_000 * 16, 20], dtype=np.int32))
    assert rows is not None
    assert rows.columns.tolist() == [[0, 99_997, 99_998, 99_999], [0, 1, 2, 3]]
    assert rows.evicted_tokens.tolist() == [99_996 * 16, 0]
    assert rows.seq_lens.tolist() == [4 * 16, 20]


def test_what_is_not_held_cannot_be_lost() -> None:
    held = HeldBlocks(1, MAX_HELD, 16, 1)
    held.evict("r", [2, 3])
    with pytest.raises(AssertionError, match="not held"):
        held.evict("r", [3])


def test_without_losses_there_is_nothing_to_do() -> None:
    held = HeldBlocks(2, MAX_HELD, 16, 1)
    assert not held
    held.evict("r", [1])
    assert held
    assert held.rows(["other"], np.array([64], dtype=np.int32)) is None
    held.forget(["r"])
    assert not held
