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
        kv_policy: a key of :data:`~vllm_semantic.policies.POLICIES`, such as ``"semantic"``, or
            the qualified name of a :class:`~vllm_semantic.policies.KVPolicy` class. ``None``
            serves vLLM unchanged.
        kv_policy_config: an object or its JSON text: the policy's options, e.g.
            ``{"semantic_tokens": 512}``, and beside them

            - ``max_request_tokens``: the largest budget that a request may ask for in
              ``SamplingParams(extra_args={"kv_policy": {...}})``;
            - ``layer_groups``: into how many equal groups the full-attention layers are split,
              each of which evicts for itself;
            - ``layer_skew_tokens``: how many tokens more than the budget the last group keeps,
              and the first fewer;
            - ``recall_gib``: GiB of host memory for evicted blocks, which may come back at the
              end of a prompt;
            - ``recall_blocks``: how many may come back at each eviction point of an answer too.

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
