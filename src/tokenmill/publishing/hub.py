"""Hub: a data root with its card → a data set repository of the Hugging Face hub, compared once it is there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from tokenmill.dataroot import layout
from tokenmill.errors import StorageError
from tokenmill.publishing.card import README, write_card
from tokenmill.publishing.croissant import CROISSANT
from tokenmill.publishing.facts import find_facts
from tokenmill.publishing.preview import PREVIEW
from tokenmill.remote import hub
from tokenmill.remote.retry import Retrier


class PublishReport(msgspec.Struct):
    """What `upload_to_hub` sent."""

    url: str
    commit: str
    """Empty for a dry run."""
    files: dict[str, int]
    """Size of each file, by its name."""
    notes: list[str]


def repository_of(target: str) -> str:
    """Return OWNER/NAME of `hf://datasets/OWNER/NAME`.

    Raises:
        StorageError: it is not one.
    """
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)/?", target)
    if match is None:
        raise StorageError(
            f"{target}: expected hf://datasets/OWNER/NAME", next_step="name the data set that is to hold the files"
        )
    return match[1]


def upload_to_hub(
    root: Path | str,
    target: str,
    *,
    private: bool = False,
    license: str | None = None,  # what the hub calls it
    dry_run: bool = False,
) -> PublishReport:
    """Send a finished data root with its card, Croissant file and preview to `hf://datasets/OWNER/NAME`.

    `huggingface_hub` sends the files, in pieces and several at once; the same call sends what an earlier one did not.
    Once they are there, the digest that the hub has of each is compared. The repository is made if there is none. A
    README.md that is there goes as it is; otherwise `write_card` writes one.

    Args:
        root: the data root.
        target: the data set of the hub.
        private: make the repository a private one, if it is made.
        license: identifier for the card, if it is written.
        dry_run: only say what would be sent; the card is not written.

    Raises:
        DataRootError: it is not finished.
        StorageError: the hub cannot be reached, refuses, or has other bytes than were sent.
    """
    root, name = Path(root), repository_of(target)
    url = f"{hub.SITE}/datasets/{name}"
    facts = find_facts(root, name=name.partition("/")[2], license=license, url=url)
    sizes = {path: nbytes for path, (nbytes, _) in facts.files.items()}
    has_card = (root / README).exists()
    notes = [f"{README} is sent as it is there; --license is not used"] if has_card and license is not None else []
    if dry_run:
        if not has_card:
            notes.append(f"{README}, {CROISSANT} and {PREVIEW} are written before it is sent (tokenmill card)")
        return PublishReport(url, "", sizes | _card_sizes(root), notes)
    if not has_card:
        notes += write_card(root, name=name.partition("/")[2], license=license, url=url).notes
    sizes |= _card_sizes(root)
    commit = hub.send_dataset(name, root, list(sizes), is_ours=_is_of_a_data_root, private=private)
    expected = {path: sha256 for path, (_, sha256) in facts.files.items()}
    _compare(root, name, commit, sizes, expected)
    return PublishReport(url, commit, sizes, notes)


def _is_of_a_data_root(path: str) -> bool:
    """Return whether a file of the repository belongs to a data root: if not to this one, to an earlier one."""
    known = (layout.TOKENS, layout.SAMPLE_IDS, layout.MANIFEST, layout.CONSOLIDATED, layout.SKIPPED)
    if path in known or layout.shard_index(path) is not None:
        return True
    return re.fullmatch(r"documents_\d{6,}\.parquet", path) is not None


def _card_sizes(root: Path) -> dict[str, int]:
    """Return the size of what `write_card` writes, as far as it is there."""
    return {path: (root / path).stat().st_size for path in (README, CROISSANT, PREVIEW) if (root / path).is_file()}


def _compare(root: Path, name: str, commit: str, sizes: dict[str, int], expected: dict[str, str]) -> None:
    """Compare what the hub says it has: of large files their SHA-256, of others the id of their Git blob."""
    there = {file.path: file for file in hub.open_dataset(name, commit, Retrier()).files}
    for path, nbytes in sizes.items():
        found = there.get(path)
        if found is not None and len(found.etag) == 40:
            data = (root / path).read_bytes()
            known = hashlib.sha1(b"blob %d\x00" % len(data) + data, usedforsecurity=False).hexdigest()
        else:
            known = expected.get(path) or hashlib.sha256((root / path).read_bytes()).hexdigest()
        if found is None or (found.nbytes, found.etag) != (nbytes, known):
            what = "nothing" if found is None else f"{found.nbytes} bytes with the digest {found.etag}"
            raise StorageError(
                f"hf://datasets/{name}@{commit}: {path}: expected {nbytes} bytes with the digest {known}, found {what}",
                next_step="run tokenmill verify on the data root, then the same command again",
            )
