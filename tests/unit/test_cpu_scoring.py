"""The scoring kernel for CPUs computes what the reference computes, whatever order keys lie in."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from dataclasses import replace

import llvmlite.binding
import numba
import numpy as np
import pytest
import torch
from numba.core.caching import CompileResultCacheImpl
from vllm import _custom_ops as custom_ops

from vllm_semantic.engine.cached_kv import CachedKV, cpu_packing
from vllm_semantic.engine.scorer import ScoredLayers
from vllm_semantic.ops.cached_blocks import CachedBlocks
from vllm_semantic.ops.kernels import cpu_scoring
from vllm_semantic.ops.kernels.compiled import compiled
from vllm_semantic.ops.platform import COMPILED_THREADS, SERIAL_NUMEL, compiled_is_faster
from vllm_semantic.ops.scoring import Reduction
from vllm_semantic.policies import BlockView, SemanticPolicy

from ..scored_blocks import attention_both

NUM_LAYERS, NUM_BLOCKS, NUM_KV_HEADS, NUM_HEADS, HEAD_SIZE, BLOCK_SIZE = 2, 7, 2, 6, 64, 32


@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_head_sizes(head_size: int) -> None:
    attention_both(head_size=head_size, layout="cpu")


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_grouped_queries(num_heads: int, num_kv_heads: int, num_queries: int) -> None:
    attention_both(num_heads, num_kv_heads, num_queries=num_queries, layout="cpu")


@pytest.mark.parametrize(("block_size", "kernel_blocks"), [(16, 1), (16, 2), (32, 3)])
@pytest.mark.parametrize("num_blocks", [4, 20])
def test_blocks(block_size: int, kernel_blocks: int, num_blocks: int) -> None:
    """Twenty blocks of 96 tokens are read in more than one go."""
    assert 2 * cpu_scoring.CHUNK < 20 * 32 * 3
    attention_both(
        block_size=block_size, kernel_blocks=kernel_blocks, num_blocks=num_blocks, layout="cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    attention_both(dtype=dtype, layout="cpu")


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_heads_and_scales_of_queries(heads: Reduction) -> None:
    attention_both(8, 2, heads=heads, query_scales=True, layout="cpu")


def cached(isa: str) -> CachedKV:
    """A cache of random keys and values, written by vLLM's own kernel."""
    kv_cache = torch.zeros(
        NUM_LAYERS, NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16
    )
    for layer in kv_cache:
        keys, values = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE).bfloat16()
        halves = layer.view(NUM_BLOCKS, NUM_KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
        slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
        custom_ops.cpu_attn_reshape_and_cache(
            keys, values, *halves, slots, isa, kv_cache_dtype="auto"
        )
    return CachedKV(kv_cache, HEAD_SIZE, 1, cpu_packing(BLOCK_SIZE, HEAD_SIZE, kv_cache.dtype, isa))


def scored(kv: CachedKV) -> ScoredLayers:
    queries = torch.randn(NUM_LAYERS, 20, NUM_HEADS, HEAD_SIZE).bfloat16()
    return ScoredLayers(kv, queries, 0.125)


def in_place(
    layers: ScoredLayers,
    window: torch.Tensor,
    ids: torch.Tensor,
    indices: torch.Tensor,
    num_tokens: int,
) -> CachedBlocks:
    """Blocks of one request."""
    assert layers.in_place is not None
    return CachedBlocks(
        layers.in_place,
        window.unsqueeze(0),
        torch.tensor([num_tokens]),
        ids,
        torch.zeros_like(ids),
        indices * BLOCK_SIZE,
    )


@pytest.mark.cpu_build("its attention kernels write the cache")
@pytest.mark.parametrize("isa", ["amx", "vec"])
@pytest.mark.parametrize("similarity", ["contribution", "attention"])
def test_what_the_kernels_of_vllm_write(isa: str, similarity: str) -> None:
    torch.manual_seed(5)
    kv = cached(isa)
    layers = scored(kv)
    ids, indices = torch.tensor([5, 0, 3, 6]), torch.tensor([0, 2, 3, 4])
    num_tokens, window = 5 * BLOCK_SIZE - 5, torch.randperm(20)[:8]
    blocks = in_place(layers, window, ids, indices, num_tokens)
    assert (blocks.layers.pairs is not None) == (isa == "amx")
    assert (blocks.layers.keys is None) == (isa == "amx")
    view = BlockView(
        layers.queries[:, window].float(),
        kv.gather_keys(ids),
        lambda: kv.gather_values(ids),
        indices,
        num_tokens,
        layers.scale,
    )
    policy = SemanticPolicy(similarity=similarity)
    scores = policy.score_cached(blocks)
    assert scores is not None
    torch.testing.assert_close(scores[:, :3], policy.score(view), rtol=2**-16, atol=2**-20)


@pytest.mark.cpu_build("its attention kernels write the cache")
@pytest.mark.parametrize("isa", ["amx", "vec"])
def test_scales_of_queries_count_in_any_order(isa: str) -> None:
    scales = torch.rand(NUM_LAYERS, NUM_KV_HEADS)
    layers = replace(scored(cached(isa)), query_scales=scales).in_place
    assert layers is not None
    assert layers.logit_scales is scales


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_a_cache_that_is_gone_is_not_held() -> None:
    """What is remembered of layers ends with them: an engine may start after another."""
    kv = cached("vec")
    one = torch.zeros(1, dtype=torch.int64)
    blocks = in_place(scored(kv), torch.arange(8), one, one, BLOCK_SIZE)
    assert SemanticPolicy().score_cached(blocks) is not None
    memory = weakref.ref(kv.kv_cache.untyped_storage())
    assert memory() is not None
    del kv, blocks
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    @numba.njit
    def widen(out: np.ndarray, elements: np.ndarray) -> None:
        for i in range(len(out)):
            out[i] = cpu_scoring._widened(elements[i])

    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    widened = np.empty(len(numbers), np.float32)
    widen(widened, cpu_scoring._flat(numbers))
    assert numbers.isfinite().sum() > 60_000
    torch.testing.assert_close(
        torch.from_numpy(widened), numbers.float(), rtol=0, atol=0, equal_nan=True
    )


def test_torch_scores_much_at_once_where_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled_is_faster(SERIAL_NUMEL - 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: COMPILED_THREADS)
    assert compiled_is_faster(SERIAL_NUMEL)
    monkeypatch.setattr(torch, "get_num_threads", lambda: COMPILED_THREADS + 1)
    assert compiled_is_faster(SERIAL_NUMEL - 1)
    assert not compiled_is_faster(SERIAL_NUMEL)


def test_vllm_may_look_at_what_numba_has_brought() -> None:
    """Or no worker starts in a process that has scored."""
    library = llvmlite.binding.ffi.lib
    assert not hasattr(library, "__dict__")
    assert callable(library.LLVMPY_GetVersionInfo)


def one_block() -> CachedBlocks:
    one = torch.zeros(1, dtype=torch.int64)
    return in_place(scored(cached("vec")), torch.arange(8), one, one, BLOCK_SIZE)


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_torch_scores_a_large_model_where_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SemanticPolicy().score_cached(one_block()) is not None
    monkeypatch.setattr(cpu_scoring, "compiled_is_faster", lambda numel: numel < 131_072)
    assert NUM_LAYERS * NUM_KV_HEADS * HEAD_SIZE * cpu_scoring.USUAL_TOKENS == 131_072
    assert SemanticPolicy().score_cached(one_block()) is None


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_torch_scores_where_numba_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a file that it has kept is cut short."""

    def kernel(*args: object) -> None:
        raise EOFError("ran out of input")

    monkeypatch.setattr(cpu_scoring, "_score_blocks", kernel)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert SemanticPolicy().score_cached(one_block()) is None
    assert "does not compile" in caplog.text
    assert "ran out of input" in caplog.text
    monkeypatch.undo()
    assert SemanticPolicy().score_cached(one_block()) is not None
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert SemanticPolicy().score_cached(one_block()) is None


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_it_is_compiled_before_it_is_asked() -> None:
    layers = scored(cached("vec")).in_place
    assert layers is not None
    assert cpu_scoring._find(layers)
    compiled_for = list(cpu_scoring._score_blocks.signatures)
    assert compiled_for
    SemanticPolicy().score_cached(one_block())
    assert cpu_scoring._score_blocks.signatures == compiled_for


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_a_request_without_blocks_costs_no_other_its_scores() -> None:
    blocks = one_block()
    alone = SemanticPolicy().score_cached(blocks)
    beside = CachedBlocks(
        blocks.layers,
        blocks.windows.repeat(3, 1),
        blocks.num_tokens.repeat(3),
        blocks.block_ids,
        blocks.requests + 1,
        blocks.first_positions,
    )
    assert alone is not None
    assert torch.equal(SemanticPolicy().score_cached(beside), alone)


@pytest.mark.cpu_build("its attention kernels write the cache")
def test_torch_scores_where_there_is_no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = one_block()
    assert SemanticPolicy().score_cached(blocks) is not None
    monkeypatch.setitem(sys.modules, cpu_scoring.__name__, None)
    assert SemanticPolicy().score_cached(blocks) is None


def test_kernels_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose files cannot be written."""
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x + 1)
    assert compiled(lambda x: x + 1)(1) == 2
