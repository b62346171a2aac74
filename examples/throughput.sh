#!/usr/bin/env bash
# vLLM's own throughput benchmark on a KV pool for eight full requests, without and with the
# policy: 32 requests, each of which grows to 1,632 tokens. Further flags are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
bench() {
  vllm bench throughput --model "${MODEL:-models/lookback-5m}" \
    --dataset-name random --random-input-len 32 --random-output-len 1600 --num-prompts 32 \
    --max-model-len 2048 --max-num-batched-tokens 512 --block-size 32 \
    --num-gpu-blocks-override 409 --kv-cache-memory-bytes 67108864 --enforce-eager "$@" |
    grep Throughput
}
echo "vLLM:" && bench "$@"
echo "vLLM with --kv-policy semantic:" && bench --kv-policy semantic "$@"
