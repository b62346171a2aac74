"""Which blocks to evict, and when. Pure functions on block indices."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class EarlierTurn(NamedTuple):
    """A prompt that was answered, and then went on: a streaming-input session."""

    num_prompt_tokens: int
    """Where the prompt ended."""

    num_tokens: int
    """Where its answer ended; what follows is prompt again."""


def prompt_end(num_tokens: int, num_prompt_tokens: int, turns: Sequence[EarlierTurn]) -> int:
    """The end of the prompt, as it was when ``num_tokens`` tokens were computed.

    Eviction points of earlier turns stay where they were, so that a session that is preempted
    evicts the same blocks when it is computed again.

    Args:
        num_tokens: computed tokens.
        num_prompt_tokens: where the prompt ends now.
        turns: the turns before, in order; empty where no prompt grew.
    """
    for turn in turns:
        if num_tokens <= turn.num_tokens:
            return turn.num_prompt_tokens
    return num_prompt_tokens


def eviction_point_of_turns(
    num_tokens: int,
    num_prompt_tokens: int,
    turns: Sequence[EarlierTurn],
    block_size: int,
    prefill_interval: int,
) -> int:
    """:func:`eviction_point_from` of a session."""
    for turn in turns:
        if num_tokens <= turn.num_tokens:
            of_turn = turn.num_prompt_tokens
            point = eviction_point_from(num_tokens, of_turn, block_size, prefill_interval)
            if point <= turn.num_tokens:
                return point
            num_tokens = turn.num_tokens + 1
    return eviction_point_from(num_tokens, num_prompt_tokens, block_size, prefill_interval)


class Question(NamedTuple):
    """The last tokens of a prompt, or of a session's next turn: they say what is asked for."""

    start: int
    """Index of its first token."""

    end: int
    """Index behind its last token."""


def question_after(
    num_tokens: int, num_prompt_tokens: int, turns: Sequence[EarlierTurn], most: int
) -> Question | None:
    """The question that is being read once ``num_tokens`` are computed, or the next one.

    Args:
        num_tokens: computed tokens; the question ends behind them.
        num_prompt_tokens: where the prompt ends now.
        turns: the turns before, in order.
        most: tokens of a question; those of a turn before are none of it.

    Returns:
        ``None`` if every prompt has been read.
    """
    begun = 0
    for end, answered in (*turns, EarlierTurn(num_prompt_tokens, num_prompt_tokens)):
        if end > num_tokens:
            return Question(max(begun, end - most), end)
        begun = answered
    return None


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
    ranked = sorted(zip(map(_number, scores), candidates, strict=True))
    return sorted(block for _, block in ranked[:num_evicted])


def with_continuations(
    blocks: Sequence[int], scores: Sequence[float], margin: float
) -> list[float]:
    """Let a block count nearly as much as the one before it: what is said there may go on in it.

    The tokens that a question looks at stand before its answer, which may lie in the next block.
    SnapKV (Li et al., 2024) pools scores over neighbouring tokens for the same reason.

    Args:
        blocks: logical indices.
        scores: one for each, higher = keep.
        margin: by which share of its score the block before ranks higher.

    Returns:
        Scores, no lower than before.
    """
    of_block = dict(zip(blocks, scores, strict=True))
    before = (of_block.get(block - 1, -math.inf) for block in blocks)
    return [
        max(score, other - margin * abs(other)) if other > -math.inf else score
        for score, other in zip(scores, before, strict=True)
    ]


def _number(score: float) -> float:
    """A score that compares: NaN is below all."""
    return score if score == score else -math.inf


def blocks_to_swap(
    held: Mapping[int, float], recallable: Mapping[int, float], most: int, margin: float
) -> list[tuple[int, int]]:
    """Choose the blocks that a request recalls, and those that make room for them.

    Args:
        held: scores, by logical index, of the blocks within the budget that may go.
        recallable: scores of those that may come back.
        most: pairs.
        margin: by which share of its own score a block has to be beaten, so that two blocks do not
            take turns.

    Returns:
        Pairs of one that goes and one that comes back, those that gain most first. NaN never comes
        back, and goes first.
    """

    worst = sorted((_number(score), block) for block, score in held.items())
    best = sorted(((_number(score), block) for block, score in recallable.items()), reverse=True)
    pairs = []
    for (its_score, goes), (score, comes) in zip(worst[:most], best, strict=False):
        # What is as low as can be, or NaN, is beaten by any number.
        needed = its_score + margin * abs(its_score) if its_score > -math.inf else its_score
        if not score > needed:
            break
        pairs.append((goes, comes))
    return pairs
