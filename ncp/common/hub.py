"""The Hugging Face hub: files of a repository, uploads, and the reason of a failure in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ncp.common.errors import UserError


def file_of(name: str, file: str, revision: str | None) -> Path:
    """A file of a model repository, from the local cache if that is up to date. Raises UserError if it fails."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except Exception as error:  # many kinds: offline, gated, no such repository
        raise UserError(f"model '{name}' is no local folder, and the hub gave no {file}: {reason(error)}") from None


def configs_of(name: str) -> Path:
    """A folder with a model repository's JSON and text files (configs and tokenizers). Raises UserError if it fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt"]))
    except Exception as error:  # as above, or the name is not a valid id
        raise UserError(f"'{name}' is no local folder, and the hub gave no configs: {reason(error)}") from None


def files_of(name: str, revision: str | None) -> list[str] | None:
    """The names of a model repository's files. None without an answer: offline, a local copy may still be usable."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(name, revision=revision)
    except Exception:  # many kinds; the later request for a file reports the problem
        return None


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns a failure to load a model's parts inside the block (local or from the hub) into a UserError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not is_lost_connection(error):
            raise
        raise UserError(f"model '{name}': loading it failed: {reason(error)}", everywhere=False) from None


def commit_of(file: Path, revision: str | None = None) -> str:
    """The commit of a file in the hub's local cache (.../snapshots/COMMIT/FILE); elsewhere `revision`."""
    return file.parts[file.parts.index("snapshots") + 1] if "snapshots" in file.parts else str(revision)


def upload(folder: Path, repository: str, private: bool, patterns: list[str]) -> None:
    """Uploads the folder's files, and creates the repository if there is none. Raises UserError if it fails."""
    from huggingface_hub import create_repo, upload_folder

    def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:  # many kinds, as above
            raise UserError(
                f"push_to_hub: the hub did not take '{repository}': {reason(error)}; the result is whole in {folder}",
                everywhere=False,
            ) from None

    known = attempt(create_repo, repository, private=private, exist_ok=True).repo_id
    attempt(upload_folder, repo_id=known, folder_path=folder, allow_patterns=patterns, commit_message="End of training")


def reason(error: BaseException) -> str:
    """Why the hub's client failed, in words, on one line.

    The client's own text has several lines and begins with an HTTP status. Other libraries wrap that text again.
    """
    from huggingface_hub import errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    said = {  # the more specific errors first
        errors.GatedRepoError: "it is gated: accept its terms on the hub and log in with 'hf auth login'",
        errors.RepositoryNotFoundError: "no such repository, or a private one: log in with 'hf auth login'",
        errors.RevisionNotFoundError: "no such revision",
        errors.RemoteEntryNotFoundError: "the repository has no such file",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, and there is no copy in the local cache",
    }
    for kind, words in said.items():
        if any(isinstance(e, kind) for e in chain):
            return words
    for e in chain:
        response = getattr(e, "response", None)
        if (status := getattr(response, "status_code", None)) in (401, 403):
            return f"access denied ({status}): log in with 'hf auth login' and a token that may do this"
        if status is not None:
            return f"HTTP status {status}"
    if any(map(is_lost_connection, chain)):
        return f"no connection, and no copy in the local cache ({_first_line(chain[-1])})"
    return _first_line(error)


def is_lost_connection(error: BaseException) -> bool:
    """Whether it is a network error. The hub's client passes on the errors of its HTTP library, which has changed."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, ConnectionError) or bool(libraries & {"httpx", "httpx2", "requests"})


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
