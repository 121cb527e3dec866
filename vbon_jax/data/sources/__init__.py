"""Sources of labelled text and prompts, one module each."""
