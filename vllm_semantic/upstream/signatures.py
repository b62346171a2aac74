"""The methods of vLLM that the plugin overrides, wraps or calls with arguments of its own.

One list for two readers: ``tests/contract`` fails on an upgrade that changes one of them, and
``python -m vllm_semantic doctor`` says so where the plugin is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

OVERRIDDEN = (
    (
        "vllm_semantic.engine.manager.SemanticManager",
        "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager",
    ),
    (
        "vllm_semantic.engine.kv_cache_manager.SemanticKVCacheManager",
        "vllm.v1.core.kv_cache_manager.KVCacheManager",
    ),
    (
        "vllm_semantic.engine.spec.SemanticSpec",
        "vllm.v1.kv_cache_interface.FullAttentionSpec",
    ),
    (
        "vllm_semantic.engine.scheduler.KVPolicyMixin",
        "vllm.v1.core.sched.scheduler.Scheduler",
    ),
    (
        "vllm_semantic.engine.scheduler.KVPolicyMixin",
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
    ),
    (
        "vllm_semantic.engine.worker.KVPolicyWorkerMixin",
        "vllm.v1.worker.gpu_worker.Worker",
    ),
    (
        "vllm_semantic.engine.worker.ScoredAsyncOutput",
        "vllm.v1.outputs.AsyncModelRunnerOutput",
    ),
    (
        "vllm_semantic.engine.backend.CompactingBuilder",
        "vllm.v1.attention.backend.AttentionMetadataBuilder",
    ),
    (
        "vllm_semantic.engine.metrics.KVPolicyStatLogger",
        "vllm.v1.metrics.loggers.AggregateStatLoggerBase",
    ),
)
"""Classes of ours and those of vLLM's whose methods they override."""

CALLED = {
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": ("parser",),
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": ("self",),
    "vllm.entrypoints.generate.beam_search.offline.BeamSearchOfflineMixin.beam_search": (
        "self",
        "prompts",
        "params",
    ),
    "vllm.entrypoints.generate.beam_search.online.BeamSearchOnlineMixin.beam_search": (
        "self",
        "prompt",
        "request_id",
        "params",
    ),
    "vllm.entrypoints.launchers.app.init_entrypoints_middleware": ("args", "app"),
    "vllm.entrypoints.launchers.run_batch.run_request": ("serving_engine_func", "request"),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest"
    ".to_beam_search_params": ("self",),
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_beam_search_params": (
        "self",
    ),
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses"
    "._generate_with_builtin_tools": (
        "self",
        "request_id",
        "engine_input",
        "sampling_params",
    ),
    "vllm.entrypoints.serve.exception_handling.error_response.create_error_response": ("message",),
    "vllm.entrypoints.speech_to_text.transcription.protocol.TranscriptionRequest"
    ".to_beam_search_params": ("self",),
    "vllm.entrypoints.speech_to_text.translation.protocol.TranslationRequest"
    ".to_beam_search_params": ("self",),
    "vllm.renderers.inputs.preprocess.conversation_to_seq": ("conversation_or_conversations",),
    "vllm.entrypoints.common.offline.OfflineInferenceMixin._add_chat_requests": (
        "self",
        "messages",
        "params",
    ),
    "vllm.entrypoints.common.offline.OfflineInferenceMixin._params_to_seq": (
        "self",
        "params",
        "num_requests",
    ),
    "vllm.entrypoints.common.offline.OfflineInferenceMixin._preprocess_chat_one": (
        "self",
        "conversation",
    ),
    "vllm.renderers.online_renderer.OnlineRenderer.preprocess_chat": (
        "self",
        "request",
        "messages",
    ),
    "vllm.v1.engine.async_llm.AsyncLLM.generate": ("self", "prompt", "sampling_params"),
    "vllm.v1.engine.async_llm.AsyncLLM._add_streaming_input_request": (
        "self",
        "request_id",
        "input_stream",
        "sampling_params",
    ),
    "vllm.v1.engine.llm_engine.LLMEngine.add_request": ("self", "request_id", "prompt", "params"),
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs": ("self",),
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.register": ("cls", "name", "value"),
    "vllm.v1.attention.backends.registry.register_backend": ("backend", "class_path"),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.cache_blocks": (
        "self",
        "request",
        "num_computed_tokens",
    ),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.find_longest_cache_hit": (
        "self",
        "block_hashes",
        "max_cache_hit_length",
    ),
    "vllm_semantic.upstream.planning.get_kv_cache_groups": ("vllm_config", "kv_cache_spec"),
    "vllm_semantic.upstream.planning._pool_bytes_per_block": ("vllm_config", "kv_cache_groups"),
    "vllm.v1.kv_cache_interface.replace_as": ("spec", "target_cls"),
    "vllm.v1.kv_cache_spec_registry.register_kv_cache_spec": (
        "manager_class",
        "uniform_type_base_spec",
    ),
    "vllm.v1.metrics.loggers.StatLoggerManager.__init__": ("self", "vllm_config"),
    "vllm.v1.simple_kv_offload.cuda_mem_ops.pin_tensor": ("tensor",),
}
"""What we wrap or call, and its first parameters."""


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters; where plugins have wrapped it, of what is below."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    return tuple(inspect.signature(plain).parameters)


def signatures() -> Iterator[tuple[str, str | None]]:
    """What the lists above name, and what is wrong with it in the vLLM that is installed."""
    for ours, base in OVERRIDDEN:
        for name, problem in overrides(resolve_name(ours), resolve_name(base)):
            yield f"{base}.{name}", problem
    for path, expected in CALLED.items():
        try:
            found = parameters(resolve_name(path))
        except AttributeError:
            yield path, "is gone"
            continue
        fits = found[: len(expected)] == expected
        yield path, None if fits else f"takes {', '.join(found)}"


def overrides(ours: type, base: type) -> Iterator[tuple[str, str | None]]:
    """The methods of ``base`` that ``ours`` overrides, and what is wrong with each.

    Wrong is one that calls ``super()`` and has none there, or takes other parameters.
    """
    for name, member in vars(ours).items():
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function) or name.startswith("__"):
            continue
        upstream = getattr(base, name, None)
        if upstream is not None:
            yield name, _difference(function, upstream)
        elif "super" in function.__code__.co_names:
            yield name, "is gone"


def _difference(ours: Callable[..., Any], upstream: Callable[..., Any]) -> str | None:
    takes_all = inspect.Parameter.VAR_KEYWORD
    if any(p.kind is takes_all for p in inspect.signature(ours).parameters.values()):
        return None
    if parameters(ours) == parameters(upstream):
        return None
    return f"takes {', '.join(parameters(upstream))}; ours {', '.join(parameters(ours))}"
