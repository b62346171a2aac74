"""The Triton kernels compile for the GPUs of the field; no GPU is needed for that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from vllm_semantic.ops.kernels import queries, scoring

ARCHITECTURES = [80, 90, 100]

SCORE = {
    "out": "*fp32",
    "rows": "*i64",
    "key_scales": "*fp32",
    "block_ids": "*i64",
    **dict.fromkeys(("query_stride_layer", "query_stride_row", "query_stride_head"), "i32"),
    **dict.fromkeys((f"key_stride_{of}" for of in ("layer", "block", "head", "token")), "i64"),
    "key_stride_channel": "i32",
    **dict.fromkeys((f"scale_stride_{of}" for of in ("layer", "block", "head", "token")), "i64"),
}
LOGSUMEXP = SCORE | {
    **dict.fromkeys(("windows", "num_tokens", "requests", "first_positions"), "*i64"),
    "scale": "fp32",
    **dict.fromkeys(("logit_scales", "value_scales"), "*fp32"),
    "norms": "*fp32",
    **{name.replace("key", "value"): of for name, of in SCORE.items() if name.startswith("key")},
}

for_every_cache = pytest.mark.parametrize(
    ("capability", "keys", "head_size"),
    [
        *itertools.product(ARCHITECTURES, ["bf16", "fp16", "fp32"], [64, 80, 256]),
        *itertools.product([90, 100], ["fp8e4nv", "fp8e5", "i8"], [128]),
    ],
)
EIGHT_BITS = ("fp8e4nv", "fp8e5", "i8")


def compiles(kernel: Any, signature: dict[str, str], capability: int, **constants: int) -> None:
    order = [name for name in kernel.arg_names if name not in constants]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in order} | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton_compile(source, target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in compiled.asm["ptx"]


@for_every_cache
def test_scoring_compiles(capability: int, keys: str, head_size: int) -> None:
    queries = "bf16" if keys in EIGHT_BITS else keys
    compiles(
        scoring.mean_key_cosine_kernel,
        SCORE | {"queries": f"*{queries}", "keys": f"*{keys}"},
        capability,
        NUM_KV_HEADS=8,
        GROUP=4,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=1 << (head_size - 1).bit_length(),
        BLOCK_SIZE=16,
        PADDED_BLOCK_SIZE=16,
        KERNEL_BLOCKS=1,
        TOKEN_SCALES=keys in ("fp8e4nv", "i8"),
        EPSILON=scoring.EPSILON,
    )


@for_every_cache
@pytest.mark.parametrize("values", [False, True])
def test_attention_scores_compile(capability: int, keys: str, head_size: int, values: bool) -> None:
    queries = "bf16" if keys in EIGHT_BITS else keys
    compiles(
        scoring.block_logsumexp_kernel,
        LOGSUMEXP | {"queries": f"*{queries}", **dict.fromkeys(("keys", "values"), f"*{keys}")},
        capability,
        NUM_QUERIES=8,
        NUM_KV_HEADS=8,
        GROUP=4,
        PADDED_ROWS=32,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=1 << (head_size - 1).bit_length(),
        BLOCK_SIZE=16,
        PADDED_BLOCK_SIZE=16,
        KERNEL_BLOCKS=1,
        VALUES=values,
        SCALED=keys.startswith("fp8"),
        TOKEN_SCALES=keys in ("fp8e4nv", "i8"),
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "rings"),
    [
        *((capability, of, of) for capability in ARCHITECTURES for of in ("bf16", "fp16", "fp32")),
        (90, "fp8e4nv", "bf16"),  # as vLLM quantises them for FA3
    ],
)
def test_keeping_queries_compiles(capability: int, dtype: str, rings: str) -> None:
    strides = dict.fromkeys(("query_stride_token", "query_stride_head"), "i32")
    compiles(
        queries.keep_queries_kernel,
        strides
        | {"query_stride_channel": "i32", "places": "*i64"}
        | {"rings": f"*{rings}", "queries": f"*{dtype}"},
        capability,
        HEAD_SIZE=80,
        ROW=32 * 80,
        ELEMENTS=queries.ELEMENTS,
    )
