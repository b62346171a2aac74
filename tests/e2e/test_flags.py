"""The flags, through vLLM's own parser and configuration."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_semantic.upstream import signatures
from vllm_semantic.upstream.backends import XFORMERS_BACKEND
from vllm_semantic.upstream.hooks import SCHEDULERS, WORKERS
from vllm_semantic.upstream.runners import access

from ..platforms import default_block_size, on_gpu, stock_block_size

SEMANTIC_512 = ["--kv-policy", "semantic", "--kv-policy-config.semantic_tokens", "512"]


def configure(model: str, *flags: str) -> Any:
    """From a command line to the configuration an engine starts with."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", model, "--dtype", "float32", *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-policy", "semantic", "--kv-policy-config", '{"semantic_tokens": 512}'],
        SEMANTIC_512,
        ["--kv-policy-config.semantic_tokens=512", "--kv-policy=semantic"],
        [*SEMANTIC_512, "--additional-config", '{"other": 1}'],
        ["--additional-config", '{"other": 1}', *SEMANTIC_512],
        ["--additional-config", '{"kv_policy": {"name": "semantic", "semantic_tokens": 512}}'],
    ],
)
def test_flags_reach_the_configuration(flags: list[str], llama: str) -> None:
    config = configure(llama, *flags)
    policy = config.additional_config["kv_policy"]
    assert policy == {"name": "semantic", "semantic_tokens": 512}
    assert ("other" in config.additional_config) == ("other" in " ".join(flags))
    assert config.scheduler_config.scheduler_cls == SCHEDULERS[on_gpu()]
    assert config.parallel_config.worker_cls in WORKERS.values()
    assert config.cache_config.block_size == default_block_size()


def test_flags_reach_an_api_server_process(llama: str) -> None:
    """``--api-server-count``: vLLM sends what was parsed to processes that load plugins later."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", llama, *SEMANTIC_512])
    args.model = args.model_tag
    code = """
import pickle, sys
from vllm.engine.arg_utils import AsyncEngineArgs
args = pickle.load(sys.stdin.buffer)
config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
print(config.additional_config, config.scheduler_config.scheduler_cls)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(args), capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = run.stdout.decode().strip().rpartition("\n")[2]
    assert found == f"{args.additional_config} {SCHEDULERS[on_gpu()]}"
    assert args.additional_config["kv_policy"]["semantic_tokens"] == 512


def test_a_parser_of_ones_own_registers_first(llama: str) -> None:
    """``EngineArgs.add_cli_args``, unlike that of ``AsyncEngineArgs``, loads no plugins."""
    code = """
import sys
import vllm_semantic
vllm_semantic.register()
from vllm import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(["--model", *sys.argv[1:]])
print(EngineArgs.from_cli_args(args).additional_config)
"""
    command = [sys.executable, "-c", code, llama, *SEMANTIC_512]
    run = subprocess.run(command, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    found = run.stdout.decode().strip().rpartition("\n")[2]
    assert found == "{'kv_policy': {'name': 'semantic', 'semantic_tokens': 512}}"


def test_block_size_of_the_user_is_kept(llama: str) -> None:
    config = configure(llama, "--kv-policy", "semantic", "--block-size", "64")
    assert config.cache_config.block_size == 64


def test_no_flag_no_change(llama: str) -> None:
    config = configure(llama)
    assert config.additional_config == {}
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls in WORKERS
    assert config.cache_config.block_size == stock_block_size()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-policy-config.semantic_tokens", "-1"], r"semantic_tokens -1 .* from 0 to"),
        (["--kv-policy-config.semantic_tokens", "1.5"], r"semantic_tokens 1.5 .* integers"),
        (["--kv-policy-config.semantic_tokens", str(2**40)], r"semantic_tokens \d+ .* from 0 to"),
        (["--kv-policy-config.window", "4"], r"window .* allowed: sink_tokens, recent_tokens"),
        (["--kv-policy-config.recent_tokens", "0"], r"recent_tokens 0 .* from 1"),
        (
            ["--block-size", "256"],
            r"--block-size 256 .*recent_tokens 128; allowed: a block size of at most 128",
        ),
    ],
)
def test_refused_at_start(flags: list[str], message: str, llama: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(llama, "--kv-policy", "semantic", *flags)


def test_options_without_a_policy_are_refused(llama: str) -> None:
    with pytest.raises(ValueError, match=r"--kv-policy-config .* needs --kv-policy"):
        configure(llama, "--kv-policy-config", json.dumps({"semantic_tokens": 1}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-policy", "smart"], "'smart' is not known; allowed: full, streaming, semantic"),
        (["--kv-policy", "semantic", "--kv-policy-config", "192"], "not a JSON object"),
    ],
)
def test_parser_refuses(
    flags: list[str], message: str, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        configure(llama, *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_xformers_is_chosen_by_name(llama: str) -> None:
    """A spawned worker unpickles the choice before it loads any plugin."""
    flags = ("--kv-policy", "semantic", "--attention-backend", "XFORMERS")
    config = configure(llama, *flags, "--kv-policy-config.semantic_tokens", "512")
    assert config.cache_config.block_size == 64
    assert config.attention_config.backend.name == "XFORMERS"
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get_path())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(config.attention_config.backend),
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.decode().strip().endswith(XFORMERS_BACKEND)


def test_an_unknown_runner_is_refused() -> None:
    """Whatever else may hold block tables one day: nothing is bypassed silently."""
    with pytest.raises(ValueError, match=r"model runner builtins.object; allowed: vllm.v1"):
        access(object())


def test_another_vllm_is_refused(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    with pytest.raises(
        ValueError, match=r"does not support vLLM 0.31.2; allowed: 0.32.\*, or VLLM"
    ):
        configure(llama, "--kv-policy", "semantic")
    configure(llama)  # without a policy it is not ours to say


def test_another_vllm_is_tried_where_that_is_asked_for(
    llama: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    monkeypatch.setenv("VLLM_SEMANTIC_ALLOW_UNTESTED", "1")
    gone = "vllm.v1.kv_cache_interface.no_such_function"
    monkeypatch.setitem(signatures.CALLED, gone, ())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = configure(llama, "--kv-policy", "semantic")
    assert config.parallel_config.worker_cls in WORKERS.values()
    (warning,) = {r.getMessage() for r in caplog.records if "not been tested" in r.getMessage()}
    assert "vLLM 0.31.2, only with 0.32.*" in warning
    assert warning.endswith(f"{gone} is gone")
