#!/usr/bin/env bash
# A server under the semantic policy; examples/client.py talks to it. Further flags are passed on:
#   examples/serve.sh --quantization bitsandbytes
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
exec vllm serve "${MODEL:-models/lookback-5m}" \
  --port "${PORT:-8000}" \
  --kv-policy semantic \
  --kv-policy-config.semantic_tokens 128 \
  --max-model-len 2048 \
  --kv-cache-memory-bytes "${KV_CACHE_BYTES:-67108864}" \
  --enforce-eager "$@"
