"""A backend made for GPUs, wrapped, end to end: vLLM's TRITON_ATTN through the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..e2e.test_oracle import assert_agree, generate, start
from ..models import random_prompts


def choose_triton_attn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let engines of a test run TRITON_ATTN; what they chose is added to the answer."""
    chosen: list[str] = []

    def choose(cls: Any, *args: Any, **kwargs: Any) -> str:
        chosen.append(AttentionBackendEnum.TRITON_ATTN.get_path())
        return chosen[-1]

    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(choose))
    # The interpreter has no device to ask; the kernels use it to choose tile sizes.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return chosen


def test_triton_attn_agrees_with_oracle(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys lie next to values, blocks are as small as on a GPU."""
    chosen = choose_triton_attn(monkeypatch)
    prompts = random_prompts([250, 230])
    with start(llama, "semantic", block_size=16) as llm:
        runs = generate(llm, llama, "semantic", prompts, max_tokens=20)
    assert_agree(runs)
    assert set(chosen) == {"vllm_semantic.engine.backend.TRITON_ATTN"}
