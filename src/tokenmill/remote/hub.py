"""The Hugging Face hub: the one module that imports `huggingface_hub`.

It reads HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE itself; no credential passes through here.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenmill.errors import SourceError, StorageError, TokenizerError
from tokenmill.redact import redact
from tokenmill.remote import retry
from tokenmill.remote.certificates import CANNOT_VERIFY, ca_bundle
from tokenmill.remote.retry import (
    AnswerError,
    Pages,
    Retrier,
    TransientError,
    is_limit,
    is_transient,
    run_within,
    stated_wait,
)

T = TypeVar("T")

SITE = "https://huggingface.co"
"""Where people look at what the hub has."""


class Fetched(NamedTuple):
    """A file of a repository."""

    path: Path
    """Path of `tokenizer.json` in the hub's local cache."""
    revision: str
    """The commit it belongs to."""


def fetch_tokenizer(name: str, revision: str | None) -> Fetched:
    """Download `tokenizer.json` and its configuration (cached by the hub library).

    Raises:
        TokenizerError: unknown, private, without `tokenizer.json`, or out of reach.
    """
    huggingface_hub = _library()
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", revision=revision))
        commit = path.parent.name  # the cache keeps a file at snapshots/<commit>/<file>
        for companion in ("tokenizer_config.json", "special_tokens_map.json"):
            # Where the end-of-sequence token is named; a repository may have only one of them.
            with contextlib.suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(name, companion, revision=commit)
    except LocalEntryNotFoundError:
        raise TokenizerError(
            f"tokenizer {name}: the hub cannot be reached and the file is not in the local cache",
            next_step="check the network (or HF_HUB_OFFLINE), or give a directory that holds tokenizer.json",
        ) from None
    except EntryNotFoundError:
        raise TokenizerError(
            f"tokenizer {name}: the repository has no tokenizer.json",
            next_step="convert it with transformers (AutoTokenizer, save_pretrained) and give that directory",
        ) from None
    except Exception as error:  # noqa: BLE001  # the client passes on whatever its transport raises
        raise TokenizerError(
            f"tokenizer {name}: the hub refused it: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            next_step="check the name; for a private or gated repository set HF_TOKEN; or give a local directory",
        ) from None
    return Fetched(path, commit)


class RepositoryFile(NamedTuple):
    """A file of a data set's repository."""

    path: str
    nbytes: int
    etag: str
    """SHA-256 of its content where the hub keeps that (large files), else the Git blob's id."""


class Repository(NamedTuple):
    """A data set's repository at one commit."""

    name: str
    commit: str
    files: list[RepositoryFile]
    card: dict[str, Any]
    """The YAML of its `README.md`; empty if there is none."""

    def url(self, path: str) -> str:
        """Return where a file is to be had, by HTTP."""
        return str(_library().hf_hub_url(self.name, path, repo_type="dataset", revision=self.commit))


def open_dataset(name: str, revision: str | None, retrier: Retrier) -> Repository:
    """Resolve `revision` (None: the main branch) to a commit and list its files.

    Raises:
        SourceError: unknown, private, or out of reach.
    """
    api = _library().HfApi()
    commit = _asked(name, retrier, lambda: api.dataset_info(name, revision=revision).sha)
    assert commit is not None
    files: list[RepositoryFile] = []
    page: str | None = f"{api.endpoint}/api/datasets/{name}/tree/{commit}?recursive=True&expand=False"
    pages = Pages(f"data set {name}", SourceError)
    while page is not None:  # each on its own, so that a fault on the way costs one request and not the listing
        entries, page = _asked(name, retrier, functools.partial(_tree_page, page))
        files += [
            RepositoryFile(entry["path"], entry["size"], entry["lfs"]["oid"] if entry.get("lfs") else entry["oid"])
            for entry in entries
            if entry["type"] == "file"
        ]
        if page is not None:
            pages.add(len(entries), page)
    card: dict[str, Any] = {}
    if any(file.path == "README.md" for file in files):
        card = _asked(name, retrier, lambda: _card(name, commit))
    return Repository(name, commit, files, card)


