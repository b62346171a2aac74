"""Small random models in Hugging Face format, made where a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 512
INITIALIZER_RANGE = 0.08
"""Weights large enough to make logits differ."""
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": INITIALIZER_RANGE,
}


def make_llama(path: Path, dtype: torch.dtype = torch.float32, **overrides: object) -> str:
    """A Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SHAPE | {"head_dim": 64} | overrides))).to(
        dtype
    ).save_pretrained(path)
    return str(path)


def make_draft(source: str, path: Path, noise: float = 0.005, kv_repeats: int = 1) -> str:
    """The same model with noise in its weights: most of what it drafts is right, not all.

    With every KV head ``kv_repeats`` times its blocks are larger, and what it computes is the same.
    """
    config, _, tensors = first_layer(source)
    config["num_key_value_heads"] *= kv_repeats
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        tensor += noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = tensor.unflatten(0, (-1, config["head_dim"]))
            tensor = heads.repeat_interleave(kv_repeats, dim=0).flatten(0, 1).contiguous()
        tensors[name] = tensor
    return write_model(path, config, tensors)


def make_shallow(path: Path, family: str = "Llama") -> str:
    """A Llama or a Qwen2 whose second layer says little: its first alone is right most of the
    time."""
    import transformers

    torch.manual_seed(0)
    shape = getattr(transformers, f"{family}Config")(**SHAPE)
    getattr(transformers, f"{family}ForCausalLM")(shape).save_pretrained(path)
    config, _, tensors = first_layer(str(path))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0.05
    return write_model(path, config, tensors)


def make_eagle(source: str, path: Path) -> str:
    """An EAGLE head for a shallow model: its first layer, which sees the next token alone."""
    config, layer, _ = first_layer(source)
    del layer["input_layernorm.weight"]  # the head has none
    for name in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{name}.weight"] /= INITIALIZER_RANGE
    tensors = {f"layers.0.{name}": tensor for name, tensor in layer.items()}
    identity = torch.eye(config["hidden_size"])
    tensors["fc.weight"] = torch.cat((identity, torch.zeros_like(identity)), dim=1)
    config |= {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]}
    return write_model(path, config, tensors)


def make_eagle3(source: str, path: Path) -> str:
    """An EAGLE-3 head for a shallow model, which has a last layer of its own and ignores what three
    layers of the model made of the tokens before."""
    config, layer, weights = first_layer(source)
    for name in ("q_proj", "k_proj", "v_proj"):
        of_token = layer[f"self_attn.{name}.weight"]
        layer[f"self_attn.{name}.weight"] = torch.cat((of_token, torch.zeros_like(of_token)), dim=1)
    layer["hidden_norm.weight"] = torch.ones(config["hidden_size"])
    tensors = {f"midlayer.{name}": tensor for name, tensor in layer.items()}
    tensors["fc.weight"] = torch.zeros(config["hidden_size"], 3 * config["hidden_size"])
    tensors["norm.weight"] = weights["model.norm.weight"]
    tensors["lm_head.weight"] = weights["lm_head.weight"]
    config |= {
        "num_hidden_layers": 1,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }
    return write_model(path, config, tensors)


def make_mimo(path: Path) -> str:
    """A shallow MiMo: a Qwen2 that predicts a token more with a layer of its own (MTP)."""
    config, layer, tensors = first_layer(make_shallow(path, "Qwen2"))
    ahead = "model.mtp_layers.0."
    tensors |= {f"{ahead}{name}": tensor for name, tensor in layer.items()}
    identity = torch.eye(config["hidden_size"])
    tensors[f"{ahead}input_proj.weight"] = torch.cat((torch.zeros_like(identity), identity), dim=1)
    ones = torch.ones(config["hidden_size"])
    tensors[f"{ahead}token_layernorm.weight"] = ones * INITIALIZER_RANGE
    tensors[f"{ahead}hidden_layernorm.weight"] = ones.clone()
    tensors[f"{ahead}final_layernorm.weight"] = ones.clone()
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return write_model(path, config, tensors)


