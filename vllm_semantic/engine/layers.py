"""Refuses attention layers that a policy cannot serve, once a model is loaded: some show only
then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ..config import POLICY_FLAG
from .backend import is_wrapped
from .spec import goes_under_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_layers(vllm_config: VllmConfig, policy: str) -> None:
    """Refuse a model whose attention is not that of each token to all tokens before it.

    A soft cap on logits and learned sinks are served: neither depends on positions.

    Args:
        vllm_config: of a worker that has loaded its model.
        policy: its name, for the message.

    Raises:
        ValueError: names what the layers do, and the first of them.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items():
        for feature in _unsupported(layer, vllm_config):
            found[feature].append(name)
    if found:
        features = "; ".join(
            f"{feature} (in {len(names)} layers, as {names[0]})" for feature, names in found.items()
        )
        raise ValueError(f"{POLICY_FLAG} {policy} does not support {features}")


def _unsupported(layer: Attention, vllm_config: VllmConfig) -> Iterator[str]:
    if layer.attn_type != AttentionType.DECODER:
        yield f"attention of the type {layer.attn_type} (allowed: {AttentionType.DECODER})"
        return
    spec = layer.get_kv_cache_spec(vllm_config)
    if not goes_under_policy(spec):  # a layer with a window, whose blocks stay as they are
        return
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        yield "models with ALiBi positions"
    if layer.use_alibi_sqrt or getattr(layer.impl, "use_alibi_sqrt", False):
        yield "models with ALiBi positions of the square root"
    if spec.non_causal:
        yield "attention that sees ahead"
    if spec.tokens_per_state != 1:
        yield f"caches with {spec.tokens_per_state} tokens per state (allowed: 1)"
    backend, dtype = layer.attn_backend, layer.kv_cache_dtype
    # vLLM asks where it chooses among backends; a CPU has one.
    if is_quantized_kv_cache(dtype) and not backend.supports_kv_cache_dtype(dtype):
        allowed = ", ".join(backend.supported_kv_cache_dtypes)
        yield f"--kv-cache-dtype {dtype} of {backend.__name__} (allowed: {allowed})"
    if not is_wrapped(backend):
        yield f"the attention backend {backend.__name__} of the model's own"