def send_dataset(
    name: str, folder: Path, paths: Sequence[str], *, is_ours: Callable[[str], bool], private: bool
) -> str:
    """Send files of a directory to a data set, which is made if there is none; return the commit that has them all.

    Other files of the data set of which `is_ours` is true are deleted there: they are of an earlier one.

    The library's own way for large folders sends them: what arrived by an earlier call is not sent again.

    Raises:
        StorageError: the hub cannot be reached, or refuses.
    """
    huggingface_hub = _library()
    api = huggingface_hub.HfApi(library_name="tokenmill")
    kind = {"repo_type": "dataset", "repo_id": name}
    try:
        api.create_repo(**kind, private=private, exist_ok=True)
        patterns = [glob.escape(path) for path in paths]
        if hasattr(api, "upload_large_folder"):  # before version 2 of the library
            api.upload_large_folder(**kind, folder_path=folder, allow_patterns=patterns, print_report=False)
        else:
            message = "Upload with tokenmill"
            api.upload_folder(**kind, folder_path=folder, allow_patterns=patterns, commit_message=message)
        there = api.list_repo_files(**kind)
        if stale := [path for path in there if is_ours(path) and path not in paths]:
            message = "Remove files of an earlier data set"
            api.delete_files(**kind, delete_patterns=list(map(glob.escape, stale)), commit_message=message)
        commit = api.dataset_info(name).sha
    except Exception as error:  # noqa: BLE001  # the client passes on whatever its transport raises
        reason = redact(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        raise StorageError(
            f"hf://datasets/{name}: could not be sent: {reason}",
            next_step="set HF_TOKEN to a token that may write there, check the network, then run the same command "
            "again: what arrived is kept",
        ) from None
    return str(commit)


def _library() -> Any:
    """Return the hub's library, set to trust the same certificates as the other clients. It is imported here only."""
    bundle = ca_bundle()
    if bundle is not None:
        os.environ.setdefault("SSL_CERT_FILE", bundle)  # the one variable it reads
    import huggingface_hub.constants
    import huggingface_hub.utils

    return huggingface_hub


def _tree_page(url: str) -> tuple[list[dict[str, Any]], str | None]:
    """Return a page of a listing, and where the next one is."""
    response = _library().get_session().get(url, headers=headers(), timeout=30)
    _library().utils.hf_raise_for_status(response)
    return response.json(), response.links.get("next", {}).get("url")


def _card(name: str, commit: str) -> dict[str, Any]:
    huggingface_hub = _library()
    url = huggingface_hub.hf_hub_url(name, "README.md", repo_type="dataset", revision=commit)
    response = huggingface_hub.get_session().get(url, headers=headers(), follow_redirects=True, timeout=30)
    response.raise_for_status()
    return card_of(response.text)


def card_of(readme: str) -> dict[str, Any]:
    """Return the YAML at the head of a `README.md`; empty if it has none that can be read."""
    try:
        card = _library().DatasetCard(readme, ignore_metadata_errors=True)
    except Exception:  # noqa: BLE001  # whatever the YAML parser raises: what is no card says nothing
        return {}
    return dict(card.data.to_dict())


def headers() -> dict[str, str]:
    """Return the headers of a request to the hub, with the user's token if there is one."""
    return dict(_library().utils.build_hf_headers(library_name="tokenmill"))


def _asked(name: str, retrier: Retrier, question: Callable[[], T]) -> T:
    """Return the hub's answer, transient faults tried again."""

    def once() -> T:
        try:
            return run_within(retry.CALL_SECONDS, question, "the hub")
        except Exception as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            if _is_untrusted(error):
                raise AnswerError(0, "no trusted connection to the hub", next_step=CANNOT_VERIFY) from None
            # What never got an answer is raised by the transport, whichever version of it there is.
            unanswered = status is None and type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore2")
            if unanswered or (status is not None and is_transient(status)):
                wait = stated_wait(response.headers) if response is not None else 0.0
                reason = f"the hub: {f'HTTP {status}' if status else type(error).__name__}"
                raise TransientError(reason, wait, limited=status is not None and is_limit(status)) from None
            raise

    try:
        return retrier(once)
    except TransientError as error:
        if error.limited:
            raise SourceError(
                f"data set {name}: the hub limits requests: {error}",
                next_step="set HF_TOKEN, which raises the limits, or wait; then run the same command again",
            ) from None
        raise SourceError(
            f"data set {name}: the hub cannot be reached: {error}",
            next_step="check the network, then run the same command again",
        ) from None
    except AnswerError as error:
        raise SourceError(f"data set {name}: {error}", next_step=error.next_step) from None
    except Exception as error:  # noqa: BLE001  # the client passes on whatever its transport raises
        raise refusal(name, error) from None


def _is_untrusted(error: BaseException) -> bool:
    """Return whether a certificate is at the bottom of it."""
    causes: list[BaseException | None] = [error]
    while causes and (cause := causes.pop()) is not None:
        if isinstance(cause, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(cause):
            return True
        causes = [cause.__cause__ or cause.__context__]
    return False


def explain_answer(error: AnswerError, name: str) -> AnswerError:
    """Return the refusal of a file, with what to do about it."""
    if error.code == "GatedRepo":
        error.next_step = _accept_terms(name)
    return error


def _accept_terms(name: str) -> str:
    endpoint = _library().constants.ENDPOINT
    return f"accept its terms at {endpoint}/datasets/{name}, and set HF_TOKEN to a token of the user who did"


def refusal(name: str, error: Exception) -> SourceError:
    """Return the hub's refusal of a data set, as an error that says what to do."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    if isinstance(error, GatedRepoError):
        return SourceError(f"data set {name}: its terms were not accepted", next_step=_accept_terms(name))

    if isinstance(error, OfflineModeIsEnabled):
        return SourceError(
            f"data set {name}: HF_HUB_OFFLINE is set, so the hub is not asked",
            next_step="unset it, or give a directory that holds the files",
        )
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return SourceError(
        f"data set {name}: the hub refused it: {reason}",
        next_step="check the name and the revision; for a private or gated data set set HF_TOKEN; if a directory was "
        "meant, there is none of that name",
    )
