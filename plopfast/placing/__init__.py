"""Placing: the rules that choose modules, and how a budget is divided among them."""
