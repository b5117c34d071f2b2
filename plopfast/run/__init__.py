"""A run: its folder, and the stages that work in it."""
