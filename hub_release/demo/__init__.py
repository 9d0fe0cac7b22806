"""The demo checkpoint: from nothing to figures and pictures."""
