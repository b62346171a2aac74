"""Streams a completion from the server of examples/serve.sh; the prompt's beginning is pinned."""

import json
import os
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    port = os.environ.get("PORT", "8000")
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
    model = client.models.list().data[0].id
    book = ROOT / "benchmarks" / "texts" / "pg19" / "10146.txt"
    prompt = book.read_text(encoding="utf-8")[:5000]
    # Within the server's own budget: 64 tokens pinned, 64 recent, 96 most similar.
    kv_policy = {"pin_prompt_tokens": 64, "semantic_tokens": 96}
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=100,
        stream=True,
        extra_body={"vllm_xargs": {"kv_policy": json.dumps(kv_policy)}},
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
