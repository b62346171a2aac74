"""The contract tests against another vLLM than the one that is installed: its Python sources alone.

    python -m tests.contract 0.33.0

fetches the wheel of that version with pip into a folder of its own, puts its sources before the
installed ones and runs ``tests/contract``. Nothing that is installed changes. No engine runs: what
the contracts do not see is not tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("orjson",)
"""What a later vLLM imports and an earlier one does not need."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.contract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="of vllm, such as 0.33.0")
    version = parser.parse_args().version
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        subprocess.run(
            [
                *(*pip, "download", "--no-deps", "--only-binary=:all:", f"--dest={folder}"),
                *("--platform=manylinux_2_28_x86_64", "--python-version=3.11"),
                f"vllm=={version}",
            ],
            check=True,
        )
        subprocess.run([*pip, "install", f"--target={sources}", *BESIDE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith((".py", ".json"))]
            archive.extractall(sources, names)
        path = os.pathsep.join(filter(None, (str(sources), os.environ.get("PYTHONPATH"))))
        tests = [sys.executable, "-m", "pytest", str(Path(__file__).parent)]
        return subprocess.run(
            tests, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
