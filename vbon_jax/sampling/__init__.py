"""Drawing responses: logits, the jitted decode loop, and the host side around it."""
