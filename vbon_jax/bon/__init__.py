"""The mathematics of best-of-N: pure functions of arrays."""
