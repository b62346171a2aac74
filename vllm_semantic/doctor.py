"""What is installed, what the plugin does with it, and what would be refused; starts no engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import __version__
from .config import POLICY_FLAG, WRAPPED_BACKENDS
from .recall import GIB
from .served import CONFIG_KEY, ServedPolicies, has_policy
from .upstream.backends import backend_member, check_backend
from .upstream.signatures import signatures
from .upstream.versions import ALLOW_UNTESTED, SUPPORTED_VLLM, is_supported

PLUGINS_GROUP = "vllm.general_plugins"
ENTRY_POINT = "vllm_semantic:register"
OPTIONAL = ("triton", "bitsandbytes", "vllm-bnb-plugin", "xformers")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    ok: bool = True


def main(flags: Sequence[str], as_json: bool) -> int:
    """Print the report; 0 if all is well.

    Args:
        flags: of ``vllm serve``, the model among them; empty: the installation alone.
        as_json: print ``{"ok": ..., SECTION: [{"name": ..., "value": ..., "ok": ...}]}``.
    """
    # vLLM reads these when it is imported; what it logs is not the report.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    report = examine(flags)
    wrong = sum(not finding.ok for findings in report.values() for finding in findings)
    if as_json:
        sections = {name: [asdict(f) for f in findings] for name, findings in report.items()}
        print(json.dumps({"ok": not wrong} | sections, indent=2))
    else:
        for section, findings in report.items():
            print(section)
            for finding in findings:
                print(f"  {'  ' if finding.ok else '! '}{finding.name:<22} {finding.value}")
        print(f"What is marked with ! is wrong: {wrong}." if wrong else "All is well.")
    return 1 if wrong else 0


def examine(flags: Sequence[str]) -> dict[str, list[Finding]]:
    """The report by section; what does not import ends it."""
    report: dict[str, list[Finding]] = {}
    sections = {"versions": versions, "device": device, "hooks": hooks, "backends": backends}
    for name, section in sections.items():
        report[name] = []
        try:
            report[name].extend(section())
        except ImportError as error:
            report[name].append(Finding(name, f"{type(error).__name__}: {error}", ok=False))
            return report
    if flags:
        report["configuration"] = list(configuration(flags))
    return report


def versions() -> Iterator[Finding]:
    """What is installed, and whether the plugin was written for it."""
    yield Finding("vllm-semantic", __version__)
    yield Finding("Python", platform.python_version())
    import torch
    import vllm

    supported = is_supported(vllm.__version__)
    note = f" (the plugin supports {SUPPORTED_VLLM}.*; {ALLOW_UNTESTED}=1 tries it)"
    yield Finding("vllm", f"{vllm.__version__}{'' if supported else note}", supported)
    yield Finding("torch", torch.__version__)
    for distribution in OPTIONAL:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        yield Finding(distribution, version)


def device() -> Iterator[Finding]:
    """What vLLM runs on, and what the plugin's own kernels are there."""
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from .ops.platform import runs_triton

    if current_platform.is_unspecified():
        yield Finding("platform", "none found that this build of vLLM runs on", ok=False)
        return
    yield Finding("platform", f"{current_platform.device_type}, {platform.machine()}")
    yield Finding("name", current_platform.get_device_name() or platform.processor())
    if capability := current_platform.get_device_capability():
        yield Finding("compute capability", capability.as_version_str())
    on_gpu = current_platform.is_cuda_alike()
    kernels = "Triton" if on_gpu or runs_triton(torch.device("cpu")) else "numba, no Triton needed"
    yield Finding("kernels", kernels, ok=HAS_TRITON or not on_gpu)


