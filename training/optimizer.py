"""Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

from __future__ import annotations

import torch

from training.model import Llama


class Optimizers:
    """The two optimisers of a run behind one step.

    `step` takes the schedule's factor; the peak rates are fixed at construction.
    """

    def __init__(self, model: Llama, matrix_rate: float, other_rate: float) -> None:
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        norms = [p for p in model.parameters() if p.ndim == 1]
        self.muon = torch.optim.Muon(
            matrices, lr=matrix_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": [model.embed_tokens.weight], "weight_decay": 0.01},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=other_rate,
            betas=(0.9, 0.98),
            eps=1e-10,
        )
        self.peaks: list[tuple[torch.optim.Optimizer, float]] = [
            (self.muon, matrix_rate),
            (self.adamw, other_rate),
        ]

    def step(self, factor: float) -> None:
        """Update the weights with `factor` of the peak learning rates, then drop the gradients."""
        for optimizer, peak in self.peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """State of both optimisers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        """Continue from what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
