"""The authors' checkpoint format."""
