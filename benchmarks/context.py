"""Where a number comes from: no figure is written without it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "models" / "lookback-5m"
PACKAGES = ("vllm-semantic", "vllm", "torch", "transformers", "bitsandbytes", "vllm-bnb-plugin")


def context(model: str, **settings: Any) -> dict[str, Any]:
    """Machine, versions, model, date and the settings of a run, for its JSON."""
    import torch

    return {
        "date": now(),
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),  # which a worker in one process leaves as it is
            "system": f"{platform.system()} {platform.machine()}",
            **_device(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "model": Path(model).name,
        **settings,
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def on_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU here."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if found["vllm"] == "not installed":  # a tree of files, without metadata
        import vllm

        found["vllm"] = vllm.__version__
    return found


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _device() -> dict[str, Any]:
    """What vLLM runs on; asked without a CUDA context in this process."""
    if not on_gpu():
        return {"device": "cpu"}
    import torch
    from vllm.platforms import current_platform
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    return {
        "device": current_platform.get_device_name(),
        "device_memory_bytes": current_platform.get_device_total_memory(),
        "driver": driver,
        "cuda": torch.version.cuda,
    }
