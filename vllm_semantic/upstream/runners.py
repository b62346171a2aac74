"""What the policy reads of vLLM's two model runners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1
from vllm.v1.worker.utils import AttentionGroup


class RunnerAccess(ABC):
    """One view on both runners."""

    name: str

    @abstractmethod
    def batch_order(self) -> Sequence[str]:
        """The requests of the batch whose metadata is being built, row by row."""

    @abstractmethod
    def without_graphs(self) -> AbstractContextManager[None]:
        """For a step whose attention does what no CUDA graph has captured, and for its drafts."""

    @abstractmethod
    def draft_layers(self) -> Set[str]:
        """The names of the attention layers of a model that drafts."""

    @abstractmethod
    def draft_groups(self) -> Sequence[AttentionGroup]:
        """These layers with metadata builders of their own, once the KV cache exists; the model's
        groups list them as well."""

    @abstractmethod
    def copy_stream(self) -> torch.cuda.Stream | None:
        """What this step's output is copied to the host on; ``None``: not asynchronously."""


class RunnerV1(RunnerAccess):
    """``vllm.v1.worker.gpu_model_runner``."""

    name = "V1"

    def __init__(self, runner: GPUModelRunnerV1) -> None:
        self._runner = runner

    def batch_order(self) -> Sequence[str]:
        return self._runner.input_batch.req_ids

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        dispatcher = self._runner.cudagraph_dispatcher
        dispatch = dispatcher.dispatch
        none = {"valid_modes": {CUDAGraphMode.NONE}, "invalid_modes": None}
        with replaced(
            dispatcher, "dispatch", lambda *args, **kwargs: dispatch(*args, **kwargs | none)
        ):
            yield

    def draft_layers(self) -> Set[str]:
        return getattr(self._drafter, "_draft_attn_layer_names", frozenset())

    def draft_groups(self) -> Sequence[AttentionGroup]:
        return getattr(self._drafter, "draft_attn_groups", ())

    @property
    def _drafter(self) -> Any:
        return getattr(self._runner, "drafter", None)

    def copy_stream(self) -> torch.cuda.Stream | None:
        return self._runner.async_output_copy_stream


class RunnerV2(RunnerAccess):
    """``vllm.v1.worker.gpu.model_runner``."""

    name = "V2"

    def __init__(self, runner: GPUModelRunnerV2) -> None:
        self._runner = runner
        self._order: Sequence[str] = ()
        prepare_attn = runner.prepare_attn

        def follow(input_batch: InputBatch) -> Any:
            # Not every model's state passes the rows' requests on to the metadata.
            self._order = input_batch.req_ids
            return prepare_attn(input_batch)

        runner.prepare_attn = follow

    def batch_order(self) -> Sequence[str]:
        return self._order

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        drafter = self._runner.speculator
        managers = (
            self._runner.cudagraph_manager,
            # It attends once more to what the step's metadata says.
            getattr(drafter, "prefill_cudagraph_manager", None),
        )
        with ExitStack() as stack:
            for manager in filter(None, managers):
                stack.enter_context(replaced(manager, "_graphs_captured", False))
            yield

    def draft_layers(self) -> Set[str]:
        return getattr(self._runner.speculator, "draft_attn_layer_names", frozenset())

    def draft_groups(self) -> Sequence[AttentionGroup]:
        groups = getattr(self._runner.speculator, "attn_groups", ())
        return [attn_group for of_cache in groups for attn_group in of_cache]

    def copy_stream(self) -> torch.cuda.Stream | None:
        return self._runner.output_copy_stream


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object with another value, for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def access(runner: Any) -> RunnerAccess:
    """The view on a worker's runner.

    Raises:
        ValueError: it is neither of vLLM's own.
    """
    if isinstance(runner, GPUModelRunnerV2):
        return RunnerV2(runner)
    if isinstance(runner, GPUModelRunnerV1):
        return RunnerV1(runner)
    raise ValueError(
        f"--kv-policy does not support the model runner {type(runner).__module__}."
        f"{type(runner).__name__}; allowed: {GPUModelRunnerV1.__module__}, "
        f"{GPUModelRunnerV2.__module__}"
    )
