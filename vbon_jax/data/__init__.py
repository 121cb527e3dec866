"""Data: tokenizers, labelled text, prompts and samples files."""
