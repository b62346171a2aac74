"""Trains the model within a wall-clock budget; stop it at will, the same command resumes it."""

from __future__ import annotations

import argparse
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from training import checkpoint
from training.batches import Batches, Position
from training.checkpoint import Progress
from training.corpus import build_corpus, open_tokens
from training.export import load_model
from training.induction import plant
from training.loss import head_loss
from training.model import Llama, ModelConfig
from training.optimizer import Optimizers
from training.schedule import STAGES, Schedule
from training.tokenizer import load_tokenizer

PLANT_TOKENS = 32_768  # to fit the induction heads on


@dataclass(frozen=True)
class Options:
    """Options of a run; see `--help`."""

    corpus: list[Path]
    out: Path
    stage: str
    init: Path | None
    minutes: float
    step_tokens: int
    micro_tokens: int
    matrix_rate: float
    other_rate: float
    checkpoint_minutes: float
    seed: int
    threads: int
    compile: bool
    device: torch.device


class Trainer:
    """One run: its model, data and clock."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.schedule = Schedule(options.minutes * 60, **STAGES[options.stage])
        self.path = options.out / "checkpoint.pt"
        torch.manual_seed(options.seed)
        tokenizer = load_tokenizer(options.out / "corpus")
        if options.init is None:
            model = Llama(ModelConfig(vocab_size=tokenizer.get_vocab_size()))
        else:
            model = load_model(options.init)
        self.model = model.to(options.device)
        self.optimizers = Optimizers(self.model, options.matrix_rate, options.other_rate)
        phases = self.schedule.phases
        self.progress = Progress(positions=[Position() for _ in phases])
        if self.path.exists():
            self.progress = checkpoint.load(self.path, self.model, self.optimizers)
        tokens = open_tokens(options.out / "corpus")
        ends = [*(int(len(tokens) * phase.start) for phase in phases), len(tokens)]
        self.batches = [
            Batches(tokens[ends[i] : ends[i + 1]], tokenizer, options.seed, phases[i], position)
            for i, position in enumerate(self.progress.positions)
        ]
        self.hidden: nn.Module = HiddenStates(self.model)
        if options.compile:
            self.hidden.compile(dynamic=False)
        self.stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: end after the step under way."""
        self.stopping = True

    def step(self) -> tuple[float, int]:
        """One update; returns its mean loss in nats and the number of tokens."""
        options, progress = self.options, self.progress
        phase = self.schedule.phase(progress.seconds)
        length = self.schedule.phases[phase].length
        micro = max(1, options.micro_tokens // length)
        parts = max(1, options.step_tokens // (micro * length))
        total = torch.zeros((), device=options.device)
        for _ in range(parts):
            drawn = self.batches[phase].draw(micro)
            loss = self.loss(*(tensor.to(options.device) for tensor in drawn)) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(self.schedule.factor(progress.step, progress.seconds))
        return float(total), parts * micro * length

    def plant_once(self) -> None:
        """Put the induction heads in when the schedule says so."""
        plant_at = self.schedule.plant
        if plant_at is None or self.progress.planted:
            return
        if self.progress.seconds >= plant_at * self.schedule.seconds:
            phase = self.schedule.phase(self.progress.seconds)
            length = self.schedule.phases[phase].length
            tokens, _ = self.batches[phase].draw(PLANT_TOKENS // length, ordinary=True)
            print(plant(self.model, tokens.to(self.options.device)), flush=True)
            self.progress.planted = True

    def loss(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean loss in nats over tokens and weights [batch, length + 1]."""
        with torch.autocast(self.options.device.type, dtype=torch.bfloat16):
            hidden = self.hidden(tokens[:, :-1])
            table = self.model.embed_tokens.weight
            return head_loss(hidden, table, tokens[:, 1:], weights[:, 1:])

    def save(self) -> None:
        """Write the checkpoint."""
        checkpoint.save(self.path, self.model, self.optimizers, self.progress)

    def run(self) -> None:
        """Train until the budget is spent or a signal asks to stop."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        progress = self.progress
        recent: list[float] = []
        clock = saved = time.monotonic()
        while progress.seconds < self.schedule.seconds and not self.stopping:
            self.plant_once()
            loss, tokens = self.step()
            now = time.monotonic()
            rate = tokens / (now - clock)
            progress.seconds += now - clock
            clock = now
            progress.step += 1
            progress.tokens += tokens
            recent.append(loss)
            if len(recent) == 20:
                progress.losses.append((progress.tokens, sum(recent) / len(recent)))
                recent.clear()
                print(
                    f"step {progress.step} tokens {progress.tokens / 1e6:.2f}M "
                    f"minutes {progress.seconds / 60:.1f} loss {progress.losses[-1][1]:.4f} "
                    f"tokens/s {rate:.0f}",
                    flush=True,
                )
            if now - saved > self.options.checkpoint_minutes * 60:
                self.save()
                saved = now
        self.save()


class HiddenStates(nn.Module):
    """The model without its head: what is worth compiling."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Last hidden states [batch, length, hidden] of tokens [batch, length]."""
        return self.model.hidden(tokens)


def parse_options() -> Options:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="run folder; resumed if it exists")
    parser.add_argument("--stage", choices=STAGES, default="language", help="what to train on")
    parser.add_argument("--init", type=Path, help="exported model or run to go on from")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock training budget")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--matrix-rate", type=float, default=6e-3, help="peak rate of Muon")
    parser.add_argument("--other-rate", type=float, default=3e-3, help="peak rate of AdamW")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler on a CPU")
    parser.add_argument("--device", type=torch.device, default=None, help="default: cuda if any")
    values = vars(parser.parse_args())
    if values["device"] is None:
        values["device"] = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Options(**values)


def main() -> None:
    """Build the corpus where there is none yet, then train."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    corpus = options.out / "corpus"
    if not (corpus / "corpus.json").exists():
        build_corpus(options.corpus, corpus, ModelConfig().vocab_size, options.seed, options.init)
    trainer = Trainer(options)
    settings = json.dumps({**vars(options), "corpus": len(options.corpus)}, default=str)
    (options.out / "options.json").write_text(f"{settings}\n", encoding="utf-8")
    print(settings, flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
