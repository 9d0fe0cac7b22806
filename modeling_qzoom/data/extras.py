"""Packages that only some of the work needs: where one is missing, the error says what for and how to install it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_for(what: str, extra: str = "stages") -> Iterator[None]:
    """Around the import of an optional package.

    Args:
        what: beginning of the error's sentence, such as "Parquet files need pyarrow".
        extra: extra of this project that brings the package.

    Raises:
        ImportError: the package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what}: pip install 'qzoom[{extra}]'.") from error
