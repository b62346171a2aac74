"""vLLM's workers with a policy: evictions reach the block table, scores leave."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.utils.gpu_sync_debug import with_gpu_sync_check
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from ..messages import (
    KVPolicyStep,
    ScoreRequest,
    attach_scores,
    attach_scoring_seconds,
    step_of,
)
from ..ops.queries import keeper
from ..policies.trial import num_judged_blocks
from ..served import CONFIG_KEY, ServedPolicies
from ..upstream.backends import wrapped_attention_backends
from ..upstream.runners import access
from .backend import CapturingImpl, CompactingBuilder, StepBuffers
from .cached_kv import CachedKV, Packing, head_scales, quantized, stack_layers
from .held_blocks import HeldBlocks, HeldRows
from .host_blocks import HostBlocks
from .host_reads import Staging
from .layers import check_layers
from .pool import explain_shortage
from .query_windows import QueryWindows, num_drafts_in_flight
from .reserved_memory import reserved_memory
from .scorer import BlockScorer, PendingScores, ScoredLayers
from .spec import SemanticSpec, semantic_specs

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.worker.utils import AttentionGroup

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, or INFO is lost


def _attach(output: ModelRunnerOutput, scores: PendingScores) -> None:
    attach_scores(output, scores.collect())
    attach_scoring_seconds(output, scores.host_seconds)


class ScoredAsyncOutput(AsyncModelRunnerOutput):
    """An asynchronous output that brings its step's scores when it is collected."""

    def __init__(self, output: AsyncModelRunnerOutput, scores: PendingScores) -> None:
        self._output = output
        self._scores = scores

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the step's tokens and scores; the output with the scores attached."""
        output = self._output.get_output()
        _attach(output, self._scores)
        return output


