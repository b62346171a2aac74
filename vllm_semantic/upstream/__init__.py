"""What stands on vLLM's internals and may change with its version, a runner or a backend.

``hooks`` wraps classes and registries; ``backends`` and ``runners`` know vLLM's attention backends
and model runners, ``planning`` how it sizes its cache, and ``versions`` what its versions do
differently; ``signatures`` lists what the contract tests and the doctor look at.
"""
