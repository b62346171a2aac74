"""What a policy does not serve is refused before a model is loaded, by name."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.platforms.cpu import CpuPlatform

from vllm_semantic.upstream.hooks import unsupported_features

from .. import interpreter
from .test_flags import configure

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
VISION = {**SMALL, "image_size": 56, "patch_size": 14, "projection_dim": 64}

CONFIGS: dict[str, Callable[[], Any]] = {
    "DeepseekV2ForCausalLM": lambda: transformers.DeepseekV2Config(
        **SMALL,
        moe_intermediate_size=64,
        n_routed_experts=2,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
    ),
    "WhisperForConditionalGeneration": lambda: transformers.WhisperConfig(
        vocab_size=512, d_model=64, encoder_layers=1, decoder_layers=1, pad_token_id=0
    ),
    "BloomForCausalLM": lambda: transformers.BloomConfig(
        vocab_size=512, hidden_size=64, n_layer=1, n_head=2
    ),
    "MiMoForCausalLM": lambda: transformers.Qwen2Config(**SMALL, num_nextn_predict_layers=2),
    "PaliGemmaForConditionalGeneration": lambda: transformers.PaliGemmaConfig(
        vision_config=VISION,
        text_config={**SMALL, "model_type": "gemma", "head_dim": 32},
        projection_dim=64,
        image_token_id=5,
    ),
}
"""Models that are refused, without weights."""


def speculative(method: str, **options: object) -> list[str]:
    config = {"method": method, "num_speculative_tokens": 2, "model": "MODEL"}
    return ["--speculative-config", json.dumps(config | options)]


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "pipeline parallelism": (
        "llama",
        ["--pipeline-parallel-size", "2"],
        r"--pipeline-parallel-size 2, where each stage .* \(allowed: 1\)",
    ),
    "context parallelism": (
        "llama",
        ["--decode-context-parallel-size", "2", "--tensor-parallel-size", "4"],
        r"context parallelism \(allowed: --decode-context-parallel-size 1\)",
    ),
    "micro-batching": (
        "llama",
        ["--ubatch-size", "2", "--all2all-backend", "deepep_low_latency"],
        r"micro-batching \(allowed: no --enable-dbo, --ubatch-size 0\)",
    ),
    "hidden states": (
        "llama",
        speculative("extract_hidden_states"),
        r"--speculative-config with method \w+ \(allowed: ngram, ngram_gpu, ",
    ),
    "MTP of several modules": (
        "MiMoForCausalLM",
        speculative("mtp"),
        r"method \w+ of several modules, .* \(allowed: num_speculative_tokens 1, of a module",
    ),
    "n-grams of a GPU": (
        "llama",
        ["--speculative-config", '{"method": "ngram_gpu", "num_speculative_tokens": 2}'],
        r"method \w+ on Model Runner V1 \(allowed: ngram\)",
    ),
    "a draft's own cache dtype": (
        "llama",
        speculative("draft_model", kv_cache_dtype="fp8_e4m3"),
        r"--speculative-config.kv_cache_dtype \w+ \(allowed: as of the model\)",
    ),
    "drafts in groups": (
        "llama",
        [*speculative("draft_model"), "--kv-policy-config.layer_groups", "2"],
        r"method \w+ with --kv-policy-config.layer_groups 2 \(allowed: 1\)",
    ),
    "KV connector": (
        "llama",
        ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'],
        r"--kv-transfer-config with \w+ \(allowed: OffloadingConnector, ExampleConnector\)",
    ),
    "example connector in groups": (
        "llama",
        [
            *("--kv-policy-config.layer_groups", "2", "--kv-transfer-config"),
            '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}',
        ],
        r"with \w+ and --kv-policy-config.layer_groups 2 \(allowed: 1, OffloadingConnector\)",
    ),
    "four bits": (
        "llama",
        ["--kv-cache-dtype", "int4_per_token_head"],
        r"--kv-cache-dtype int4_per_token_head \(allowed: auto, bfloat16, float16, fp8, ",
    ),
    "fast prefill of shared KV": (
        "llama",
        ["--kv-sharing-fast-prefill"],
        r"--kv-sharing-fast-prefill \(allowed: without\)",
    ),
    "Mamba with prefix caching": (
        "granite_hybrid",
        ["--enable-prefix-caching"],
        r"Mamba layers \(allowed: --no-enable-prefix-caching\)",
    ),
    "attention backend": (
        "llama",
        ["--attention-backend", "FLEX_ATTENTION"],
        r"--attention-backend FLEX_ATTENTION \(allowed: CPU_ATTN, FLASH_ATTN, ",
    ),
    "pooling": ("llama", ["--runner", "pooling"], r"--runner pooling \(allowed: generate\)"),
    "NF4 in float32": (
        "llama",
        ["--quantization", "bitsandbytes"],  # `configure` asks for float32
        r"--dtype float32 with --quantization bitsandbytes \(allowed: bfloat16, float16\)",
    ),
    "MLA": ("DeepseekV2ForCausalLM", [], r"multi-head latent attention \(MLA\)"),
    "encoder-decoder": ("WhisperForConditionalGeneration", [], "encoder-decoder models"),
    "ALiBi": ("BloomForCausalLM", [], "models with ALiBi positions"),
    "images that see ahead": (
        "PaliGemmaForConditionalGeneration",
        [],
        r"models whose images see ahead \(allowed: --language-model-only\)",
    ),
    "diffusion": ("llama", ["--diffusion-config", '{"canvas_length": 32}'], "diffusion models"),
}
"""Feature -> model, flags, what the message says of it."""


def model_path(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if name not in CONFIGS:
        path: str = request.getfixturevalue(name)
        return path
    config = CONFIGS[name]()
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    return str(tmp_path)


DEVICES = {"pipeline parallelism": 2, "context parallelism": 4}
"""Where vLLM has GPUs it counts them before a plugin is asked."""


CPU_BUILD = {"n-grams of a GPU": "on a GPU Model Runner V2 runs, and takes them"}


def marks(feature: str) -> list[pytest.MarkDecorator]:
    devices = pytest.mark.devices(DEVICES.get(feature, 1))
    why = CPU_BUILD.get(feature)
    return [devices, pytest.mark.cpu_build(why)] if why else [devices]


@pytest.mark.parametrize("feature", [pytest.param(name, marks=marks(name)) for name in REFUSED])
def test_refused_at_start(feature: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name, flags, message = REFUSED[feature]
    model = model_path(name, request, tmp_path)
    flags = [flag.replace("MODEL", model) for flag in flags]
    with pytest.raises(ValueError, match=f"--kv-policy semantic does not support .*{message}"):
        configure(model, "--skip-tokenizer-init", "--kv-policy", "semantic", *flags)


def test_images_that_are_turned_off_see_nothing(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What a message allows is allowed."""
    model = model_path("PaliGemmaForConditionalGeneration", request, tmp_path)
    policy = ("--kv-policy", "semantic", "--skip-tokenizer-init")
    configure(model, *policy, "--language-model-only")


