"""Causal language models: loading them, and what their linear modules are."""
