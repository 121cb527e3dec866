"""Flax models, their key-value cache, and Hugging Face directories in and out."""
