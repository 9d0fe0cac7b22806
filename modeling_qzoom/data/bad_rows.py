"""Rows that cannot be used: counted, named and skipped."""

import logging


logger = logging.getLogger(__name__)


_SHOWN = 5


class BadRows:
    """Counts and names rows that cannot be used.

    Args:
        source: what the rows come from, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.skipped: list[str] = []

    def add(self, name: str, why: str) -> None:
        """Note a row; the first few are logged at once."""
        self.skipped.append(f"{name}: {why}")
        if len(self.skipped) <= _SHOWN:
            logger.warning("skipped %s: %s", name, why)

    def check(self, usable: int) -> None:
        """Log the count.

        Raises:
            ValueError: no row, or fewer rows than bad ones, are left: the data is not what the configuration says.
        """
        if self.skipped:
            logger.warning("%s: %d of %d rows skipped", self.source, len(self.skipped), usable + len(self.skipped))
        if usable == 0 or len(self.skipped) > usable:
            shown = "; ".join(self.skipped[:3])
            raise ValueError(
                f"{self.source} has {usable} usable rows and {len(self.skipped)} unusable ones"
                + (f", such as {shown}." if shown else ": it is empty.")
            )
