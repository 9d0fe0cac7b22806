"""Thresholds and presets from held-out rows."""
