"""Variational best-of-N alignment in JAX and Flax."""
