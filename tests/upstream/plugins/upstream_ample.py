"""Loaded into vLLM's pytest run: ``SemanticSpec`` groups in place of full-attention ones.

What a test constructs by the names in ``substitutes`` is ours instead; vLLM's own modules are
left alone. The budget is more than any test's sequence, so whatever a test can see should be
what it sees of vLLM. Everything built is counted.
"""

from __future__ import annotations

import functools
import sys
from abc import ABCMeta
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_semantic import register
from vllm_semantic.engine.manager import SemanticManager
from vllm_semantic.engine.scheduler import AsyncSemanticScheduler, KVPolicyMixin, SemanticScheduler
from vllm_semantic.engine.spec import SemanticSpec, semantic_spec
from vllm_semantic.policies import SemanticPolicy
from vllm_semantic.served import CONFIG_KEY, ServedPolicies

AMPLE = 1 << 20
"""Tokens of each part of the budget; also larger than any test's block."""

POLICY = SemanticPolicy(sink_tokens=AMPLE, recent_tokens=AMPLE, semantic_tokens=AMPLE)
SERVED = ServedPolicies(POLICY.name, POLICY)

CONFIG = SimpleNamespace(
    scheduler_config=SimpleNamespace(max_num_batched_tokens=8192, async_scheduling=False),
    max_in_flight_tokens=8192,
)
"""Of a spec that no scheduler has been given yet."""

built: Counter[str] = Counter()


# -- what a test constructs --------------------------------------------------------------


def _spec(*args: Any, **kwargs: Any) -> Any:
    """As the wrapped attention backends do it for each layer of a model."""
    return semantic_spec(FullAttentionSpec(*args, **kwargs), SERVED, CONFIG)


def _scheduler(stock: type[Scheduler], ours: type[Scheduler], *args: Any, **kwargs: Any) -> Any:
    """Ours, unless no group is under the policy: then the plugin refuses to start."""
    vllm_config, cache_config = kwargs["vllm_config"], kwargs["kv_cache_config"]
    groups = [g for g in cache_config.kv_cache_groups if type(g.kv_cache_spec) is SemanticSpec]
    for group in groups:
        group.kv_cache_spec = replace(
            group.kv_cache_spec,
            prefill_interval=vllm_config.scheduler_config.max_num_batched_tokens,
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            eviction_delay=int(vllm_config.scheduler_config.async_scheduling or 0),
        )
    return (ours if groups else stock)(*args, **kwargs)


def _constructs(original: type, build: Callable[..., Any]) -> type:
    """A class that is ``original`` in every way but what calling it gives."""
    metaclass = type(
        "Substituting",
        (ABCMeta,),
        {
            "__call__": lambda cls, *args, **kwargs: build(*args, **kwargs),
            "__instancecheck__": lambda cls, instance: isinstance(instance, original),
        },
    )
    return metaclass(original.__name__, (original,), {"__module__": original.__module__})


substitutes = {
    FullAttentionSpec: _constructs(FullAttentionSpec, _spec),
    FullAttentionManager: _constructs(FullAttentionManager, SemanticManager),
    Scheduler: _constructs(Scheduler, functools.partial(_scheduler, Scheduler, SemanticScheduler)),
    AsyncScheduler: _constructs(
        AsyncScheduler, functools.partial(_scheduler, AsyncScheduler, AsyncSemanticScheduler)
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Substitute in the test modules and their helpers, all imported by now."""
    modules = {item.module for item in items}  # some are not below the package ``tests``
    modules |= {module for name, module in sys.modules.items() if name.startswith("tests.")}
    for module in modules:
        for original, substitute in substitutes.items():
            if vars(module).get(original.__name__) is original:
                setattr(module, original.__name__, substitute)


# -- engines -----------------------------------------------------------------------------


def pytest_configure() -> None:
    register()
    EngineArgs.create_engine_config = _under_policy(EngineArgs.create_engine_config)


def _under_policy(create_engine_config: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_engine_config)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.additional_config = {CONFIG_KEY: {"name": POLICY.name, **POLICY.parts()}}
        return create_engine_config(self, *args, **kwargs)

    return wrapper


# -- counts ------------------------------------------------------------------------------


def _count(cls: type, method: str, name: Callable[[Any], str | None]) -> None:
    original = getattr(cls, method)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (counted := name(self)) is not None:
            built[counted] += 1
        return result

    setattr(cls, method, wrapper)


def _stock_manager(manager: FullAttentionManager) -> str | None:
    """Those left, by what they manage: some kinds of attention are none of the plugin's."""
    if type(manager) is not FullAttentionManager:
        return None
    return f"stock_managers_{type(manager.kv_cache_spec).__name__}"


_count(SemanticManager, "__init__", lambda manager: "semantic_managers")
_count(SemanticManager, "_evict", lambda manager: "evictions")
_count(KVPolicyMixin, "__init__", lambda scheduler: "semantic_schedulers")
_count(FullAttentionManager, "__init__", _stock_manager)
_count(
    Scheduler,
    "__init__",
    lambda s: "stock_schedulers" if type(s) in (Scheduler, AsyncScheduler) else None,
)


@pytest.fixture(autouse=True)
def count(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """What this test built."""
    before = built.copy()
    yield
    for name, number in (built - before).items():
        record_property(name, number)


@pytest.fixture(scope="session", autouse=True)
def count_all(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """What all tests built."""
    yield
    for name, number in built.items():
        record_testsuite_property(name, number)
