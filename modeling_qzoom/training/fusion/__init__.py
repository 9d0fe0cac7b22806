"""Stage 2: the decoder learns to answer from coarse view and crop."""
