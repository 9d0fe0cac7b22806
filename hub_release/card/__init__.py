"""Model cards: taken apart, put together from a repository's files, and checked against them."""
