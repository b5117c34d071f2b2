"""Data: reads files into rows, turns rows into tokens, and groups tokens into batches."""
