"""Where Triton kernels run, and on how many threads what runs on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SERIAL_NUMEL = 1 << 20
"""Elements below which threads cost more than they save: an operation on so many takes well under
a millisecond, and the threads of a busy machine meet no sooner than that."""

COMPILED_THREADS = 2
"""Threads on which torch's operations take as long as a kernel of ours does on one."""


def runs_triton(device: torch.device) -> bool:
    """Whether operations on tensors of ``device`` go to a Triton kernel: on a GPU, or anywhere
    under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def compiled_is_faster(numel: int) -> bool:
    """Whether a kernel that is compiled for the CPU, on the calling thread alone, is faster than
    torch's operations on as many threads as they would take.

    Args:
        numel: elements of the largest tensor that these would read, as a rule: what scores a
            request must not depend on what else is in its batch.
    """
    return numel < SERIAL_NUMEL or torch.get_num_threads() <= COMPILED_THREADS


@contextmanager
def threads_for(numel: int) -> Iterator[None]:
    """Run small operations on the calling thread alone.

    vLLM's CPU worker has put a function that does nothing in the place of
    ``torch.set_num_threads``, since threads that are made later are bound to no core
    (vllm/v1/worker/cpu_worker.py). One thread ends none of the others and makes none.

    Args:
        numel: elements of the largest tensor that is read.
    """
    before = torch.get_num_threads()
    if numel >= SERIAL_NUMEL or before == 1:
        yield
        return
    torch._C.set_num_threads(1)
    try:
        yield
    finally:
        torch._C.set_num_threads(before)
