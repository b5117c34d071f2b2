"""A run: what its folder holds, and the stages that fill it."""
