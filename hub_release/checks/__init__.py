"""Checks of a repository: what can be seen without running it, and what it answers in a clean environment."""
