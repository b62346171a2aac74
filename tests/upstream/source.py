"""vLLM's source package, and its tests out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"


def fetch(cache: Path) -> Path:
    """Let pip download and check the source package once; return the archive."""
    downloads = cache / "source"
    if not list(downloads.glob("*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(downloads)]
        command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        command += ["--require-hashes", "--requirement", str(REQUIREMENTS)]
        environment = os.environ | {"PYTHONPATH": str(HERE / "metadata_only")}
        subprocess.run(command, env=environment, check=True)
    (archive,) = downloads.glob("*.tar.gz")
    return archive


def extract_tests(archive: Path, folder: Path) -> Path:
    """Unpack ``tests/`` alone into ``folder``.

    vLLM's package folder or metadata beside the tests would be taken for the installed one,
    and the platform for another.
    """
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/"):
                members.append(member)
        tar.extractall(folder, members, filter="data")
    tests = folder / "tests"
    if not (tests / "v1" / "core").is_dir() or any(folder.glob("vllm*")):
        raise ValueError(f"{archive.name} does not have vLLM's tests where they are looked for")
    return tests
