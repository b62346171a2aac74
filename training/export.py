"""Turns a run into a Hugging Face folder, and reads one back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.card import model_card, stages
from training.model import Llama, ModelConfig
from training.tokenizer import load_tokenizer, save_for_transformers

BOS_ID = 0
EOS_ID = 1


def transformers_config(config: ModelConfig, context: int) -> LlamaConfig:
    """The same shape in the words of `transformers`."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_size,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )


def load_model(folder: Path) -> Llama:
    """The fp32 model of an exported folder, or of a run's latest checkpoint."""
    if (folder / "model.safetensors").exists():
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_size=raw["head_dim"],
            rope_theta=raw["rope_theta"],
            rms_norm_eps=raw["rms_norm_eps"],
        )
        weights = load_file(folder / "model.safetensors")
        state: dict[str, Tensor] = {
            name.removeprefix("model."): weight.float()
            for name, weight in weights.items()
            if name != "lm_head.weight"
        }
    else:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        config, state = ModelConfig(**saved["config"]), saved["model"]
    model = Llama(config)
    model.load_state_dict(state)
    return model


def export(run: Path, out: Path, context: int) -> None:
    """Write config, weights (bf16), tokenizer and model card to `out`."""
    model = load_model(run)
    config = transformers_config(model.config, context)
    target = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    missing, unexpected = target.model.load_state_dict(model.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    target.tie_weights()
    target.bfloat16()
    target.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID
    )
    out.mkdir(parents=True, exist_ok=True)
    target.save_pretrained(str(out))
    (out / "model.safetensors").chmod(0o644)
    # Readers of the older layout look for the base frequency at the top level.
    path = out / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["rope_theta"] = model.config.rope_theta
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_for_transformers(load_tokenizer(run / "corpus"), out, context)


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder of training.train")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--context", type=int, default=2048, help="longest trained window")
    parser.add_argument("--hardware", default="a CPU", help="for the model card")
    parser.add_argument(
        "--evaluation", type=Path, default=None, help="JSON of training.evaluate, for the card"
    )
    parser.add_argument("--note", help="for the card: what the run's options do not say")
    arguments = parser.parse_args()
    # Before anything is written: a run may go on from the model that it replaces.
    record = stages(arguments.run, arguments.hardware, arguments.note)
    export(arguments.run, arguments.out, arguments.context)
    text = json.dumps(record, indent=1)
    (arguments.out / "training.json").write_text(f"{text}\n", encoding="utf-8")
    card = model_card(
        arguments.out.name, arguments.run, record, arguments.evaluation, arguments.context
    )
    (arguments.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
