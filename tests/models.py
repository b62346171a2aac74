"""Small random models in Hugging Face format, made where a test wants them."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB_SIZE = 512


def make_llama(path: Path, **overrides: object) -> str:
    """A Llama with grouped-query attention; weights large enough to make logits differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "initializer_range": 0.08,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(config | overrides))).save_pretrained(path)
    return str(path)


def make_neox(path: Path, **overrides: object) -> str:
    """A GPT-NeoX as Pythia has it: parallel residual, a quarter of each head rotated."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        "rotary_pct": 0.25,
        "initializer_range": 0.08,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**(config | overrides))).save_pretrained(path)
    return str(path)


def random_prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Token-id prompts for vLLM, of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"prompt_token_ids": torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist()}
        for n in lengths
    ]
