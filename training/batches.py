"""Draws training batches from the token stream; a position is all its state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from training.schedule import Phase
from training.synthetic import Weaver

BOS_SHARE = 0.5  # of the windows start with BOS, as a prompt does


@dataclass
class Position:
    """How many windows a region has given; written by `Batches`, kept in the checkpoint."""

    drawn: int = 0


class Batches:
    """Windows of one region of the stream, each at most once per pass, in a seeded order."""

    def __init__(
        self,
        tokens: NDArray[np.uint16],
        tokenizer: Tokenizer,
        seed: int,
        phase: Phase,
        position: Position,
    ) -> None:
        self.tokens = tokens  # [tokens] uint16
        self.phase = phase
        self.weaver = Weaver(tokenizer, phase.answer_weight)
        self.seed = seed
        self.position = position
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def _start(self, draw: int) -> int:
        """First token of the window number `draw`; each pass shuffles and shifts anew."""
        length = self.phase.length
        windows = len(self.tokens) // length - 2
        epoch, index = divmod(draw, windows)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, length, epoch]).permutation(windows)
            self._order = (epoch, order)
        return int(self._order[1][index]) * length + epoch * 97 % length

    def draw(self, batch: int, ordinary: bool = False) -> tuple[Tensor, Tensor]:
        """The next windows; `ordinary` ones carry no task.

        Returns:
            Tokens [batch, length + 1] int64 and their weights in the loss, of the same shape
            in fp32.
        """
        length = self.phase.length
        rows, weights = [], []
        for _ in range(batch):
            rng = np.random.default_rng([self.seed, length, self.position.drawn])
            start = self._start(self.position.drawn)
            row = self.tokens[start : start + length + 1].astype(np.int64)
            weight = np.ones(len(row), np.float32)
            kind = 1.0 if ordinary else rng.random()
            if kind < self.phase.synthetic:
                row, weight = self.weaver.weave(row, rng)
            elif kind < self.phase.synthetic + self.phase.echo:
                row, weight = self.weaver.echo(row, rng)
            if rng.random() < BOS_SHARE:
                row[0] = 0
            rows.append(row)
            weights.append(weight)
            self.position.drawn += 1
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(weights))
