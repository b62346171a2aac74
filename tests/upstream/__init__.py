"""vLLM's own tests of ``v1/core``, run without the plugin, with it, and under a policy."""
