"""Engines in processes of their own, so that two sides can take turns in one run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .clocks import Clock, Stopwatch, count_calls, follow


class EngineSide:
    """What runs inside an engine's process. Every method is one measurement."""

    def __init__(self, model: str, policy: str | None, options: dict[str, int], kwargs: Any):
        from vllm_semantic import LLM

        from .forcing import forcing_options

        self.llm = LLM(
            model,
            kv_policy=policy,
            kv_policy_config=options or None,
            **forcing_options(),
            enable_prefix_caching=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **kwargs,
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker

    # -- one measurement each ---------------------------------------------------------

    def generate(self, prompts: list[list[int]], num_new: int) -> dict[str, float]:
        """Serve a batch; seconds, generated tokens, preemptions."""
        from vllm import SamplingParams

        preemptions = count_calls(self.scheduler, "_preempt_request")
        params = SamplingParams(
            max_tokens=num_new, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(_prompts(prompts), params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "tokens": tokens, "preemptions": preemptions.count}

    def nll_of_prompts(self, documents: list[list[int]], num_prompt: int) -> dict[str, Any]:
        """The same, but each document is read as a prompt, in chunks."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0
        )
        start = time.perf_counter()
        outputs = self.llm.generate(_prompts(documents), params, use_tqdm=False)
        seconds = time.perf_counter() - start
        nll = []
        for document, output in zip(documents, outputs, strict=True):
            rows = zip(document[num_prompt:], output.prompt_logprobs[num_prompt:], strict=True)
            nll.append([-row[token].logprob for token, row in rows])
        return {"nll": nll, "seconds": seconds}

    def tokens(
        self,
        prompts: list[list[int]],
        num_new: int,
        extra_args: list[dict[str, Any]] | None = None,
    ) -> list[list[int]]:
        """Greedy tokens of a batch; ``extra_args`` for a policy, one a prompt."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=num_new,
                temperature=0,
                ignore_eos=True,
                detokenize=False,
                extra_args=of or None,
            )
            for of in extra_args or [{}] * len(prompts)
        ]
        outputs = self.llm.generate(_prompts(prompts), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def decode_steps(
        self, prompts: list[list[int]], num_steps: int, instrument: bool = False
    ) -> dict[str, float]:
        """Mean seconds of a step in which every request decodes one token."""
        self.start_decoding(prompts, num_steps)
        clocks = self._instrument() if instrument else {}
        seconds = self.decode(num_steps)
        shares = {name: clock.seconds / seconds for name, clock in clocks.items()}
        for clock in clocks.values():
            clock.remove()
        self.stop_decoding()
        return {"seconds": seconds / num_steps, **shares}

    def start_decoding(self, prompts: list[list[int]], num_steps: int) -> None:
        """Read prompts until every request decodes; each may then decode ``num_steps`` tokens.

        Raises:
            RuntimeError: the KV pool does not hold all requests at once.
        """
        from vllm import SamplingParams

        # The first to be read decode on while the last are read.
        num_tokens = sum(map(len, prompts))
        num_reading = num_tokens // self.scheduler.max_num_scheduled_tokens + 2 * len(prompts)
        params = SamplingParams(
            max_tokens=num_steps + num_reading, temperature=0, ignore_eos=True, detokenize=False
        )
        engine = self.llm.llm_engine
        for i, prompt in enumerate(_prompts(prompts)):
            engine.add_request(str(i), prompt, params)
        while any(request.is_prefill_chunk for request in self.scheduler.running) or (
            len(self.scheduler.running) < len(prompts)
        ):
            engine.step()
            if not engine.has_unfinished_requests():
                raise RuntimeError(f"the KV pool does not hold {len(prompts)} requests at once")

    def decode(self, num_steps: int) -> float:
        """Seconds of some steps of the requests that were started."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.llm.llm_engine.step()
        return time.perf_counter() - start

    def stop_decoding(self) -> None:
        """Abort the requests that were started."""
        engine = self.llm.llm_engine
        engine.abort_request([request.request_id for request in self.scheduler.running])
        while engine.has_unfinished_requests():
            engine.step()

    def nll(
        self,
        documents: list[list[int]],
        num_prompt: int,
        extra_args: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Negative log-likelihoods of each document after its prompt, token by token.

        ``extra_args`` for a policy, one a document.
        """
        from .forcing import forced_params

        start = time.perf_counter()
        outputs = self.llm.generate(
            _prompts([document[:num_prompt] for document in documents]),
            [
                forced_params(document[num_prompt:], of)
                for document, of in zip(documents, extra_args or [{}] * len(documents), strict=True)
            ],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        nll = []
        for document, output in zip(documents, outputs, strict=True):
            completion = output.outputs[0]
            assert list(completion.token_ids) == document[num_prompt:], "the text was not forced"
            nll.append(
                [
                    -row[token].logprob
                    for token, row in zip(completion.token_ids, completion.logprobs, strict=True)
                ]
            )
        return {"nll": nll, "seconds": seconds}

    def retention(self, document: list[int], num_prompt: int) -> dict[str, Any]:
        """Which blocks live as a document is decoded, after each step that changed it.

        Returns:
            ``policy``, ``block_size``, ``points`` (computed tokens) and ``kept`` (logical blocks).
        """
        manager = next(iter(self.scheduler.kv_policy_managers.values()))
        points: list[int] = []
        kept: list[list[int]] = []

        def see(output: Any) -> None:
            for request_id in output.num_scheduled_tokens:
                table = manager.req_to_blocks[request_id]
                held = [i for i, block in enumerate(table) if not block.is_null]
                if not kept or held != kept[-1]:
                    points.append(self.scheduler.requests[request_id].num_computed_tokens)
                    kept.append(held)

        follow(self.scheduler, "schedule", see)
        try:
            self.nll([document], num_prompt)
        finally:
            del self.scheduler.schedule
        return {
            "policy": manager.default_policy.name,
            "block_size": manager.block_size,
            "points": points,
            "kept": kept,
        }

    def attention(self, prompts: list[list[int]], calls: int = 50) -> dict[str, float]:
        """Attention of one decode step in all layers, and what reading its keys takes at least.

        The step's own metadata is replayed layer by layer, so the caches are as they were.
        """
        import torch

        runner = self.worker.model_runner
        caught: list[tuple[Any, Any]] = []
        builders = [
            (attn_group, builder)
            for attn_groups in runner.attn_groups
            for attn_group in attn_groups
            for builder in attn_group.metadata_builders
        ]
        for attn_group, builder in builders:
            follow(builder, "build", lambda metadata, g=attn_group: caught.append((g, metadata)))
        self.decode_steps(prompts, 4)
        for _, builder in builders:
            del builder.build
        latest = {id(group): (group, metadata) for group, metadata in caught}
        layers = self.worker.vllm_config.compilation_config.static_forward_context
        device = Stopwatch(runner.device)
        seconds = num_bytes = 0.0
        for group, metadata in latest.values():
            tokens = int(metadata.seq_lens.sum())
            for name in group.layer_names:
                layer = layers[name]
                shape = (len(metadata.seq_lens), layer.num_heads, layer.head_size)
                query = torch.randn(shape, device=runner.device).to(runner.dtype)
                key = query[:, : layer.num_kv_heads]
                output = torch.empty_like(query)
                arguments = (layer, query, key, key, layer.kv_cache, metadata, output)
                seconds += device.mean(lambda a=arguments: a[0].impl.forward(*a), calls)
                per_token = layer.num_kv_heads * 2 * layer.head_size * layer.kv_cache.itemsize
                num_bytes += tokens * per_token
        return {"seconds": seconds, "kept_kv_bytes": num_bytes}

    def kernels(self) -> dict[str, float]:
        """Largest differences between the device's kernels and their references."""
        from .kernels import compare

        return compare(self.worker.model_runner.device)

    def bandwidth(self, num_bytes: int = 2 << 30) -> float:
        """Bytes a second that this machine reads, measured by summing a large tensor."""
        import torch

        device = self.worker.model_runner.device
        data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
        return num_bytes / Stopwatch(device).mean(lambda: data.sum(), 10)

    def memory(self) -> dict[str, int]:
        """Bytes: KV pool, and the most that was ever allocated on the device."""
        import torch

        config = self.scheduler.kv_cache_config
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {
            "kv_pool": sum(tensor.size for tensor in config.kv_cache_tensors),
            "peak_allocated": peak,
        }

    def settings(self) -> dict[str, Any]:
        """What vLLM chose."""
        config = self.worker.vllm_config
        return {
            "block_size": config.cache_config.block_size,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }

    def runner(self) -> str:
        """The model runner, backend and CUDA graph mode in use."""
        config = self.worker.vllm_config
        groups = self.worker.model_runner.attn_groups
        backends = sorted({group.backend.get_name() for of in groups for group in of})
        mode = config.compilation_config.cudagraph_mode
        version = "V2" if config.use_v2_model_runner else "V1"
        ahead = "async" if config.scheduler_config.async_scheduling else "sync"
        return f"{version}, {ahead}, {'+'.join(backends)}, CUDA graphs {mode.name}"

    def fits(self, num_tokens: int) -> int:
        """How many requests of so many tokens the KV pool holds while they decode."""
        pool, config = self.scheduler.kv_cache_manager.block_pool, self.worker.vllm_config
        held = -(-num_tokens // config.cache_config.block_size)
        num_blocks = pool.num_gpu_blocks - 1
        for manager in getattr(self.scheduler, "kv_policy_managers", {}).values():
            policy, spec = manager.default_policy, manager.kv_cache_spec
            if policy.bounded:
                budget = policy.budget(spec.block_size).total
                held = min(held, budget + 1)
                # What one step reads of prompts lies beside the budgets.
                num_blocks -= spec.max_admission_blocks - budget - 1
        return int(num_blocks // held)

    def stats(self) -> dict[str, Any]:
        """What the policy did so far, and the memory of the weights in bytes."""
        managers = getattr(self.scheduler, "kv_policy_managers", {}).values()
        return {
            "evicted_blocks": sum(manager.stats.evicted_blocks for manager in managers),
            "peak_kv_blocks": getattr(self.scheduler, "peak_kv_blocks", None),
            "num_blocks": self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            "weight_bytes": weight_bytes(self.worker.get_model()),
        }

    def _scored_layers(self) -> list[Any]:
        layers = self.worker.vllm_config.compilation_config.static_forward_context.values()
        return [x for x in layers if getattr(x.impl, "newest_queries", None) is not None]

    def _instrument(self) -> dict[str, Clock]:
        """Clocks on everything that the policy adds to a step."""
        scoring, eviction, compaction = Clock(), Clock(), Clock()
        scoring.wrap(self.worker._block_scorer, "_score_group")
        for layer in self._scored_layers():
            scoring.wrap(layer.impl, "keep_queries")
        eviction.wrap(self.worker, "_apply_evictions")
        for group_id, manager in self.scheduler.kv_policy_managers.items():
            for name in ("keeps_queries", "score_request", "record_scores"):
                scoring.wrap(manager, name)
            for name in ("remove_skipped_blocks", "take_evictions"):
                eviction.wrap(manager, name)
            for attn_group in self.worker.model_runner.attn_groups[group_id]:
                for builder in attn_group.metadata_builders:
                    compaction.wrap(builder, "_compact")
                    scoring.wrap(builder, "_kept_queries")
        return {"scoring": scoring, "eviction": eviction, "compaction": compaction}


def _prompts(token_ids: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in token_ids]


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights as loaded, NF4 statistics included.

    vLLM's CPU linear layers hand their weight to oneDNN and drop the parameter; its size is
    the layer's shape in the model's dtype.
    """
    from vllm.model_executor.layers.linear import LinearBase

    total = 0
    seen: set[int] = set()  # tied weights count once
    for module in model.modules():
        parameters = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(parameter) for parameter in parameters}
        own = sum(parameter.nbytes for parameter in parameters)
        if own == 0 and isinstance(module, LinearBase):
            size = module.input_size_per_partition * module.output_size_per_partition
            own = size * module.params_dtype.itemsize
        total += own
        for parameter in parameters:
            for state in getattr(parameter, "bnb_quant_state", {}).values():
                total += state.absmax.nbytes + state.code.nbytes
    return total


def _serve(connection: Any, arguments: tuple[Any, ...]) -> None:
    try:
        side = EngineSide(*arguments)
        connection.send(None)
        while (call := connection.recv()) is not None:
            name, args, kwargs = call
            connection.send(getattr(side, name)(*args, **kwargs))
    except Exception as error:
        connection.send(error)
        raise


class RemoteEngine:
    """A handle on an :class:`EngineSide`; its methods run there."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._receive()

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._connection.send((name, args, kwargs))
            return self._receive()

        return call


@contextmanager
def engine(
    model: str, policy: str | None = None, options: dict[str, int] | None = None, **kwargs: Any
) -> Iterator[RemoteEngine]:
    """Start an engine in a process of its own; stop it at the end."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process behind the process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(
        target=_serve, args=(there, (str(model), policy, options or {}, kwargs)), daemon=True
    )
    process.start()
    there.close()
    try:
        yield RemoteEngine(here)
        here.send(None)
        process.join(30)
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
