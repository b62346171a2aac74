"""What the policy reads of vLLM's two model runners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1


class RunnerAccess(ABC):
    """One view on both runners."""

    name: str

    @abstractmethod
    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """The requests of the batch whose metadata is being built, row by row."""

    @abstractmethod
    def rewind(self, num_tokens: Mapping[str, int]) -> None:
        """Have running requests compute again what follows so many first tokens of each."""

    @abstractmethod
    def copy_stream(self) -> torch.cuda.Stream | None:
        """What this step's output is copied to the host on; ``None``: not asynchronously."""


class RunnerV1(RunnerAccess):
    """``vllm.v1.worker.gpu_model_runner``."""

    name = "V1"

    def __init__(self, runner: GPUModelRunnerV1) -> None:
        self._runner = runner

    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        return self._runner.input_batch.req_ids

    def rewind(self, num_tokens: Mapping[str, int]) -> None:
        """Nothing: the runner takes the numbers from the scheduler in each step."""

    def copy_stream(self) -> torch.cuda.Stream | None:
        return self._runner.async_output_copy_stream


class RunnerV2(RunnerAccess):
    """``vllm.v1.worker.gpu.model_runner``."""

    name = "V2"

    def __init__(self, runner: GPUModelRunnerV2) -> None:
        self._runner = runner

    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        slots = self._runner.req_states.index_to_req_id
        return [slots[slot] for slot in common.req_idx]  # type: ignore[union-attr]

    def rewind(self, num_tokens: Mapping[str, int]) -> None:
        """The device counts for itself; on the host the runner takes the scheduler's numbers.

        Not by vLLM's staged writes: their buffers are there for one write in each step.
        """
        states = self._runner.req_states
        counts, slots = states.num_computed_tokens.gpu, map(states.req_id_to_index.get, num_tokens)
        counts.index_copy_(
            0,
            async_tensor_h2d(list(slots), counts.device, torch.int64),
            async_tensor_h2d(list(num_tokens.values()), counts.device, counts.dtype),
        )
        for request_id, left in num_tokens.items():
            self._forget_prompt_logprobs(request_id, left)

    def _forget_prompt_logprobs(self, request_id: str, num_tokens: int) -> None:
        """What comes is put behind what there is: drop those of the tokens that are read again."""
        worker = self._runner.prompt_logprobs_worker
        parts = worker.in_progress_prompt_logprobs.get(request_id) if worker else None
        for i, part in enumerate(parts or ()):
            parts[i] = part._replace(
                logprob_token_ids=part.logprob_token_ids[:num_tokens],
                logprobs=part.logprobs[:num_tokens],
                selected_token_ranks=part.selected_token_ranks[:num_tokens],
            )
            num_tokens -= len(parts[i].logprobs)

    def copy_stream(self) -> torch.cuda.Stream | None:
        return self._runner.output_copy_stream


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
