"""What the plugin wraps of vLLM's classes, and registers with it, attention backends apart.

Each hook says what it is for and where it attaches in vLLM 0.32; ``tests/contract`` holds
every upstream signature used here. Without a policy none of them changes anything.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import (
    CONFIG_FLAG,
    KV_CACHE_DTYPES,
    KV_CONNECTORS,
    POLICY_FLAG,
    SPECULATIVE_METHODS,
    WRAPPED_BACKENDS,
    check_block_size,
    resolve_policy_class,
)
from ..frontend import asks_for_policy, check_places, checked, system_chats, with_pinned
from ..layer_groups import LAYER_GROUPS, LAYER_SKEW, check_layer_groups
from ..policies import POLICIES, KVPolicy
from ..policies.trial import AttentionShape
from ..recall import RECALL_BLOCKS, RECALL_GIB
from ..served import (
    CONFIG_KEY,
    MAX_REQUEST_TOKENS,
    ServedPolicies,
    flags_to_config,
    has_policy,
)
from .backends import wants_xformers, xformers_member
from .versions import check_vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheSpec

SCHEDULERS = {
    False: "vllm_semantic.engine.scheduler.SemanticScheduler",
    True: "vllm_semantic.engine.scheduler.AsyncSemanticScheduler",
}

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_semantic.engine.cpu_worker.SemanticCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_semantic.engine.worker.SemanticWorker",
}

DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 16, "xformers": 64}
"""Smallest block that a platform's kernels handle well."""

_SpecT = TypeVar("_SpecT", bound="type[KVCacheSpec]")


# -- flags and configuration -----------------------------------------------------------


def install() -> None:
    """Entry point ``vllm.general_plugins``: teach ``EngineArgs`` the policy flags.

    Called in every process, more than once. vLLM loads general plugins before it builds
    its parser (``AsyncEngineArgs.add_cli_args``) and in ``EngineArgs.__post_init__``.
    """
    from vllm.engine.arg_utils import EngineArgs

    # On the class: another plugin may wrap the methods after us (vllm-bnb-plugin does).
    if getattr(EngineArgs, "kv_policy_hook", False):
        return
    EngineArgs.kv_policy_hook = True
    EngineArgs.add_cli_args = staticmethod(_adding_flags(EngineArgs.add_cli_args))
    EngineArgs.create_engine_config = _finishing(EngineArgs.create_engine_config)


def _adding_flags(add_cli_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_cli_args)
    def wrapper(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            title="KVPolicy", description="Evict KV cache blocks of long sequences (vllm-semantic)."
        )
        group.add_argument(
            POLICY_FLAG,
            type=_policy_name,
            default=None,
            help=f"Which KV cache blocks a request keeps: {', '.join(POLICIES)}, or the qualified "
            "name of a KVPolicy class. Default: vLLM's own cache, untouched.",
        )
        group.add_argument(
            CONFIG_FLAG,
            type=_json_object,
            default=None,
            help="Options of the policy in tokens, as JSON or one by one "
            f"({CONFIG_FLAG}.semantic_tokens 512). {MAX_REQUEST_TOKENS}: the largest budget that a "
            "request may ask for, default: that of the policy. "
            f"{LAYER_GROUPS}: equal shares of the layers that evict for themselves, default: 1. "
            f"{LAYER_SKEW}: what the last of these groups keeps beyond the budget and the first "
            "falls short of it, default: 0. "
            f"{RECALL_GIB}: host memory for evicted blocks, which come back when the end of a "
            f"prompt asks for them, default: 0, none. {RECALL_BLOCKS}: how many may come back at "
            "each eviction point of an answer too, default: 0. "
            + "; ".join(f"{name}: {cls.options()}" for name, cls in POLICIES.items()),
        )
        # After parsing, for every order of --additional-config and our flags; and not later:
        # vLLM sends what was parsed to API server processes that have no plugin loaded yet.
        parser.parse_known_args = _merging_flags(parser.parse_known_args)
        return parser

    return wrapper


