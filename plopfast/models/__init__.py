"""Causal language models: loading and running them, their linear modules and frozen weights."""
