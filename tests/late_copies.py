"""KV offloading for CPU engines: vLLM's own in all but the copies, which it has for GPUs alone.

A copy out is made as late as a GPU may make it: when vLLM waits for it, or some steps later.
Whoever overwrites a block before then stores what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

STEPS = 6
"""That a copy out takes."""


class LateCopies(CPUOffloadingSpec):
    """Named by ``spec_name`` in the configuration of ``OffloadingConnector``."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return Worker(kv_caches, self.blocks_per_chunk, self.num_chunks)


class Worker(OffloadingWorker):
    """Copies whole blocks between a KV cache and chunks of host memory."""

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, num_chunks: int
    ) -> None:
        self.caches = [of.tensor for of in kv_caches.tensors]
        self.groups = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self.blocks_per_chunk = blocks_per_chunk
        size = num_chunks * blocks_per_chunk
        self.host = [cache.new_empty((size, cache.shape[1])) for cache in self.caches]
        self.pending: dict[int, tuple[int, GPULoadStoreSpec, CPULoadStoreSpec]] = {}
        self.finished: list[TransferResult] = []
        self.waited: list[int] = []
        """Copies out that vLLM had to wait for."""

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        self.pending[job_id] = STEPS, src_spec, dst_spec
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        num_bytes = sum(
            self.caches[i][block].copy_(self.host[i][place]).nbytes
            for i, block, place in self._places(dst_spec, src_spec)
        )
        self.finished.append(TransferResult(job_id, True, num_bytes, 1e-6))
        return True

    def get_finished(self) -> list[TransferResult]:
        for job_id, (steps, *specs) in list(self.pending.items()):
            self.pending[job_id] = steps - 1, *specs
            if steps == 0:
                self._store(job_id)
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self.pending.keys():
            self.waited.append(job_id)
            self._store(job_id)

    def _store(self, job_id: int) -> None:
        _, src_spec, dst_spec = self.pending.pop(job_id)
        num_bytes = sum(
            self.host[i][place].copy_(self.caches[i][block]).nbytes
            for i, block, place in self._places(src_spec, dst_spec)
        )
        self.finished.append(TransferResult(job_id, True, num_bytes, 1e-6))

    def _places(
        self, device: GPULoadStoreSpec, host: CPULoadStoreSpec
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Index of a cache, a block in it, and its place in host memory."""
        blocks, chunks = iter(device.block_ids.tolist()), iter(host.block_ids.tolist())
        for group, (num_blocks, first) in enumerate(
            zip(device.group_sizes, device.block_indices, strict=True)
        ):
            chunk = None
            for index in range(first, first + num_blocks):
                if chunk is None or index % self.blocks_per_chunk == 0:
                    chunk = next(chunks)
                block = next(blocks)
                place = chunk * self.blocks_per_chunk + index % self.blocks_per_chunk
                for i in self.groups[group]:
                    yield i, block, place
        assert next(chunks, None) is None
