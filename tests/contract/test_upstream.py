"""Every upstream signature and behaviour that a hook relies on: an upgrade fails here first."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from typing import Any

import pytest
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsKVCacheMethod,
)
from vllm.renderers.base import BaseRenderer
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import BeamSearchParams
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    get_manager_for_kv_cache_spec,
)
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, create_kv_cache_views
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.metrics.loggers import (
    AggregateStatLoggerBase,
    PrometheusStatLogger,
    StatLoggerManager,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import AttentionGroup

from vllm_semantic.config import WRAPPED_BACKENDS
from vllm_semantic.engine.manager import SemanticManager
from vllm_semantic.engine.metrics import KVPolicyStatLogger
from vllm_semantic.engine.refusal import KVPolicyError
from vllm_semantic.engine.scheduler import AsyncSemanticScheduler, SemanticScheduler
from vllm_semantic.engine.spec import SemanticSpec
from vllm_semantic.engine.worker import SemanticWorker
from vllm_semantic.upstream.backends import backend_member, check_backend, xformers_member
from vllm_semantic.upstream.hooks import SCHEDULERS, WORKERS
from vllm_semantic.upstream.signatures import overrides, parameters, signatures

from ..platforms import on_gpu

# -- EngineArgs ------------------------------------------------------------------------


def test_engine_args_are_what_the_hooks_wrap() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    assert fields["block_size"] is None
    assert "additional_config" in fields


def test_requests_are_checked_where_prompt_and_parameters_meet() -> None:
    source = inspect.getsource(inspect.unwrap(InputProcessor.process_inputs))
    assert "sampling_params = params.clone()" in source, "extra_args are replaced on a copy"
    assert source.rindex("sampling_params.max_tokens") < source.index("return EngineCoreRequest(")
    assert {"sampling_params", "prompt_token_ids", "prompt_embeds"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert "parser" in parameters(OnlineRenderer.preprocess_chat)
    assert "self.config = config" in inspect.getsource(BaseRenderer.__init__)


def test_errors_of_the_engines_client_keep_their_status() -> None:
    """Why there is an error of our own: any other becomes a 500."""
    source = inspect.getsource(inspect.unwrap(AsyncLLM.generate))
    assert re.search(r"except \(VLLMClientError, GracefulHTTPError(, GenerationError)?\)", source)
    assert issubclass(KVPolicyError, VLLMClientError)
    assert create_error_response(KVPolicyError("a")).error.code == 400


def test_generators_are_asked_for_before_an_answer_begins() -> None:
    for serve in (
        OpenAIServingChat._create_chat_completion,
        OpenAIServingCompletion._create_completion,
        OpenAIServingResponses._create_responses,
        ServingTokens.serve_tokens,
    ):
        source = inspect.getsource(serve)
        asks = re.search(r"(engine_client.generate|_generate_with_builtin_tools)\(", source)
        assert asks, serve
        assert asks.start() < source.index("stream_generator(")


def test_a_beam_search_asks_the_engine_of_its_owner() -> None:
    assert "self.engine_client.generate(" in inspect.getsource(
        inspect.unwrap(BeamSearchOnlineMixin.beam_search)
    )
    assert "self.llm_engine.add_request(" in inspect.getsource(OfflineInferenceMixin)
    params = BeamSearchParams(beam_width=1, max_tokens=1)
    params.extra_args = {}  # type: ignore[attr-defined]


def test_a_session_keeps_what_was_computed() -> None:
    """Which is nothing, if it was preempted; since 0.33 all that it knows but the last token."""
    source = inspect.getsource(Scheduler._update_request_as_session)
    settle = inspect.getsource(Scheduler.update_from_output)
    handled = settle.index("finished = self._handle_stopped_request(request)")
    assert "self.waiting.remove_requests(stopped_preempted_reqs)" in settle[handled:]
    if "keep_end = session.num_tokens - 1" in source:
        assert "for request in continuing_reqs:" in settle[handled:], "enqueued by vLLM itself"
    else:
        assert "del session._all_token_ids[num_computed_tokens:]" in source


def test_a_waiting_request_can_end_with_an_error() -> None:
    source = inspect.getsource(Scheduler.update_from_output)
    # Ids; since 0.33 an error of vllm.outputs for each.
    (ends,) = re.finditer(r"set\(self.grammar_compile_error_reqs\)|errors = self.grammar", source)
    assert "RequestStatus.FINISHED_ERROR" in source[ends.start() :]


def test_plugins_are_loaded_before_the_parser_is_built() -> None:
    source = inspect.getsource(AsyncEngineArgs.add_cli_args)
    assert source.index("load_general_plugins()") < source.index("EngineArgs.add_cli_args(parser)")
    assert "load_general_plugins()" in inspect.getsource(EngineArgs.__post_init__)


def test_classes_named_in_strings_exist() -> None:
    # Importing vLLM's CPU worker takes torch's CUDA calls away from the process.
    workers = [pair for pair in WORKERS.items() if "cpu" not in pair[0] or not on_gpu()]
    for path in (*SCHEDULERS.values(), *itertools.chain(*workers)):
        assert inspect.isclass(resolve_obj_by_qualname(path))


# -- scheduler -------------------------------------------------------------------------


def test_schedule_asks_for_the_size_of_every_chunk() -> None:
    source = inspect.getsource(Scheduler.schedule)
    assert source.count("self._reserve_prefill_lookahead(") == 2, "running and waiting requests"
    assert source.count("self._get_local_prefix_cache_hit(") == 1
    assert source.rindex("self._update_after_schedule(") < source.rindex("return scheduler_output")
    advance = inspect.getsource(Scheduler._update_after_schedule)
    assert "request.num_computed_tokens += num_scheduled_token" in advance


def test_a_lookup_says_what_it_found_and_where_it_ended() -> None:
    lookup = inspect.getsource(KVCacheManager.get_computed_blocks)
    assert "num_new_computed_tokens + num_uncached if num_uncached else 0" in lookup


def test_lookahead_reserves_for_drafts_only() -> None:
    """Why a decode step may skip vLLM's own answer."""
    source = inspect.getsource(Scheduler._reserve_prefill_lookahead)
    assert "0 < remaining < self.num_prefill_lookahead" in source


