"""Stand-ins for the models that vLLM's tests name: their configuration, and weights where run.

The suite's schedulers read a model's configuration, and for multimodal ones its processor;
only the three engine tests read weights. Nothing here comes from a hub.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
"""Of the models that run; characters are tokens."""


def make_models(folder: Path) -> list[str]:
    """Write every model below ``folder``, as ``owner/name``; return their names."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    makers = {
        "facebook/opt-125m": make_opt,
        "facebook/opt-350m": make_opt,
        "Qwen/Qwen1.5-7B": make_qwen2,
        "Qwen/Qwen3-0.6B": make_qwen3,
        "Qwen/Qwen2.5-VL-3B-Instruct": partial(
            make_image_model, num_image_tokens=16384, max_positions=128000
        ),
        "llava-hf/llava-1.5-7b-hf": partial(
            make_image_model, num_image_tokens=576, max_positions=4096
        ),
        "hmellor/tiny-random-LlamaForCausalLM": make_llama,
    }
    for name, make in makers.items():
        path = folder / name
        path.mkdir(parents=True)
        make(path)
    return list(makers)


def make_opt(path: Path) -> None:
    """OPT-125M's configuration."""
    from transformers import OPTConfig

    _save_config(path, OPTConfig(dtype="float16"), "OPTForCausalLM")


def make_qwen2(path: Path) -> None:
    """Qwen1.5-7B's configuration."""
    from transformers import Qwen2Config

    config = Qwen2Config(vocab_size=151936, intermediate_size=11008, num_key_value_heads=32)
    _save_config(path, config, "Qwen2ForCausalLM")


def make_qwen3(path: Path) -> None:
    """A Qwen3 small enough to run, with the 40,960 positions of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_small(), max_position_embeddings=40960, tie_word_embeddings=True, dtype="float16"
    )
    _save_model(path, Qwen3ForCausalLM, config)


def make_llama(path: Path) -> None:
    """A Llama small enough to run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_small(), max_position_embeddings=8192, dtype="float16")
    _save_model(path, LlamaForCausalLM, config)


def make_image_model(path: Path, num_image_tokens: int, max_positions: int) -> None:
    """A BLIP-2's configuration and processor, with an image's tokens and the length of another.

    The models named need torchvision, which a vLLM without a GPU is installed without; their
    tests only need a model that takes images.
    """
    from transformers import (
        Blip2Config,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        OPTConfig,
    )

    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=28, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig().to_dict(),
        text_config=OPTConfig(max_position_embeddings=max_positions).to_dict(),
        num_query_tokens=num_image_tokens,
        image_token_id=4,
    )
    _save_config(path, config, "Blip2ForConditionalGeneration")
    Blip2Processor(
        image_processor=BlipImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=_tokenizer(["<image>"]),
        num_query_tokens=num_image_tokens,
    ).save_pretrained(path)


def _small() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _save_config(path: Path, config: Any, architecture: str) -> None:
    config.architectures = [architecture]
    config.save_pretrained(path)


def _save_model(path: Path, model_class: Any, config: Any) -> None:
    import torch

    torch.manual_seed(0)
    model_class(config).to(torch.float16).save_pretrained(path)
    _tokenizer([]).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))


def _tokenizer(special_tokens: list[str]) -> Any:
    """Every character is a token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    characters = [chr(i) for i in range(32, 127)]
    vocabulary = ["<s>", "</s>", "<pad>", "<unk>", *special_tokens, *characters]
    tokenizer = Tokenizer(
        WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special_tokens,
    )
