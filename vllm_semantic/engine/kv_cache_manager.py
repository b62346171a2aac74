"""vLLM's KV cache manager, with a short way through the steps that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager

from .host_pool import HostPool
from .manager import NoRoomError, SemanticManager

if TYPE_CHECKING:
    from vllm.v1.request import Request


class SemanticKVCacheManager(KVCacheManager):
    """Skips vLLM's allocation in the steps that change none of a request's blocks.

    A decoding request needs a block, fills one, or reaches an eviction point once per block. In
    every other step vLLM's ``allocate_slots`` asks each manager what is to be freed, allocated and
    cached, to find that nothing is. Here that is known from the last step that changed something.
    """

    unchanged_until: dict[str, float]
    """By request, the computed tokens up to which a step neither needs a block, nor evicts one,
    nor makes one shareable. Found again after each step that goes past them."""

    host_pool: HostPool | None
    """What keeps evicted blocks. Written by the scheduler."""

    @classmethod
    def take_over(cls, manager: KVCacheManager) -> SemanticKVCacheManager:
        """Turn the manager that vLLM's scheduler has just built into one of this class.

        The scheduler names the class that it builds, and hands the manager to nobody before it
        is built itself.
        """
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.unchanged_until = {}
        manager.host_pool = None
        # For all groups: layers with a window are not under a policy, and see what is.
        manager._cache_blocks = manager.coordinator.cache_blocks
        manager.coordinator.cache_blocks = manager._cache_exact_blocks
        return manager

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """Allocate slots as vLLM does; nothing is to be done up to :attr:`unchanged_until`."""
        end = request.num_computed_tokens + num_new_tokens + kwargs.get("num_lookahead_tokens", 0)
        until = self.unchanged_until.get(request.request_id)
        if until is not None and end <= until:  # unknown of one that begins, with a prefix or not
            return self.empty_kv_cache_blocks
        try:
            blocks = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        except NoRoomError:
            return None  # as where the step's own tokens find no room
        if blocks is not None:
            self._find_unchanged(request)
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Make full blocks shareable as vLLM does; asynchronously, it asks after every token."""
        if num_computed_tokens > self.unchanged_until.get(request.request_id, 0):
            super().cache_blocks(request, num_computed_tokens)

    def _cache_exact_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Offer blocks for sharing, in any group, but none computed after an eviction in one."""
        for manager in self.coordinator.single_type_managers:
            if isinstance(manager, SemanticManager):
                exact = manager.num_exact_tokens(request.request_id)
                num_computed_tokens = min(num_computed_tokens, exact)
        self._cache_blocks(request, num_computed_tokens)

    def reset_prefix_cache(self) -> bool:
        """Forget which blocks are equal to which, in host memory too: the model may change."""
        reset: bool = super().reset_prefix_cache()
        if reset and self.host_pool is not None:
            self.host_pool.forget_contents()
        return reset

    def forget(self, request_id: str) -> None:
        """Drop what is remembered of a request: its blocks are freed, or its prompt has changed."""
        self.unchanged_until.pop(request_id, None)

    def free(self, request: Request) -> None:
        """Free a request that finished, was aborted or was preempted."""
        self.forget(request.request_id)
        super().free(request)

    def pop_blocks_for_free(self, request: Request) -> Any:
        """Take a request's blocks, to be freed later."""
        self.forget(request.request_id)
        return super().pop_blocks_for_free(request)

    def _find_unchanged(self, request: Request) -> None:
        """Called with the tokens computed before the step: its own are not counted yet."""
        until = None
        for manager in self.coordinator.single_type_managers:
            if not isinstance(manager, SemanticManager):
                return  # vLLM's own, beside ours in a hybrid model, have rules of theirs
            if until is None:
                until = manager.evicts_from(request)
            until = min(until, manager.filled_until(request))
        if until is not None:
            self.unchanged_until[request.request_id] = until
