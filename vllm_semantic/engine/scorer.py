"""Block scores of one step: kept queries against the cache, one score of all layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, groupby
from typing import TypeVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d

from ..messages import BlockScores, ScoreRequest
from ..ops.cached_blocks import CachedBlocks, CachedLayers
from ..ops.platform import runs_triton, threads_for
from ..ops.scoring import Reduction
from ..policies import BlockView, KVPolicy
from ..policies.check import POLICY_ERRORS
from ..policies.trial import AttentionShape, checked_scores
from .cached_kv import CachedKV
from .host_blocks import HostBlocks
from .query_windows import QueryWindows

logger = init_logger(f"vllm.{__name__}")

_T = TypeVar("_T")

OverRanks = Callable[[torch.Tensor, Sequence[bool]], torch.Tensor]
"""Reduces the scores ``[num_layers, num_blocks]`` fp32 of a rank over all tensor-parallel ranks: to
their mean or, for blocks whose flag is set, to their maximum."""

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Keys, or values, of blocks by their ids: see ``CachedKV.gather_keys``."""

MAX_GATHERED = 1 << 25
"""Elements of keys that are gathered at once, 128 MiB in fp32; layers are split to stay below."""

MAX_LOGITS = 1 << 24
"""Numbers that kernels write for one head, query and block each, 64 MiB; split likewise."""


@dataclass(frozen=True)
class ScoredLayers:
    """Attention layers of one shape that are scored together."""

    cache: CachedKV
    queries: torch.Tensor  # [num_layers, num_rows, num_heads, head_size], see QueryWindows
    scale: float
    """What these layers multiply a dot product with."""
    query_scales: torch.Tensor | None = None
    """``[num_layers, num_kv_heads]`` fp32: what the kept queries of each head's group are to be
    multiplied with, where vLLM quantises queries too."""
    host: CachedKV | None = None
    """Their evicted blocks in host memory, if any can be recalled; see :class:`HostBlocks`."""

    @cached_property
    def in_place(self) -> CachedLayers | None:
        """What kernels read; ``None`` where keys are packed in tiles that none knows."""
        cache = self.cache
        if cache.keys is None and cache.pairs is None:
            return None
        logit_scales, value_scales = self.query_scales, None
        if cache.quantized is not None and cache.quantized.keys is not None:
            value_scales, of_keys = cache.quantized.values, cache.quantized.keys
            logit_scales = of_keys if logit_scales is None else of_keys * logit_scales
        return CachedLayers(
            self.queries,
            cache.keys,
            cache.kernel_blocks,
            self.scale,
            cache.values,
            logit_scales,
            value_scales,
            cache.key_scales,
            cache.value_scales,
            cache.pairs,
        )


def scratch_bytes(
    policy: KVPolicy,
    num_layers: int,
    num_blocks: int,
    shape: AttentionShape,
    device: torch.device,
    num_recallable: int = 0,
) -> int:
    """An upper bound of what scoring takes while it runs.

    Args:
        policy: that scores.
        num_layers: scored in one step.
        num_blocks: scored in one step, of all requests.
        shape: of these layers.
        device: of the KV cache.
        num_recallable: blocks of one request that may be in host memory.
    """
    if has_kernel(policy) and runs_triton(device) and not num_recallable:
        of_layer = num_blocks * shape.num_heads * policy.num_queries
        # Two of the kernels' numbers for each, and twice what they are compared with.
        return 4 * 4 * min(num_layers * of_layer, max(MAX_LOGITS, of_layer))
    # Keys and values as cached and in fp32, keys once more head by head, and three of the weights
    # that attention gives to each key.
    weights = shape.num_heads * policy.num_queries / (shape.num_kv_heads * shape.head_size)
    # At least one layer is gathered, whatever it takes; once more as it comes from host memory.
    of_layer = num_recallable * shape.num_kv_heads * shape.block_size * shape.head_size
    return int(4 * max(MAX_GATHERED, of_layer) * (5 + 3 * weights + bool(num_recallable)))