def test_every_refusal_is_tested() -> None:
    everything: Any = SimpleNamespace(
        additional_config={"kv_policy": {"name": "semantic", "layer_groups": 2}},
        model_config=SimpleNamespace(
            runner_type="pooling",
            quantization="bitsandbytes",
            dtype=torch.float32,
            use_mla=True,
            is_encoder_decoder=True,
            is_mm_prefix_lm=True,
            uses_alibi=True,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="int4_per_token_head",
            kv_sharing_fast_prefill=True,
            mamba_cache_mode="align",
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=2, decode_context_parallel_size=2, use_ubatching=True
        ),
        speculative_config=SimpleNamespace(
            method="medusa",
            use_multi_module_mtp=lambda: True,
            use_gemma4_mtp=lambda: False,
            use_ngram_gpu=lambda: True,
            enable_adaptive_verification=True,
            kv_cache_dtype="fp8",
        ),
        kv_transfer_config=SimpleNamespace(kv_connector="NixlConnector"),
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="FLEX_ATTENTION")),
        diffusion_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(async_scheduling=True),
        num_lookahead_tokens=2,
        num_speculative_tokens=2,
        use_v2_model_runner=False,
    )
    refused = unsupported_features(everything)
    source = ast.parse(textwrap.dedent(inspect.getsource(unsupported_features)))
    (checks,) = (node for node in ast.walk(source) if isinstance(node, ast.Dict))
    assert len(refused) == len(checks.keys), "`everything` does not trigger every check"
    patterns = [message for _, _, message in REFUSED.values()]
    patterns += [  # what the CPU platform does not have, and what Model Runner V1 refuses itself
        r"method medusa and --async-scheduling on Model Runner V1 "
        r"\(allowed: --no-async-scheduling\)",
        r"--speculative-config.enable_adaptive_verification \(allowed: without\)",
    ]
    untested = [one for one in refused if not any(re.search(p, one) for p in patterns)]
    assert not untested


@pytest.mark.cpu_build("vLLM schedules ahead there, and Model Runner V2 runs")
def test_model_runner_v1_does_not_draft_ahead(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where vLLM turns scheduling ahead on; asked for, it is refused."""
    # Noted, so that it is put back.
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", CpuPlatform.check_and_update_config)
    interpreter.allow_async_scheduling()
    flags = ["--skip-tokenizer-init", "--kv-policy", "semantic"]
    flags += ["--spec-method", "draft_model", "--spec-model", llama, "--spec-tokens", "2"]
    assert not configure(llama, *flags).scheduler_config.async_scheduling
    message = r"and --async-scheduling on Model Runner V1 \(allowed: --no-async-scheduling\)"
    with pytest.raises(ValueError, match=message):
        configure(llama, *flags, "--async-scheduling")
