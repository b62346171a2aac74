"""Which blocks to evict, and when. Pure functions on block indices."""

from collections.abc import Sequence

from .base import BlockBudget


def is_eviction_point(
    num_tokens: int, num_prompt_tokens: int, block_size: int, prefill_interval: int
) -> bool:
    """Whether a request that has computed ``num_tokens`` tokens may evict there.

    Eviction points depend on the request alone, never on how a batch was scheduled, so
    that the same request evicts the same blocks in any batch and after a preemption:
    every ``prefill_interval`` tokens of the prompt, its end, and then every full block.
    """
    if num_tokens < num_prompt_tokens:
        return num_tokens % prefill_interval == 0
    return num_tokens == num_prompt_tokens or num_tokens % block_size == 0


def eviction_point_from(
    num_tokens: int, num_prompt_tokens: int, block_size: int, prefill_interval: int
) -> int:
    """The first eviction point at or after ``num_tokens`` computed tokens."""
    if num_tokens <= num_prompt_tokens:
        return min(num_prompt_tokens, -(-num_tokens // prefill_interval) * prefill_interval)
    return -(-num_tokens // block_size) * block_size


def blocks_to_evict(kept: Sequence[int], budget: BlockBudget, scores: Sequence[float]) -> list[int]:
    """Choose the blocks a request gives up to be within its budget.

    Args:
        kept: logical indices of the full blocks the request holds, ascending.
        budget: what it may keep.
        scores: one per candidate (``budget.candidates(kept)``), higher = keep. Equal scores:
            the older block goes. NaN sorts below all.

    Returns:
        Logical indices, ascending; empty within the budget.

    Raises:
        ValueError: the number of scores is not the number of candidates.
    """
    num_evicted = len(kept) - budget.total
    if num_evicted <= 0:
        return []
    candidates = budget.candidates(kept)
    if len(scores) != len(candidates):
        raise ValueError(f"{len(scores)} scores for {len(candidates)} candidate blocks")
    ranked = sorted(zip((s if s == s else float("-inf") for s in scores), candidates, strict=True))
    return sorted(block for _, block in ranked[:num_evicted])
