"""Supervised fitting, PPO, and their checkpoints."""
