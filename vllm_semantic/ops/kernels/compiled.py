"""Functions that numba compiles for the CPU they run on."""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba

REORDERED = {"reassoc", "contract", "arcp", "nsz"}
"""What a compiler may do to sums, or no loop over one would use vectors. NaN stays NaN."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call with arguments of their kinds; on disk where one can be written."""
    try:
        return numba.njit(fastmath=REORDERED, cache=True)(function)
    except RuntimeError:  # no folder for it
        return numba.njit(fastmath=REORDERED)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile into the callers."""
    return numba.njit(fastmath=REORDERED, inline="always")(function)


def _without_attributes(library: type) -> None:
    """Let a CPU worker of vLLM 0.32 start in a process that has imported numba.

    It asks all that any module knows for its ``__dict__`` (vllm/triton_utils/dispatcher.py), and
    llvmlite's library would answer to that with a function, as it does to every name.
    """
    find = library.__getattr__  # type: ignore[attr-defined]

    def find_function(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return find(self, name)

    library.__getattr__ = find_function  # type: ignore[attr-defined]


_without_attributes(type(llvmlite.binding.ffi.lib))
