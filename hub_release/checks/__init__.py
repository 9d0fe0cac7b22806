"""Proofs of a repository."""
