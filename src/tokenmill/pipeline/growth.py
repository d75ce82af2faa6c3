"""Growth: the files of a corpus that earlier data roots do not have. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenmill.corpus.corpus import find_corpus
from tokenmill.corpus.location import without_secrets
from tokenmill.dataroot import layout
from tokenmill.dataroot import manifest as manifests
from tokenmill.errors import DataRootError, SourceChangedError, SourceError
from tokenmill.options import StoreOptions
from tokenmill.recipe import Recipe


def find_new_files(recipe: Recipe, earlier: Sequence[Path], store: StoreOptions) -> list[str]:
    """Return paths of the files that `recipe` means and that none of the earlier data roots was made from.

    Raises:
        DataRootError: one of those is none, or was made from another corpus.
        SourceError: there is no new file, or (`SourceChangedError`) an old one is no longer what it was.
    """
    corpus = find_corpus(recipe.dataset, recipe.text_column, recipe.text_separator, store)
    found = {file.path: file for file in corpus.files}
    known: set[str] = set()
    for root in earlier:
        manifest = manifests.load(root) if root.is_dir() else None
        if manifest is None:
            raise DataRootError(
                f"{root}: expected an earlier data root of the corpus, found no {layout.MANIFEST}",
                next_step="give the directory that tokenmill pretokenize made of the older files",
            )
        if not _is_same_corpus(manifest.recipe.dataset, recipe.dataset):
            raise DataRootError(
                f"{root}: was made from another corpus: {manifest.recipe.dataset} there, {recipe.dataset} here",
                next_step="give earlier data roots of this corpus",
            )
        for file in manifest.files:
            now = found.get(file.path)
            is_other = now is not None and (
                now.nbytes != file.nbytes or (None not in (now.etag, file.etag) and now.etag != file.etag)
            )
            if now is not None and is_other:
                raise SourceChangedError(
                    f"{corpus.name_of(file.path)}: is not the file that {root} was made from: expected {file.nbytes} "
                    f"bytes{f' with ETag {file.etag}' if file.etag else ''}, found {now.nbytes}"
                    f"{f' with ETag {now.etag}' if now.etag else ''}",
                    next_step="restore the file; give new content a new name",
                )
        known.update(file.path for file in manifest.files)
    new = [path for path in found if path not in known]
    if not new:
        raise SourceError(
            f"{corpus.location.name}: none of its {len(found)} files is new: the earlier data roots have them all"
            + "".join(f"; {note}" for note in cut_short(earlier)),
            next_step="leave --only-new out to make all of them, or do nothing",
        )
    return new


def cut_short(earlier: Sequence[Path]) -> list[str]:
    """Return a note for each earlier data root that has not all of its files: the rest of these is in none."""
    notes = []
    for root in earlier:
        manifest = manifests.load(root)
        if manifest is not None and not manifest.complete:
            notes.append(
                f"{root}: is not finished: run its command again, or documents of its files are in no data root"
            )
        elif manifest is not None and manifest.recipe.total_tokens == manifest.tokens:
            stopped = f"{root}: stopped at {manifest.recipe.total_tokens} tokens"
            notes.append(f"{stopped}, so documents of its files are in no data root")
    return notes


def _is_same_corpus(one: str | tuple[str, ...], other: str | tuple[str, ...]) -> bool:
    pair = [[each] if isinstance(each, str) else list(each) for each in (one, without_secrets(other))]
    if pair[0] == pair[1]:
        return True
    local = [[str(Path(name).resolve()) for name in names if "://" not in name] for names in pair]
    return local[0] == local[1] and all(len(names) == len(paths) for names, paths in zip(pair, local, strict=True))
