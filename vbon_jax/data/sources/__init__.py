"""Where texts and prompts come from: one file a format."""
