"""The demo checkpoint: how it is made from nothing, measured and shown."""
