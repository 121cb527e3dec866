"""Flax models, their key-value cache, and reading and writing of Hugging Face directories."""