def has_kernel(policy: KVPolicy) -> bool:
    """Whether a policy has a kernel that scores blocks in place, in the cache."""
    return type(policy).score_cached is not KVPolicy.score_cached


class PendingScores:
    """The scores of one step while they are copied from the device to the host.

    Args:
        asked: by KV cache group and request.
        means: per group, ``[num_blocks]`` fp32 on the device, requests in their order.
        copy_stream: what to copy on; ``None`` copies when they are collected.
    """

    host_seconds = 0.0
    """Seconds of scoring on the host. On a GPU the kernels may still run then. Written by the
    worker."""

    def __init__(
        self,
        asked: Mapping[int, Mapping[str, ScoreRequest]],
        means: Mapping[int, torch.Tensor],
        copy_stream: torch.cuda.Stream | None,
    ) -> None:
        self._asked = asked
        self._on_device = means  # alive until it has been copied
        self._on_host = means
        self._copied: torch.cuda.Event | None = None
        if copy_stream is None:
            return
        ready = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(copy_stream):
            copy_stream.wait_event(ready)
            self._on_host = {
                group_id: mean.to("cpu", non_blocking=True) for group_id, mean in means.items()
            }
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def collect(self) -> BlockScores:
        """Wait for the copy, for nothing else on the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return {group_id: dict(self._split(group_id)) for group_id in self._asked}

    def _split(self, group_id: int) -> Iterator[tuple[str, list[float]]]:
        scores = iter(self._on_host[group_id].tolist())
        for request_id, request in self._asked[group_id].items():
            yield request_id, [next(scores) for _ in request.scored_indices]


class BlockScorer:
    """Answers score requests after a forward pass, without waiting for the device.

    Args:
        groups: the layers of each KV cache group under the policy.
        windows: which rows hold a request's newest queries.
        over_ranks: see :data:`OverRanks`; alone, a rank keeps its own.
        host: what evicted blocks can be read from, if any can be recalled.
    """

    def __init__(
        self,
        groups: Mapping[int, Sequence[ScoredLayers]],
        windows: QueryWindows,
        over_ranks: OverRanks = lambda scores, highest: scores,
        host: HostBlocks | None = None,
    ) -> None:
        self.groups = groups
        self.windows = windows
        self.over_ranks = over_ranks
        self.host = host
        self.failed: set[str] = set()
        """Requests whose scoring has failed, and was logged."""
        self._no_kernel: set[KVPolicy] = set()
        """Policies that have no kernel for these layers."""

    def __call__(
        self,
        asked: Mapping[int, Mapping[str, ScoreRequest]],
        copy_stream: torch.cuda.Stream | None = None,
    ) -> PendingScores:
        """Score what was asked for.

        Args:
            asked: by KV cache group and request.
            copy_stream: what the scores travel to the host on.

        Returns:
            One score per full block asked for, in order; NaN where the policy failed.
        """
        # Requests of one kind are scored together, and answered in that order.
        asked = {group_id: _by_kind(requests) for group_id, requests in asked.items()}
        means = {
            group_id: self._score_group(self.groups[group_id], requests)
            for group_id, requests in asked.items()
        }
        return PendingScores(asked, means, copy_stream)

    def forget(self, request_ids: set[str]) -> None:
        """Drop the state of requests that finished, were aborted or preempted."""
        self.failed -= request_ids

    def _score_group(
        self, group: Sequence[ScoredLayers], asked: Mapping[str, ScoreRequest]
    ) -> torch.Tensor:
        scores: list[torch.Tensor] = []
        highest_rank: list[bool] = []
        highest_layer: list[bool] = []
        kinds = groupby(asked.items(), key=lambda item: _kind(item[1]))
        for (policy, over_layers, _), items in kinds:
            requests = dict(items)
            num_blocks = sum(len(request.scored_indices) for request in requests.values())
            highest_rank += [policy.over_ranks == "max"] * num_blocks
            highest_layer += [over_layers == "max"] * num_blocks
            of_policy = self._attempt(
                partial(self._score_cached, policy, group, requests), group, requests
            )
            if of_policy is not None:
                scores.append(of_policy)
                continue
            for request_id, request in requests.items():
                of_request = partial(self._score_request, group, request_id, request)
                scores.append(self._attempt(of_request, group, {request_id: request}))
        of_layers = self.over_ranks(_joined(scores, 1), highest_rank)
        means = of_layers.mean(0)
        if not any(highest_layer):
            return means
        takes_highest = async_tensor_h2d(highest_layer, means.device, torch.bool)
        return torch.where(takes_highest, of_layers.amax(0), means)

    def _attempt(
        self,
        score: Callable[[], _T],
        group: Sequence[ScoredLayers],
        asked: Mapping[str, ScoreRequest],
    ) -> _T | torch.Tensor:
        """``score()`` or, where the code of a policy fails, NaN for every block.

        A rank that failed still takes part in what ranks make of their scores, or the others would
        wait for it; NaN makes that NaN, so that all ranks tell the manager the same.
        """
        try:
            return score()
        except POLICY_ERRORS:  # a policy is anybody's code
            if not self.failed.issuperset(asked):
                (policy,) = {request.policy for request in asked.values()}
                logger.exception(
                    "KV policy %s cannot score the blocks of request %s",
                    policy.name,
                    ", ".join(asked),
                )
            self.failed |= asked.keys()
            num_blocks = sum(len(request.scored_indices) for request in asked.values())
            shape = (sum(len(layers.queries) for layers in group), num_blocks)
            return torch.full(shape, float("nan"), device=group[0].queries.device)

    def _score_cached(
        self, policy: KVPolicy, group: Sequence[ScoredLayers], asked: Mapping[str, ScoreRequest]
    ) -> torch.Tensor | None:
        """All requests by the policy's kernel, if it has one: a row for each layer."""
        if not has_kernel(policy) or policy in self._no_kernel:
            return None
        if any(request.recallable for request in asked.values()):
            return None  # kernels read the cache alone
        if len({min(request.num_tokens, policy.num_queries) for request in asked.values()}) > 1:
            return None  # one has fewer queries than it is asked for
        block_size = group[0].cache.block_size
        ids: list[int] = []
        rows: list[int] = []  # of each block's request
        firsts: list[int] = []  # tokens
        windows: list[int] = []
        full: list[int] = []
        for i, (request_id, request) in enumerate(asked.items()):
            full += range(len(ids), len(ids) + len(request.block_indices))
            ids += request.block_ids
            rows += [i] * len(request.block_ids)
            firsts += [index * block_size for index in request.held_indices]
            windows += self._window(request_id, request)
        num_tokens = [request.num_tokens for request in asked.values()]
        device = group[0].queries.device
        block_ids, requests, first_positions, window_rows, ends = _on_device(
            (ids, rows, firsts, windows, num_tokens), device
        )

        def num_logits(layers: ScoredLayers) -> int:
            return len(block_ids) * layers.queries.shape[2] * policy.num_queries

        scores = []
        for layers in _some_at_once(group, num_logits, MAX_LOGITS):
            if layers.in_place is None:
                self._no_kernel.add(policy)
                return None
            cached = CachedBlocks(
                layers.in_place,
                window_rows.view(len(asked), -1),
                ends,
                block_ids,
                requests,
                first_positions,
            )
            of_layers = policy.score_cached(cached)
            if of_layers is None:
                self._no_kernel.add(policy)
                return None
            num_layers = len(layers.queries)
            scores.append(checked_scores(of_layers, num_layers, len(block_ids), device))
        of_all = _joined(scores, 0)
        if len(full) == len(ids):
            return of_all
        return of_all.index_select(1, async_tensor_h2d(full, device, torch.int64))

    def _score_request(
        self, group: Sequence[ScoredLayers], request_id: str, request: ScoreRequest
    ) -> torch.Tensor:
        """One request by its policy's score: a row for each layer."""
        device = group[0].queries.device
        block_indices, block_ids, rows = _on_device(
            (request.held_indices, request.block_ids, self._window(request_id, request)), device
        )
        slots = list(request.recallable.values())
        if slots:  # put in order, the block being filled last
            recallable = async_tensor_h2d(list(request.recallable), device, torch.int64)
            block_indices, order = torch.cat((block_indices, recallable)).sort()

        def num_gathered(layers: ScoredLayers) -> int:
            return len(block_indices) * layers.cache.block_numel

        scores = []
        for layers in _some_at_once(group, num_gathered, MAX_GATHERED):
            num_layers = len(layers.queries)
            with threads_for(num_gathered(layers) * num_layers):
                keys, values = layers.cache.gather_keys, layers.cache.gather_values
                if slots:
                    assert self.host is not None and layers.host is not None
                    host, places = self.host.on_device(layers.host, slots)
                    keys = partial(_both, keys, host.gather_keys, places, order)
                    values = partial(_both, values, host.gather_values, places, order)
                queries = layers.queries.index_select(1, rows).float()
                if layers.query_scales is not None:
                    group = queries.shape[2] // layers.query_scales.shape[1]
                    queries *= layers.query_scales.repeat_interleave(group, 1)[:, None, :, None]
                view = BlockView(
                    queries,
                    keys(block_ids),
                    partial(values, block_ids),
                    block_indices,
                    request.num_tokens,
                    layers.scale,
                )
                of_layers = request.policy.score(view)
            scores.append(checked_scores(of_layers, num_layers, view.num_full_blocks, device))
        return _joined(scores, 0)

    def _window(self, request_id: str, request: ScoreRequest) -> list[int]:
        """The rows of the queries that the request's policy looks at."""
        num_queries = request.policy.num_queries
        return self.windows.window(request_id, request.num_tokens, num_queries)


