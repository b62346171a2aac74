"""A chat of several turns that comes back to what was said in the first, over the OpenAI API.

Start the server with host memory for what is evicted, then ask with and without it:

    examples/serve.sh --kv-policy-config.recall_gib 0.25 --max-num-batched-tokens 512
    python examples/chat.py
"""

import json
import os
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "benchmarks" / "texts" / "pg19" / "10321.txt"
FACT = "\nThe pass key is 67326. Remember it. 67326 is the pass key.\n"


def main() -> None:
    port = os.environ.get("PORT", "8000")
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")
    book = BOOK.read_text(encoding="utf-8")
    turns = [book[:300] + FACT + book[300:2500], book[2500:5000], "What is the pass key?"]
    for recall in (False, True):
        answer = chat(client, turns, {"recall": recall})
        print(f"{'with' if recall else 'without'} recall: {answer}")


def chat(client: openai.OpenAI, turns: list[str], kv_policy: dict[str, object]) -> str:
    """Say one thing after the other; the last answer."""
    model = client.models.list().data[0].id
    messages: list[dict[str, str]] = []
    answer = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        completion = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            stop="\n",
            extra_body={"vllm_xargs": {"kv_policy": json.dumps(kv_policy)}},
        )
        answer = (completion.choices[0].message.content or "").strip()
        messages.append({"role": "assistant", "content": answer})
    return answer


if __name__ == "__main__":
    main()
