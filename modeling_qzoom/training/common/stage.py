"""What a training stage says about itself; `run.train` does the rest."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn
from torch.utils.data import Dataset

from ...asking.session import Session
from .config import TrainConfig
from .labelled import Labelled
from .trainer import Counts


Config = TypeVar("Config", bound=TrainConfig)
Record = TypeVar("Record")
Parts = Iterable[nn.Module | nn.Parameter]


class TrainStage(ABC, Generic[Config, Record]):
    """A training stage under its options.

    Attributes:
        name: name of the stage.
        labels: name of the stage that makes its labels.
        config: options of the stage.

    Args:
        config: options of the stage.
    """

    name: ClassVar[str]
    labels: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def record(self, row: dict[str, Any]) -> Record:
        """The record of a label by column."""

    @abstractmethod
    def dataset(self, labelled: Labelled[Record]) -> Dataset[dict[str, Any]]:
        """What is trained on; asked for `Key`s.

        Raises:
            ValueError: the labels hold nothing to train on.
        """

    @abstractmethod
    def parts(self, session: Session) -> Parts:
        """Readies the model (fresh branches, adapters) and returns what is to be trained.

        It does the same on a model that is loaded again.

        Raises:
            ValueError: the model lacks what is to be trained.
        """

    @abstractmethod
    def collate(self, items: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
        """A batch of the dataset's items as `forward`'s keywords."""

    def check(self) -> None:
        """Find out before anything is loaded that the stage cannot be trained here.

        Raises:
            ImportError: a package is missing or too old.
        """

    def defaults(self) -> dict[str, Any]:
        """The stage's own defaults of `TrainingArguments`."""
        return {}

    def measure(self, batch: dict[str, Any]) -> Counts:
        """What to log about a batch besides the loss."""
        return {}

    def finish(self, session: Session) -> None:
        """What happens to the model between the last step and saving, such as merging adapters."""
