"""Block scores of all layers and requests in one call, compiled for the CPU it runs on."""

from __future__ import annotations

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
import torch
from numba.extending import overload

from ..cached_blocks import CachedBlocks, CachedLayers
from ..platform import compiled_is_faster
from .compiled import compiled, inlined

logger = logging.getLogger(f"vllm.{__name__}")

ELEMENTS: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.int32: np.uint32,
}
"""What the kernel takes elements of each dtype for: the sign of 16 bits tells, and two of bf16 come
as one where AMX takes them so."""

CHUNK = 512
"""Tokens of which a head's keys are widened to fp32 at once: they stay near the core."""

TILE = np.intp(16)
"""Words in a row of a tile of AMX."""

USUAL_TOKENS = 512
"""Of a request that is scored, by which it is decided what is faster."""

LOG2_E = np.float32(math.log2(math.e))
SMALLEST = np.float32(-87)
"""Above the logarithm of the smallest normal number."""

C1, C2, C3, C4, C5, C6 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
"""Taylor's series of 2^x."""


@inlined
def _fp32(bits):
    return np.uint32(bits).view(np.float32)


def _widened(element):
    """An element as fp32."""


@overload(_widened, inline="always")
def _widened_of_dtype(element):
    if element == numba.float32:
        return lambda element: element
    if element == numba.uint16:  # bf16: the upper half of an fp32
        return lambda element: _fp32(np.uint32(element) << np.uint32(16))

    def of_half(element):
        bits = np.uint32(np.uint16(element))
        sign = (bits & np.uint32(0x8000)) << np.uint32(16)
        # Exponents of 5 bits where those of 8 are, and made as large: exact for subnormals too.
        number = _fp32((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
        is_none = (bits & np.uint32(0x7C00)) == np.uint32(0x7C00)  # infinite, or NaN
        exponent = np.uint32(0x7F800000) if is_none else np.uint32(0)
        return _fp32(np.float32(number).view(np.uint32) | sign | exponent)

    return of_half


@inlined
def _lower(word):
    """The first of two bf16 in a word, as fp32."""
    return _fp32(word << np.uint32(16))


@inlined
def _upper(word):
    return _fp32(word & np.uint32(0xFFFF0000))


def _read_keys(out, first, keys):
    """Keys of a head in a kernel block as ``out[:, first:first + block_size]``, channel by channel.

    Without AMX that is how they are kept (csrc/cpu/cpu_attn_vec.hpp in vLLM). With AMX they come
    in words of two channels each, for 16 tokens at a time (csrc/cpu/cpu_attn_amx.hpp).
    """


@overload(_read_keys)
def _read_keys_as_kept(out, first, keys):
    def in_rows(out, first, keys):
        size = len(keys) // len(out)
        for channel in range(len(out)):
            row = out[channel, first : first + size]
            kept = keys[channel * size : (channel + 1) * size]
            for t in range(size):
                row[t] = _widened(kept[t])

    def in_words(out, first, keys):
        for i in range(len(keys) // TILE):
            tokens, pair = divmod(i, len(out) // 2)
            at = first + tokens * TILE
            even, odd = out[2 * pair, at : at + TILE], out[2 * pair + 1, at : at + TILE]
            words = keys[i * TILE : (i + 1) * TILE]
            for t in range(TILE):
                even[t] = _lower(words[t])
                odd[t] = _upper(words[t])

    return in_words if keys.dtype == numba.uint32 else in_rows


def _read_norms(out, values):
    """Euclidean norms of the values of a head in a kernel block.

    Without AMX a token's value lies behind the other's. With AMX values come in words of two tokens
    each, 16 channels at a time.
    """


@overload(_read_norms)
def _read_norms_as_kept(out, values):
    def in_rows(out, values):
        size = len(values) // len(out)
        for t in range(len(out)):
            kept = values[t * size : (t + 1) * size]
            squares = np.float32(0)
            for channel in range(size):
                element = _widened(kept[channel])
                squares += element * element
            out[t] = math.sqrt(squares)

    def in_words(out, values):
        out[:] = 0
        for i in range(len(values) // TILE):
            pair = i % (len(out) // 2)
            words = values[i * TILE : (i + 1) * TILE]
            lower, upper = np.float32(0), np.float32(0)
            for channel in range(TILE):
                a, b = _lower(words[channel]), _upper(words[channel])
                lower += a * a
                upper += b * b
            out[2 * pair] += lower
            out[2 * pair + 1] += upper
        for t in range(len(out)):
            out[t] = math.sqrt(out[t])

    return in_words if values.dtype == numba.uint32 else in_rows


@inlined
def _four(row, first):
    """Numbers of their own, which stay in registers; a row of an array would not."""
    return row[first], row[first + 1], row[first + 2], row[first + 3]


@inlined
def _product(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]


@compiled
def _dot(out, first, queries, keys, num_tokens):
    """``out[:, first:first + num_tokens] = queries @ keys[:, :num_tokens]``, each key read once for
    four queries."""
    end = first + num_tokens
    for i in range(0, len(queries), 4):
        a, b = out[i, first:end], out[i + 1, first:end]
        c, d = out[i + 2, first:end], out[i + 3, first:end]
        for t in range(num_tokens):
            a[t] = b[t] = c[t] = d[t] = 0
        for j in range(0, len(keys), 4):
            qa, qb = _four(queries[i], j), _four(queries[i + 1], j)
            qc, qd = _four(queries[i + 2], j), _four(queries[i + 3], j)
            for t in range(num_tokens):
                key = keys[j, t], keys[j + 1, t], keys[j + 2, t], keys[j + 3, t]
                a[t] += _product(qa, key)
                b[t] += _product(qb, key)
                c[t] += _product(qc, key)
                d[t] += _product(qd, key)


@inlined
def _exp(x):
    """Of numbers up to 0, to 1e-6 of each."""
    x = max(x, SMALLEST) * LOG2_E
    whole = np.floor(x + np.float32(0.5))
    x -= whole
    series = (((((C6 * x + C5) * x + C4) * x + C3) * x + C2) * x + C1) * x + np.float32(1)
    return series * _fp32(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@compiled
def _highest(numbers, scratch):
    """The highest of some numbers, a multiple of 4 of them: most of it in vectors."""
    size = len(numbers) // 4
    a, b = numbers[:size], numbers[size : 2 * size]
    c, d = numbers[2 * size : 3 * size], numbers[3 * size :]
    for i in range(size):
        e = a[i] if a[i] > b[i] else b[i]
        f = c[i] if c[i] > d[i] else d[i]
        scratch[i] = e if e > f else f
    highest = scratch[0]
    for i in range(1, size):
        highest = scratch[i] if scratch[i] > highest else highest
    return highest


@compiled
def _add_softmax(out, logits, share, scratch):
    """Add ``share`` of the softmax of ``logits``, which are overwritten."""
    highest = _highest(logits, scratch)
    total = np.float32(0)
    for t in range(len(logits)):
        weight = _exp(logits[t] - highest)
        logits[t] = weight
        total += weight
    share /= total
    for t in range(len(logits)):
        out[t] += logits[t] * share


@compiled
def _num_behind(last, positions, size):
    """How many tokens of blocks of ``size``, at the end, lie behind that at place ``last``.

    Args:
        last: place in the sequence.
        positions: of the blocks' first tokens, ascending.
        size: tokens of a block.
    """
    num = 0
    for i in range(len(positions) - 1, -1, -1):
        behind = positions[i] + size - 1 - last
        if behind <= 0:
            break
        num += min(behind, size)
    return num


@compiled
def _score_blocks(
    out,  # [num_layers, num_blocks] fp32
    queries,  # flat, as all that has strides here: of layers, rows and heads
    query_strides,
    keys,  # flat: of layers, kernel blocks and heads
    key_strides,
    values,
    value_strides,
    of_head,  # elements, or words, of a head in a kernel block
    kernel_blocks,
    block_size,  # of a kernel block
    scale,
    logit_scales,  # [num_layers, num_kv_heads] fp32, or empty
    num_kv_heads,
    group,
    head_size,
    windows,  # [num_reqs, num_queries] int64
    num_tokens,  # [num_reqs] int64
    block_ids,  # [num_blocks] int64
    requests,  # [num_blocks] int64
    first_positions,  # [num_blocks] int64
    weighs_values,
    takes_highest,
):
    num_queries = windows.shape[1]
    num_rows = group * num_queries
    size = kernel_blocks * block_size
    of_head_mean = np.float32(1 / (num_kv_heads * group))
    end = 0
    for request in range(len(windows)):
        start = end
        while end < len(requests) and requests[end] == request:
            end += 1
        if start == end:
            continue
        num_keys = (end - start) * size
        kernel_ids = np.empty((end - start) * kernel_blocks, np.intp)
        for i in range(len(kernel_ids)):
            block_id = block_ids[start + i // kernel_blocks]
            kernel_ids[i] = block_id * kernel_blocks + i % kernel_blocks
        positions, newest = first_positions[start:end], num_tokens[request] - 1
        at_once = min(max(1, CHUNK // block_size), len(kernel_ids))
        rows = np.zeros((-(-num_rows // 4) * 4, head_size), np.float32)
        widened = np.empty((head_size, at_once * block_size), np.float32)
        logits = np.empty((len(rows), num_keys), np.float32)
        norms = np.ones(num_keys, np.float32)
        received = np.empty(num_keys, np.float32)
        scratch = np.empty(num_keys, np.float32)
        for layer in range(len(out)):
            for kv_head in range(num_kv_heads):
                factor = scale
                if len(logit_scales):
                    factor *= logit_scales[layer, kv_head]
                for i in range(num_rows):
                    row = windows[request, i % num_queries]
                    head = kv_head * group + i // num_queries
                    at = layer * query_strides[0] + row * query_strides[1] + head * query_strides[2]
                    for channel in range(head_size):
                        rows[i, channel] = _widened(queries[at + channel]) * factor
                for first in range(0, len(kernel_ids), at_once):
                    ids = kernel_ids[first : first + at_once]
                    for i in range(len(ids)):
                        at = layer * key_strides[0] + ids[i] * key_strides[1]
                        at += kv_head * key_strides[2]
                        _read_keys(widened, i * block_size, keys[at : at + of_head])
                        if weighs_values:
                            at = layer * value_strides[0] + ids[i] * value_strides[1]
                            at += kv_head * value_strides[2]
                            to = (first + i) * block_size
                            _read_norms(norms[to : to + block_size], values[at : at + of_head])
                    _dot(logits, first * block_size, rows, widened, len(ids) * block_size)
                # Where no token is yet may be anything, also NaN.
                norms[num_keys - _num_behind(newest, positions, size) :] = 0
                for member in range(group):
                    received[:] = 0
                    for i in range(num_queries):
                        seen = logits[member * num_queries + i]
                        own = newest - (num_queries - 1 - i)
                        seen[num_keys - _num_behind(own, positions, size) :] = -np.inf
                        _add_softmax(received, seen, np.float32(1 / num_queries), scratch)
                    is_first = kv_head + member == 0
                    for i in range(end - start):
                        score = np.float32(0)
                        for t in range(i * size, (i + 1) * size):
                            score += received[t] * norms[t]
                        if not takes_highest:
                            score *= of_head_mean
                        if not is_first:
                            before = out[layer, start + i]
                            score = max(score, before) if takes_highest else score + before
                        out[layer, start + i] = score


def block_scores(
    cached: CachedBlocks, takes_highest: bool, weighs_values: bool
) -> torch.Tensor | None:
    """Score blocks in the cache itself: see ``ops.scoring.cached_attention`` and, where values
    weigh, ``cached_contribution``.

    Args:
        cached: blocks.
        takes_highest: of the heads; else their mean.
        weighs_values: whether attention counts times the norm of what is read.

    Returns:
        ``[num_layers, num_blocks]`` fp32; ``None`` for layers that :func:`_find` finds nothing of.
    """
    layers = cached.layers
    in_memory = _IN_MEMORY.get(layers)
    if in_memory is None:
        in_memory = _IN_MEMORY[layers] = _find(layers)
    if not in_memory:
        return None
    scores = np.empty((len(layers.queries), len(cached.block_ids)), np.float32)
    _score_blocks(
        scores,
        *in_memory,
        cached.windows.numpy(),
        cached.num_tokens.numpy(),
        cached.block_ids.numpy(),
        cached.requests.numpy(),
        cached.first_positions.numpy(),
        weighs_values,
        takes_highest,
    )
    return torch.from_numpy(scores)


_IN_MEMORY: WeakKeyDictionary[CachedLayers, tuple[Any, ...]] = WeakKeyDictionary()
"""What :func:`_find` has found."""


def _find(layers: CachedLayers) -> tuple[Any, ...]:
    """What the kernel is told of layers, once it has been compiled for them.

    Returns:
        Nothing where it cannot read their cache: that is quantised, or lies in another order than
        vLLM's CPU kernels for x86 keep it in. Nor where torch's operations are faster, or where
        numba fails, which is logged.
    """
    num_layers, _, num_heads, head_size = layers.queries.shape
    keys, values = layers.pairs or (layers.keys, layers.values)
    if numba.config.DISABLE_JIT or keys is None or values is None or keys.dtype not in ELEMENTS:
        return ()
    num_kv_heads, of_head = keys.shape[2], keys[0, 0, 0].numel()
    block_size = (2 if layers.pairs else 1) * of_head // head_size
    by_channel = (keys.stride()[3:], values.stride()[3:]) == ((1, block_size), (head_size, 1))
    if not (layers.pairs or by_channel) or head_size % 4 or block_size % 4:
        return ()
    if not compiled_is_faster(num_layers * num_kv_heads * head_size * USUAL_TOKENS):
        return ()
    scales = layers.logit_scales
    found = (
        _flat(layers.queries),
        layers.queries.stride()[:3],
        _flat(keys),
        keys.stride()[:3],
        _flat(values),
        values.stride()[:3],
        of_head,
        layers.kernel_blocks,
        block_size,
        np.float32(layers.scale),
        np.empty((0, 0), np.float32) if scales is None else scales.numpy(),
        num_kv_heads,
        num_heads // num_kv_heads,
        head_size,
    )
    of_nobody = np.empty(0, np.int64)
    try:
        _score_blocks(
            np.empty((num_layers, 0), np.float32),
            *found,
            np.empty((0, 1), np.int64),
            *[of_nobody] * 4,
            True,
            True,
        )
    except Exception:  # numba's, also of files that it has kept: an optimisation may fail
        logger.warning(
            "The scoring kernel does not compile; torch's operations take its place. What numba "
            "has kept of it is in the folder __pycache__ beside %s, or in NUMBA_CACHE_DIR.",
            __file__,
            exc_info=True,
        )
        return ()
    return found


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """The memory that a tensor lies in, from its first element to its last."""
    num_elements = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    flat = tensor.as_strided((num_elements,), (1,))
    if flat.dtype == torch.bfloat16:  # which numpy does not know
        flat = flat.view(torch.int16)
    return flat.numpy().view(ELEMENTS[tensor.dtype])
