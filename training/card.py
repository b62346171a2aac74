"""The model card, written from what the run and its evaluation recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from training.corpus import WIKITEXT_SHARE
from training.schedule import STAGES, Schedule

HEADER = """---
license: cc-by-sa-3.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
"""


def text_table(evaluation: dict[str, list[dict[str, Any]]]) -> str:
    """A row a text and context: perplexity with the full and with the streaming mask."""
    lines = [
        "| text | context | tokens | full | sink 4 + last 256 | difference | beyond the window |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in evaluation["texts"]:
        full, streaming = row["full_perplexity"], row["streaming_perplexity"]
        far, near = row["full_perplexity_beyond_window"], row["streaming_perplexity_beyond_window"]
        lines.append(
            f"| {row['text']} | {row['context']} | {row['tokens']:,} | {full:.2f} | "
            f"{streaming:.2f} | {100 * (streaming / full - 1):+.1f} % | "
            f"{far:.2f} / {near:.2f} ({100 * (near / far - 1):+.1f} %) |"
        )
    return "\n".join(lines)


def passkey_table(evaluation: dict[str, list[dict[str, Any]]]) -> str:
    """A row a context: share of five-digit keys recalled."""
    lines = ["| context | documents | full | sink 4 + last 256 |", "|---|---|---|---|"]
    for row in evaluation["passkey"]:
        lines.append(
            f"| {row['context']} | {row['documents']} | {row['full_accuracy']:.0%} | "
            f"{row['streaming_accuracy']:.0%} |"
        )
    return "\n".join(lines)


def stages(run: Path, hardware: str, note: str | None = None) -> list[dict[str, Any]]:
    """What the model was trained on, stage by stage: that of `run.init`, then the run itself.

    `note` says what the run's options do not.
    """
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    progress = saved["progress"]
    options = json.loads((run / "options.json").read_text(encoding="utf-8"))
    stage = {
        "stage": options["stage"],
        "corpus": json.loads((run / "corpus" / "corpus.json").read_text(encoding="utf-8")),
        "tokens": progress["tokens"],
        "steps": progress["step"],
        "minutes": round(progress["seconds"] / 60, 1),
        "hardware": hardware,
        "windows": [position["drawn"] for position in progress["positions"]],
        "rates": [options["matrix_rate"], options["other_rate"]],
        "loss": [round(loss, 3) for _, loss in progress["losses"][-10:]],
    }
    if note:
        stage["note"] = note
    before = [] if options["init"] is None else json.loads(history(Path(options["init"])))
    return [*before, stage]


def history(model: Path) -> str:
    """The stages of an exported model, as JSON."""
    return (model / "training.json").read_text(encoding="utf-8")


def describe(stage: dict[str, Any]) -> str:
    """One stage in Markdown."""
    settings, corpus = STAGES[stage["stage"]], stage["corpus"]
    windows = "\n".join(
        f"  - from {phase.start:.0%} of the time: {phase.length} tokens "
        f"({drawn * phase.length / 1e6:.1f} M in all), {phase.synthetic:.0%} of them with a "
        f"synthetic task whose answers weigh {phase.answer_weight:g}, {phase.echo:.0%} one "
        "passage over and over"
        for phase, drawn in zip(settings["phases"], stage["windows"], strict=True)
    )
    planted = (
        f"""
- After {settings["plant"]:.0%} of the time, induction heads were planted by ridge regression
  (`training/induction.py`) and trained on with everything else."""
        if settings.get("plant")
        else ""
    )
    rate = stage["tokens"] / stage["minutes"] / 60
    loss = sum(stage["loss"]) / len(stage["loss"])
    decay = settings.get("decay", Schedule.decay)
    return f"""### Stage `{stage["stage"]}`

- Data: {corpus["books"]} English books, public domain in the USA, and {corpus["articles"]:,}
  English Wikipedia articles (2015, CC BY-SA 3.0), {corpus["tokens"] / 1e6:.1f} M tokens, of
  which the run drew each window at most once.
- Seen: {stage["tokens"] / 1e6:.1f} M tokens in {stage["steps"]:,} steps and {stage["minutes"]:.0f}
  minutes on {stage["hardware"]} ({rate:,.0f} tokens/s).
- Windows:
{windows}{planted}
- Muon at {stage["rates"][0]:g} for the matrices inside the layers, AdamW at {stage["rates"][1]:g}
  for the rest; a linear decay to zero over the last {decay:.0%} of the time.
- Training loss at the end: {loss:.3f} nats per token (weighted, synthetic tasks included).
{f"- {stage['note']}{chr(10)}" if "note" in stage else ""}"""


def model_card(
    name: str, run: Path, record: list[dict[str, Any]], evaluation: Path | None, context: int
) -> str:
    """The card in Markdown; `record` as `stages` gives it."""
    saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    config = saved["config"]
    parameters = sum(weight.numel() for weight in saved["model"].values())
    story = "\n".join(map(describe, record))
    sections = [
        f"""{HEADER}
# {name}

A small English language model that uses its context: {parameters / 1e6:.2f} M parameters in the
Llama architecture, made by `training/` of this repository for its tests, examples and
benchmarks. It continues old books and encyclopedia text and repeats what stands further back;
what it gains from that is measured below. It knows next to nothing of the world: use
it to measure what a cache keeps, not for its answers.

| | |
|---|---|
| layers, hidden, MLP | {config["num_layers"]}, {config["hidden_size"]}, \
{config["intermediate_size"]} |
| query heads, KV heads, head size | {config["num_heads"]}, {config["num_kv_heads"]}, \
{config["head_size"]} |
| embedding | {config["vocab_size"]} byte-level BPE tokens, tied with the head |
| positions | RoPE, base {config["rope_theta"]:g}, trained up to {context} tokens |
| weights | bfloat16 |

## Training

{WIKITEXT_SHARE:.0%} of the articles were rewritten in the raw form of WikiText. Some windows
carry a synthetic long-range task (pass keys, several needles, key-value tables, two hops,
repeated passages; `training/synthetic.py`). The evaluation texts were left out of the corpus.
bfloat16 autocast over fp32 weights.

{story}"""
    ]
    if evaluation is not None:
        results = json.loads(evaluation.read_text(encoding="utf-8"))
        sections.append(
            f"""## Evaluation

Held-out texts: the WikiText-2 test split and two books of the PG-19 test split (10146,
10321), from their beginning, as many tokens as shown. Perplexity per token of this tokenizer,
in adjacent windows with BOS in front: with the full context, and with a mask that lets a
token look at the first 4 and the last 256 tokens. The last column counts only the tokens with
at least 260 tokens in front (full / masked).

{text_table(results)}

Pass keys: five digits at evenly spread depths of held-out text, asked for at the end; all five
must be right under greedy decoding.

{passkey_table(results)}
"""
        )
    sections.append(
        """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The tokenizer puts BOS in front. The chat template writes the user's text, a newline and
`Answer:`, the form of the questions in the training data.

## Licence

CC BY-SA 3.0, after the Wikipedia text among the training data.
"""
    )
    return "\n".join(sections)
