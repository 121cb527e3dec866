"""Measuring a policy against the reference and against best-of-N."""
