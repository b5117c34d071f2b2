"""Low-rank adapter operations as plain functions on tensors, imported as `plopfast.kernels`.

Docstring only: Hugging Face's transformers probes for a package named `kernels` and imports this folder when a
checkout's root is on `sys.path`, so nothing here may import, fail or carry a version.
"""