def first_layer(
    source: str,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The configuration of a model, a copy of its first layer, and all its weights."""
    import json

    from safetensors.torch import load_file

    weights = load_file(f"{source}/model.safetensors")
    prefix = "model.layers.0."
    layer = {
        name.removeprefix(prefix): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
    return json.loads((Path(source) / "config.json").read_text()), layer, weights


def write_model(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    import json

    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def make_lora(source: str, path: Path, merged: Path, seed: int) -> None:
    """An adapter of the attention projections; ``merged`` becomes the model that has it."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    rank, projections = 8, ("q_proj", "k_proj", "v_proj", "o_proj")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(f"{source}/model.safetensors")
    adapter = {}
    for name in [n for n in tensors if n.split(".")[-2] in projections]:
        num_out, num_in = tensors[name].shape
        down = torch.randn(rank, num_in, generator=generator) * 0.05
        up = torch.randn(num_out, rank, generator=generator) * 0.05
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"] = down, up
        tensors[name] += up @ down
    path.mkdir()
    save_file(adapter, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": projections}
    (path / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    shutil.copytree(source, merged)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})


def make_prequantised(source: str, path: Path) -> str:
    """The same model with NF4 weights on disk, as transformers writes them."""
    import json
    import shutil

    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        packed, state = quantize_4bit(tensors[name], compress_statistics=True, quant_type="nf4")
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": True,
    }
    (path / "config.json").write_text(json.dumps(config))
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


def make_gemma(path: Path, num_layers: int = 3) -> str:
    """A Gemma 3: of three layers, two have a sliding window of 64 tokens and one full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=8192,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        * (num_layers // 3),
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(path)
    return str(path)


def make_gpt_oss(path: Path) -> str:
    """A gpt-oss: a learned sink for each head, a layer with a window and one without, experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=8192,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # large enough to take half of the attention
            layer.self_attn.sinks.copy_(torch.arange(4.0) + 4)
    model.save_pretrained(path)
    return str(path)


def make_granite_hybrid(path: Path) -> str:
    """A Granite 4: a Mamba layer and one with attention."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        shared_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=0,
        max_position_embeddings=8192,
        position_embedding_type="rope",
        layer_types=["mamba", "attention"],
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=8,  # so that a state is no larger than a block of keys and values
        mamba_n_groups=1,
        mamba_expand=2,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    GraniteMoeHybridForCausalLM(config).save_pretrained(path)
    return str(path)


def make_idefics(tokenizer: str, path: Path) -> tuple[str, str]:
    """An Idefics3, whose images are 196 tokens each, and its language model alone."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    text_config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.08,
        pad_token_id=0,
    )
    config = transformers.Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 4,
        },
        text_config=text_config,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Idefics3ForConditionalGeneration(config)
    model.save_pretrained(path / "whole")
    pixels = {"longest_edge": 56}
    images = Idefics3ImageProcessorPil(size=pixels, max_image_size=pixels, do_image_splitting=False)
    transformers.Idefics3Processor(
        image_processor=images, tokenizer=words, image_seq_len=196
    ).save_pretrained(path / "whole")
    language = transformers.LlamaForCausalLM(text_config)
    language.model.load_state_dict(model.model.text_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(path / "language")
    return str(path / "whole"), str(path / "language")


def random_prompts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Token-id prompts for vLLM, of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"prompt_token_ids": torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist()}
        for n in lengths
    ]


NUM_FACTS = 8
FIRST_ANSWER = 16
"""Token ids 1..NUM_FACTS state a fact; FIRST_ANSWER + i is the answer to fact i."""


def make_fact_finder(path: Path) -> str:
    """A hand-built Llama whose one head always looks for a fact and says which it sees.

    Channels of the residual stream: 0 is on for every token, 1 marks a fact token, 2..9 say
    which fact, 16..63 are noise. Every query points along the slowest RoPE channel, where
    only fact tokens have a key; keys of other tokens are noise in other slow channels.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    facts = torch.arange(1, NUM_FACTS + 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        layer, attention = model.model.layers[0], model.model.layers[0].self_attn
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
            norm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 1.0
        embedding[:, 16:] = torch.randn(VOCAB_SIZE, 48) * 0.5
        embedding[facts, 1] = 4.0
        embedding[facts, 1 + facts] = 4.0
        slow = 31  # channels 31 and 63 are one RoPE pair of 1.5e-6 radians a token
        attention.q_proj.weight[slow, 0] = 40.0
        attention.k_proj.weight[slow, 1] = 10.0
        attention.k_proj.weight[26:31, 16:] = torch.randn(5, 48) * 0.2
        for i in range(NUM_FACTS):
            attention.v_proj.weight[i, 2 + i] = 1.0
            attention.o_proj.weight[2 + i, i] = 20.0
            model.lm_head.weight[FIRST_ANSWER + i, 2 + i] = 10.0
    model.save_pretrained(path)
    return str(path)


def fact_prompt(fact: int, position: int, length: int) -> dict[str, list[int]]:
    """Noise with one fact at a position."""
    (prompt,) = random_prompts([length], seed=fact)
    tokens = [t if t >= FIRST_ANSWER + NUM_FACTS else t + 32 for t in prompt["prompt_token_ids"]]
    tokens[position] = 1 + fact
    return {"prompt_token_ids": tokens}
