"""Semantic KV-block eviction for vLLM, as a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM

__version__ = "0.2.0"

__all__ = ["LLM", "register"]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; idempotent and cheap."""
    from .upstream.hooks import install

    install()


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from .llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
