"""Queries of a step into the rings of their requests, in one launch a layer."""

import torch
import triton
import triton.language as tl

MAX_PROGRAMS = 256
"""Along the kept queries. A captured launch has as many whatever a step keeps."""

ELEMENTS = 2048
"""Of a query that one program copies."""


@triton.jit  # type: ignore[untyped-decorator]
def keep_queries_kernel(
    rings,  # [num_rows, num_heads, head_size], contiguous
    queries,  # [num_tokens, num_heads, head_size]
    places,  # [1 + n, 2] int64, contiguous
    query_stride_token,
    query_stride_head,
    query_stride_channel,
    HEAD_SIZE: tl.constexpr,
    ROW: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    num_kept = tl.load(places)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    in_row = element < ROW
    offset = (element // HEAD_SIZE) * query_stride_head + (
        element % HEAD_SIZE
    ) * query_stride_channel
    for kept in range(tl.program_id(0), num_kept, tl.num_programs(0)):
        source = tl.load(places + 2 * (kept + 1))
        row = tl.load(places + 2 * (kept + 1) + 1)
        query = tl.load(queries + source * query_stride_token + offset, mask=in_row)
        tl.store(rings + row * ROW + element, query, mask=in_row)


def keep_queries(rings: torch.Tensor, queries: torch.Tensor, places: torch.Tensor) -> None:
    """Copy queries in place: see ``ops.queries.keep_queries``."""
    _, num_heads, head_size = rings.shape
    row = num_heads * head_size
    grid = (min(len(places) - 1, MAX_PROGRAMS), triton.cdiv(row, ELEMENTS))
    keep_queries_kernel[grid](
        rings,
        queries,
        places,
        *queries.stride(),
        HEAD_SIZE=head_size,
        ROW=row,
        ELEMENTS=min(ELEMENTS, triton.next_power_of_2(row)),
    )
