"""What the policy reads and writes of vLLM's two model runners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1

from ..messages import BlockIndices


class RunnerAccess(ABC):
    """One view on both runners."""

    name: str

    @abstractmethod
    def null_blocks(
        self, group_id: int, evictions: Mapping[str, BlockIndices], kernel_blocks: int
    ) -> None:
        """Write the null block into the block tables that the next step is built from.

        Rows of running requests only ever grow, so an entry stays null once written.

        Args:
            group_id: the KV cache group.
            evictions: logical blocks of running requests.
            kernel_blocks: kernel blocks in a block of the manager.
        """

    @abstractmethod
    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """The requests of the batch whose metadata is being built, row by row."""

    @abstractmethod
    def copy_stream(self) -> torch.cuda.Stream | None:
        """What this step's output is copied to the host on; ``None``: not asynchronously."""


class RunnerV1(RunnerAccess):
    """``vllm.v1.worker.gpu_model_runner``: block tables live on the host."""

    name = "V1"

    def __init__(self, runner: GPUModelRunnerV1) -> None:
        self._runner = runner

    def null_blocks(
        self, group_id: int, evictions: Mapping[str, BlockIndices], kernel_blocks: int
    ) -> None:
        # The last step may still be copying these rows to the device.
        with self._runner.synchronize_input_prep():
            for request_id, block_indices in evictions.items():
                self._null_row(group_id, request_id, block_indices, kernel_blocks)

    def _null_row(
        self, group_id: int, request_id: str, block_indices: BlockIndices, kernel_blocks: int
    ) -> None:
        block_ids = self._runner.requests[request_id].block_ids[group_id]
        for index in block_indices:
            block_ids[index] = 0
        row = self._runner.input_batch.req_id_to_index.get(request_id)
        if row is None:
            return
        table = self._runner.input_batch.block_table[group_id].block_table.np
        for index in block_indices:
            start = index * kernel_blocks
            # An expanded null block is the kernel blocks 0, 1, ...
            table[row, start : start + kernel_blocks] = range(kernel_blocks)

    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        return self._runner.input_batch.req_ids

    def copy_stream(self) -> torch.cuda.Stream | None:
        return self._runner.async_output_copy_stream


class RunnerV2(RunnerAccess):
    """``vllm.v1.worker.gpu.model_runner``: block tables live on the device, in manager blocks."""

    name = "V2"

    def __init__(self, runner: GPUModelRunnerV2) -> None:
        self._runner = runner
        self._null_block_id = torch.zeros((), dtype=torch.int32, device=runner.device)

    def null_blocks(
        self, group_id: int, evictions: Mapping[str, BlockIndices], kernel_blocks: int
    ) -> None:
        # Staged writes take one contiguous range a request; evicted blocks are scattered. These
        # entries were written in earlier steps, so a scatter on the same stream is in order.
        slots = self._runner.req_states.req_id_to_index
        rows = [slots[request_id] for request_id, blocks in evictions.items() for _ in blocks]
        columns = [index for blocks in evictions.values() for index in blocks]
        table = self._runner.block_tables.block_tables[group_id].gpu
        places = async_tensor_h2d([rows, columns], table.device, torch.int64)
        table.index_put_(tuple(places), self._null_block_id)

    def batch_order(self, common: CommonAttentionMetadata) -> Sequence[str]:
        slots = self._runner.req_states.index_to_req_id
        return [slots[slot] for slot in common.req_idx]  # type: ignore[union-attr]

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
