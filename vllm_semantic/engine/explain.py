"""Why a request lost which blocks: log lines at DEBUG, built only where that is logged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from ..messages import BlockIndices

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or its level does not count


def explain_eviction(
    policy: str,
    request_id: str,
    group_id: int,
    point: int,
    candidates: Sequence[int],
    scores: Sequence[float],
    evicted: BlockIndices,
    recalled: BlockIndices,
) -> None:
    """Log what could go at an eviction point, with its score, what went and what came back."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "KV policy %s: request %s at token %d evicts blocks %s%s of KV cache group %d; "
            "scores %s",
            policy,
            request_id,
            point,
            evicted,
            f" and recalls {recalled}" if recalled else "",
            group_id,
            ", ".join(f"{i}: {score:.4g}" for i, score in zip(candidates, scores, strict=True)),
        )


def sum_up_request(
    policy: str, request: Request, group_id: int, evicted: int, held: int, scored: int
) -> None:
    """Log the totals of a request that has finished, in blocks of a group, if it evicted any.

    One that was preempted computes, and evicts, all of it again: its totals count once.
    """
    if evicted and request.is_finished() and logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "KV policy %s: request %s finished with %d prompt and %d output tokens: "
            "%d blocks evicted, %d held, %d scored in KV cache group %d",
            policy,
            request.request_id,
            request.num_prompt_tokens,
            request.num_output_tokens,
            evicted,
            held,
            scored,
            group_id,
        )
