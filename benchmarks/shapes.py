"""Models known by their shape: speed does not depend on what the weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SHARD_BYTES = 4 << 30


def llama_8b() -> Any:
    """Llama-3.1-8B (its published config.json), 128k tokens of context."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072 + 4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def pythia_2_8b() -> Any:
    """Pythia-2.8B (its published config.json), its context stretched to 128k tokens."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        architectures=["GPTNeoXForCausalLM"],
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rotary_pct=0.25,
        max_position_embeddings=131072 + 4096,
        tie_word_embeddings=False,
    )


def tiny() -> Any:
    """A few thousand weights: to see that a benchmark runs."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )


SHAPES = {"llama-3.1-8b": llama_8b, "pythia-2.8b": pythia_2_8b, "tiny": tiny}


def write_config(name: str, folder: Path) -> str:
    """A folder that vLLM loads with ``load_format="dummy"``."""
    config = SHAPES[name]()
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return str(folder)


def write_checkpoint(name: str, folder: Path) -> str:
    """A folder with random bf16 weights, for loaders that read them (bitsandbytes).

    Generated tensor by tensor, in shards of at most :data:`SHARD_BYTES` and one tensor more.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = SHAPES[name]()
    write_config(name, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(shard, folder / file)
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for key, meta in model.named_parameters():
        weight = torch.ones(meta.shape, device=device)
        if meta.ndim == 2:
            weight.normal_(std=0.02, generator=generator)
        shard[key] = weight.to(torch.bfloat16).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return str(folder)


def kv_bytes(model: str, num_tokens: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values of ``num_tokens`` tokens, ``itemsize`` bytes a number."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return num_tokens * config.num_hidden_layers * num_kv_heads * head_size * 2 * itemsize
