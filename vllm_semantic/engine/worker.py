"""vLLM's workers with a policy: evictions reach the block table, scores leave."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ..config import CONFIG_KEY, policy_from_config
from ..hooks import wrapped_attention_backends
from ..messages import BlockScores, KVPolicyStep, attach_scores, step_of
from .backend import CapturingImpl, CompactingBuilder
from .capture import QueryCapture
from .key_cache import KeyCache, stack_layers
from .scorer import BlockScorer, ScoredLayers
from .spec import SemanticSpec, semantic_spec

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.worker.utils import AttentionGroup


class ScoredAsyncOutput(AsyncModelRunnerOutput):
    """An asynchronous output that brings its step's scores when it is collected."""

    def __init__(self, output: AsyncModelRunnerOutput, scores: BlockScores) -> None:
        self._output = output
        self._scores = scores

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        attach_scores(output, self._scores)
        return output


class KVPolicyWorkerMixin(Worker):
    """What the workers of every platform need; put before one of them."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model with wrapped attention backends; vLLM chooses which."""
        self.kv_policy = policy_from_config(self.vllm_config.additional_config[CONFIG_KEY])
        if not isinstance(self.model_runner, GPUModelRunner):
            raise ValueError(
                f"--kv-policy does not support {type(self.model_runner).__module__} yet; "
                "set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        with wrapped_attention_backends():
            super().load_model(**kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Put the full-attention layers under the policy."""
        specs = super().get_kv_cache_spec()
        return {
            name: semantic_spec(spec, self.kv_policy, self.vllm_config)
            for name, spec in specs.items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Connect the attention layers to the scorer once their cache exists.

        Raises:
            RuntimeError: a layer under the policy runs a backend that was not wrapped.
        """
        super().initialize_from_config(kv_cache_config)
        self._captures: list[QueryCapture] = []
        self._builders: list[CompactingBuilder] = []
        self._kernel_blocks: dict[int, int] = {}
        self._evicted_requests: set[str] = set()
        self._block_scores: BlockScores | None = None
        self._block_scorer = BlockScorer(
            self.kv_policy,
            {
                group_id: self._connect(group_id, attn_groups)
                for group_id, attn_groups in enumerate(self.model_runner.attn_groups)
            },
        )

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Empty the evicted entries of the block tables, run, and score what was asked."""
        step = step_of(scheduler_output) or KVPolicyStep()
        self._apply_evictions(step)
        self._evicted_requests -= scheduler_output.finished_req_ids
        self._switch(bool(self._evicted_requests), bool(step.score_requests))
        output = super().execute_model(scheduler_output)
        self._switch(False, False)  # a dummy batch has neither holes nor requests to score
        if step.score_requests:
            rows = self.model_runner.input_batch.req_id_to_index
            self._block_scores = self._block_scorer(step.score_requests, rows)
        return output

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample; send the step's scores along with the tokens."""
        output = super().sample_tokens(grammar_output)
        scores, self._block_scores = self._block_scores, None
        if scores is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return ScoredAsyncOutput(output, scores)
        attach_scores(output, scores)
        return output

    def _switch(self, has_holes: bool, scores: bool) -> None:
        for builder in self._builders:
            builder.has_holes = has_holes
        for capture in self._captures:
            capture.active = scores

    def _apply_evictions(self, step: KVPolicyStep) -> None:
        """Write the null block into both of the runner's copies of a request's table.

        Rows of running requests only ever grow, so an entry stays null once written.
        """
        runner = self.model_runner
        for group_id, evictions in step.evictions.items():
            table = runner.input_batch.block_table[group_id]
            kernel_blocks = self._kernel_blocks[group_id]
            self._evicted_requests |= evictions.keys()
            for request_id, block_indices in evictions.items():
                block_ids = runner.requests[request_id].block_ids[group_id]
                for index in block_indices:
                    block_ids[index] = 0
                row = runner.input_batch.req_id_to_index.get(request_id)
                if row is None:
                    continue
                for index in block_indices:
                    start = index * kernel_blocks
                    # An expanded null block is the kernel blocks 0, 1, ...
                    table.block_table.np[row, start : start + kernel_blocks] = range(kernel_blocks)

    def _connect(self, group_id: int, attn_groups: list[AttentionGroup]) -> list[ScoredLayers]:
        """Hook up the metadata builders and layers of a KV cache group, if under the policy."""
        scored = []
        for attn_group in attn_groups:
            spec = attn_group.kv_cache_spec
            if not isinstance(spec, SemanticSpec):
                continue
            layers = get_layers_from_vllm_config(
                self.vllm_config, Attention, attn_group.layer_names
            ).values()
            kernel_blocks = spec.block_size // next(iter(layers)).kv_cache.shape[2]
            self._kernel_blocks[group_id] = kernel_blocks
            for builder in attn_group.metadata_builders:
                if not isinstance(builder, CompactingBuilder):
                    raise RuntimeError(f"--kv-policy: {type(builder).__name__} is not wrapped")
                builder.num_null_ids = kernel_blocks
                self._builders.append(builder)
            if self.kv_policy.scores_blocks:
                for _, alike in groupby(layers, key=lambda layer: layer.num_heads):
                    scored += self._connect_layers(list(alike), kernel_blocks)
        return scored

    def _connect_layers(self, layers: list[Attention], kernel_blocks: int) -> list[ScoredLayers]:
        """Give layers of one shape the buffers that their queries go to."""
        first = layers[0]
        places = self._key_places(first)
        scored = []
        for kv_cache in stack_layers([layer.kv_cache for layer in layers]):
            queries = torch.empty(
                len(kv_cache),
                self.scheduler_config.max_num_seqs,
                first.num_heads,
                first.head_size,
                dtype=self.model_config.dtype,
                device=kv_cache.device,
            )
            key_cache = KeyCache(kv_cache, first.head_size, kernel_blocks, places)
            scored.append(ScoredLayers(key_cache, queries))
        captures = [capture for stacked in scored for capture in stacked.captures]
        for layer, capture in zip(layers, captures, strict=True):
            if not isinstance(layer.impl, CapturingImpl):
                raise RuntimeError(f"--kv-policy: {type(layer.impl).__name__} is not wrapped")
            layer.impl.query_capture = capture
        self._captures += captures
        return scored

    def _key_places(self, layer: Attention) -> torch.Tensor | None:
        """Where the kernels keep a head's keys, see :class:`KeyCache`."""
        return None


class SemanticWorker(KVPolicyWorkerMixin, Worker):
    """vLLM's GPU worker with a policy."""