def test_offloading_can_be_told_what_is_exact() -> None:
    """The names that ``engine/offloading.py`` reads and writes, and what vLLM does with them."""
    assert "self._max_loadable_tokens(request, num_computed_tokens)" in inspect.getsource(
        OffloadingConnector.get_num_new_matched_tokens
    )
    asked = inspect.getsource(Scheduler.schedule)
    assert asked.index("self._build_kv_connector_meta(") < asked.index("return scheduler_output")
    named = inspect.getsource(OffloadingConnectorScheduler.__init__)
    for name in ("config", "_req_status", "_current_batch_jobs_to_flush"):
        assert f"self.{name}" in named
    of_request = {field.name for field in dataclasses.fields(RequestOffloadState)}
    assert {"group_states", "max_offload_tokens", "transfer_jobs"} <= of_request
    offered = inspect.getsource(OffloadingConnectorScheduler._build_store_jobs)
    assert offered.count("if block_id == 0:") == 2, "what is gone is not stored"
    flushed = inspect.getsource(OffloadingConnectorScheduler)
    assert "jobs_to_flush=self._current_batch_jobs_to_flush" in flushed


def test_the_example_connector_stores_what_it_is_shown() -> None:
    """The names that ``engine/whole_prompts.py`` reads."""
    build = inspect.getsource(ExampleConnector.build_connector_meta)
    assert "for new_req in scheduler_output.scheduled_new_reqs:" in build
    assert "if new_req.req_id in self._requests_need_load:" in build
    assert [*inspect.signature(ExampleConnector.get_num_new_matched_tokens).parameters] == [
        "self",
        "request",
        "num_computed_tokens",
    ]


def test_request_has_what_is_read() -> None:
    source = inspect.getsource(Request.__init__)
    for name in (
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_in_flight_tokens",
        "num_stale_output_tokens",
    ):
        assert f"self.{name}" in source


