"""Upload an export by the hub's own client, in one commit, without replacing anything unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.exporters.hub.card import Facts, make_card
from ssmc.exporters.hub.files import public_manifest, read_export
from ssmc.runtime.errors import OutputError, SsmcError, UsageError
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.companions import README
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MADE_BY_THE_HUB = {".gitattributes"}
MAIN = "main"


@dataclass(frozen=True)
class Pushed:
    """What was published, or would be.

    Attributes:
        repository: "owner/name".
        card: the content of its README.md.
        files: bytes by name, README.md and the manifest among them.
        url: of the commit; None where nothing was uploaded.
        others: files that were in the repository before and are still there.
    """

    repository: str
    card: str
    files: Mapping[str, int]
    url: str | None = None
    others: tuple[str, ...] = ()


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    branch: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    figures: tuple[str | Path, ...] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Pushed:
    """Upload an export with a model card.

    Args:
        directory: what `export` wrote.
        repository: "owner/name"; it is made if it is not there.
        private: whether a new one is seen by its owner alone.
        branch: of the repository, made if it is not there; None: main.
        base_model, license, figures: see `Facts`.
        force: replace files that are there; others stay.
        dry_run: only say what would be done; nothing is asked of the hub.
        progress: told what is being done.

    Raises:
        UsageError: it is no export, no repository's name, or there is no token.
        CheckpointError: the export is not whole.
        OutputError: the hub refuses, or the repository holds something already.
    """
    _check_name(repository)
    export = read_export(directory)
    card = make_card(export, Facts(repository, base_model, license, tuple(map(Path, figures))))
    contents: dict[str, bytes | Path] = {MANIFEST: public_manifest(export.manifest).encode(), README: card.encode()}
    contents |= export.files
    sizes = {n: c.stat().st_size if isinstance(c, Path) else len(c) for n, c in sorted(contents.items())}
    if dry_run:
        return Pushed(repository, card, sizes)
    return _upload(Pushed(repository, card, sizes), contents, private, branch or MAIN, force, progress)


def _upload(
    what: Pushed, contents: Mapping[str, bytes | Path], private: bool, branch: str, force: bool, progress: Progress
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if token is None:
        raise UsageError("There is no token for the hub. Run `hf auth login`, or set HF_TOKEN to one that may write.")
    api, name = HfApi(token=token, library_name="ssmc"), what.repository
    with _explained(name):
        progress("asking the hub", 0, 2)
        found, parent = _there(api, name, branch)
        taken = sorted(found & contents.keys())
        if found and not force:
            some = ", ".join((taken or sorted(found))[:3])
            raise OutputError(
                f"{name} holds {len(found)} files already ({some} ...), and nothing was changed. Replace those of the "
                "same name with --force, or name another repository or --branch."
            )
        api.create_repo(name, private=private or None, exist_ok=True)
        if branch != MAIN and parent is None:
            api.create_branch(name, branch=branch, exist_ok=True)
        progress("uploading", 1, 2)
        operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
        commit = api.create_commit(
            name, operations, commit_message="Export of ssmc", revision=branch, parent_commit=parent
        )
        progress("uploading", 2, 2)
    return Pushed(name, what.card, what.files, commit.commit_url, tuple(sorted(found - contents.keys())))


def _there(api: HfApi, name: str, branch: str) -> tuple[set[str], str | None]:
    """The files of a branch and its last commit, so that nothing that comes in between is overwritten."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(name, revision=branch)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set(), None
    names = {sibling.rfilename for sibling in info.siblings or ()}
    return names - _MADE_BY_THE_HUB, info.sha


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise ValueError("it has no owner")
    except ValueError as error:
        raise UsageError(f"{repository!r} is no name of a repository of the hub. Give it as owner/name.") from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of the client and of the network as sentences."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        yield
    except SsmcError:
        raise
    except GatedRepoError as error:
        raise OutputError(f"{name} is closed to you on the hub. Ask its owner, or name another repository.") from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        raise OutputError(f"{_refusals.get(code, _refused)(name, error)}") from error
    except Exception as error:  # httpx's, the file system's and the client's own errors
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise OutputError(
            f"{name} could not be written on the hub ({reason}). Look at it there, and push again."
        ) from error


def _refused(name: str, error: Any) -> str:
    reason = (error.server_message or str(error)).strip().split("\n")[0].rstrip(".")
    return f"The hub refused to write {name} ({reason}). Nothing was published."


_refusals: Mapping[int, Callable[[str, Any], str]] = {
    401: lambda name, _: "The hub does not know this token. Run `hf auth login` again, or set HF_TOKEN anew.",
    403: lambda name, _: f"Your token may not write {name}. Take one that may write, and a repository of your own.",
    409: lambda name, _: f"{name} was changed by somebody else meanwhile, so nothing was written. Push again.",
    412: lambda name, _: f"{name} was changed by somebody else meanwhile, so nothing was written. Push again.",
}
