"""vLLM's offline ``LLM`` with two more arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from . import register
from .served import CONFIG_KEY, flags_to_config


class LLM(vllm.LLM):
    """``vllm.LLM`` under a KV policy.

    Args:
        model: as in ``vllm.LLM``.
        kv_policy: ``"full"``, ``"streaming"``, ``"semantic"``, the qualified name of a
            :class:`~vllm_semantic.policies.KVPolicy` class, or ``None`` for vLLM untouched.
        kv_policy_config: the policy's options, e.g. ``{"semantic_tokens": 512}``, or their JSON
            text, and ``max_request_tokens``, the largest budget that a request may ask for in
            ``SamplingParams(extra_args={"kv_policy": {...}})``, ``layer_groups``, how many
            equal shares of the layers evict for themselves, and ``layer_skew_tokens``, how many
            tokens more than the budget the last of them keeps, and the first fewer.
        **kwargs: as in ``vllm.LLM``.

    Raises:
        ValueError: an unknown policy or option, or one that this configuration cannot serve.
    """

    def __init__(
        self,
        model: str,
        *,
        kv_policy: str | None = None,
        kv_policy_config: Mapping[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        config = flags_to_config(kv_policy, kv_policy_config)
        if config is not None:
            # Whoever imports this class wants the plugin, whatever VLLM_PLUGINS names.
            register()
            additional_config = kwargs.pop("additional_config", None) or {}
            kwargs["additional_config"] = {**additional_config, CONFIG_KEY: config}
        super().__init__(model, **kwargs)