def _merging_flags(parse_known_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse_known_args)
    def wrapper(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        config = flags_to_config(namespace.kv_policy, namespace.kv_policy_config)
        if config is not None:
            namespace.additional_config = {
                **(namespace.additional_config or {}),
                CONFIG_KEY: config,
            }
        return namespace, rest

    return wrapper


def _finishing(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if xformers := wants_xformers(self):
            xformers_member()
        if not has_policy(self):
            return create_engine_config(self, *args, **kwargs)
        from vllm.platforms import current_platform

        served = ServedPolicies.from_config(self.additional_config[CONFIG_KEY])
        check_vllm_version()
        check_requests()

        def create(**changes: Any) -> VllmConfig:
            engine_args = copy.copy(self)  # vLLM writes to it
            vars(engine_args).update(changes)
            if engine_args.block_size is None:
                platform = "xformers" if xformers else current_platform.device_type
                engine_args.block_size = DEFAULT_BLOCK_SIZE.get(platform)
            return create_engine_config(engine_args, *args, **kwargs)

        vllm_config = create()
        if drafts_ahead_on_v1(vllm_config) and self.async_scheduling is None:
            vllm_config = create(async_scheduling=False)  # scheduling ahead was vLLM's choice
        finish_config(vllm_config, served.default)
        check_layer_groups(served.layer_groups, num_full_layers(vllm_config))
        served.try_out(attention_shape(vllm_config))
        export_metrics()
        return vllm_config

    return wrapper


def _policy_name(name: str) -> str:
    try:
        resolve_policy_class(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def drafts_ahead_on_v1(vllm_config: VllmConfig) -> bool:
    """Whether Model Runner V1 would draft for steps that are scheduled ahead.

    A request that waits for its drafts to be verified is passed over for a step, and V1 looks for
    its drafts in the last step.
    """
    return bool(
        vllm_config.num_speculative_tokens
        and vllm_config.scheduler_config.async_scheduling
        and not vllm_config.use_v2_model_runner
    )


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """What of a configuration a policy cannot serve yet, in the words of vLLM's flags."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    speculative, transfer = vllm_config.speculative_config, vllm_config.kv_transfer_config
    served = ServedPolicies.from_config(vllm_config.additional_config[CONFIG_KEY])
    drafts = vllm_config.num_lookahead_tokens > 0  # a model does, with a KV cache of its own
    drafter = f"--speculative-config with method {speculative and speculative.method}"
    draft_dtype = speculative and speculative.kv_cache_dtype
    backend = vllm_config.attention_config.backend
    backends = ", ".join(WRAPPED_BACKENDS)
    checks = {
        f"--pipeline-parallel-size {parallel.pipeline_parallel_size}, where each stage would score "
        "its own layers (allowed: 1)": (parallel.pipeline_parallel_size > 1),
        "context parallelism (allowed: --decode-context-parallel-size 1)": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batching (allowed: no --enable-dbo, --ubatch-size 0)": parallel.use_ubatching,
        f"{drafter} (allowed: {', '.join(SPECULATIVE_METHODS)})": (
            speculative is not None and speculative.method not in SPECULATIVE_METHODS
        ),
        f"{drafter} of several modules, or of one without a KV cache of its own (allowed: "
        "num_speculative_tokens 1, of a module with a KV cache)": (
            speculative is not None
            and (speculative.use_multi_module_mtp() or speculative.use_gemma4_mtp())
        ),
        "--speculative-config.enable_adaptive_verification (allowed: without)": (
            speculative is not None and speculative.enable_adaptive_verification
        ),
        f"{drafter} on Model Runner V1 (allowed: ngram)": (
            speculative is not None
            and speculative.use_ngram_gpu()
            and not vllm_config.use_v2_model_runner
        ),
        f"{drafter} and --async-scheduling on Model Runner V1 (allowed: --no-async-scheduling)": (
            drafts_ahead_on_v1(vllm_config)
        ),
        f"{drafter} with {CONFIG_FLAG}.{LAYER_GROUPS} {served.layer_groups} (allowed: 1)": (
            drafts and served.layer_groups > 1
        ),
        f"--kv-transfer-config with {transfer and transfer.kv_connector} (allowed: "
        f"{', '.join(KV_CONNECTORS)})": (
            transfer is not None and transfer.kv_connector not in KV_CONNECTORS
        ),
        f"--kv-transfer-config with {transfer and transfer.kv_connector} and "
        f"{CONFIG_FLAG}.{LAYER_GROUPS} {served.layer_groups} (allowed: 1, OffloadingConnector)": (
            transfer is not None
            and transfer.kv_connector != "OffloadingConnector"
            and served.layer_groups > 1
        ),
        f"--kv-cache-dtype {cache.cache_dtype} (allowed: {', '.join(KV_CACHE_DTYPES)})": (
            cache.cache_dtype not in KV_CACHE_DTYPES
        ),
        f"--speculative-config.kv_cache_dtype {draft_dtype} (allowed: as of the model)": (
            draft_dtype not in (None, cache.cache_dtype)
        ),
        "--kv-sharing-fast-prefill (allowed: without)": cache.kv_sharing_fast_prefill,
        "--enable-prefix-caching of a model with Mamba layers (allowed: "
        "--no-enable-prefix-caching)": cache.mamba_cache_mode != "none",
        f"--attention-backend {backend and backend.name} (allowed: {backends})": (
            backend is not None and backend.name not in WRAPPED_BACKENDS
        ),
        f"--runner {model.runner_type} (allowed: generate)": model.runner_type != "generate",
        "--dtype float32 with --quantization bitsandbytes (allowed: bfloat16, float16)": (
            model.quantization == "bitsandbytes" and model.dtype.itemsize != 2
        ),
        "models with multi-head latent attention (MLA)": model.use_mla,
        "encoder-decoder models": model.is_encoder_decoder,
        "models with ALiBi positions": model.uses_alibi,
        "models whose images see ahead (allowed: --language-model-only)": model.is_mm_prefix_lm,
        "diffusion models": vllm_config.diffusion_config is not None,
    }
    return [feature for feature, present in checks.items() if present]


def finish_config(vllm_config: VllmConfig, policy: KVPolicy) -> None:
    """Put our scheduler and worker in place, or refuse.

    Raises:
        ValueError: a feature, block size, worker or scheduler that a policy cannot serve.
    """
    if unsupported := unsupported_features(vllm_config):
        raise ValueError(f"{POLICY_FLAG} {policy.name} does not support {'; '.join(unsupported)}")
    check_block_size(policy, vllm_config.cache_config.block_size)
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.worker_cls not in WORKERS:
        raise ValueError(
            f"{POLICY_FLAG} {policy.name} does not support --worker-cls {parallel.worker_cls}; "
            f"allowed: {', '.join(WORKERS)}"
        )
    if scheduler.scheduler_cls is not None:
        raise ValueError(
            f"{POLICY_FLAG} {policy.name} does not support --scheduler-cls "
            f"{scheduler.scheduler_cls}; allowed: none"
        )
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]


def num_full_layers(vllm_config: VllmConfig) -> int | None:
    """How many layers have full attention, where a model's configuration says so.

    Where it does not, the workers count the layers that they have loaded.
    """
    model = vllm_config.model_config
    config = model.hf_text_config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = model.is_hybrid or model.get_sliding_window() or kinds != {"full_attention"}
    if others or getattr(config, "num_kv_shared_layers", 0):
        return None
    return model.get_num_layers(vllm_config.parallel_config)


def attention_shape(vllm_config: VllmConfig) -> AttentionShape:
    """Of the full-attention layers of a worker."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return AttentionShape(
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
        vllm_config.cache_config.block_size,
    )


# -- requests --------------------------------------------------------------------------


def check_requests() -> None:
    """Read and check what requests ask for, where vLLM reads the rest of them.

    That is ``InputProcessor.process_inputs``; for a server already where a route asks for an
    answer, since an answer that is streamed is asked for before and processed after its first
    byte. A system message is counted where the messages of a chat are at hand. Called before an
    engine with a policy is built; one without is served as before.
    """
    from vllm.entrypoints.common.offline import OfflineInferenceMixin
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.launchers import app, run_batch
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
    from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor, "kv_policy_hook", False):
        return
    InputProcessor.kv_policy_hook = True
    InputProcessor.process_inputs = _checking_inputs(InputProcessor.process_inputs)
    AsyncLLM.generate = _checking_first(AsyncLLM.generate)
    AsyncLLM._add_streaming_input_request = _keeping_policy(AsyncLLM._add_streaming_input_request)
    OpenAIServingResponses._generate_with_builtin_tools = _checking_response(
        OpenAIServingResponses._generate_with_builtin_tools
    )
    OnlineRenderer.preprocess_chat = _pinning_chat(OnlineRenderer.preprocess_chat)
    OfflineInferenceMixin._add_chat_requests = _pinning_chats(
        OfflineInferenceMixin._add_chat_requests
    )
    for request in (
        CompletionRequest,
        ChatCompletionRequest,
        TranscriptionRequest,
        TranslationRequest,
    ):
        request.to_beam_search_params = _with_extra_args(request.to_beam_search_params)
    BeamSearchOnlineMixin.beam_search = _searching_online(BeamSearchOnlineMixin.beam_search)
    BeamSearchOfflineMixin.beam_search = _searching_offline(BeamSearchOfflineMixin.beam_search)
    app.init_entrypoints_middleware = _adding_middleware(app.init_entrypoints_middleware)
    run_batch.run_request = _checking_batch(run_batch.run_request)


def _checking_inputs(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    from ..engine.refusal import refusing

    @functools.wraps(process_inputs)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        params = request.sampling_params
        if params is not None and params.extra_args:
            with refusing():
                params.extra_args = _checked(
                    params.extra_args,
                    self.vllm_config,
                    request.prompt_token_ids,
                    request.prompt_embeds,
                    params.max_tokens,
                    resumable=request.resumable,
                )
        return request

    return wrapper


def _checked(
    extra_args: Any,
    vllm_config: VllmConfig,
    prompt_token_ids: Any,
    prompt_embeds: Any,
    max_tokens: int | None,
    *,
    resumable: bool = False,
) -> Any:
    """Extra arguments of a request with the policy that it gets, if it asks for one."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds

    if not asks_for_policy(extra_args, vllm_config):
        return extra_args
    max_model_len = vllm_config.model_config.max_model_len
    num_prompt_tokens = length_from_prompt_token_ids_or_embeds(prompt_token_ids, prompt_embeds)
    if max_tokens is None:
        max_tokens = max_model_len - num_prompt_tokens
    if resumable:  # more prompt may follow, up to what the model takes
        num_prompt_tokens = max_model_len
    return checked(extra_args, vllm_config, num_prompt_tokens, max_tokens)


def _checked_rendered(
    extra_args: Any, vllm_config: VllmConfig, prompt: Any, max_tokens: Any
) -> Any:
    """The same of a prompt that has been rendered; others are left to the input processor."""
    from ..engine.refusal import refusing

    if not extra_args or not isinstance(prompt, dict) or "type" not in prompt:
        return extra_args
    decoder = prompt.get("decoder_prompt", prompt)
    token_ids, embeds = decoder.get("prompt_token_ids"), decoder.get("prompt_embeds")
    with refusing():
        return _checked(extra_args, vllm_config, token_ids, embeds, max_tokens)


def _checking_first(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Check when an answer is asked for; a generator begins when it is read."""

    @functools.wraps(generate)
    def wrapper(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        extra_args, max_tokens = sampling_params.extra_args, sampling_params.max_tokens
        _checked_rendered(extra_args, self.vllm_config, prompt, max_tokens)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return wrapper


def _checking_response(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The same where Responses ask for an answer: they ask the engine inside of a generator."""

    @functools.wraps(generate)
    def wrapper(
        self: Any,
        request_id: str,
        engine_input: Any,
        sampling_params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        vllm_config = self.engine_client.vllm_config
        extra_args, max_tokens = sampling_params.extra_args, sampling_params.max_tokens
        _checked_rendered(extra_args, vllm_config, engine_input, max_tokens)
        return generate(self, request_id, engine_input, sampling_params, *args, **kwargs)

    return wrapper


def _keeping_policy(add_session: Callable[..., Any]) -> Callable[..., Any]:
    from ..engine.sessions import under_one_policy

    @functools.wraps(add_session)
    async def wrapper(
        self: Any,
        request_id: str,
        input_stream: Any,
        sampling_params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if has_policy(self.vllm_config):
            input_stream = under_one_policy(input_stream, sampling_params, self.vllm_config)
        return await add_session(self, request_id, input_stream, sampling_params, *args, **kwargs)

    return wrapper


def _with_extra_args(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's parameters of a beam search have no field for them, but take attributes."""

    @functools.wraps(to_beam_search_params)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = to_beam_search_params(self, *args, **kwargs)
        params.extra_args = self.vllm_xargs
        return params

    return wrapper


def _searching_online(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    from ..engine.beams import searching

    @functools.wraps(beam_search)
    def wrapper(
        self: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        vllm_config = self.engine_client.vllm_config
        if extra_args := getattr(params, "extra_args", None):
            extra_args = _checked_rendered(extra_args, vllm_config, prompt, params.max_tokens)
            self = searching(self, "engine_client", extra_args)
        return beam_search(self, prompt, request_id, params, *args, **kwargs)

    return wrapper


def _searching_offline(beam_search: Callable[..., Any]) -> Callable[..., Any]:
    from ..engine.beams import searching

    @functools.wraps(beam_search)
    def wrapper(self: Any, prompts: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if extra_args := getattr(params, "extra_args", None):
            self = searching(self, "llm_engine", extra_args)
        return beam_search(self, prompts, params, *args, **kwargs)

    return wrapper


def _adding_middleware(init_middleware: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_middleware)
    def wrapper(args: Any, app: Any, *more: Any, **kwargs: Any) -> Any:
        if has_policy(args):
            from ..middleware import MisplacedPolicies

            app.add_middleware(MisplacedPolicies)  # first, so behind vLLM's authentication
        return init_middleware(args, app, *more, **kwargs)

    return wrapper


def _checking_batch(run_request: Callable[..., Any]) -> Callable[..., Any]:
    """Requests of a batch file have a route each and pass no middleware."""
    from ..engine.refusal import refusing
    from ..middleware import PLACES

    @functools.wraps(run_request)
    async def wrapper(serve: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        async def checking(body: Any, *more: Any) -> Any:
            if request.url in PLACES:
                with refusing():
                    check_places(dict(body), PLACES[request.url], request.url)
            return await serve(body, *more)

        return await run_request(checking, request, *args, **kwargs)

    return wrapper


def _pinning_chat(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    from ..engine.refusal import refusing

    @functools.wraps(preprocess)
    async def wrapper(self: Any, request: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await preprocess(self, request, messages, *args, **kwargs)
        extra_args = getattr(request, "vllm_xargs", None)
        with refusing():
            if asks_for_policy(extra_args, self.renderer.config):
                prompts = [rendered[1][0]["prompt_token_ids"]]
                for chat in system_chats(extra_args, messages):
                    # Without a parser: it would change the request, a second time.
                    _, (other,) = await preprocess(
                        self, request, chat, *args, **{**kwargs, "parser": None}
                    )
                    prompts.append(other["prompt_token_ids"])
                if len(prompts) > 1:
                    request.vllm_xargs = with_pinned(extra_args, *prompts)
        return rendered

    return wrapper


def _pinning_chats(add_chat_requests: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.renderers.inputs.preprocess import conversation_to_seq

    queueing = ("use_tqdm", "lora_request", "priority")  # the rest says how a chat is rendered

    @functools.wraps(add_chat_requests)
    def wrapper(self: Any, messages: Any, params: Any, **kwargs: Any) -> Any:
        rendering = {name: value for name, value in kwargs.items() if name not in queueing}
        vllm_config = self.llm_engine.vllm_config

        def pinned(chat: Any, params: Any) -> Any:
            extra_args = getattr(params, "extra_args", None)
            if not asks_for_policy(extra_args, vllm_config):
                return params
            if chats := system_chats(extra_args, chat):
                prompts = [
                    self._preprocess_chat_one(messages, **rendering)["prompt_token_ids"]
                    for messages in (chat, *chats)
                ]
                params = params.clone()
                params.extra_args = with_pinned(extra_args, *prompts)
            return params

        chats = conversation_to_seq(messages)
        params = [*map(pinned, chats, self._params_to_seq(params, len(chats)))]
        return add_chat_requests(self, chats, params, **kwargs)

    return wrapper


# -- registries ------------------------------------------------------------------------


def register_spec(
    manager_class: type[SingleTypeKVCacheManager],
    uniform_type_base_spec: type[KVCacheSpec],
) -> Callable[[_SpecT], _SpecT]:
    """vLLM's ``register_kv_cache_spec`` decorator, after its own specs.

    Registering into an empty registry makes vLLM skip its built-in specs
    (``KVCacheSpecRegistry._ensure_registered``).
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

    KVCacheSpecRegistry._ensure_registered()
    return register_kv_cache_spec(manager_class, uniform_type_base_spec)


def export_metrics() -> None:
    """Put what a policy does on ``/metrics``, in the process that holds an engine's client.

    ``vllm.stat_logger_plugins`` is not for us: whatever is registered there makes vLLM log
    although ``--disable-log-stats`` was given, policy or not, and is created before vLLM's own
    Prometheus logger, which unregisters every metric of the name ``vllm:``.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    if not getattr(StatLoggerManager, "kv_policy_hook", False):
        StatLoggerManager.kv_policy_hook = True
        StatLoggerManager.__init__ = _adding_stat_logger(StatLoggerManager.__init__)


def _adding_stat_logger(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if has_policy(vllm_config):
            from ..engine.metrics import KVPolicyStatLogger

            # The first, since it takes what is ours out of what the others log.
            self.stat_loggers.insert(0, KVPolicyStatLogger(vllm_config, self.engine_indexes))

    return wrapper
