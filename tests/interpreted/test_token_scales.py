"""Caches in which every key and value of a head has its own scale: TRITON_ATTN's alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from vllm_semantic.engine.cached_kv import PER_TOKEN_DTYPES, CachedKV, Quantized
from vllm_semantic.policies import SemanticPolicy

from ..engines import engine, manager_of
from ..models import random_prompts
from .test_triton_attn import choose_triton_attn

OPTIONS = {
    "sink_tokens": 16,
    "recent_tokens": 32,
    "semantic_tokens": 64,
    "similarity": "contribution",
}
PARAMS = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False)
PROMPTS = random_prompts([190])

for_every_dtype = pytest.mark.parametrize("kv_cache_dtype", PER_TOKEN_DTYPES)


@for_every_dtype
@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_what_was_written_is_read(kv_cache_dtype: str, kernel_blocks: int) -> None:
    """As vLLM's kernels write it and see it; of int8, to half a step of what was to be written.

    Interpreted, a number that is rounded up to a power of two becomes half of it in fp8.
    """
    generator = torch.Generator().manual_seed(1)
    num_layers, num_blocks, num_heads, block_size, head_size = 2, 6, 2, 16, 64
    dtype = PER_TOKEN_DTYPES[kv_cache_dtype]
    shape = (num_layers, num_blocks, num_heads, block_size, 2 * (head_size + 4))
    kv_cache = torch.zeros(shape, dtype=STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype])
    num_tokens = num_blocks * block_size
    written = torch.randn(2, num_layers, num_tokens, num_heads, head_size, generator=generator)
    written *= torch.rand(2, num_layers, num_tokens, num_heads, 1, generator=generator) * 9 + 0.1
    seen = torch.empty_like(written)
    for i, layer in enumerate(kv_cache):
        impl = TritonAttentionImpl(4, head_size, 1.0, num_heads, None, None, kv_cache_dtype)
        slots = torch.arange(num_tokens)
        impl.do_kv_cache_update(torch.nn.Module(), *written[:, i], layer, slots)
        halves = impl._pth_key_value_caches(layer)
        scales = impl._k_scale_cache, impl._v_scale_cache
        for of, half, scale in zip(seen[:, i], halves, scales, strict=True):
            of.copy_((half[..., :head_size].float() * scale.unsqueeze(3)).flatten(0, 1))
    if dtype is torch.int8:
        step = written.abs().amax(-1, keepdim=True) / 127
        assert ((seen - written).abs() <= 0.501 * step).all()
    cache = CachedKV(kv_cache, head_size, kernel_blocks, None, Quantized(dtype))
    ids = torch.tensor([2, 0])
    size = kernel_blocks * block_size
    for half, gather in zip(seen, (cache.gather_keys, cache.gather_values), strict=True):
        blocks = half.view(num_layers, -1, size, num_heads, head_size)[:, ids].transpose(2, 3)
        assert torch.equal(gather(ids), blocks)
    one = cache.layers(slice(1, 2))
    assert torch.equal(one.gather_values(ids), cache.gather_values(ids)[1:])


def serve(llama: str, kv_cache_dtype: str, options: dict[str, Any] | None) -> tuple[Any, Any]:
    """The tokens, and what the policy counted."""
    with engine(
        llama,
        policy=options and "semantic",
        kv_policy_config=options,
        block_size=16,
        max_num_batched_tokens=64,
        kv_cache_dtype=kv_cache_dtype,
    ) as llm:
        (output,) = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return output.outputs[0].token_ids, options and (llm.trace.by_index(), manager_of(llm))


def test_kernels_read_what_is_gathered(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks go by keys and values in place and gathered."""
    choose_triton_attn(monkeypatch)
    in_place, (evicted, manager) = serve(llama, "int8_per_token_head", OPTIONS)
    assert manager.stats.evicted_blocks > 0
    monkeypatch.setattr(SemanticPolicy, "score_cached", lambda self, cached: None)
    gathered, (same, _) = serve(llama, "int8_per_token_head", OPTIONS)
    assert (gathered, same) == (in_place, evicted)


def test_recall(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the prompt but its beginning is a question, which sees host memory too: as without a
    policy, whose scales lie elsewhere."""
    choose_triton_attn(monkeypatch)
    with_host_memory, (_, manager) = serve(
        llama, "fp8_per_token_head", OPTIONS | {"recall_gib": 0.125}
    )
    assert manager.stats.read_blocks > 0
    assert with_host_memory[0] == serve(llama, "fp8_per_token_head", None)[0][0]
