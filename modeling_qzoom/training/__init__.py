"""Training of the demo and, later, of any supported backbone. Not published with checkpoints."""
