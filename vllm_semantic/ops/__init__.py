"""Pure operations on tensors and block lists. Nothing here imports vLLM."""
