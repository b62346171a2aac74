"""Settings that must precede vLLM, and the small models that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import interpreter

# Engines run in the test process: a start takes seconds, and tests can look inside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
if interpreter.wanted():
    interpreter.install()
else:
    collect_ignore = ["interpreted"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models here are too small to share
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


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
