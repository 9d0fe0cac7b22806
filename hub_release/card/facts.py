"""What a repository's own files say about it. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_release.repository.files import BASE_LICENCE, EVALUATION, FIGURE_KINDS, files_of, is_repository, read_json
from hub_release.repository.tensors import stored_tensors, tensor_bytes, variant_of


@dataclass(frozen=True)
class Facts:
    """What a repository's files say about it.

    Attributes:
        config: content of config.json.
        variant: kind of repository, see `tensors.variant_of`.
        weight_files, weight_bytes: how many files hold the weights, and the size of the weights in them.
        figures: what was measured, by kind of figures, see `files.FIGURE_KINDS`.
        base_licences: names of the base model's licence files.
        repository: name under which the card's examples load it.
    """

    config: dict[str, Any]
    variant: str
    weight_files: int
    weight_bytes: int
    figures: dict[str, Any]
    base_licences: tuple[str, ...]
    repository: str

    @property
    def base(self) -> str | None:
        """The base model's repository; None where the config names none that others can reach."""
        name = self.config.get("base_model_name_or_path")
        return name if is_repository(name) else None


def read_facts(folder: Path, repository: str) -> Facts:
    """Reads off a folder what its card has to say.

    Raises:
        BuildError: configuration, weights or figures are missing or damaged.
    """
    config, tensors = read_json(folder / "config.json"), stored_tensors(folder)
    paths = {kind: folder / EVALUATION / f"{kind}.json" for kind in FIGURE_KINDS}
    return Facts(
        config=config,
        variant=variant_of(config, tensors),
        weight_files=len({tensor.file for tensor in tensors.values()}),
        weight_bytes=tensor_bytes(tensors),
        figures={kind: read_json(path) for kind, path in paths.items() if path.exists()},
        base_licences=tuple(name for name in files_of(folder) if name.startswith(BASE_LICENCE)),
        repository=repository,
    )
