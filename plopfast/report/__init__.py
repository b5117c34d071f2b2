"""The report: one page from the files of a run folder. Computes nothing."""
