"""The error of a repository that is not what it should be."""


class BuildError(ValueError):
    """A checkpoint or a folder is not what it should be; the message says what to do."""
