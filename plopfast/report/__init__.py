"""The page that a run folder's files make."""
