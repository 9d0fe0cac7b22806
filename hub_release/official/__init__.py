"""The checkpoint format of the authors' code, and the operating points that they publish."""
