"""Stage 1 and 2.5: where the model looks, and the region branch that learns it."""
