"""Pages drawn by rule, with questions whose answers are known."""
