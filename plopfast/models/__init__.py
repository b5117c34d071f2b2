"""Causal language models: loads them and finds their linear modules."""
