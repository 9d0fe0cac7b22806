"""Publishes a folder on the Hub: `push.py FOLDER OWNER/NAME`.

What `verify.py` refuses is not sent. Everything goes in one commit, and the card's examples load OWNER/NAME from then
on. `--dry-run` lists every file with its size, as it would be sent, and contacts nobody. The token is the one in
`HF_TOKEN` or of `hf auth login`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# called as a file, Python looks for packages beside it; ours are one folder up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from hub_release.card.parts import rename
from hub_release.repository.files import files_of, is_repository
from hub_release.verify import add_environment_options, environment_options, verify


MAIN = "main"
# errors of the HTTP library that huggingface-hub uses, which is not the same in all of its versions
_NETWORK_ERRORS = HfHubHTTPError.__bases__
# made by the Hub with the repository
_HUBS_OWN = {".gitattributes"}


class PushError(ValueError):
    """Nothing was sent; the message says why and what to do."""


@dataclass(frozen=True)
class Upload:
    """One file as it goes to the Hub.

    Attributes:
        name: path in the repository.
        content: the file, or the bytes that replace it.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def operation(self) -> CommitOperationAdd:
        """Its part of the commit."""
        return CommitOperationAdd(self.name, self.content)


def plan(folder: Path, repository: str) -> list[Upload]:
    """Every file of a folder, sorted; the card names the repository in its examples.

    Raises:
        PushError: `repository` is no OWNER/NAME.
    """
    if not is_repository(repository):
        raise PushError(f"{repository!r} is no repository; write OWNER/NAME.")
    card = rename((folder / "README.md").read_text(encoding="utf-8"), repository).encode()
    return [Upload(name, card if name == "README.md" else folder / name) for name in files_of(folder)]


def _check_repository(api: Any, repository: str, private: bool, tag: str | None) -> None:
    if private and not api.repo_info(repository).private:
        raise PushError(f"{repository} exists and is public; make it private in its settings, or leave --private out.")
    if tag is not None and tag in {known.name for known in api.list_repo_refs(repository).tags}:
        raise PushError(f"{repository} has a tag {tag} already; a tag that people pin does not move. Choose another.")


def push(
    folder: Path,
    repository: str,
    *,
    revision: str = MAIN,
    tag: str | None = None,
    private: bool = False,
    delete: bool = False,
    message: str = "Publish a verified folder",
    api: Any = None,
) -> str:
    """Sends a folder in one commit; whether it deserves it is `verify`'s business.

    Args:
        repository: OWNER/NAME; made if it does not exist.
        revision: branch; made from `main` if it does not exist.
        tag: name for the commit.
        private: whether to make the repository private; one that exists has to be.
        delete: whether to delete files of the repository that the folder does not hold.
        message: the commit's message.
        api: an `HfApi`, by default a new one.

    Returns:
        The commit's hash.

    Raises:
        PushError: the repository is public, has that tag, or holds other files. Nothing was sent then.
    """
    api = api or HfApi()
    uploads = plan(folder, repository)
    api.create_repo(repository, private=private or None, exist_ok=True)
    _check_repository(api, repository, private, tag)
    if revision != MAIN:
        api.create_branch(repository, branch=revision, exist_ok=True)
    others = sorted({*api.list_repo_files(repository, revision=revision)} - {up.name for up in uploads} - _HUBS_OWN)
    if others and not delete:
        raise PushError(
            f"{repository} holds files that {folder} lacks, and would not be what was verified: {', '.join(others)}. "
            "Pass --delete to delete them in the same commit."
        )
    operations = [*(upload.operation() for upload in uploads), *(CommitOperationDelete(name) for name in others)]
    commit = api.create_commit(repository, operations, commit_message=message, revision=revision).oid
    if tag is not None:
        api.create_tag(repository, tag=tag, revision=commit)
    return commit


def _list(uploads: list[Upload]) -> None:
    for upload in uploads:
        print(f"{upload.size:>15,}  {upload.name}")
    print(f"{sum(upload.size for upload in uploads):>15,}  bytes in {len(uploads)} files")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what build.py made")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where it goes; made if it does not exist")
    parser.add_argument("--revision", default=MAIN, metavar="BRANCH", help="branch to commit to")
    parser.add_argument("--tag", help="name for the commit, for people to pin")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--delete", action="store_true", help="delete what the repository holds besides")
    parser.add_argument("--message", default="Publish a verified folder", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    add_environment_options(parser)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    problems = verify(options.folder, **environment_options(options), tell=print)
    if problems:
        print(f"error: {options.folder} is not sent: {problems[0]}", file=sys.stderr)
        return 1
    try:
        _list(plan(options.folder, options.repository))
        if options.dry_run:
            print(f"dry run: nothing was sent to {options.repository}, branch {options.revision}")
            return 0
        names = ("revision", "tag", "private", "delete", "message")
        commit = push(options.folder, options.repository, **{name: getattr(options, name) for name in names})
    except (PushError, OSError, *_NETWORK_ERRORS) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"sent to https://huggingface.co/{options.repository}, commit {commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
