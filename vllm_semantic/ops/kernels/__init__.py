"""Triton kernels behind the operations of this package. Import only where Triton runs."""
