"""What is reserved beside the KV cache covers what is taken."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_semantic.engine import scorer
from vllm_semantic.engine.cached_kv import CachedKV
from vllm_semantic.engine.query_windows import QueryWindows
from vllm_semantic.engine.scorer import BlockScorer, ScoredLayers, scratch_bytes
from vllm_semantic.messages import ScoreRequest
from vllm_semantic.policies import KVPolicy, SemanticPolicy
from vllm_semantic.policies.h2o import H2OPolicy
from vllm_semantic.policies.snapkv import SnapKVPolicy
from vllm_semantic.policies.trial import AttentionShape

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 8, 2, 64, 16
NUM_REQS, BLOCKS_EACH = 6, 20
SHAPE = AttentionShape(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
CPU = torch.device("cpu")


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at once."""

    def __init__(self, *outside: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._storages or not size:
            return
        self._storages.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._storages.discard(place)
        self.now -= size


@pytest.mark.parametrize(
    "policy",
    [
        SemanticPolicy(),
        SemanticPolicy(similarity="contribution"),
        H2OPolicy(),
        SnapKVPolicy(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("layers_at_once", [1, NUM_LAYERS])
def test_scoring_takes_no_more_than_it_says(
    policy: KVPolicy, layers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_blocks = NUM_REQS * BLOCKS_EACH
    kv_cache = torch.randn(NUM_LAYERS, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    windows = QueryWindows(policy.num_queries, NUM_REQS)
    queries = torch.randn(NUM_LAYERS, windows.num_rows, NUM_HEADS, HEAD_SIZE)
    layers = ScoredLayers(CachedKV(kv_cache, HEAD_SIZE, 1), queries, HEAD_SIZE**-0.5)
    of_request = layers_at_once * BLOCKS_EACH * layers.cache.block_numel
    monkeypatch.setattr(scorer, "MAX_GATHERED", of_request)
    logits = layers_at_once * num_blocks * NUM_HEADS * policy.num_queries
    monkeypatch.setattr(scorer, "MAX_LOGITS", logits)
    blocks = list(range(BLOCKS_EACH))
    asked = {
        str(i): ScoreRequest(
            policy, BLOCKS_EACH * BLOCK_SIZE, blocks, [i * BLOCKS_EACH + block for block in blocks]
        )
        for i in range(NUM_REQS)
    }
    score = BlockScorer({0: [layers]}, windows)
    expected = scratch_bytes(policy, NUM_LAYERS, num_blocks, SHAPE, CPU)
    with Peak(kv_cache, queries) as peak:
        score({0: asked}).collect()
    assert not score.failed
    assert peak.now < peak.most
    # Beside it: ids, rows and the scores themselves, a few numbers for each block.
    small = 64 * num_blocks * NUM_LAYERS
    assert peak.most <= expected + small
    # Nor does it say much too much.
    assert expected <= 2.5 * peak.most
