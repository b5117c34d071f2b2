"""Data: files to rows, rows to tokens, tokens to batches."""
