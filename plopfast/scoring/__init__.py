"""Scoring: Normalized Feature Norms (PLoP, arXiv 2506.20629), and how sure they are."""
