"""Rows to ask about: read from files, or drawn."""
