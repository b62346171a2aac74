"""What a policy's score or rank returns, tried on made-up blocks before a model is loaded."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from .base import KVPolicy
from .check import POLICY_ERRORS, PolicyError, reason
from .view import BlockView

ON_ANY_DEVICE = (ArithmeticError, AttributeError, ImportError, LookupError, NameError, TypeError)
"""Errors in a policy's Python code, the same on a CPU and a GPU. With a CUDA build of torch, any
other error that a trial on the CPU raises may be for want of a GPU, and is not refused here."""

NUM_LAYERS = 2
"""Layers of the view that a score is tried on. The engine may score a model in several views."""


@dataclass(frozen=True)
class AttentionShape:
    """Of the layers that a policy is tried for."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int


def try_out(policy: KVPolicy, shape: AttentionShape) -> None:
    """Let a policy judge made-up blocks on a CPU, as the engine will.

    Raises:
        PolicyError: it raises, or returns something that is not one number for each block.
    """
    if policy._judge is None or not any(policy._selected_parts):
        return
    try:
        # Nothing of it shows in what anybody draws at random later.
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            if policy.scores_blocks:
                for num_filled in (0, shape.block_size // 2):
                    _try_score(policy, shape, num_filled)
            else:
                _try_rank(policy, shape)
    except PolicyError:
        raise
    except POLICY_ERRORS as error:
        if torch.version.cuda is None or isinstance(error, ON_ANY_DEVICE):
            why = reason(error, type(policy).__module__)
            raise PolicyError(f"cannot {policy._judge}: {why}") from error


def num_judged_blocks(policy: KVPolicy, block_size: int) -> int:
    """How many full blocks a policy is tried on: one more than its budget, at most 64."""
    return min(policy.budget(block_size).total + 1, 64)


def _held_blocks(policy: KVPolicy, shape: AttentionShape) -> list[int]:
    """As at an eviction point, one gone before."""
    return [0, *range(2, num_judged_blocks(policy, shape.block_size) + 1)]


def _try_score(policy: KVPolicy, shape: AttentionShape, num_filled: int) -> None:
    full = _held_blocks(policy, shape)
    held = full + [full[-1] + 1] * bool(num_filled)
    num_tokens = (full[-1] + 1) * shape.block_size + num_filled
    generator = torch.Generator().manual_seed(0)
    of_block = (shape.num_kv_heads, shape.block_size, shape.head_size)
    keys, values = (
        torch.randn((NUM_LAYERS, len(held), *of_block), generator=generator) for _ in range(2)
    )
    num_queries = min(policy.num_queries, num_tokens)
    queries = torch.randn(
        (NUM_LAYERS, num_queries, shape.num_heads, shape.head_size), generator=generator
    )
    scale = shape.head_size**-0.5
    view = BlockView(queries, keys, values.clone, torch.tensor(held), num_tokens, scale)
    scores = checked_scores(policy.score(view), NUM_LAYERS, len(full), keys.device)
    if scores.isnan().all():
        raise PolicyError("cannot score: every score is NaN")


def _try_rank(policy: KVPolicy, shape: AttentionShape) -> None:
    held = _held_blocks(policy, shape)
    candidates, num_tokens = held[1:-1], (held[-1] + 1) * shape.block_size
    ranks = checked_ranks(policy.rank(list(candidates), num_tokens, {}), len(candidates))
    if all(rank != rank for rank in ranks):
        raise PolicyError("cannot rank: every rank is NaN")


def checked_scores(
    scores: object, num_layers: int, num_blocks: int, device: torch.device
) -> torch.Tensor:
    """What :meth:`~.base.KVPolicy.score` returned, in fp32.

    Raises:
        TypeError: it is no tensor, or none of real numbers.
        ValueError: it is not one score for each layer and block, or on another device.
    """
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"the scores are a {type(scores).__name__}; allowed: a torch.Tensor")
    if scores.shape != (num_layers, num_blocks):
        raise ValueError(
            f"the scores have the shape {list(scores.shape)}; "
            f"allowed: {[num_layers, num_blocks]}, one for each layer and full block"
        )
    if scores.is_complex() or scores.layout is not torch.strided:
        raise TypeError(
            f"the scores are {scores.dtype}, {scores.layout}; allowed: dense real numbers"
        )
    if scores.device != device:
        raise ValueError(f"the scores are on {scores.device}; allowed: {device}, as the keys")
    return scores.detach().float()


def checked_ranks(ranks: object, num_blocks: int) -> list[float]:
    """What :meth:`~.base.KVPolicy.rank` returned, as floats.

    Raises:
        TypeError: it is no sequence of real numbers; a tensor or an array of them is one.
        ValueError: it is not one for each candidate.
    """
    if hasattr(ranks, "tolist"):
        ranks = ranks.tolist()
    if not isinstance(ranks, Sequence) or isinstance(ranks, (str, bytes)):
        raise TypeError(f"the ranks are a {type(ranks).__name__}; allowed: a sequence of numbers")
    if len(ranks) != num_blocks:
        raise ValueError(f"there are {len(ranks)} ranks for {num_blocks} blocks")
    if wrong := [rank for rank in ranks if not isinstance(rank, Real)]:
        raise TypeError(f"{reprlib.repr(wrong[0])} is among the ranks; allowed: numbers")
    return [float(rank) for rank in ranks]
