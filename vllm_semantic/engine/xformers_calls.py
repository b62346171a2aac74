"""Which calls of xformers' operators serve a step, over which view of the cache.

Pure torch and xformers; vLLM's interface is in ``xformers_backend.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from types import ModuleType
from typing import Any

import numpy as np
import torch

NAME = "XFORMERS"

PAGE_MULTIPLE = 64
"""``triton_splitk.FwOp.BLOCK_N``: a block of keys never straddles two pages."""

MAX_DECODE_QUERIES = 16
"""``triton_splitk`` takes causal masks for at most this many queries a request, all equal."""


def load_fmha() -> ModuleType:
    """``xformers.ops.fmha``.

    Raises:
        ImportError: xformers is missing or refuses what is installed beside it.
    """
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            f"--attention-backend {NAME} needs xformers: pip install xformers ({error})"
        ) from error
    return fmha


# -- the cache as xformers wants it ----------------------------------------------------


def _keys_and_values(
    tokens: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [1, T, num_kv_heads, 2 * head_size]
    grouped = tokens.unsqueeze(3).expand(-1, -1, -1, group_size, -1)
    keys, values = grouped.chunk(2, dim=-1)
    return keys, values


def paged_keys_and_values(
    kv_cache: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole cache as two views; query heads of a group share a key head (stride 0).

    Args:
        kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``, in memory
            ``[num_pages, page_size, num_kv_heads, 2 * head_size]``.
        group_size: query heads of each key head.

    Returns:
        Keys and values ``[1, num_pages * page_size, num_kv_heads, group_size, head_size]``.

    Raises:
        ValueError: the cache has another layout, and a view is impossible.
    """
    pages = kv_cache.transpose(1, 2)
    try:
        tokens = pages.view(1, -1, *pages.shape[2:])
    except RuntimeError as error:
        raise ValueError(
            f"--attention-backend {NAME} does not support KV cache strides {kv_cache.stride()}; "
            "allowed: layout LBNHC"
        ) from error
    return _keys_and_values(tokens, group_size)


def gathered_keys_and_values(
    kv_cache: torch.Tensor, pages: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of some pages, one request after the other.

    Args:
        kv_cache: as in :func:`paged_keys_and_values`, in any layout.
        pages: ``[num_reqs, num_columns]`` int32 page ids.
        group_size: query heads of each key head.

    Returns:
        Keys and values
        ``[1, num_reqs * num_columns * page_size, num_kv_heads, group_size, head_size]``.
    """
    tokens = kv_cache.transpose(1, 2).index_select(0, pages.flatten())
    return _keys_and_values(tokens.view(1, -1, *tokens.shape[2:]), group_size)


# -- which requests go to which operator -----------------------------------------------


@dataclass
class Call:
    """Consecutive requests of a step that one call of xformers serves."""

    tokens: slice
    """Theirs among the step's tokens."""

    bias: Any
    """``PagedBlockDiagonalCausalWithOffsetPaddedKeysMask`` over the cache, or
    ``BlockDiagonalCausalWithOffsetPaddedKeysMask`` over gathered pages."""

    pages: torch.Tensor | None = None
    """``[num_reqs, num_columns]`` int32, what to gather; ``None`` reads pages in place."""

    num_padding: int = 0
    """Queries that the bias expects behind :attr:`tokens`."""

    def inputs(
        self, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Operands for the bias, in xformers' BMGHK form.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, of the whole step.
            kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``.

        Returns:
            Query, keys and values ``[1, T, num_kv_heads, group_size, head_size]``; only
            gathered pages and padded queries are copies.
        """
        num_kv_heads = kv_cache.shape[1]
        query = query[self.tokens]
        if self.num_padding:
            query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, self.num_padding))
        query = query.unflatten(1, (num_kv_heads, -1)).unsqueeze(0)
        group_size = query.shape[3]
        if self.pages is None:
            return query, *paged_keys_and_values(kv_cache, group_size)
        return query, *gathered_keys_and_values(kv_cache, self.pages, group_size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def plan_calls(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> list[Call]:
    """Decodes in place, the rest gathered.

    The decodes are the leading requests with as many queries each as the first, at most
    :data:`MAX_DECODE_QUERIES`; vLLM puts requests with one query first.

    Args:
        query_lens: new tokens of each request; requests without any only at the end.
        seq_lens: tokens of each request in the cache, the new ones included.
        block_table: ``[num_reqs, num_columns]`` int32 page ids in order; what lies behind a
            sequence's end is not read.
        page_size: tokens of a page.
    """
    num_reqs = len(np.trim_zeros(query_lens, "b"))
    query_lens, seq_lens = query_lens[:num_reqs], seq_lens[:num_reqs]
    num_decodes = 0
    if query_lens and query_lens[0] <= MAX_DECODE_QUERIES:
        num_decodes = len(list(takewhile(lambda length: length == query_lens[0], query_lens)))
    split = sum(query_lens[:num_decodes])
    calls = []
    if num_decodes:
        call = _decode_call(
            query_lens[0], seq_lens[:num_decodes], block_table[:num_decodes], page_size
        )
        call.tokens = slice(0, split)
        calls.append(call)
    if num_decodes < num_reqs:
        rest = slice(num_decodes, num_reqs)
        call = _gathering_call(query_lens[rest], seq_lens[rest], block_table[rest], page_size)
        call.tokens = slice(split, sum(query_lens))
        calls.append(call)
    return calls


def _decode_call(
    query_len: int, seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> Call:
    """The kernel is compiled for each number of rows and columns: both become powers of two.

    Rows added read one key of the null block, and nobody reads what they attend to.
    """
    bias_class = load_fmha().attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    num_columns = power_of_two(-(-max(seq_lens) // page_size))
    block_table = block_table[:, :num_columns]
    num_rows = power_of_two(len(seq_lens))
    num_added = num_rows - len(seq_lens)
    bias = bias_class.from_seqlens(
        q_seqlen=[query_len] * num_rows,
        kv_seqlen=[*seq_lens, *[1] * num_added],
        block_tables=torch.nn.functional.pad(block_table, (0, 0, 0, num_added)),
        page_size=page_size,
        device=block_table.device,
    )
    return Call(slice(0), bias, num_padding=num_added * query_len)


def _gathering_call(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> Call:
    """Rows are padded to the longest with the null block; a layer's copy is as large."""
    bias_class = load_fmha().attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
    device = block_table.device
    num_pages = [-(-length // page_size) for length in seq_lens]
    num_columns = max(num_pages)
    column = torch.arange(num_columns)
    present = column < torch.tensor(num_pages).unsqueeze(1)
    bias = bias_class.from_seqlens(
        q_seqlen=query_lens,
        kv_padding=num_columns * page_size,
        kv_seqlen=seq_lens,
        device=device,
    )
    pages = block_table[:, :num_columns] * present.to(device, non_blocking=True)
    return Call(slice(0), bias, pages=pages)
