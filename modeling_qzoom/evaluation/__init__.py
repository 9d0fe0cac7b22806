"""Synthetic pages, measures and figures. Not published with checkpoints."""
