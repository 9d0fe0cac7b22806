"""The folder of a Hub repository: files, code, weights."""
