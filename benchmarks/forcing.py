"""Teacher forcing by a logits processor: the engine decodes a text that is already there."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class ForcedText(AdapterLogitsProcessor):
    """Leaves one token to choose from: the next of ``extra_args["forced_token_ids"]``.

    Log-probabilities are taken before logits processors (``logprobs_mode`` raw), so they are
    the model's own.
    """

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


def forced_params(token_ids: list[int]) -> SamplingParams:
    """Decode exactly ``token_ids`` and say how likely each was."""
    return SamplingParams(
        max_tokens=len(token_ids),
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args={"forced_token_ids": token_ids},
    )
