"""Loaded into vLLM's pytest run, all three ways: what its ``conftest.py`` would give, and proof.

That file's imports need more than a CPU installation has, so the suite runs without it.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ENGINE_CACHE_BYTES = 64 << 20
"""KV cache of the suite's few engines; by default they would take most of the memory."""


def pytest_configure() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # as each of vLLM's processes does; VLLM_PLUGINS says which
    EngineArgs.create_engine_config = _small_cache(EngineArgs.create_engine_config)


def _small_cache(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.kv_cache_memory_bytes = self.kv_cache_memory_bytes or ENGINE_CACHE_BYTES
        return create_engine_config(self, *args, **kwargs)

    return wrapper


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """As vLLM's ``tests/conftest.py`` has it: its log reaches the root logger."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        yield caplog


@pytest.fixture(scope="session", autouse=True)
def say_what_was_loaded(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """Whether the plugin was installed, and whether any class of its engine was imported."""
    from vllm.engine.arg_utils import EngineArgs

    yield
    record_testsuite_property("plugin_installed", hasattr(EngineArgs, "kv_policy_hook"))
    record_testsuite_property("engine_imported", "vllm_semantic.engine" in sys.modules)
