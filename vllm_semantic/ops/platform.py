"""Where Triton kernels run: on a GPU, or anywhere under Triton's interpreter."""

import os

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether operations on tensors of ``device`` go to a Triton kernel."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
