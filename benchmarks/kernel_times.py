"""What a device does in a step, kernel by kernel, and what of it a policy adds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Means of a step."""

    seconds: float
    calls: float


Kernels = dict[str, Times]
"""By the name of a kernel; on a CPU, of an operator."""

ATTENTION = re.compile(r"attention|attn|flash|fmha", re.IGNORECASE)

SHAPED = re.compile(r"gemm|nvjet|cutlass|cublas|aten::(add|b)?mm\b|onednn", re.IGNORECASE)
"""Matrix products: libraries choose among kernels, of other names, by shape."""


def kernel_times(device: Any, run: Callable[[], Any], num_steps: int) -> Kernels:
    """Profile ``num_steps`` steps that ``run`` makes, from an idle device to one."""
    import torch
    from torch.autograd import DeviceType

    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        run()
    kernels: Kernels = {}
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) != on_gpu or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        before = kernels.get(event.key, Times(0.0, 0.0))
        kernels[event.key] = Times(
            before.seconds + microseconds / 1e6 / num_steps, before.calls + event.count / num_steps
        )
    return kernels


def total_seconds(kernels: Kernels) -> float:
    """All kernels of a step."""
    return sum(of.seconds for of in kernels.values())


def attention_seconds(kernels: Kernels) -> float:
    """The attention kernels of a step."""
    return sum(of.seconds for name, of in kernels.items() if ATTENTION.search(name))


def added(policy: Kernels, stock: Kernels) -> Kernels:
    """What a policy launches in a step beside what stock vLLM does there.

    A kernel counts as far as it runs more often: a graph that is replayed does not tell who
    captured a kernel. Attention and matrix products have other names at other shapes and are
    left out; the two sides have to be at the same lengths for them to be alike.
    """
    more = {}
    for name, of in policy.items():
        calls = of.calls - (stock[name].calls if name in stock else 0.0)
        if calls > 0 and not ATTENTION.search(name) and not SHAPED.search(name):
            more[name] = Times(of.seconds * calls / of.calls, calls)
    return dict(sorted(more.items(), key=lambda item: -item[1].seconds))