def _on_device(numbers: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """A tensor, int64, of each of some lists, in one copy."""
    together = async_tensor_h2d(
        np.array([*chain.from_iterable(numbers)], np.int64), device, torch.int64
    )
    return together.split([len(of) for of in numbers])


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """``torch.cat``, which would copy a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _some_at_once(
    group: Sequence[ScoredLayers], elements: Callable[[ScoredLayers], int], most: int
) -> Iterator[ScoredLayers]:
    """A group's layers, as many at once as need ``most`` elements together; at least one.

    Args:
        group: layers of one shape each.
        elements: what one of these layers needs.
        most: at once.
    """
    for layers in group:
        step = max(1, most // max(1, elements(layers)))
        if step >= len(layers.queries):
            yield layers  # with what is known of their cache
            continue
        for first in range(0, len(layers.queries), step):
            part = slice(first, first + step)
            cache, host = layers.cache, layers.host
            yield replace(
                layers,
                cache=cache.layers(part),
                queries=layers.queries[part],
                query_scales=None if layers.query_scales is None else layers.query_scales[part],
                host=host and host.layers(part),
            )


def _both(
    gather: Gather,
    gather_host: Gather,
    places: torch.Tensor,
    order: torch.Tensor,
    block_ids: torch.Tensor,
) -> torch.Tensor:
    """Blocks of the cache and of host memory, in the order of their sequence."""
    return torch.cat((gather(block_ids), gather_host(places)), dim=1).index_select(1, order)


def _kind(request: ScoreRequest) -> tuple[KVPolicy, Reduction, bool]:
    """What requests that are scored together have in common."""
    return request.policy, request.over_layers, bool(request.recallable)


def _by_kind(asked: Mapping[str, ScoreRequest]) -> dict[str, ScoreRequest]:
    """The same requests, those of one kind behind each other; on every rank alike."""
    order = {kind: i for i, kind in enumerate(dict.fromkeys(map(_kind, asked.values())))}
    return dict(sorted(asked.items(), key=lambda item: order[_kind(item[1])]))
