"""The folder of a Hub repository: its files, code, weights and processor."""
