"""Models whose configuration does not say what their layers do: refused once they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import (
    PrefillPrefixLMAttention,
)
from vllm.model_executor.models import llama as vllm_llama
from vllm.model_executor.models.whisper_causal import WhisperCausalAttentionWithBlockPooling
from vllm.v1.attention.selector import get_attn_backend

from ..engines import engine
from ..models import random_prompts

SLOPES = [0.5, 0.25, 0.125, 0.0625]
FIRST = r"in 2 layers, as model\.layers\.0\.self_attn\.attn"


def with_an_encoders_masks(*args: Any, **kwargs: Any) -> Attention:
    """A decoder's layer whose backend sees ahead, and nothing but the backend says so."""
    backend = create_encoder_only_attention_backend(get_attn_backend(64, torch.float32, "auto"))
    return Attention(*args, **kwargs, attn_backend=backend)


LAYERS: dict[str, tuple[Callable[..., Attention], str]] = {
    "ALiBi": (
        partial(Attention, alibi_slopes=SLOPES),
        rf"models with ALiBi positions \({FIRST}\)",
    ),
    "sees ahead": (PrefillPrefixLMAttention, rf"attention that sees ahead \({FIRST}\); .*backend"),
    "a backend of its own": (
        with_an_encoders_masks,
        rf"attention backend EncoderOnlyAttention_CPU_ATTN of the model's own \({FIRST}\)",
    ),
    "shortened distances": (
        partial(WhisperCausalAttentionWithBlockPooling, block_pool_size=4),
        rf"caches with 1/4 tokens per state \(allowed: 1\) \({FIRST}\)",
    ),
}


@pytest.mark.parametrize("what", LAYERS)
def test_refused_once_loaded(what: str, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Llama, built with other layers than its configuration has."""
    layer, message = LAYERS[what]
    monkeypatch.setattr(vllm_llama, "Attention", layer)
    with (
        pytest.raises(ValueError, match=f"--kv-policy semantic does not support .*{message}"),
        engine(llama, policy="semantic"),
    ):
        pass


@pytest.mark.cpu_build("TRITON_ATTN takes it")
def test_a_cache_that_the_backend_does_not_read(llama: str) -> None:
    """vLLM has one backend for CPUs, and does not ask it."""
    message = r"--kv-cache-dtype fp8_per_token_head of CPU_ATTN \(allowed: auto, fp8, "
    with (
        pytest.raises(ValueError, match=f"--kv-policy semantic does not support .*{message}"),
        engine(llama, policy="semantic", kv_cache_dtype="fp8_per_token_head"),
    ):
        pass


def test_a_layer_with_a_window_may_do_as_it_likes(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are not the policy's."""

    def attention(*args: Any, prefix: str, **kwargs: Any) -> Attention:
        if "layers.1" in prefix:
            kwargs |= {"per_layer_sliding_window": 64, "alibi_slopes": SLOPES}
        return Attention(*args, prefix=prefix, **kwargs)

    monkeypatch.setattr(vllm_llama, "Attention", attention)
    with engine(llama, policy="semantic") as llm:
        params = SamplingParams(max_tokens=8, detokenize=False)
        llm.generate(random_prompts([900]), params, use_tqdm=False)
        assert llm.trace.by_index()[0]