class KVPolicyWorkerMixin(Worker):
    """A worker under a policy: a mixin to put before that of any platform."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model with wrapped attention backends; vLLM chooses which.

        Raises:
            ValueError: its layers do what a policy cannot serve.
        """
        self.served_policies = ServedPolicies.from_config(
            self.vllm_config.additional_config[CONFIG_KEY]
        )
        self.runner_access = access(self.model_runner)
        with wrapped_attention_backends():
            super().load_model(**kwargs)
        check_layers(self.vllm_config, self.served_policies.default.name)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Put the full-attention layers under the policy.

        Raises:
            ValueError: they cannot be split into the groups that were asked for.
        """
        specs = super().get_kv_cache_spec()
        return semantic_specs(specs, self.served_policies, self.vllm_config)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, less what a policy needs beside it.

        Where they are too few, the log says which flags help.
        """
        available_bytes: int = super().determine_available_memory()
        specs = self.get_kv_cache_spec()
        available_bytes -= self._reserve(specs, available_bytes)
        if shortage := explain_shortage(self.vllm_config, specs, available_bytes):
            logger.error("%s", shortage)
        return available_bytes

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Connect the attention layers to the scorer once their cache exists.

        Raises:
            RuntimeError: a layer under the policy runs a backend that was not wrapped.
        """
        super().initialize_from_config(kv_cache_config)
        self._held: dict[int, HeldBlocks] = {}
        self._builders: list[CompactingBuilder] = []
        self._scored_layers: dict[int, list[Attention]] = {}
        self._draft_caches: dict[int, list[CachedKV]] = {}
        self._scores: PendingScores | None = None
        self._reads_host = False
        self._end_step()
        self._windows = QueryWindows(
            self.served_policies.num_queries,
            self.scheduler_config.max_num_seqs,
            num_drafts_in_flight(self.vllm_config),
        )
        scored = {
            group_id: self._connect(group_id, attn_groups)
            for group_id, attn_groups in enumerate(self.model_runner.attn_groups)
        }
        self._host = self._host_blocks(scored)
        self._block_scorer = BlockScorer(scored, self._windows, self._over_ranks, self._host)
        backends = {
            attn_group.backend.__name__
            for group_id in self._held
            for attn_group in self.model_runner.attn_groups[group_id]
        }
        logger.info_once(
            "KV policy %s: model runner %s, attention backend %s",
            self.served_policies.default.name,
            self.runner_access.name,
            ", ".join(sorted(backends)),
        )

    def compile_or_warm_up_model(self) -> Any:
        """Compile the policy's kernels too, before a request needs them."""
        for group_id, held in self._held.items():
            for policy in self.served_policies.rules:
                blocks = list(range(num_judged_blocks(policy, held.block_size)))
                num_tokens = len(blocks) * held.block_size
                request = ScoreRequest(policy, num_tokens, blocks, [0] * len(blocks))
                self._block_scorer({group_id: {"": request}}).collect()
                # Once it serves, a failure is one request's; here it is everybody's.
                if self._block_scorer.failed:
                    raise RuntimeError(
                        f"--kv-policy {policy.name} cannot score; its error is above"
                    )
                self._windows.forget([""])
        return super().compile_or_warm_up_model()

    @with_gpu_sync_check  # VLLM_GPU_SYNC_CHECK holds us to what vLLM holds itself to
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Note what was evicted, run, and score what was asked."""
        step = step_of(scheduler_output) or KVPolicyStep()
        self._forget(scheduler_output)
        if step.copies:
            assert self._host is not None
            self._host.copy(step.copies)
        self._apply_evictions(step)
        self._begin_step(step)
        self._reads_host = bool(step.reads)
        try:
            with self._graphs():
                output = super().execute_model(scheduler_output)
        finally:
            self._end_step()
        if step.score_requests:
            # Without waiting for the device: there, what is measured is the launching.
            started = time.perf_counter()
            self._scores = self._block_scorer(step.score_requests, self.runner_access.copy_stream())
            self._scores.host_seconds = time.perf_counter() - started
        return output

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample; send the step's scores along with the tokens.

        A model that drafts does so here, and sees the blocks that the step's requests hold.
        """
        self._in_step = True
        try:
            with self._graphs():
                output = super().sample_tokens(grammar_output)
        finally:
            self._end_step()
        scores, self._scores = self._scores, None
        if scores is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return ScoredAsyncOutput(output, scores)
        _attach(output, scores)
        return output

    def _reserve(self, specs: dict[str, KVCacheSpec], available_bytes: int) -> int:
        """Bytes to take from what vLLM would give to the KV cache."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        for name in self.runner_access.draft_layers():
            layers.pop(name, None)
        reserved = reserved_memory(
            self.vllm_config, specs, layers, available_bytes, self.model_runner.device
        )
        name = self.served_policies.default.name
        if self.cache_config.kv_cache_memory_bytes is not None:
            logger.info("KV policy %s: %s beside --kv-cache-memory-bytes", name, reserved)
            return 0
        logger.info("KV policy %s: %s taken from the KV cache", name, reserved)
        if hasattr(self, "peak_activation_memory"):  # what a GPU worker advises, and plans with
            self.peak_activation_memory += reserved.total
            self.available_kv_cache_memory_bytes -= reserved.total
        return reserved.total

    def _graphs(self) -> AbstractContextManager[None]:
        """No CUDA graph captured what a step does that reads host memory."""
        return self.runner_access.without_graphs() if self._reads_host else nullcontext()

    # -- one step ----------------------------------------------------------------------

    def _forget(self, scheduler_output: SchedulerOutput) -> None:
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        self._windows.forget(gone)
        self._block_scorer.forget(gone)
        for held in self._held.values():
            held.forget(gone)

    def _apply_evictions(self, step: KVPolicyStep) -> None:
        for group_id, evictions in step.evictions.items():
            for request_id, blocks in evictions.items():
                self._held[group_id].evict(request_id, blocks)
        for group_id, recalls in step.recalls.items():
            for request_id, places in recalls.items():
                self._held[group_id].recall(request_id, places)

    def _begin_step(self, step: KVPolicyStep) -> None:
        self._in_step, self._keeps_queries, self._reads = True, step.keeps_queries, step.reads

    def _end_step(self) -> None:
        """Until the next step, batches are dummies: no request of theirs has lost blocks."""
        self._in_step, self._keeps_queries, self._reads = False, set(), {}

    def _query_rows(self, common: CommonAttentionMetadata) -> np.ndarray | None:
        """Where the queries of a batch go, see :data:`~.backend.QueryRows`."""
        if not self._keeps_queries:
            return None
        assert common.seq_lens_cpu_upper_bound is not None
        return self._windows.place(
            self._keeps_queries,
            self.runner_access.batch_order(),
            common.query_start_loc_cpu.numpy(),
            common.seq_lens_cpu_upper_bound.numpy(),
        )

    def _held_rows(
        self, held: HeldBlocks, num_ahead: int, common: CommonAttentionMetadata
    ) -> HeldRows | None:
        """What each row of the batch holds, see :data:`~.backend.HeldRowsOf`.

        Args:
            held: of the KV cache group.
            num_ahead: tokens that a model drafts behind those that the host knows of.
            common: of the batch.
        """
        if not self._in_step or not held:
            return None
        assert common.seq_lens_cpu_upper_bound is not None
        seq_lens = common.seq_lens_cpu_upper_bound.numpy() + np.int32(num_ahead)
        return held.rows(self.runner_access.batch_order(), seq_lens)

    def _host_reads(
        self, group_id: int, common: CommonAttentionMetadata
    ) -> dict[int, Mapping[int, int]]:
        """Which rows of the batch see host memory, see :data:`~.backend.ReadsOf`."""
        if group_id not in self._reads:
            return {}
        reads = self._reads[group_id]
        order = enumerate(self.runner_access.batch_order())
        return {row: reads[request_id] for row, request_id in order if request_id in reads}

    def _over_ranks(self, scores: torch.Tensor, highest: Sequence[bool]) -> torch.Tensor:
        """Every rank holds some of the KV heads, an equal number each: see ``OverRanks``."""
        group = get_tp_group()
        if group.world_size == 1:
            return scores
        # A reduction may be in place, and what a policy returned may be a part of something else.
        copied = partial(scores.clone, memory_format=torch.contiguous_format)
        means = group.all_reduce(copied()) / group.world_size
        if not any(highest):
            return means
        of_rank = copied()
        dist.all_reduce(of_rank, dist.ReduceOp.MAX, group.device_group)
        takes_highest = async_tensor_h2d(highest, scores.device, torch.bool)
        # NaN, by which a rank says that its policy failed, is a number to a maximum.
        return torch.where(takes_highest & ~means.isnan(), of_rank, means)

    # -- once, at start ----------------------------------------------------------------

    def _connect(self, group_id: int, attn_groups: list[AttentionGroup]) -> list[ScoredLayers]:
        """Hook up the metadata builders and layers of a KV cache group, if under the policy.

        The layers of a model that drafts share the block table, and are not scored.

        Raises:
            ValueError: a model that drafts has a group of its own.
        """
        scored = []
        drafts_ahead = bool(
            self.scheduler_config.async_scheduling and self.vllm_config.num_speculative_tokens
        )
        draft_groups = self.runner_access.draft_groups()
        drafters = [of for of in draft_groups if of.kv_cache_group_id == group_id]
        drafting = self.runner_access.draft_layers()
        if drafters:
            names = {name for attn_group in attn_groups for name in attn_group.layer_names}
            # vLLM drafts by the first group's block table, but for EAGLE.
            by_first = self.vllm_config.speculative_config.uses_draft_model()
            if names <= drafting or (by_first and group_id):
                raise ValueError(
                    "--kv-policy needs a draft model of --speculative-config whose layers share "
                    "the first KV cache group with full-attention layers of the model"
                )
        for attn_group in (*attn_groups, *drafters):
            spec = attn_group.kv_cache_spec
            if not isinstance(spec, SemanticSpec):
                continue
            layers = get_layers_from_vllm_config(
                self.vllm_config, Attention, attn_group.layer_names
            )
            kernel_blocks = spec.block_size // next(iter(layers.values())).kv_cache.shape[2]
            max_num_blocks = spec.max_held_blocks(self.vllm_config) * kernel_blocks
            max_num_reqs = self.scheduler_config.max_num_seqs
            if group_id not in self._held:
                self._held[group_id] = HeldBlocks(
                    max_num_reqs, max_num_blocks, spec.block_size, kernel_blocks
                )
            num_ahead = self.vllm_config.num_lookahead_tokens if attn_group in drafters else 0
            for builder in attn_group.metadata_builders:
                if not isinstance(builder, CompactingBuilder):
                    raise RuntimeError(f"--kv-policy: {type(builder).__name__} is not wrapped")
                if self.served_policies.bounded:
                    self._connect_builder(builder, group_id, max_num_blocks, num_ahead)
                    builder.drafts_ahead = drafts_ahead
                    self._builders.append(builder)
            if attn_group in drafters:
                kv_caches = stack_layers([layer.kv_cache for layer in layers.values()])
                self._draft_caches.setdefault(group_id, []).extend(
                    CachedKV(kv_cache, spec.head_size, kernel_blocks) for kv_cache in kv_caches
                )
            if self.served_policies.rules:
                for _, alike in groupby(
                    [layer for name, layer in layers.items() if name not in drafting],
                    key=lambda layer: (layer.num_heads, layer.impl.scale, layer.kv_cache_dtype),
                ):
                    scored += self._connect_layers(of_shape := list(alike), kernel_blocks)
                    self._scored_layers.setdefault(group_id, []).extend(of_shape)
        return scored

    def _connect_builder(
        self, builder: CompactingBuilder, group_id: int, max_num_blocks: int, num_ahead: int = 0
    ) -> None:
        """Tell a metadata builder of a KV cache group where to look in each step."""
        held = self._held[group_id]
        builder.buffers = self._step_buffers(max_num_blocks)
        builder.held_rows = partial(self._held_rows, held, num_ahead)
        builder.query_rows = self._query_rows
        builder.reads = partial(self._host_reads, group_id)
        builder.kernel_blocks = held.kernel_blocks

    def _host_blocks(self, scored: dict[int, list[ScoredLayers]]) -> HostBlocks | None:
        """Host memory for evicted blocks, where some was asked for; the layers get their part."""
        groups = {group_id: layers for group_id, layers in scored.items() if layers}
        attn_groups = self.model_runner.attn_groups
        specs = [of.kv_cache_spec for group_id in groups for of in attn_groups[group_id]]
        num_slots = next((s.host_slots for s in specs if isinstance(s, SemanticSpec)), 0)
        if not num_slots:
            return None
        drafting = self._draft_caches
        host = HostBlocks(
            {
                group_id: [*(of.cache for of in layers), *drafting.get(group_id, [])]
                for group_id, layers in groups.items()
            },
            num_slots,
            self.model_runner.device,
        )
        stagings: dict[torch.Size, Staging] = {}
        for group_id, layers in groups.items():
            caches = host.caches(group_id)[: len(layers)]
            scored[group_id] = [
                replace(of, host=cache) for of, cache in zip(layers, caches, strict=True)
            ]
            host_kvs = (host_kv for cache in caches for host_kv in cache.kv_cache)
            for layer, host_kv in zip(self._scored_layers[group_id], host_kvs, strict=True):
                block = layer.kv_cache.shape[1:]
                if block not in stagings:
                    num_blocks = cdiv(self.model_config.max_model_len, block[1])
                    stagings[block] = Staging(host, layer.kv_cache, num_blocks)
                assert isinstance(layer.impl, CapturingImpl)
                layer.impl.host_kv, layer.impl.staging = host_kv, stagings[block]
        return host

    def _step_buffers(self, max_num_blocks: int) -> StepBuffers:
        return StepBuffers(
            self.scheduler_config.max_num_seqs,
            max_num_blocks,
            windows=self._windows if self.served_policies.rules else None,
            device=self.model_runner.device,
        )

    def _connect_layers(self, layers: list[Attention], kernel_blocks: int) -> list[ScoredLayers]:
        """Give layers of one shape the buffers that their queries go to."""
        first = layers[0]
        packing = self._packing(first)
        scored: list[ScoredLayers] = []
        for kv_cache in stack_layers([layer.kv_cache for layer in layers]):
            first_layer = sum(len(stacked.queries) for stacked in scored)
            of_stack = layers[first_layer : first_layer + len(kv_cache)]
            queries = self._windows.buffer(
                len(kv_cache),
                first.num_heads,
                first.head_size,
                self.model_config.dtype,
                kv_cache.device,
            )
            fp8 = quantized(of_stack)
            cache = CachedKV(kv_cache, first.head_size, kernel_blocks, packing, fp8)
            query_scales = None
            if any(layer.query_quant is not None for layer in of_stack):
                query_scales = head_scales(of_stack, "_q_scale")
            scored.append(ScoredLayers(cache, queries, first.impl.scale, query_scales))
        buffers = [buffer for stacked in scored for buffer in stacked.queries]
        for layer, buffer in zip(layers, buffers, strict=True):
            if not isinstance(layer.impl, CapturingImpl):
                raise RuntimeError(f"--kv-policy: {type(layer.impl).__name__} is not wrapped")
            layer.impl.keep_queries = keeper(buffer)
        return scored

    def _packing(self, layer: Attention) -> Packing | None:
        """Where the kernels keep a head's keys and values, see :class:`CachedKV`."""
        return None


class SemanticWorker(KVPolicyWorkerMixin, Worker):
    """vLLM's GPU worker with a policy."""
