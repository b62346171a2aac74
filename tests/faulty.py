"""Policies that fail, importable in the processes of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_semantic.policies import BlockView
from vllm_semantic.policies.tova import TOVAPolicy


@dataclass(frozen=True, kw_only=True)
class SpoiltPolicy(TOVAPolicy):
    """What a test makes of good scores; with a memory, as the default policy has."""

    name: ClassVar[str] = "spoilt"
    decay: ClassVar[float] = 0.8

    @staticmethod
    def spoil(view: BlockView, scores: torch.Tensor) -> Any:
        """Replaced by tests; engines run in their process."""
        return scores

    def score(self, view: BlockView) -> torch.Tensor:
        return self.spoil(view, super().score(view))


@dataclass(frozen=True, kw_only=True)
class OneRankFailsPolicy(TOVAPolicy):
    """Fails on the second of two ranks, but not at start: there it sees one block throughout."""

    name: ClassVar[str] = "one_rank_fails"

    def score(self, view: BlockView) -> torch.Tensor:
        from vllm.distributed import get_tensor_model_parallel_rank

        in_worker = torch.distributed.is_initialized()
        at_start = torch.equal(view.keys[:, 0], view.keys[:, 1])
        if in_worker and not at_start and get_tensor_model_parallel_rank() == 1:
            raise RuntimeError("only here")
        return super().score(view)


@dataclass(frozen=True, kw_only=True)
class NeverScoresPolicy(TOVAPolicy):
    """Fails in every worker, at start already, where one block stands for all; not before."""

    name: ClassVar[str] = "never_scores"

    def score(self, view: BlockView) -> torch.Tensor:
        if torch.equal(view.keys[:, 0], view.keys[:, 1]):
            raise RuntimeError("not even once")
        return super().score(view)
