"""Engines in processes of their own, so that two sides can take turns in one run."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .clocks import Clock, Stopwatch, count_calls, follow, synchronize
from .kernel_times import Kernels, kernel_times


class EngineSide:
    """What runs inside an engine's process. Every method is one measurement."""

    def __init__(
        self,
        model: str,
        policy: str | None,
        options: dict[str, int],
        kwargs: Any,
        forcing: bool = True,
    ):
        from vllm_semantic import LLM

        from .forcing import forcing_options

        self.llm = LLM(
            model,
            kv_policy=policy,
            kv_policy_config=options or None,
            **(forcing_options() if forcing else {}),
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **{"enable_prefix_caching": False, **kwargs},
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
        """Mean seconds of a step in which every request decodes one token.

        Beside it, how long the first tokens of all took.
        """
        first_tokens = self.start_decoding(prompts, num_steps)
        clocks = self._instrument() if instrument else {}
        seconds = self.decode(num_steps)
        shares = {name: clock.seconds / seconds for name, clock in clocks.items()}
        for clock in clocks.values():
            clock.remove()
        self.stop_decoding()
        return {"seconds": seconds / num_steps, "first_tokens": first_tokens, **shares}

    def start_decoding(self, prompts: list[list[int]], num_steps: int) -> float:
        """Read prompts until every request decodes; each may then decode ``num_steps`` tokens.

        Every request has given its first token by then. So nothing that is still in flight, where
        steps are scheduled ahead, is a part of a prompt.

        Returns:
            Seconds until the last request gave its first token.

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
        waiting = {str(i) for i in range(len(prompts))}
        start = time.perf_counter()
        for i, prompt in enumerate(_prompts(prompts)):
            engine.add_request(str(i), prompt, params)
        while waiting:
            waiting -= {output.request_id for output in engine.step()}
        seconds = time.perf_counter() - start
        if len(self.scheduler.running) < len(prompts):
            self.stop_decoding()
            raise RuntimeError(f"the KV pool does not hold {len(prompts)} requests at once")
        return seconds

    def decode(self, num_steps: int) -> float:
        """Seconds of some steps of the requests that were started, from an idle device to one.

        Raises:
            RuntimeError: a request did not decode one token in every step.
        """
        engine, device = self.llm.llm_engine, self.worker.model_runner.device
        synchronize(device)
        start, num_tokens = time.perf_counter(), 0
        for _ in range(num_steps):
            num_tokens += len(engine.step())
        synchronize(device)
        seconds = time.perf_counter() - start
        expected = num_steps * len(self.scheduler.running)
        if num_tokens != expected:
            raise RuntimeError(f"{num_tokens} tokens were decoded, not {expected}")
        return seconds

    def stop_decoding(self) -> None:
        """Abort the requests that were started."""
        engine, scheduler = self.llm.llm_engine, self.scheduler
        engine.abort_request(list(scheduler.requests))
        while engine.has_unfinished_requests():
            engine.step()

    def profile(self, num_steps: int) -> Kernels:
        """What the device does in a step of the requests that were started, kernel by kernel."""
        return kernel_times(
            self.worker.model_runner.device, lambda: self.decode(num_steps), num_steps
        )

    def kept_kv(self) -> dict[str, float]:
        """What the running requests hold, by the scheduler's own tables.

        Returns:
            ``requests``; ``tokens``, the mean of a request; ``kv_bytes`` of all of them.
        """
        block_size = self.worker.vllm_config.cache_config.block_size
        managers = getattr(self.scheduler, "kv_policy_managers", {}).values()
        kept = 0
        for request in self.scheduler.running:
            tables = [manager.req_to_blocks[request.request_id] for manager in managers]
            evicted = {sum(block.is_null for block in table) for table in tables} or {0}
            kept += request.num_computed_tokens - max(evicted) * block_size
        num_reqs = len(self.scheduler.running)
        return {
            "requests": num_reqs,
            "tokens": kept / num_reqs,
            "kv_bytes": kept * self._kv_bytes_per_token(),
        }

    def read_kv_bytes(self) -> int:
        """Bytes of keys and values that attention reads in one more step.

        By the lengths that its kernels were given: looked at before the next step is prepared,
        which reuses the buffers.
        """
        return sum(
            int(metadata.seq_lens.sum()) * self._kv_bytes_per_token(group.layer_names)
            for group, metadata in self._metadata_of_a_step()
        )

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
        """Which blocks live as a document is decoded, after each step that changed it, in the first
        group of layers.

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
        """Attention of one decode step in all layers, call by call, and what it has to read.

        The step's own metadata is replayed layer by layer while its requests are still there, so
        caches and lengths are as they were. On a GPU short calls take what their launch takes:
        :meth:`profile` tells what the kernels do.
        """
        import torch

        self.start_decoding(prompts, 8)
        layers = self.worker.vllm_config.compilation_config.static_forward_context
        runner = self.worker.model_runner
        device = Stopwatch(runner.device)
        seconds = num_bytes = 0.0
        for group, metadata in self._metadata_of_a_step():
            num_bytes += int(metadata.seq_lens.sum()) * self._kv_bytes_per_token(group.layer_names)
            for name in group.layer_names:
                layer = layers[name]
                shape = (len(metadata.seq_lens), layer.num_heads, layer.head_size)
                query = torch.randn(shape, device=runner.device).to(runner.dtype)
                key = query[:, : layer.num_kv_heads]
                output = torch.empty_like(query)
                arguments = (layer, query, key, key, layer.kv_cache, metadata, output)
                seconds += device.mean(lambda a=arguments: a[0].impl.forward(*a), calls)
        self.stop_decoding()
        return {"seconds": seconds, "kept_kv_bytes": num_bytes}

    def _metadata_of_a_step(self) -> list[tuple[Any, Any]]:
        """Decode a few steps; attention groups and the metadata of the last step, which has run."""
        caught: dict[int, tuple[Any, Any]] = {}
        builders = [
            (attn_group, builder)
            for attn_groups in self.worker.model_runner.attn_groups
            for attn_group in attn_groups
            for builder in attn_group.metadata_builders
        ]
        for attn_group, builder in builders:

            def see(metadata: Any, group: Any = attn_group) -> None:
                caught[id(group)] = (group, metadata)

            follow(builder, "build", see)
        try:
            self.decode(4)
        finally:
            for _, builder in builders:
                del builder.build
        return list(caught.values())

    def _kv_bytes_per_token(self, layer_names: Iterable[str] | None = None) -> int:
        """Of some attention layers, of all by default."""
        layers = self.worker.vllm_config.compilation_config.static_forward_context
        if layer_names is None:
            layer_names = [name for name, layer in layers.items() if hasattr(layer, "num_kv_heads")]
        return sum(
            layer.num_kv_heads * 2 * layer.head_size * layer.kv_cache.itemsize
            for layer in map(layers.get, layer_names)
        )

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
            # Of the whole allocation, which groups of layers overlay.
            "kv_pool": max(tensor.size for tensor in config.kv_cache_tensors),
            "peak_allocated": peak,
        }

    def settings(self) -> dict[str, Any]:
        """What vLLM chose, and the tokens that a request may keep (``None``: all)."""
        config = self.worker.vllm_config
        block_size = config.cache_config.block_size
        policies = [
            manager.default_policy
            for manager in getattr(self.scheduler, "kv_policy_managers", {}).values()
        ]
        budgets = [policy.budget(block_size).total for policy in policies if policy.bounded]
        return {
            "block_size": block_size,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "budget_tokens": budgets[0] * block_size if budgets else None,
        }

    def chosen(self) -> dict[str, str]:
        """The model runner, scheduling, attention backend and CUDA graphs in use."""
        config = self.worker.vllm_config
        groups = self.worker.model_runner.attn_groups
        backends = sorted({group.backend.get_name() for of in groups for group in of})
        return {
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "scheduling": "async" if config.scheduler_config.async_scheduling else "sync",
            "backend": "+".join(backends),
            "cuda_graphs": config.compilation_config.cudagraph_mode.name,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
        }

    def fits(self, num_tokens: int) -> int:
        """How many requests of so many tokens the KV pool holds while they decode."""
        pool, config = self.scheduler.kv_cache_manager.block_pool, self.worker.vllm_config
        held = -(-num_tokens // config.cache_config.block_size)
        num_blocks = pool.num_gpu_blocks - 1
        managers = getattr(self.scheduler, "kv_policy_managers", {}).values()
        for manager in managers:
            policy, spec = manager.default_policy, manager.kv_cache_spec
            if policy.bounded:
                budget = policy.budget(spec.block_size).total
                held = min(held, budget + 1)
                # What one step reads of prompts lies beside the budgets.
                num_blocks -= spec.max_admission_blocks - budget - 1
        return int(num_blocks // (held * max(len(managers), 1)))

    def stats(self) -> dict[str, Any]:
        """What the policy did so far, and the memory of the weights in bytes."""
        managers = getattr(self.scheduler, "kv_policy_managers", {}).values()
        counted = (
            "evicted_blocks",
            "copied_blocks",
            "read_blocks",
            "recalled_blocks",
            "dropped_blocks",
        )
        return {
            **{name: sum(getattr(m.stats, name) for m in managers) for name in counted},
            "peak_kv_blocks": getattr(self.scheduler, "peak_kv_blocks", None),
            "num_blocks": self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            "weight_bytes": weight_bytes(self.worker.get_model()),
        }

    def _scored_layers(self) -> list[Any]:
        layers = self.worker.vllm_config.compilation_config.static_forward_context.values()
        return [x for x in layers if getattr(x.impl, "keep_queries", None) is not None]

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
                    scoring.wrap(builder.buffers, "place_queries")
                    scoring.wrap(builder, "query_rows")
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


class EngineError(RuntimeError):
    """What went wrong in an engine's process, as its traceback."""


def _serve(connection: Any, arguments: tuple[Any, ...]) -> None:
    """Answer calls until ``None`` comes; a call that fails is not the end."""
    try:
        side = EngineSide(*arguments)
    except Exception:
        connection.send(EngineError(traceback.format_exc()))
        raise
    connection.send(None)
    while (call := connection.recv()) is not None:
        name, args, kwargs = call
        try:
            answer = getattr(side, name)(*args, **kwargs)
        except Exception:
            answer = EngineError(traceback.format_exc())
        connection.send(answer)


class RemoteEngine:
    """A handle on an :class:`EngineSide`; its methods run there.

    Args:
        connection: to its process.
        seconds: that start and calls may take, all together; ``None``: as long as they like.
    """

    def __init__(self, connection: Any, seconds: float | None = None) -> None:
        self._connection = connection
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._started = False

    def wait(self) -> None:
        """Until it has started.

        Raises:
            EngineError: it did not.
            TimeoutError: it took too long.
        """
        if not self._started:
            self._receive()
            self._started = True

    def _receive(self) -> Any:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        if not self._connection.poll(left):
            raise TimeoutError("an engine took longer than it was given")
        try:
            answer = self._connection.recv()
        except EOFError:
            raise EngineError("the process of an engine has ended") from None
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            self._connection.send((name, args, kwargs))
            return self._receive()

        return call


@contextmanager
def starting(
    model: str,
    policy: str | None = None,
    options: dict[str, int] | None = None,
    *,
    forcing: bool = True,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Iterator[RemoteEngine]:
    """Start an engine in a process of its own without waiting for it; stop it at the end.

    Args:
        model: a folder.
        policy: ``None`` for vLLM without one.
        options: of the policy.
        forcing: whether it can decode texts that are there already.
        seconds: what start and calls may take, all together.
        environment: variables beside those of this process.
        kwargs: of ``vllm.LLM``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process behind the process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    arguments = (str(model), policy, options or {}, kwargs, forcing)
    process = spawn.Process(target=_serve, args=(there, arguments), daemon=True)
    with _with_environment(environment or {}):
        process.start()
    there.close()
    try:
        yield RemoteEngine(here, seconds)
        if process.is_alive():
            here.send(None)
            process.join(30)
    finally:
        if process.is_alive():
            process.terminate()
            process.join(10)
        if process.is_alive():
            process.kill()


_spawning = threading.Lock()


@contextmanager
def _with_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """For a process that starts meanwhile: it takes the environment that its parent has then."""
    with _spawning:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def engine(
    model: str, policy: str | None = None, options: dict[str, int] | None = None, **kwargs: Any
) -> Iterator[RemoteEngine]:
    """The same, once it has started."""
    with starting(model, policy, options, **kwargs) as side:
        side.wait()
        yield side
