"""What a training stage says about itself; `run.train` does the rest."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import nn
from torch.utils.data import Dataset

from ...asking.session import Session
from .config import RunConfig, TrainConfig
from .labelled import Labelled
from .trainer import Counts


class Opened(Protocol):
    """A model that is to be trained, beside whatever it is trained on."""

    @property
    def session(self) -> Session:
        """The model with its processor."""

    @property
    def backbone(self) -> str:
        """Fingerprint of the model's backbone."""


Config = TypeVar("Config", bound=RunConfig)
LabelledConfig = TypeVar("LabelledConfig", bound=TrainConfig)
Material = TypeVar("Material", bound=Opened)
Record = TypeVar("Record")
Parts = Iterable[nn.Module | nn.Parameter]


class TrainStage(ABC, Generic[Config, Material]):
    """A training stage under its options.

    Attributes:
        name: name of the stage.
        config: options of the stage.

    Args:
        config: options of the stage.
    """

    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def open(self) -> Material:
        """What training begins with: the model, and what it is trained on.

        Raises:
            ValueError: something is missing, or does not belong together.
        """

    @abstractmethod
    def dataset(self, material: Material) -> Dataset[dict[str, Any]]:
        """What is trained on; asked for `Key`s.

        Raises:
            ValueError: it holds nothing to train on.
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

    def at_step(self, session: Session, step: int) -> dict[str, Any]:
        """Keywords of `forward` that depend on model and step of the optimiser alone: the same in every process."""
        return {}

    def measure(self, batch: dict[str, Any]) -> Counts:
        """What to log about a batch besides the loss."""
        return {}

    def finish(self, session: Session) -> None:
        """What happens to the model between the last step and saving, such as merging adapters."""


class LabelledStage(TrainStage[LabelledConfig, Labelled[Record]]):
    """A training stage on labels.

    Attributes:
        labels: name of the stage that makes them.
    """

    labels: ClassVar[str]

    @abstractmethod
    def record(self, row: dict[str, Any]) -> Record:
        """The record of a label by column."""

    def open(self) -> Labelled[Record]:
        return Labelled.open(self.config, self.labels, self.record)
