"""Stage 3: when the coarse view is enough."""
