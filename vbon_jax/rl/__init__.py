"""Policy-optimisation losses: pure functions of arrays."""
