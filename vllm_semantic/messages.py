"""What travels between the block manager and the workers, one step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .ops.scoring import Reduction
from .policies import KVPolicy
from .policies.selection import EarlierTurn

BlockIndices = list[int]
"""Logical block indices of one request, ascending."""


class Owner(NamedTuple):
    """A request's blocks in one KV cache group."""

    group_id: int
    request_id: str


class BlockCopy(NamedTuple):
    """A block of a KV cache group that is copied to host memory, or back."""

    group_id: int
    block_id: int
    """On the device."""
    slot: int
    """In host memory."""


class HostCopies(NamedTuple):
    """What a step copies before its forward pass: first out, then back."""

    out: list[BlockCopy]
    back: list[BlockCopy]


@dataclass(frozen=True)
class ScoreRequest:
    """Asks for scores of the full blocks that one request has. Written by the block manager."""

    policy: KVPolicy
    """Says what a block is worth."""

    num_tokens: int
    """The eviction point that the scores are for: tokens computed once the step has run."""

    block_indices: BlockIndices
    """Logical indices of the full blocks that are scored, and attended to by the scores."""

    block_ids: list[int]
    """Physical ids, in the same order, and behind them that of the block being filled, if any."""

    recallable: Mapping[int, int] = field(default_factory=dict)
    """Blocks that are in host memory only: the slot of each, by logical index."""

    over_layers: Reduction = "mean"
    """How a block's scores in the layers of a group become one: their mean, or, at the end of a
    question, their maximum."""

    @property
    def scored_indices(self) -> BlockIndices:
        """Logical indices of the blocks that get a score, ascending."""
        if not self.recallable:
            return self.block_indices
        return sorted([*self.block_indices, *self.recallable])

    @property
    def held_indices(self) -> BlockIndices:
        """Logical indices of all :attr:`block_ids`; what is being filled comes behind the rest."""
        if len(self.block_ids) == len(self.block_indices):
            return self.block_indices
        return [*self.block_indices, self.block_indices[-1] + 1]


@dataclass
class KVPolicyStep:
    """What a scheduler step tells the workers; one entry per KV cache group and request.

    Written by the scheduler, read by the workers before the forward pass (copies, evictions,
    recalls, reads) and after it (score requests).
    """

    evictions: dict[int, dict[str, BlockIndices]] = field(default_factory=dict)
    """Logical indices of the blocks that a request has lost since the last step."""

    recalls: dict[int, dict[str, dict[int, int]]] = field(default_factory=dict)
    """Where on the device a block is that came back, by logical index. After the evictions."""

    copies: HostCopies | None = None
    """Between the device and host memory; of all groups."""

    reads: dict[int, dict[str, Mapping[int, int]]] = field(default_factory=dict)
    """Where this step computes the last tokens of a prompt: the evicted blocks that their attention
    reads in host memory, slots by logical index."""

    score_requests: dict[int, dict[str, ScoreRequest]] = field(default_factory=dict)
    """Which blocks to score after the forward pass, where the step ends at an eviction point."""

    keeps_queries: set[str] = field(default_factory=set)
    """Requests of which this step computes queries that an eviction will look at."""


BlockScores = dict[int, dict[str, list[float]]]
"""Per KV cache group and request, a score for each of its ``ScoreRequest.scored_indices``."""


def attach_policy(request: Any, policy: KVPolicy) -> None:
    """Give a vLLM ``Request`` a policy of its own; it lives as long as the request does."""
    request.kv_policy = policy


def policy_of(request: Any, default: KVPolicy) -> KVPolicy:
    """The policy of a vLLM ``Request``."""
    return getattr(request, "kv_policy", default)


def note_turn(request: Any) -> None:
    """Remember where the prompt of a vLLM ``Request`` ended, before a session's prompt grows."""
    turn = EarlierTurn(request.num_prompt_tokens, request.num_computed_tokens)
    request.kv_policy_turns = (*earlier_turns_of(request), turn)


def earlier_turns_of(request: Any) -> Sequence[EarlierTurn]:
    """The turns that a streaming-input session has had."""
    return getattr(request, "kv_policy_turns", ())


def extra_args_of(request: Any) -> Mapping[str, Any]:
    """The ``SamplingParams.extra_args`` of a vLLM ``Request``."""
    params = request.sampling_params
    return (params and params.extra_args) or {}


def attach_step(scheduler_output: Any, step: KVPolicyStep) -> None:
    """Send a step along with vLLM's ``SchedulerOutput``; plain attributes are pickled."""
    scheduler_output.kv_policy_step = step


def step_of(scheduler_output: Any) -> KVPolicyStep | None:
    """The step sent with a ``SchedulerOutput``, if there was anything to say."""
    return getattr(scheduler_output, "kv_policy_step", None)


def attach_scores(model_runner_output: Any, scores: BlockScores) -> None:
    """Send scores along with vLLM's ``ModelRunnerOutput``."""
    model_runner_output.kv_block_scores = scores


def attach_scoring_seconds(model_runner_output: Any, seconds: float) -> None:
    """Send along how long a worker's host was busy with the step's scores."""
    model_runner_output.kv_scoring_seconds = seconds


def scores_of(model_runner_output: Any) -> BlockScores:
    """The scores that came with a ``ModelRunnerOutput``."""
    return getattr(model_runner_output, "kv_block_scores", {})


def scoring_seconds_of(model_runner_output: Any) -> float:
    """The time that came with a ``ModelRunnerOutput``."""
    return getattr(model_runner_output, "kv_scoring_seconds", 0.0)
