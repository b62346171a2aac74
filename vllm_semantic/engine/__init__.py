"""Subclasses of vLLM's own parts: spec, block manager, scheduler, worker, backend."""
