"""Studies: whether scores can be trusted, and whether placements differ once they are trained."""