def test_a_request_is_added_once() -> None:
    """What is attached to it then stays, also through a preemption."""
    assert "self.requests[request.request_id] = request" in inspect.getsource(Scheduler.add_request)
    assert not hasattr(Request, "__slots__")


def test_stale_outputs_are_marked_at_preemption() -> None:
    source = inspect.getsource(Scheduler._preempt_request)
    assert "request.num_stale_output_tokens = request.num_in_flight_tokens" in source
    assert "self._free_request_blocks(request)" in source


# -- block manager ---------------------------------------------------------------------


def test_allocate_slots_evicts_on_the_processed_count() -> None:
    source = inspect.getsource(KVCacheManager.allocate_slots)
    evict = source.index("self.coordinator.remove_skipped_blocks(")
    assert "total_computed_tokens - request.num_in_flight_tokens" in source[evict:]
    assert "num_prompt_tokens=request.num_prompt_tokens" in source[evict:]
    for changes in ("allocate_new_computed_blocks(", "allocate_new_blocks("):
        assert evict < source.index(f"self.coordinator.{changes}"), "which NoRoomError keeps from"


def test_freeing_goes_through_pop_blocks_for_free() -> None:
    assert "self.pop_blocks_for_free(" in inspect.getsource(SingleTypeKVCacheManager.free)


def test_manager_takes_an_admission_cap() -> None:
    assert "max_admission_blocks_per_request" in parameters(SingleTypeKVCacheManager.__init__)
    source = inspect.getsource(SingleTypeKVCacheManager.get_num_blocks_to_allocate)
    assert "self.max_admission_blocks_per_request" in source
    source = inspect.getsource(KVCacheCoordinator.get_num_blocks_to_allocate)
    assert source.count("apply_admission_cap=apply_admission_cap") == 2, "by keyword"
    # Obsolete once the cap is passed for every spec: see patches/README.md.
    source = inspect.getsource(get_manager_for_kv_cache_spec)
    assert "isinstance(\n        kv_cache_spec,\n        (SlidingWindowSpec" in source


def test_null_block() -> None:
    pool = BlockPool(num_gpu_blocks=4, enable_caching=False, hash_block_size=32)
    assert pool.null_block.block_id == 0
    assert pool.null_block.is_null
    assert pool.get_num_free_blocks() == 3


def test_spec_and_registry() -> None:
    for name in ("sliding_window", "attention_chunk_size", "block_size", "num_kv_heads"):
        assert name in {field.name for field in dataclasses.fields(FullAttentionSpec)}
    assert "if _REGISTRY_KVCACHESPEC_LIST:" in inspect.getsource(
        KVCacheSpecRegistry._ensure_registered
    )
    spec = SemanticSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=None)  # type: ignore[arg-type]
    assert KVCacheSpecRegistry.get_manager_class(spec) is SemanticManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is FullAttentionSpec


def test_layers_lie_at_equal_distances() -> None:
    assert "views.append(cache_logical)" in inspect.getsource(create_kv_cache_views)


# -- attention -------------------------------------------------------------------------


def test_metadata_builder() -> None:
    assert AttentionMetadataBuilder.supports_update_block_table is False


def test_common_metadata_has_what_is_replaced() -> None:
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert fields >= {
        "block_table_tensor",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "max_seq_len",
        "query_start_loc",
        "_num_computed_tokens_cache",
    }


@pytest.mark.parametrize("name", WRAPPED_BACKENDS)
def test_wrapped_backends(name: str) -> None:
    """Each base exists; where it imports here, its implementation takes what ours passes on."""
    try:
        check_backend(backend_member(name))
    except ImportError as error:
        assert name != ("FLASH_ATTN" if on_gpu() else "CPU_ATTN"), error
        pytest.skip(f"{name} does not import on this platform: {error}")
    assert not AttentionBackendEnum[name].is_overridden()


# -- worker ----------------------------------------------------------------------------


def test_a_backend_can_be_registered_under_a_name() -> None:
    assert xformers_member() is xformers_member() is AttentionBackendEnum["XFORMERS"]


