"""A model and rows in, answers out: what training, evaluation and serving share."""
