"""Placing: which modules a rule picks, and how a budget is shared out among them."""