def test_runner_v2_has_what_the_worker_reads() -> None:
    tables = inspect.getsource(BlockTables.append_block_ids)
    assert "start = self.num_blocks.np[i, req_index] if not overwrite else 0" in tables, (
        "rows only grow"
    )
    runner = inspect.getsource(GPUModelRunnerV2)
    for expression in (
        "self.req_states = RequestState(",
        "self.output_copy_stream = torch.cuda.Stream(",
        "self.execute_model_state = ExecuteModelState(",
    ):
        assert expression in runner
    assert "req_ids" in {field.name for field in dataclasses.fields(InputBatch)}
    assert "= self.prepare_attn(input_batch)" in runner, "before the metadata of a batch is built"
    dispatch = inspect.getsource(CudaGraphManager.dispatch)
    assert "if self._graphs_captured and" in dispatch, "else it runs without graphs"
    finish = inspect.getsource(GPUModelRunnerV2.finish_requests)
    assert "scheduler_output.preempted_req_ids" in finish


def test_in_flight_tokens_are_those_not_settled() -> None:
    """Where a chunk starts: what is processed and what is in flight."""
    source = inspect.getsource(KVCacheManager.allocate_slots)
    assert "total_computed_tokens - request.num_in_flight_tokens" in source
    assert "self.coordinator.cache_blocks(request, num_tokens_to_cache)" in source


def test_runner_has_what_the_worker_reads() -> None:
    source = inspect.getsource(GPUModelRunner)
    for expression in ("self.input_batch", "self.attn_groups"):
        assert expression in source
    assert "valid_modes={CUDAGraphMode.NONE} if force_eager" in source, "by name, to run without"
    assert {"valid_modes", "invalid_modes"} <= {
        *inspect.signature(CudagraphDispatcher.dispatch).parameters
    }
    update = inspect.getsource(GPUModelRunner._update_states)
    assert "self.input_batch.num_computed_tokens_cpu[req_index] = num_computed_tokens" in update, (
        "it takes the scheduler's number in each step, also a smaller one"
    )
    append = inspect.getsource(BlockTable.append_row)
    assert "self.num_blocks_per_row[row_idx] += num_blocks" in append, "rows only grow"


def test_a_draft_shares_blocks_and_builds_metadata_of_its_own() -> None:
    proposer = inspect.getsource(SpecDecodeBaseProposer)
    assert "self.draft_attn_groups: list[AttentionGroup] = []" in proposer
    assert "self._draft_attn_layer_names = {" in proposer
    assert {"layer_names", "metadata_builders", "kv_cache_group_id"} <= {
        field.name for field in dataclasses.fields(AttentionGroup)
    }
    assert "attn_group.build_metadata_for_drafting(" in proposer
    assert "return self.build(" in inspect.getsource(AttentionMetadataBuilder.build_for_drafting)
    assert "common_attn_metadata.seq_lens_cpu_upper_bound += 1" in proposer, "per token drafted"
    assert "self.drafter.propose(" in inspect.getsource(GPUModelRunner.propose_draft_token_ids)
    assert "propose_draft_token_ids(" in inspect.getsource(GPUModelRunner.sample_tokens)
    assert isinstance(VllmConfig.num_lookahead_tokens, property)
    v2 = inspect.getsource(DraftModelSpeculator)
    assert "self.draft_attn_layer_names = set(all_attn_layers) - target_attn_layer_names" in v2
    assert "self.attn_groups, self.attn_cg_support, _ = init_attn_backend(" in v2
    assert "self.speculator.set_attn(" in inspect.getsource(GPUModelRunnerV2)
    assert "if not attn_group.supports_draft_decode_metadata_update" in v2, "asked of builders"
    assert "else self._multi_step_decode" in inspect.getsource(TargetDependentARSpeculator.propose)
    for name in ("use_multi_module_mtp", "use_gemma4_mtp", "use_ngram_gpu"):
        assert callable(getattr(SpeculativeConfig, name))
    schedule = inspect.getsource(Scheduler.schedule)
    assert "num_lookahead_tokens=self.num_lookahead_tokens," in schedule, "by name"


