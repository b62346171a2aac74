"""Cross-entropy through the output head without ever holding all the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows of logits held at once: 512 x 4096 fp32 = 8 MiB stay in the cache


class HeadLoss(torch.autograd.Function):
    """Weighted negative log-likelihood whose gradient is made in the forward pass, chunk by chunk.

    The logits of a batch are by far its largest tensor; on a CPU, writing and reading
    them costs more than the product that makes them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
    ) -> Tensor:
        """hidden [tokens, hidden], weight [vocab, hidden], targets and token_weights [tokens].

        Returns the weighted mean, a scalar in nats.
        """
        dtype = torch.bfloat16 if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        head = weight.detach().to(dtype)
        rows = hidden.detach().to(dtype)
        grad_rows = torch.empty_like(rows)
        grad_head = torch.zeros_like(head, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        scales = (token_weights / token_weights.sum())[:, None]
        for start in range(0, targets.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            goal = targets[part, None]
            log_probs = (rows[part] @ head.T).float().log_softmax(-1)
            total -= (log_probs.gather(1, goal) * scales[part]).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, goal, torch.full_like(goal, -1, dtype=grad.dtype))
            grad = grad.mul_(scales[part]).to(dtype)
            grad_rows[part] = grad @ head
            grad_head += grad.T @ rows[part]
        ctx.save_for_backward(grad_rows, grad_head)
        ctx.hidden_dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of hidden and weight; the others have none."""
        grad_rows, grad_head = ctx.saved_tensors
        (outer,) = grad_outputs
        return grad_rows.to(ctx.hidden_dtype) * outer, grad_head * outer, None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Weighted mean loss for hidden [batch, length, hidden], the rest [batch, length]."""
    apply: Callable[..., Tensor] = HeadLoss.apply
    return apply(hidden.flatten(0, 1), weight, targets.flatten(), token_weights.flatten())
