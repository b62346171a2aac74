"""What vLLM runs on in this process, and what follows from it for tests.

On a GPU the suites run on what vLLM chooses there: Model Runner V2, asynchronous scheduling, and
for the float32 of most tests TRITON_ATTN, as FLASH_ATTN and FLASHINFER take 16 bits alone.

Importing this loads neither vLLM nor torch, which would count threads before conftest.py says how
many.
"""

from __future__ import annotations

from functools import cache

from . import interpreter


@cache
def on_gpu() -> bool:
    """Whether vLLM's CUDA build found a GPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def schedules_ahead() -> bool:
    """Whether an engine schedules a step before the output of the last has come."""
    return on_gpu() or interpreter.wanted()


def eviction_delay() -> int:
    """Tokens after an eviction that still see its blocks."""
    return int(schedules_ahead())


def default_block_size() -> int:
    """What a policy sets where nobody says."""
    from vllm_semantic.upstream.hooks import DEFAULT_BLOCK_SIZE

    return DEFAULT_BLOCK_SIZE["cuda" if on_gpu() else "cpu"]


def stock_block_size() -> int:
    """What vLLM sets where nobody says."""
    return 16 if on_gpu() else 128


def enough_devices(wanted: int) -> bool:
    """Whether so many workers can run here; any number share a CPU."""
    from vllm.platforms import current_platform

    return not on_gpu() or current_platform.device_count() >= wanted
