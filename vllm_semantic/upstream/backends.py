"""Which attention backends vLLM finds: its own, wrapped while a model loads, and XFORMERS."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config import WRAPPED_BACKENDS
from .signatures import parameters

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

XFORMERS_BACKEND = "vllm_semantic.engine.xformers_backend.XFormersBackend"

WRAPPED_MODULE = "vllm_semantic.engine.backend"
"""Has each of the wrapped backends under its name."""


@contextmanager
def wrapped_attention_backends() -> Iterator[None]:
    """While a model loads, let vLLM choose among wrapped attention backends.

    The overrides end with the load: another engine in the same process finds vLLM's own.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    known = AttentionBackendEnum.__members__  # XFORMERS only if it was asked for
    members = [known[name] for name in WRAPPED_BACKENDS if name in known]
    selector._cached_get_attn_backend.cache_clear()
    for member in members:
        register_backend(member, f"{WRAPPED_MODULE}.{member.name}")
    try:
        yield
    finally:
        for member in members:
            member.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def wants_xformers(engine_args: Any) -> bool:
    """Whether ``--attention-backend XFORMERS`` was given; vLLM still holds it as a string."""
    backend = engine_args.attention_backend or engine_args.attention_config.backend
    return str(getattr(backend, "name", backend)).upper() == "XFORMERS"


def backend_member(name: str) -> AttentionBackendEnum:
    """One of :data:`~.config.WRAPPED_BACKENDS`, as vLLM names it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return xformers_member() if name == "XFORMERS" else AttentionBackendEnum[name]


def xformers_member() -> AttentionBackendEnum:
    """The backend of our own, registered on first use; imports no xformers."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if "XFORMERS" not in AttentionBackendEnum.__members__:
        member = AttentionBackendEnum.register("XFORMERS", XFORMERS_BACKEND)
        # A spawned process unpickles the configuration before it loads plugins.
        member.__reduce_ex__ = lambda protocol: (xformers_member, ())  # type: ignore[method-assign]
    return AttentionBackendEnum["XFORMERS"]


def check_backend(member: AttentionBackendEnum) -> None:
    """Whether an attention backend can be wrapped as the plugin does it.

    Raises:
        ImportError: it does not import on this platform.
        TypeError: vLLM passes its implementation or its builder something else.
    """
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    from ..engine.backend import CapturingImpl

    try:
        backend = member.get_class()
        forward, builder = backend.get_impl_cls().forward, backend.get_builder_cls()
    except (ImportError, RuntimeError, AttributeError) as error:  # as their libraries have it
        raise ImportError(f"{type(error).__name__}: {error}") from error
    passed = parameters(CapturingImpl.forward)[:-2]
    if parameters(forward)[: len(passed)] != passed:
        raise TypeError(f"{member.name}: forward takes {', '.join(parameters(forward))}")
    if not issubclass(builder, AttentionMetadataBuilder):
        raise TypeError(f"{member.name}: {builder.__name__} is no AttentionMetadataBuilder")
