"""The attention to come: what the oracle policy is told. Through transformers, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

HORIZON = 256
"""Tokens to come that count: blocks of use much later only crowd out what is needed now."""

ROWS = 256
"""Queries whose weights are held at once."""


class Foresight:
    """Full-cache attention of a model, block by block.

    Args:
        model: name or folder.
        block_size: tokens.
    """

    def __init__(self, model: str, block_size: int) -> None:
        self.block_size = block_size
        AttentionInterface.register("foresight", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="foresight"
        ).eval()

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int], num_prompt: int) -> dict[str, list[float]]:
        """What each block will receive after each eviction point.

        Args:
            token_ids: a document, of which the first ``num_prompt`` are the prompt.
            num_prompt: read in one chunk.

        Returns:
            By eviction point, the attention of the next :data:`HORIZON` tokens to each block,
            summed over tokens, the mean over heads and layers.
        """
        length = len(token_ids)
        self._seen = torch.zeros(length, -(-length // self.block_size))
        self._num_layers = 0
        self.model(torch.tensor([list(token_ids)]), use_cache=False)
        until = torch.cat((torch.zeros(1, self._seen.shape[1]), self._seen.cumsum(0)))
        until /= self._num_layers
        points = [n for n in range(num_prompt, length) if n % self.block_size == 0]
        return {
            str(n): (until[min(n + HORIZON, length)] - until[n]).tolist()
            for n in sorted({num_prompt, *points})
        }

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Causal attention of one sequence, ``[1, num_heads, length, head_size]``."""
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1)[0] for x in (key, value))
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        outputs = []
        for start in range(0, query.shape[2], ROWS):
            rows = query[0, :, start : start + ROWS]
            logits = rows @ key.transpose(1, 2) * scale  # [num_heads, rows, length]
            later = torch.ones_like(logits[0], dtype=torch.bool).triu(start + 1)
            weights = logits.masked_fill(later, float("-inf")).softmax(-1)
            padded = torch.nn.functional.pad(
                weights.mean(0), (0, self._seen.shape[1] * self.block_size - len(key[0]))
            )
            self._seen[start : start + ROWS] += padded.unflatten(1, (-1, self.block_size)).sum(2)
            outputs.append(weights @ value)
        self._num_layers += 1
        return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0), None
