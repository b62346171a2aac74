"""Engines in processes of their own, so that two sides can take turns in one run."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EngineSide:
    """What runs inside an engine's process. Every method is one measurement."""

    def __init__(self, model: str, policy: str | None, options: dict[str, int], kwargs: Any):
        from vllm_semantic import LLM

        from .forcing import ForcedText

        self.llm = LLM(
            model,
            kv_policy=policy,
            kv_policy_config=options or None,
            logits_processors=[ForcedText],
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

        preemptions = _count_calls(self.scheduler, "_preempt_request")
        params = SamplingParams(
            max_tokens=num_new, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(_prompts(prompts), params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"seconds": seconds, "tokens": tokens, "preemptions": preemptions.count}

    def decode_steps(
        self, prompts: list[list[int]], num_steps: int, instrument: bool = False
    ) -> dict[str, float]:
        """Mean seconds of a step in which every request decodes one token."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=num_steps + 2, temperature=0, ignore_eos=True, detokenize=False
        )
        engine = self.llm.llm_engine
        request_ids = [str(i) for i in range(len(prompts))]
        for request_id, prompt in zip(request_ids, _prompts(prompts), strict=True):
            engine.add_request(request_id, prompt, params)
        while any(request.is_prefill_chunk for request in self.scheduler.running) or (
            len(self.scheduler.running) < len(prompts)
        ):
            engine.step()
        clocks = self._instrument() if instrument else {}
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        seconds = time.perf_counter() - start
        shares = {name: clock.seconds / seconds for name, clock in clocks.items()}
        for clock in clocks.values():
            clock.remove()
        engine.abort_request(request_ids)
        while engine.has_unfinished_requests():
            engine.step()
        return {"seconds": seconds / num_steps, **shares}

    def nll(self, documents: list[list[int]], num_prompt: int) -> dict[str, Any]:
        """Negative log-likelihoods of each document after its prompt, token by token."""
        from .forcing import forced_params

        start = time.perf_counter()
        outputs = self.llm.generate(
            _prompts([document[:num_prompt] for document in documents]),
            [forced_params(document[num_prompt:]) for document in documents],
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

    def stats(self) -> dict[str, Any]:
        """What the policy did so far, and the memory of the weights in bytes."""
        managers = getattr(self.scheduler, "kv_policy_managers", {}).values()
        return {
            "evicted_blocks": sum(manager.stats.evicted_blocks for manager in managers),
            "peak_kv_blocks": getattr(self.scheduler, "peak_kv_blocks", None),
            "num_blocks": self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            "weight_bytes": weight_bytes(self.worker.get_model()),
        }

    def _instrument(self) -> dict[str, _Clock]:
        """Clocks on everything that the policy adds to a step."""
        scoring, eviction, compaction = _Clock(), _Clock(), _Clock()
        scoring.wrap(self.worker._block_scorer, "_score_group")
        for capture in self.worker._captures:
            scoring.wrap(capture, "record")
        eviction.wrap(self.worker, "_apply_evictions")
        for group_id, manager in self.scheduler.kv_policy_managers.items():
            for name in ("score_request", "record_scores"):
                scoring.wrap(manager, name)
            for name in ("remove_skipped_blocks", "take_evictions"):
                eviction.wrap(manager, name)
            for attn_group in self.worker.model_runner.attn_groups[group_id]:
                for builder in attn_group.metadata_builders:
                    compaction.wrap(builder, "_compact")
        return {"scoring": scoring, "eviction": eviction, "compaction": compaction}


class _Clock:
    """Seconds spent in some methods of some objects."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._wrapped: list[tuple[Any, str, Any, bool]] = []

    def wrap(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)
        self._wrapped.append((owner, name, function, name in vars(owner)))

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)

    def remove(self) -> None:
        for owner, name, function, own in self._wrapped:
            if own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)


class _Counter:
    count = 0


def _count_calls(owner: Any, name: str) -> _Counter:
    counter, function = _Counter(), getattr(type(owner), name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counter.count += 1
        return function(owner, *args, **kwargs)

    setattr(owner, name, counting)
    return counter


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
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
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
