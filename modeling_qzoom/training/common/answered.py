"""What training on rows with answers begins with: a model, and rows that may be others in every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...asking.fingerprints import backbone_fingerprint
from ...asking.session import Session, open_session
from ...data.config import DataConfig
from ...data.drawn.rows import QUESTIONS, page_rows
from ...data.readers import load_rows
from ...data.records import DRAWN
from ...data.rows import Row
from .config import RunConfig


@dataclass
class AnsweredConfig(RunConfig, DataConfig):
    """Training on rows with answers."""


class EpochRows(Protocol):
    """Rows of which an epoch sees each once."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def row(self, epoch: int, index: int) -> Row:
        """The row in a place of an epoch."""


@dataclass(frozen=True)
class SameRows:
    """Rows that are the same in every epoch."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, epoch: int, index: int) -> Row:
        """The row in a place, whatever the epoch."""
        return self.rows[index]


@dataclass(frozen=True)
class FreshPages:
    """Questions about drawn pages that no two epochs share; each page is drawn when it is asked for.

    Attributes:
        split: split that the pages belong to.
        count: rows of an epoch.
        seed: seed of the pages.
        pages: name of the pages' settings.
    """

    split: str
    count: int
    seed: int
    pages: str = "plain"

    def __len__(self) -> int:
        return self.count

    def row(self, epoch: int, index: int) -> Row:
        """The row in a place of an epoch: pages follow each other, each with all its questions."""
        pages = -(-self.count // len(QUESTIONS))
        page, place = divmod(index, len(QUESTIONS))
        rows = page_rows(self.split, self.seed, epoch * pages + page, self.pages)
        return rows[place % len(rows)]  # a page may have one question fewer


def epoch_rows(config: DataConfig) -> EpochRows:
    """The rows that a configuration names; drawn ones are new in every epoch, 1000 of them where `limit` is unset.

    Raises:
        ValueError: the data does not exist, is empty, or more rows are unusable than not.
    """
    if not config.data.startswith(DRAWN):
        return SameRows(load_rows(config, needs_answer=True))
    split, slash, pages = config.data.removeprefix(DRAWN).partition("/")
    count, pages = 1000 if config.limit is None else config.limit, pages if slash else "plain"
    if count < 1:
        raise ValueError(f"limit must be at least 1, got {count}.")
    page_rows(split, config.seed, 0, pages)  # a split that does not exist is named now, not in a worker
    return FreshPages(split, count, config.seed, pages)


@dataclass(frozen=True)
class Answered:
    """Rows with answers, and the model that is to be trained on them.

    Attributes:
        rows: the rows.
        session: the model.
        backbone: fingerprint of its backbone.
    """

    rows: EpochRows
    session: Session
    backbone: str

    @classmethod
    def open(cls, config: AnsweredConfig) -> "Answered":
        """Find the rows of a configuration and load its model.

        Raises:
            ValueError: data or model are missing.
        """
        rows = epoch_rows(config)
        session = open_session(config)
        return cls(rows, session, backbone_fingerprint(session.model))
