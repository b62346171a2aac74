"""Saves and restores a run in one atomic file."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from training.batches import Position
from training.model import Llama
from training.optimizer import Optimizers


@dataclass
class Progress:
    """What a run has done so far; written by the training loop only."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens, mean loss in nats)
    positions: list[Position] = field(default_factory=list)  # one per phase
    planted: bool = False  # whether the induction heads were put in


def save(path: Path, model: Llama, optimizers: Optimizers, progress: Progress) -> None:
    """Write the checkpoint beside `path`, then rename it, so that a crash leaves the old one."""
    partial = path.with_suffix(".partial")
    state = {
        "config": asdict(model.config),
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "progress": asdict(progress),
        "rng": torch.get_rng_state(),
    }
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, model: Llama, optimizers: Optimizers) -> Progress:
    """Restore model, optimisers and the random state; returns the progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    torch.set_rng_state(state["rng"])
    raw = dict(state["progress"])
    raw["positions"] = [Position(**position) for position in raw["positions"]]
    return Progress(**raw)
