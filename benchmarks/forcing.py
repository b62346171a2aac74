"""Teacher forcing: the engine decodes a text that is already there, and says how likely it was.

Model Runner V2 replays traces by itself (``--enable-trace-replay``); V1 takes a logits processor.
Log-probabilities are the model's own with either (``logprobs_mode`` raw).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm import SamplingParams, envs
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedText(AdapterLogitsProcessor):
    """Leaves one token to choose from: the next of ``extra_args["forced_token_ids"]``."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forced = (params.extra_args or {}).get("forced_token_ids")
        if forced is None:
            return None

        def force(output_token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = forced[len(output_token_ids)]
            masked = torch.full_like(logits, float("-inf"))
            masked[token] = 0.0
            return masked

        return force


def replays_traces() -> bool:
    """Whether vLLM chooses Model Runner V2 here (``VllmConfig.use_v2_model_runner``)."""
    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if chosen is None else bool(chosen)


def forcing_options() -> dict[str, Any]:
    """What an engine needs so that :func:`forced_params` are obeyed."""
    if replays_traces():
        return {"enable_trace_replay": True}
    return {"logits_processors": [ForcedText]}


def forced_params(
    token_ids: list[int], extra_args: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Decode exactly ``token_ids`` and say how likely each was; ``extra_args`` for a policy."""
    forced: dict[str, Any] = {"extra_args": {**(extra_args or {}), "forced_token_ids": token_ids}}
    if replays_traces():
        forced = {"extra_args": dict(extra_args or {}), "trace_decode_token_ids": token_ids}
    return SamplingParams(
        max_tokens=len(token_ids),
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        **forced,
    )
