"""Model Runner V2 on a CPU: its Triton kernels, and ours, through Triton's interpreter.

Call :func:`install` before anything imports vLLM; a process is one or the other for good.
"""

from __future__ import annotations

import os
from typing import Any

SWITCH = "KV_POLICY_TEST_RUNNER"
"""Environment variable; ``V2`` runs the tests of a process on Model Runner V2."""


def wanted() -> bool:
    return os.environ.get(SWITCH) == "V2"


def install() -> None:
    """Make vLLM believe that Triton has a device here; every kernel is then interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        driver: Any = Driver

    triton.backends.backends["cpu"] = Backend


def allow_async_scheduling() -> None:
    """Let an engine schedule ahead, as GPUs do by default; vLLM turns it off on CPUs.

    There it gains nothing; here it shows that scores a step late are handled.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(checked)
