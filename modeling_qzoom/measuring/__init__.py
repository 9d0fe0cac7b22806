"""What a prefill does: FLOPs predicted and counted without weights, seconds and memory with random ones."""
