"""Text, prompts and reference samples."""
