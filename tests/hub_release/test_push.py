"""Publishing: what is handed to the Hub's client, what is not, and what a dry run says about it."""

import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from hub_release import push as push_module
from hub_release.card.parts import read_card, repository_of
from hub_release.push import PushError, main, plan, push
from hub_release.repository.files import files_of


REPOSITORY = "someone/tiny"


@dataclass
class StubApi:
    """Stands in for `HfApi`: keeps every call, answers from its fields."""

    files: list[str] = field(default_factory=lambda: [".gitattributes"])
    tags: list[str] = field(default_factory=list)
    private: bool = True
    error: Exception | None = None
    calls: list[tuple] = field(default_factory=list)
    operations: list = field(default_factory=list)

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.error is not None:
            raise self.error

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def create_tag(self, repo_id, **options):
        self.calls.append(("create_tag", repo_id, options))

    def create_commit(self, repo_id, operations, **options):
        self.calls.append(("create_commit", repo_id, options))
        self.operations = list(operations)
        return SimpleNamespace(oid="c0ffee")

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def list_repo_refs(self, repo_id):
        return SimpleNamespace(tags=[SimpleNamespace(name=tag) for tag in self.tags])

    def list_repo_files(self, repo_id, revision):
        return self.files

    @property
    def sent(self) -> bool:
        return any(call[0] == "create_commit" for call in self.calls)


@pytest.fixture
def api(monkeypatch):
    stub = StubApi()
    monkeypatch.setattr(push_module, "HfApi", lambda: stub)
    return stub


def content(operation: CommitOperationAdd) -> bytes:
    with operation.as_file() as file:
        return file.read()


def test_every_file_goes_in_one_commit(published, api):
    assert push(published, REPOSITORY) == "c0ffee"
    assert [type(operation) for operation in api.operations] == [CommitOperationAdd] * len(files_of(published))
    sent = {operation.path_in_repo: content(operation) for operation in api.operations}
    assert list(sent) == files_of(published)
    card = sent.pop("README.md").decode()
    assert repository_of(read_card(card)) == REPOSITORY
    assert card.replace(REPOSITORY, "built") == (published / "README.md").read_text()
    assert all(data == (published / name).read_bytes() for name, data in sent.items())
    assert api.calls == [
        ("create_repo", REPOSITORY, {"private": None, "exist_ok": True}),
        ("create_commit", REPOSITORY, {"commit_message": "Publish a verified folder", "revision": "main"}),
    ]


def test_branch_tag_and_privacy(published, api):
    push(published, REPOSITORY, revision="next", tag="v1", private=True, message="First")
    assert api.calls == [
        ("create_repo", REPOSITORY, {"private": True, "exist_ok": True}),
        ("create_branch", REPOSITORY, {"branch": "next", "exist_ok": True}),
        ("create_commit", REPOSITORY, {"commit_message": "First", "revision": "next"}),
        ("create_tag", REPOSITORY, {"tag": "v1", "revision": "c0ffee"}),
    ]


def test_a_repository_holds_what_was_verified_and_nothing_else(published, api):
    api.files += ["config.json", "pytorch_model.bin"]
    with pytest.raises(PushError, match=r"holds files that .* lacks.*: pytorch_model\.bin\. Pass --delete"):
        push(published, REPOSITORY)
    assert not api.sent
    push(published, REPOSITORY, delete=True)
    deleted = [operation for operation in api.operations if isinstance(operation, CommitOperationDelete)]
    assert [operation.path_in_repo for operation in deleted] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        ({"private": False}, {"private": True}, "exists and is public"),
        ({"tags": ["v1"]}, {"tag": "v1"}, "has a tag v1 already"),
    ],
)
def test_refused_before_anything_is_sent(published, api, state, options, said):
    vars(api).update(state)
    with pytest.raises(PushError, match=said):
        push(published, REPOSITORY, **options)
    assert not api.sent


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/data/tiny", "someone/", "../tiny"])
def test_a_name_that_is_no_repository(published, api, name):
    with pytest.raises(PushError, match="write OWNER/NAME"):
        push(published, name)
    assert api.calls == []


def test_dry_run_lists_what_would_be_sent_and_sends_nothing(published, api, monkeypatch, capsys):
    monkeypatch.setattr(push_module, "verify", lambda folder, **options: [])
    assert main([str(published), REPOSITORY, "--dry-run", "--here"]) == 0
    *listed, total, last = capsys.readouterr().out.splitlines()
    assert api.calls == [] and last == f"dry run: nothing was sent to {REPOSITORY}, branch main"
    push(published, REPOSITORY)
    sent = [(operation.path_in_repo, operation.upload_info.size) for operation in api.operations]
    said = [(line.split()[1], int(line.split()[0].replace(",", ""))) for line in listed]
    assert said == sent
    assert int(total.split()[0].replace(",", "")) == sum(size for _, size in sent)


def test_command_sends(published, api, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(push_module, "verify", lambda folder, **options: asked.update(options) or [])
    assert main([str(published), REPOSITORY, "--tag", "v1", "--python", "other", "--base-folder", "base"]) == 0
    assert f"https://huggingface.co/{REPOSITORY}, commit c0ffee" in capsys.readouterr().out
    assert asked["python"] == "other" and str(asked["base_folder"]) == "base"
    assert [call[0] for call in api.calls] == ["create_repo", "create_commit", "create_tag"]
    vars(api).update(error=OSError("no token was found"), calls=[])
    assert main([str(published), REPOSITORY]) == 1
    assert capsys.readouterr().err == "error: no token was found\n"
    network_error = next(iter(HfHubHTTPError.__bases__))
    vars(api).update(error=network_error("no\nroute"))
    assert main([str(published), REPOSITORY]) == 1
    assert capsys.readouterr().err == "error: no route\n"


def test_what_verify_refuses_is_not_sent(published, api, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "built")
    (folder / "notes.txt").write_text("")
    for options in ([], ["--dry-run"]):
        assert main([str(folder), REPOSITORY, "--here", *options]) == 1
        assert "is not sent: notes.txt does not belong in a repository" in capsys.readouterr().err
    assert api.calls == []


def test_plan_is_sorted_and_complete(published):
    uploads = plan(published, REPOSITORY)
    assert [upload.name for upload in uploads] == sorted(files_of(published))
    assert all(upload.size for upload in uploads)
