"""Where Triton kernels run: on a GPU, or anywhere under Triton's interpreter."""

import os

import torch


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on ``tensor`` goes to a Triton kernel."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
