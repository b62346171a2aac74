"""A scheduler and a worker's host side without a model: what a step costs beside its kernels."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu_worker import Worker

from vllm_semantic import register
from vllm_semantic.engine.backend import CompactingBuilder
from vllm_semantic.engine.held_blocks import HeldBlocks
from vllm_semantic.engine.query_windows import QueryWindows
from vllm_semantic.engine.scorer import BlockScorer
from vllm_semantic.engine.spec import semantic_spec
from vllm_semantic.engine.worker import KVPolicyWorkerMixin
from vllm_semantic.served import CONFIG_KEY, ServedPolicies
from vllm_semantic.upstream.hooks import SCHEDULERS


class Seconds(NamedTuple):
    """Means of a step, in CPU time of the thread."""

    scheduler: float
    worker: float


class Host:
    """One side of the comparison: an engine core's loop over real parts of it.

    Args:
        model: for its configuration.
        policy: as in ``additional_config``; ``None`` for vLLM without the plugin.
        max_num_seqs: requests at a time.
        max_model_len: tokens of each at most.
        kwargs: of ``EngineArgs``.
    """

    def __init__(
        self,
        model: str,
        policy: dict[str, Any] | None,
        max_num_seqs: int,
        max_model_len: int,
        **kwargs: Any,
    ) -> None:
        register()
        config = EngineArgs(
            model=model,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enable_prefix_caching=False,
            additional_config={} if policy is None else {CONFIG_KEY: policy},
            **kwargs,
        ).create_engine_config()
        block_size = config.cache_config.block_size
        spec: Any = FullAttentionSpec(
            block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16
        )
        specs = [spec]
        if policy is None:
            scheduler, worker = Scheduler, PlainWorker
        else:
            served = ServedPolicies.from_config(policy)
            spec = semantic_spec(spec, served, config)
            specs = [replace(spec, layer_group=group) for group in range(served.layer_groups)]
            scheduler, worker = resolve_obj_by_qualname(SCHEDULERS[False]), PolicyWorker
        num_blocks = len(specs) * max_num_seqs * -(-max_model_len // block_size) + 1
        self.scheduler = make_scheduler(scheduler, config, specs, num_blocks)
        self.worker = worker(config, specs)

    def start(self, prompts: list[list[int]]) -> None:
        """Read prompts until every request decodes."""
        params = SamplingParams(max_tokens=1 << 20, temperature=0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self.scheduler.add_request(Request(str(i), prompt, params, None))
        while len(self.scheduler.running) < len(prompts) or any(
            request.is_prefill_chunk for request in self.scheduler.running
        ):
            self.steps(1)

    def steps(self, count: int) -> Seconds:
        """Run some steps."""
        scheduling = working = 0.0
        for _ in range(count):
            began = time.thread_time()
            output = self.scheduler.schedule()
            scheduled = time.thread_time()
            self.worker.execute_model(output)
            result = self.worker.sample_tokens(None)
            answered = time.thread_time()
            self.scheduler.update_from_output(output, result)
            scheduling += scheduled - began + time.thread_time() - answered
            working += answered - scheduled
        return Seconds(scheduling / count, working / count)

    def evicted_blocks(self) -> int:
        """Blocks that the policy took so far."""
        managers: dict[int, Any] = getattr(self.scheduler, "kv_policy_managers", {})
        return sum(manager.stats.evicted_blocks for manager in managers.values())


def make_scheduler(cls: type[Scheduler], config: Any, specs: Sequence[Any], num_blocks: int) -> Any:
    """A scheduler of a KV cache group for each spec, that no model has been loaded for."""
    config.cache_config.num_gpu_blocks = num_blocks
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([f"layer {i}"], of) for i, of in enumerate(specs)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=specs[0].block_size,
    )


class PlainBuilder:
    """Ends where a backend would build the metadata of its kernels."""

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace()


class PolicyBuilder(CompactingBuilder, PlainBuilder):
    """The same, behind what every wrapped backend does before."""

    def __init__(self, spec: Any) -> None:
        self.kv_cache_spec = spec


class PlainWorker(Worker):
    """Keeps a batch's block tables as Runner V1 does, one a KV cache group, and answers at once."""

    def __init__(self, config: Any, specs: Sequence[Any]) -> None:
        self.vllm_config = config
        self.model_config, self.scheduler_config = config.model_config, config.scheduler_config
        self.builders: list[Any] = [PlainBuilder() for _ in specs]
        shape = (config.scheduler_config.max_num_seqs, config.model_config.max_model_len)
        num_columns = -(-shape[1] // specs[0].block_size)
        self.tables = [torch.zeros(shape[0], num_columns, dtype=torch.int32) for _ in specs]
        self.num_blocks = np.zeros(shape[0], dtype=np.int64)
        self.seq_lens = torch.zeros(shape[0], dtype=torch.int32)
        self.rows: dict[str, int] = {}
        self.prompt_lens: dict[str, int] = {}

    def execute_model(self, scheduler_output: Any) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        for new in scheduler_output.scheduled_new_reqs:
            self.rows[new.req_id] = len(self.rows)
            self.prompt_lens[new.req_id] = len(new.prompt_token_ids)
            self._append(new.req_id, new.block_ids, new.num_computed_tokens)
        for of in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            self._append(*of)
        scheduled = scheduler_output.num_scheduled_tokens
        self.batch = sorted(scheduled, key=self.rows.__getitem__)
        index = [self.rows[request_id] for request_id in self.batch]
        lengths = np.array([scheduled[request_id] for request_id in self.batch])
        self.seq_lens[index] += torch.from_numpy(lengths).int()
        starts = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        whole = len(index) == len(self.tables[0])
        seq_lens = self.seq_lens if whole else self.seq_lens[index]
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens,
            num_reqs=len(index),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.tables[0],
            slot_mapping=starts,
            seq_lens_cpu_upper_bound=seq_lens,
        )
        for builder, table in zip(self.builders, self.tables, strict=True):
            of_group = copy.copy(common)
            of_group.block_table_tensor = table if whole else table[index]
            builder.build(0, of_group)
        ends = dict(zip(self.batch, seq_lens.tolist(), strict=True))
        self.answer = ModelRunnerOutput(
            req_ids=self.batch,
            req_id_to_index={request_id: i for i, request_id in enumerate(self.batch)},
            sampled_token_ids=[
                [7] if ends[request_id] >= self.prompt_lens[request_id] else []
                for request_id in self.batch
            ],
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.answer

    def _append(self, request_id: str, block_ids: Any, num_computed_tokens: int) -> None:
        row = self.rows[request_id]
        self.seq_lens[row] = num_computed_tokens
        if block_ids:
            first = self.num_blocks[row]
            self.num_blocks[row] += len(block_ids[0])
            for table, of_group in zip(self.tables, block_ids, strict=True):
                ids = torch.tensor(of_group, dtype=torch.int32)
                table[row, first : first + len(ids)] = ids


class InstantScorer(BlockScorer):
    """Collects and sends scores; what they are is the device's work."""

    def _score_group(self, group: Any, asked: Any) -> torch.Tensor:
        return torch.zeros(sum(len(request.block_indices) for request in asked.values()))


class PolicyWorker(KVPolicyWorkerMixin, PlainWorker):
    """The plugin's worker over the plain one."""

    def __init__(self, config: Any, specs: Sequence[Any]) -> None:
        super().__init__(config, specs)
        spec, groups = specs[0], range(len(specs))
        self.served_policies = spec.served
        self.runner_access = self
        self._scores, self._in_step, self._reads_host = None, False, False
        self.model_runner = SimpleNamespace(device=torch.device("cpu"))
        self._windows = QueryWindows(spec.served.num_queries, self.scheduler_config.max_num_seqs)
        self._block_scorer = InstantScorer({group: [] for group in groups}, self._windows)
        max_num_reqs, max_num_blocks = len(self.num_blocks), spec.max_held_blocks(config)
        self._held = {
            group: HeldBlocks(max_num_reqs, max_num_blocks, spec.block_size, 1) for group in groups
        }
        self._builders = self.builders = [PolicyBuilder(of) for of in specs]
        for group_id, builder in zip(self._held, self._builders, strict=True):
            self._connect_builder(builder, group_id, max_num_blocks)

    def batch_order(self) -> list[str]:
        return self.batch

    def copy_stream(self) -> None:
        return None
