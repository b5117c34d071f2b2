"""Scoring: Normalized Feature Norms (PLoP, arXiv 2506.20629), their intervals, and when to stop."""
