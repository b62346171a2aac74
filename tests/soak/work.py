"""What clients of a soak ask for, and what the server says to each alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from openai.types import Completion

from ..server import SMALL_BUDGET

POOL_BLOCKS = 40
"""Three of the largest requests at once; more preempt each other."""

FLAGS = [
    *SMALL_BUDGET,
    f"--num-gpu-blocks-override={POOL_BLOCKS}",
    "--max-num-seqs=8",
]

ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""On a CPU, vLLM's linear layers compile a kernel for each number of tokens in a step and keep 1024
of them, 50 KiB each: growth that ends, but not within minutes, and would hide any other."""

POLICIES: list[dict[str, Any] | None] = [
    None,
    None,
    {"name": "streaming", "sink_tokens": 4, "recent_tokens": 160},
    {"name": "semantic", "sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 160},
    {"name": "semantic", "similarity": "study"},
    {"name": "semantic", "pin_prompt_tokens": 90},
    {"name": "full"},
]

NEAR_TIE = 1e-3
"""Nats between the best token and the next, below which a batch may swap the two in float32."""


@dataclass(frozen=True)
class Work:
    """One request."""

    prompt: str
    max_tokens: int
    policy: dict[str, Any] | None

    @property
    def arguments(self) -> dict[str, Any]:
        """For ``client.completions.create``."""
        body: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        if self.policy is not None:
            body["vllm_xargs"] = {"kv_policy": json.dumps(self.policy)}
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "extra_body": body,
        }


@dataclass
class Answer:
    """What the server says to a request alone."""

    token_ids: list[int]
    gaps: list[float]
    """Log-probability of each token minus that of the next best."""

    @classmethod
    def of(cls, completion: Completion) -> Self:
        """Read it from an answer with ``logprobs=2``."""
        (choice,) = completion.choices
        best = [sorted(top.values())[-2:] for top in choice.logprobs.top_logprobs]
        return cls(choice.token_ids, [greatest - next_ for next_, greatest in best])

    def compare(self, token_ids: Sequence[int]) -> str:
        """What came as ``equal``, a ``near tie``, or ``different`` from a place on."""
        for i, (expected, token) in enumerate(zip(self.token_ids, token_ids, strict=False)):
            if expected != token:
                return "near tie" if self.gaps[i] < NEAR_TIE else f"different from token {i} on"
        return "equal" if len(token_ids) <= len(self.token_ids) else "too long"


def catalogue(size: int, seed: int, texts: Path) -> list[Work]:
    """Different requests: short and long, some with a beginning in common."""
    generator = random.Random(seed)
    documents = [path.read_text(encoding="utf-8") for path in sorted(texts.glob("*.txt"))]
    works = []
    for i in range(size):
        policy = POLICIES[i % len(POLICIES)]
        document = generator.choice(documents)
        whole = policy is not None and policy["name"] == "full"
        length = generator.choice([80, 300] if whole else [80, 300, 1200, 2600, 4600])
        start = 0 if generator.random() < 0.5 else generator.randrange(len(document) - length)
        most = 90 if whole else 400
        works.append(Work(document[start : start + length], generator.randrange(4, most), policy))
    return works