def hooks() -> Iterator[Finding]:
    """Whether vLLM loads the plugin, and whether what it overrides is as it was."""
    from vllm import envs
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names = [
        entry_point.name
        for entry_point in importlib.metadata.entry_points(group=PLUGINS_GROUP)
        if entry_point.value == ENTRY_POINT
    ]
    found = f"{PLUGINS_GROUP}: {', '.join(names) or 'not there; is vllm-semantic installed?'}"
    yield Finding("entry point", found, bool(names))
    if envs.VLLM_PLUGINS is not None and not set(names) & set(envs.VLLM_PLUGINS):
        yield Finding("VLLM_PLUGINS", f"{','.join(envs.VLLM_PLUGINS)} leaves it out", ok=False)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())  # loads the plugins
    has_flag = hasattr(parser.parse_args([]), "kv_policy")
    yield Finding("flags", f"{POLICY_FLAG} {'is there' if has_flag else 'is missing'}", has_flag)
    has_hook = getattr(EngineArgs, "kv_policy_hook", False)
    yield Finding("EngineArgs", "wrapped" if has_hook else "not wrapped", has_hook)
    checked = dict(signatures())
    problems = {name: problem for name, problem in checked.items() if problem is not None}
    for name, problem in problems.items():
        yield Finding(name, problem, ok=False)
    fit = len(checked) - len(problems)
    yield Finding("methods of vLLM", f"{fit} of {len(checked)} as the plugin knows them")


def backends() -> Iterator[Finding]:
    """Which attention backends a policy can wrap here."""

    wrapped = 0
    for name in WRAPPED_BACKENDS:
        try:
            check_backend(backend_member(name))
        except ImportError as error:
            yield Finding(name, f"not here: {str(error).splitlines()[0]}")
        except TypeError as error:
            yield Finding(name, str(error), ok=False)
        else:
            wrapped += 1
            yield Finding(name, "fits; wrapped where vLLM chooses it")
    if not wrapped:
        yield Finding("attention backends", "none can be wrapped", ok=False)


def configuration(flags: Sequence[str]) -> Iterator[Finding]:
    """What ``vllm serve`` would start with these flags, or why it would not."""
    try:
        vllm_config = serve_config(flags)
    except Exception as error:  # whatever stops `vllm serve` is the answer
        yield Finding("refused", f"{type(error).__name__}: {error}", ok=False)
        return
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    yield Finding("model", vllm_config.model_config.model)
    if has_policy(vllm_config):
        served = ServedPolicies.from_config(vllm_config.additional_config[CONFIG_KEY])
        block_size = vllm_config.cache_config.block_size
        yield Finding("policy", served.describe_default(block_size))
        yield Finding("policies of requests", served.describe(block_size))
        if served.recall_gib:
            yield Finding("host memory", describe_host(served, vllm_config))
    else:
        yield Finding("policy", f"none without {POLICY_FLAG}: vLLM as it is")
    yield Finding("model runner", "V2" if vllm_config.use_v2_model_runner else "V1")
    yield Finding("scheduler", scheduler.get_scheduler_cls().__qualname__)
    yield Finding("worker", str(parallel.worker_cls).rpartition(".")[2])
    backend = vllm_config.attention_config.backend
    yield Finding("attention backend", backend.name if backend else "vLLM's choice")


def describe_host(served: ServedPolicies, vllm_config: Any) -> str:
    """What host memory for evicted blocks holds; a model's own layers may say otherwise."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = model.get_num_layers(parallel)
    num_kv_heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    dtype = str(vllm_config.cache_config.cache_dtype)
    itemsize = model.dtype.itemsize if dtype == "auto" else 1 if "8" in dtype else 2
    token_bytes = 2 * num_layers * num_kv_heads * model.get_head_size() * itemsize
    num_tokens = int(served.recall_gib * GIB // token_bytes)
    return (
        f"{served.recall_gib:g} GiB for evicted blocks, {num_tokens:,} tokens if all "
        f"{num_layers} layers are under the policy; for the end of a prompt as many come back "
        f"as its budget has room for, in an answer {served.recall_blocks} at a time"
    )


def serve_config(flags: Sequence[str]) -> Any:
    """The configuration that ``vllm serve`` with these flags would start an engine with.

    Raises:
        ValueError: a flag or its value is not known, or not supported.
    """
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    serve, parser = ServeSubcommand(), Parser()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args([serve.name, *flags])
    serve.validate(args)
    args.model = args.model_tag or args.model
    engine_args = AsyncEngineArgs.from_cli_args(args)
    return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
