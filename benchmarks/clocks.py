"""Time and counts of what happens inside an engine, without changing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Clock:
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


class Stopwatch:
    """Seconds of calls on a device: by its own events where it has a clock of its own."""

    def __init__(self, device: Any) -> None:
        self._on_gpu = device.type == "cuda"

    def mean(self, call: Callable[[], Any], calls: int) -> float:
        """Mean seconds of a call, after three that only warm up."""
        import torch

        for _ in range(3):
            call()
        if not self._on_gpu:
            began = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - began) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


def synchronize(device: Any) -> None:
    """Wait until a device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def follow(owner: Any, name: str, see: Callable[[Any], Any]) -> None:
    """Show every result of a method to ``see``; ``del owner.name`` ends it."""
    function = getattr(owner, name)

    def following(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        see(result)
        return result

    setattr(owner, name, following)


class Counter:
    count = 0


def count_calls(owner: Any, name: str) -> Counter:
    counter, function = Counter(), getattr(type(owner), name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counter.count += 1
        return function(owner, *args, **kwargs)

    setattr(owner, name, counting)
    return counter