def test_a_request_says_how_many_drafts_are_in_flight() -> None:
    advance = inspect.getsource(AsyncScheduler._update_after_schedule)
    assert "request.num_output_placeholders += (" in advance, "one, and the drafts"
    settle = inspect.getsource(Scheduler.update_from_output)
    assert "request.num_output_placeholders -= num_rejected" in settle
    assert "request.num_computed_tokens -= num_rejected" in settle
    schedule = inspect.getsource(Scheduler.schedule)
    assert "if num_new_tokens == 0:" in schedule, "a request may be passed over"


def test_triton_attn_remembers_where_scales_are() -> None:
    ensure = inspect.getsource(TritonAttentionImpl._ensure_scale_caches)
    assert "if self._k_scale_cache is not None:" in ensure
    assert "self._v_scale_cache" in ensure
    forward = inspect.getsource(TritonAttentionImpl.forward)
    assert "k_scale_cache = self._k_scale_cache" in forward


def test_backends_say_whether_heads_have_scales() -> None:
    assert callable(AttentionBackend.supports_per_head_quant_scales)
    process = inspect.getsource(CompressedTensorsKVCacheMethod.process_weights_after_loading)
    for name in ("_k_scale", "_v_scale", "_q_scale"):
        assert f'layer.register_buffer("{name}"' in process
        assert f"layer.{name}_float" in process


def test_outputs_take_attributes() -> None:
    assert not hasattr(ModelRunnerOutput, "__slots__")


# -- metrics ---------------------------------------------------------------------------


def test_numbers_by_name_reach_the_stat_loggers_in_order() -> None:
    (numbers,) = (
        field for field in dataclasses.fields(SchedulerStats) if field.name.startswith("num_kv_")
    )
    assert (numbers.name, numbers.type) == ("num_kv_fetch_reqs_by_stage", dict[str, int])
    init = inspect.getsource(StatLoggerManager.__init__)
    assert "self.engine_indexes = " in init
    assert "self.stat_loggers: list[AggregateStatLoggerBase] = []" in init
    record = inspect.getsource(StatLoggerManager.record)
    assert "for stat_logger in self.stat_loggers:" in record
    assert parameters(AggregateStatLoggerBase.__init__) == parameters(KVPolicyStatLogger.__init__)


def test_a_stat_logger_plugin_would_log_unasked() -> None:
    """Why there is none. Obsolete once a plugin can decline: see patches/README.md."""
    assert "self.log_stats = log_stats or has_custom_loggers" in inspect.getsource(AsyncLLM)
    assert "unregister_vllm_metrics()" in inspect.getsource(PrometheusStatLogger.__init__)


# -- everything overridden, wrapped or called ------------------------------------------


def test_signatures() -> None:
    problems = dict(signatures())
    assert {name: problem for name, problem in problems.items() if problem} == {}
    assert len(problems) > 30
    for method in ("Scheduler._reserve_prefill_lookahead", "Worker.execute_model"):
        assert any(name.endswith(method) for name in problems)


def test_a_changed_signature_is_found() -> None:
    class Base:
        def same(self, request: Any) -> None: ...
        def changed(self, request: Any, more: Any) -> None: ...
        @classmethod
        def merge(cls, specs: Any, more: Any) -> None: ...

    class Ours(Base):
        def same(self, request: Any) -> None: ...
        def changed(self, request: Any) -> None: ...
        @classmethod
        def merge(cls, specs: Any) -> None: ...
        def gone(self) -> None:
            super().gone()  # type: ignore[misc]

        def of_our_own(self) -> None: ...

    assert dict(overrides(Ours, Base)) == {
        "same": None,
        "changed": "takes self, request, more; ours self, request",
        "merge": "takes cls, specs, more; ours cls, specs",
        "gone": "is gone",
    }


def test_ours_derive_from_what_they_override() -> None:
    for ours, base in (
        (SemanticScheduler, Scheduler),
        (AsyncSemanticScheduler, AsyncScheduler),
        (SemanticWorker, Worker),
    ):
        assert issubclass(ours, base)


@pytest.mark.cpu_build("importing vLLM's CPU worker takes torch's CUDA calls away")
def test_the_cpu_worker_derives_from_vllms() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    from vllm_semantic.engine.cpu_worker import SemanticCPUWorker

    assert issubclass(SemanticCPUWorker, CPUWorker)
