"""A paged cache in plain torch: what a rule would do, many documents at once, without an engine.

For the search of ``docs/research.md``: a variant of a rule takes seconds here and a few lines.
What an engine does with the same rule is measured by ``benchmarks/quality.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from vllm_semantic.layer_groups import skew_blocks
from vllm_semantic.policies.base import BlockBudget

BLOCK_SIZE = 32
WINDOW = 32
"""Queries that rules may look at."""


@dataclass
class State:
    """What a rule sees of all documents at an eviction point, in one group of layers."""

    point: int
    """Tokens computed."""
    blocks: Tensor  # [num_docs, num_held] int64, logical: all full blocks
    recent: Tensor  # [num_docs, num_recent] int64
    queries: Tensor  # [num_layers, num_docs, num_heads, WINDOW, head_size], the newest last
    mass: Tensor  # [num_layers, num_docs, num_heads, WINDOW, num_blocks] attention by logical block
    peak: Tensor  # the same, of the token that gets most
    added: Tensor  # the same, attention times the norm of the value
    gather: Callable[[Tensor, bool], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)
    """Kept between points, for rules that add up."""

    def keys(self) -> Tensor:
        """``[num_layers, num_docs, num_kv_heads, num_held, block_size, head_size]``."""
        return self.gather(self.blocks, False)

    def values(self) -> Tensor:
        """As :meth:`keys`."""
        return self.gather(self.blocks, True)


Rule = Callable[[State], Tensor]
"""Scores ``[num_docs, num_held]``, higher = keep."""


@dataclass(frozen=True)
class Prompt:
    """The beginnings of documents, read."""

    documents: Tensor
    point: int
    cache: Tensor
    layers: list[tuple[Tensor, ...]]
    logits: Tensor


class PagedDecoder:
    """Decodes documents in step, each with a cache of its own that a rule keeps small."""

    def __init__(self, model: str) -> None:
        AttentionInterface.register("paged-decoder", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="paged-decoder"
        ).eval()
        config = self.model.config
        self.num_layers = config.num_hidden_layers
        self._layers: list[tuple[Tensor, ...]] = []
        self._prompt: Prompt | None = None
        self.shape = (config.num_key_value_heads, config.head_dim)

    @torch.inference_mode()
    def losses(
        self,
        documents: Tensor,
        num_prompt: int,
        split: BlockBudget | None = None,
        rule: Rule | None = None,
        num_groups: int = 1,
        skew: int = 0,
    ) -> Tensor:
        """Losses in nats of the tokens after the prompt, ``[num_docs, length - num_prompt]``.

        Args:
            documents: ``[num_docs, length]`` int64.
            num_prompt: tokens read at once; blocks go at its end and then at every full block.
            split: the budget; ``None`` keeps all.
            rule: what the selected blocks are kept by; ``None``: age.
            num_groups: equal shares of the layers, each of which keeps blocks of its own.
            skew: blocks that the last group selects more, and the first fewer.
        """
        num_docs, length = documents.shape
        num_kv_heads, head_size = self.shape
        size = (self.num_layers, num_docs, num_kv_heads, length, head_size)
        self._cache = torch.zeros(2, *size)
        self._num_blocks = -(-length // BLOCK_SIZE)
        self._share = self.num_layers // num_groups
        memories: list[dict[str, Any]] = [{} for _ in range(num_groups)]
        if split is not None:
            splits = [
                split.shifted(skew_blocks(group, num_groups, skew, 1))
                for group in range(num_groups)
            ]
        full = [n for n in range(num_prompt + 1, length) if n % BLOCK_SIZE == 0]
        kept = [torch.zeros(num_docs, 0, dtype=torch.int64)] * num_groups
        seen = start = 0
        found = []
        for point in [num_prompt, *full, length]:
            tail = torch.arange(seen * BLOCK_SIZE, point).expand(num_docs, -1)
            self._positions = [torch.cat((tokens_of(of), tail), dim=1) for of in kept]
            first, last = max(start, num_prompt - 1), min(point, length - 1)
            if start == 0:
                logits = self._read_prompt(documents, point)
            else:
                logits = self._forward(documents, start, point, point - first)
            if last > first:
                chosen = logits[:, : last - first].log_softmax(-1)
                goal = documents[:, first + 1 : last + 1, None]
                found.append(-chosen.gather(2, goal)[..., 0])
            start, num_full = point, point // BLOCK_SIZE
            new = torch.arange(seen, num_full).expand(num_docs, -1)
            kept, seen = [torch.cat((of, new), dim=1) for of in kept], num_full
            # What one group gives up is approximate in all: they score from there on.
            if split is not None and num_full > min(of.total for of in splits):
                kept = [
                    self._evict(of, point, splits[group], rule, group, memory)
                    for group, (of, memory) in enumerate(zip(kept, memories, strict=True))
                ]
        return torch.cat(found, dim=1)

    def _read_prompt(self, documents: Tensor, point: int) -> Tensor:
        """As :meth:`_forward`; once for all rules, none of which has acted yet."""
        known = self._prompt
        if known is None or known.point != point or not torch.equal(known.documents, documents):
            logits = self._forward(documents, 0, point, 1)
            cache = self._cache[..., :point, :].clone()
            known = self._prompt = Prompt(documents, point, cache, self._layers, logits)
        self._cache[..., :point, :], self._layers = known.cache, known.layers
        return known.logits

    def _forward(self, documents: Tensor, start: int, end: int, num_logits: int) -> Tensor:
        """Compute tokens ``start`` to ``end``; the logits of the last ones."""
        self._span = (start, end)
        self._layers = []
        positions = torch.arange(start, end).expand(len(documents), -1)
        return self.model(
            documents[:, start:end],
            position_ids=positions,
            use_cache=False,
            logits_to_keep=num_logits,
        ).logits

    def _evict(
        self,
        kept: Tensor,
        point: int,
        split: BlockBudget,
        rule: Rule | None,
        group: int,
        memory: dict[str, Any],
    ) -> Tensor:
        excess = max(0, kept.shape[1] - split.total)
        ends = (split.sink, kept.shape[1] - split.recent)
        sink, blocks, recent = kept.tensor_split(ends, dim=1)
        if rule is None:
            return torch.cat((sink, blocks[:, excess:], recent), dim=1)
        layers = slice(group * self._share, (group + 1) * self._share)
        seen = (torch.stack(of) for of in zip(*self._layers[layers], strict=True))
        scores = rule(State(point, kept, recent, *seen, partial(self._gather, layers), memory))
        scores = scores.tensor_split(ends, dim=1)[1]
        best = scores.argsort(dim=1, stable=True)[:, excess:].sort(1).values
        return torch.cat((sink, blocks.gather(1, best), recent), dim=1)

    def _gather(self, layers: slice, blocks: Tensor, values: bool) -> Tensor:
        num_docs, count = blocks.shape
        num_kv_heads, head_size = self.shape
        index = tokens_of(blocks)[None, :, None, :, None]
        index = index.expand(self._share, num_docs, num_kv_heads, count * BLOCK_SIZE, head_size)
        return self._cache[int(values), layers].gather(3, index).unflatten(3, (count, BLOCK_SIZE))

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer, (start, end) = module.layer_idx, self._span
        cache = self._cache[:, layer]  # [2, num_docs, num_kv_heads, length, head_size]
        cache[0, :, :, start:end], cache[1, :, :, start:end] = key, value
        positions = self._positions[layer // self._share]
        index = positions[None, :, None, :, None].expand(2, -1, key.shape[1], -1, key.shape[3])
        group = query.shape[1] // key.shape[1]
        keys, values = cache.gather(3, index).repeat_interleave(group, dim=2)
        hidden = positions[:, None, None, :] > torch.arange(start, end)[:, None]
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        logits = query @ keys.transpose(2, 3) * scale
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        last = weights[:, :, -WINDOW:]
        by_block = (positions // BLOCK_SIZE)[:, None, None, :].expand_as(last)
        shape = (*last.shape[:3], self._num_blocks)
        mass = torch.zeros(shape).scatter_add_(3, by_block, last)
        peak = torch.zeros(shape).scatter_reduce_(3, by_block, last, "amax")
        norms = values.norm(dim=-1).unsqueeze(2)
        added = torch.zeros(shape).scatter_add_(3, by_block, last * norms)
        self._layers.append((query[:, :, -WINDOW:], mass, peak, added))
        return (weights @ values).transpose(1, 2).contiguous(), None


def tokens_of(blocks: Tensor) -> Tensor:
    """Positions of the tokens of blocks [num_docs, n], [num_docs, n * block_size]."""
    return (blocks.unsqueeze(2) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten(1)
