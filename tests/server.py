"""A ``vllm serve`` process, its client, its metrics and its log."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import openai
import psutil

from .platforms import on_gpu

BLOCK_SIZE = 32
HOST_MIB = 256
"""Host memory for evicted blocks; its pages count as they fill."""
SMALL_BUDGET = [
    "--kv-policy=semantic",
    "--kv-policy-config.sink_tokens=8",
    "--kv-policy-config.recent_tokens=64",
    "--kv-policy-config.semantic_tokens=64",
    "--kv-policy-config.max_request_tokens=256",
    f"--kv-policy-config.recall_gib={HOST_MIB / 1024}",
    f"--block-size={BLOCK_SIZE}",
    "--max-num-batched-tokens=256",
    "--max-model-len=2048",
    "--kv-cache-memory-bytes=67108864",
    "--enforce-eager",
    "--no-async-scheduling",
    "--dtype=float32",
    *(["--gpu-memory-utilization=0.3"] if on_gpu() else []),
]
"""Flags of a server whose requests evict early; the pool and the batch are left to say.

One step is in flight at a time, as on any CPU: what fits into a pool is the same everywhere. In
float32 a request in a batch answers as alone, and a CPU without bfloat16 is five times as fast.
"""


class Server:
    """A server on a free port; leaving the context ends it.

    Args:
        model: a folder.
        log: takes what the server prints; appended to.
        flags: of ``vllm serve``.
        environment: variables beside those of this process.
        script: runs ``vllm serve`` instead, with the variables ``MODEL`` and ``PORT``.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str],
        environment: Mapping[str, str] | None = None,
        script: Path | None = None,
    ) -> None:
        self.port = server_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = str(model)
        self.log = log
        # One process for the engine as a user gets it, unlike the other tests.
        self.environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.environment |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.environment |= environment or {}
        self.environment |= {"MODEL": str(model), "PORT": str(self.port)} if script else {}
        command = [str(script)] if script else [*serve_command(model), f"--port={self.port}"]
        self.command = [*command, *flags]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)
        self.start()

    def start(self) -> None:
        """Start the process, or another one at the same address."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.stop(60)

    def wait(self) -> None:
        """Until it serves."""
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-4000:])

    def stop(self, seconds: float) -> int:
        """End it by SIGTERM; its exit status.

        Raises:
            subprocess.TimeoutExpired: it took longer; it is killed then.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def children(self) -> list[psutil.Process]:
        """The processes of its engine."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def rss(self) -> float:
        """Resident memory of all its processes in MiB."""
        processes = [psutil.Process(self.process.pid), *self.children()]
        return sum(process.memory_info().rss for process in processes) / 2**20

    def metric(self, name: str) -> float:
        """The sum of the metrics whose names begin so."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
        return sum(float(value) for value in values)

    def idle(self) -> bool:
        """No request runs or waits, and no block is held."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return not any(self.metric(name) for name in (*names, "vllm:kv_cache_usage_perc"))

    def wait_until_idle(self) -> None:
        for _ in range(100):
            if self.idle():
                return
            time.sleep(0.2)
        raise AssertionError("blocks or requests are left behind")


def server_port() -> int:
    """A free port that nobody is given unasked.

    A port that the system picks may be given away again, to an engine in another process of the
    tests, in the half minute that a server takes to bind it. These lie below the ones it picks.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        return port
    raise OSError("no port from 20000 to 31999 of 100 tried is free")


def serve_command(model: Path) -> list[str]:
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
