"""Settings that must precede vLLM, and the small models that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import interpreter
from .platforms import enough_devices, on_gpu

# Engines run in the test process: a start takes seconds, and tests can look inside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are too small to share
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if interpreter.wanted():  # before anything asks vLLM where it is
    interpreter.install()
elif not on_gpu():
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
collected = {"interpreted": interpreter.wanted(), "gpu": on_gpu()}
collect_ignore = [folder for folder, here in collected.items() if not here]
# Triton's products of float32 are of 10 bits on a GPU, unless asked; these tests compare float32.
os.environ["TRITON_F32_DEFAULT"] = "ieee"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("cpu_build"):
        if on_gpu():
            pytest.skip(f"needs vLLM's CPU build: {marker.args[0]}")
    for marker in item.iter_markers("devices"):
        if not enough_devices(marker.args[0]):
            pytest.skip(f"needs {marker.args[0]} GPUs, a worker on each")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_llama

    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def neox(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_neox

    return make_neox(tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_gemma

    return make_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def gemma_of_six(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_gemma

    return make_gemma(tmp_path_factory.mktemp("gemma-of-six"), num_layers=6)


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_gpt_oss

    return make_gpt_oss(tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture(scope="session")
def granite_hybrid(tmp_path_factory: pytest.TempPathFactory) -> str:
    from .models import make_granite_hybrid

    return make_granite_hybrid(tmp_path_factory.mktemp("granite-hybrid"))


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).resolve().parent.parent
