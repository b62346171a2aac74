"""What the wall clock says: the learning rate and the context length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """From `start` (fraction of the budget) on, train on windows of `length` tokens.

    `synthetic` is the share of windows with a long-range task, whose answers weigh
    `answer_weight` in the loss; `echo` the share that says one passage over and over: dense
    practice that turns planted induction heads into good ones.
    """

    start: float
    length: int
    synthetic: float
    echo: float
    answer_weight: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Warm-up by steps, then stable, then a linear decay to zero over the end of the budget."""

    seconds: float
    phases: tuple[Phase, ...]
    plant: float | None = None  # when the induction heads are put in, as a fraction of the budget
    warmup_steps: int = 50
    decay: float = 0.3

    def factor(self, step: int, elapsed: float) -> float:
        """Learning rate as a fraction of its peak after `elapsed` seconds of training."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        left = max(0.0, 1.0 - elapsed / self.seconds)
        return min(warmup, left / self.decay)

    def phase(self, elapsed: float) -> int:
        """Index of the phase after `elapsed` seconds of training."""
        done = elapsed / self.seconds
        return max(i for i, phase in enumerate(self.phases) if done >= phase.start)


STAGES = {
    "language": {
        "plant": 0.59,
        "phases": (
            Phase(0.0, 512, synthetic=0.2, echo=0.0),
            Phase(0.59, 512, synthetic=0.2, echo=0.25),
            Phase(0.8, 2048, synthetic=0.35, echo=0.05),
        ),
    },
    "recall": {
        "phases": (
            Phase(0.0, 512, synthetic=0.5, echo=0.1, answer_weight=8.0),
            Phase(0.25, 2048, synthetic=0.4, echo=0.02, answer_weight=8.0),
        ),
        "decay": 0.4,
    },
}
"""What a run trains on: first `language` from nothing, then `recall` on top of it (`--init`)."""
