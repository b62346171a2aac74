"""A block inside an image counts as any other: to the cache a prompt is a row of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import SamplingParams

from ..engines import engine, reset_trace
from ..models import make_idefics

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)


def run(llm: Any, prompt: Any) -> tuple[Any, dict[int, list[int]]]:
    reset_trace(llm)
    (output,) = llm.generate([prompt], PARAMS, use_tqdm=False)
    (evictions,) = llm.trace.by_index()
    return output, evictions


def test_images_are_their_vectors(repo: Path, tmp_path: Path) -> None:
    """The language model alone, given the vectors that it got with the images, does the same."""
    whole, language = make_idefics(str(repo / "models" / "lookback-5m"), tmp_path)
    book = sorted((repo / "benchmarks" / "texts" / "pg19").glob("*.txt"))[0].read_text()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    prompt = {
        "prompt": f"{book[:300]}<image>{book[300:900]}<image>{book[900:1500]}",
        "multi_modal_data": {"image": [Image.fromarray(image) for image in pixels]},
    }
    vectors: list[torch.Tensor] = []

    def listen(model: Any) -> None:
        model.model.text_model.layers[0].register_forward_pre_hook(
            lambda _, args: vectors.append(args[1].clone())
        )

    with engine(
        whole,
        policy="semantic",
        kv_policy_config=OPTIONS,
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 2},
    ) as llm:
        llm.apply_model(listen)
        output, evictions = run(llm, prompt)
        again, same = run(llm, prompt)
        assert again.num_cached_tokens > 0
        assert (again.outputs[0].token_ids, same) == (output.outputs[0].token_ids, evictions)
    tokens = np.array(output.prompt_token_ids)
    in_an_image = {
        i for i in range(len(tokens) // 32) if len(set(tokens[32 * i : 32 * i + 32])) == 1
    }
    gone = {block for blocks in evictions.values() for block in blocks}
    assert gone & in_an_image
    assert gone - in_an_image
    with engine(
        language, policy="semantic", kv_policy_config=OPTIONS, enable_prompt_embeds=True
    ) as llm:
        embeds = torch.cat(vectors)[: len(tokens)]
        answer, expected = run(llm, {"prompt_embeds": embeds})
    assert answer.outputs[0].token_ids == output.outputs[0].token_ids
    assert evictions == expected
