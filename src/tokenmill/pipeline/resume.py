"""Resume: decides from what an earlier run left whether a run may continue, and what is still to make. Reads only.

A data root is gone on with only by the recipe, tokenizer and corpus it was begun with. A shard
counts as done only if the manifest has its record and the file is the one recorded.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tokenmill.corpus.corpus import Corpus
from tokenmill.dataroot import layout, npy
from tokenmill.dataroot.earlier_run import damaged_sidecar
from tokenmill.dataroot.manifest import Consolidated, Manifest, ShardRecord, load_consolidated
from tokenmill.dataroot.proof import is_whole
from tokenmill.dataroot.tokens_file import TokensFile
from tokenmill.encoding.encoder import Encoder
from tokenmill.errors import DataRootError, SourceChangedError, TokenizerError
from tokenmill.recipe import Recipe

log = logging.getLogger("tokenmill")

_GREW = (
    "to add new files, give them a data root of their own (tokenmill pretokenize --only-new THIS_DATA_ROOT) and view "
    "both together (docs/views.md); to go on with this one, move the file away"
)


def refuse_inside(root: Path, recipe: Recipe, corpus: Corpus) -> None:
    """The data root must not lie where the corpus is searched: its sidecars are parquet files too."""
    datasets = (recipe.dataset,) if isinstance(recipe.dataset, str) else recipe.dataset
    one_of_each = {file.path.rpartition("/")[0]: file for file in corpus.files}.values()
    opened = (corpus.location.open(file) for file in one_of_each)
    folders = {path.parent for path in opened if isinstance(path, Path)}  # few, however many files
    searched = [Path(dataset).resolve() for dataset in datasets if Path(dataset).is_dir()] if folders else []
    ours = root.resolve()
    if ours in map(Path.resolve, folders) or any(ours.is_relative_to(folder) for folder in searched):
        raise DataRootError(
            f"{root}: lies inside the corpus ({corpus.location.name}): its files would become part of it",
            next_step="choose a directory outside the corpus",
        )


def refuse_other(root: Path, manifest: Manifest, recipe: Recipe, corpus: Corpus, encoder: Encoder) -> None:
    """The data root must have been begun with the same recipe, tokenizer and corpus."""
    choose = "choose another directory, or run with the recipe of this one (see its manifest.json)"
    difference = manifest.recipe.difference(recipe)
    if difference is not None:
        raise DataRootError(f"{root}: made by another recipe: {difference}", next_step=choose)
    expected, found = manifest.tokenizer.sha256, encoder.tokenizer.sha256
    if expected != found:
        raise DataRootError(
            f"{root}: made with another tokenizer: tokenizer.json sha256 {expected} there, {found} here",
            next_step=choose,
        )
    _refuse_changed_source(manifest, corpus)


def agree_on_probe(root: Path, manifest: Manifest, encoder: Encoder) -> None:
    """The fixed strings must give the ids they gave when the data root was begun; a new one learns them.

    Raises:
        TokenizerError: other ids.
    """
    recorded = manifest.tokenizer.probe
    if not recorded:
        manifest.tokenizer.probe = encoder.probe
    elif encoder.ids_of(recorded) != recorded:
        raise TokenizerError(
            f"{root}: {encoder.backend.version} no longer gives the ids it gave when this data root was begun "
            f"(with {manifest.software.get('engine')})",
            next_step="install the versions named under software in manifest.json, then run again",
        )
    if encoder.tokenizer.eos_id != manifest.tokenizer.eos_id:
        raise TokenizerError(
            f"{root}: its documents end in id {manifest.tokenizer.eos_id}, but {encoder.backend.version} gives "
            f"{encoder.tokenizer.eos_token!r} the id {encoder.tokenizer.eos_id}",
            next_step="start in another directory: what was made here is wrong",
        )
    ours = encoder.tokenizer.bos_id, encoder.tokenizer.fim.ids if encoder.tokenizer.fim is not None else None
    if ours != (manifest.tokenizer.bos_id, manifest.tokenizer.fim_ids):
        raise TokenizerError(
            f"{root}: it was begun with the ids {manifest.tokenizer.bos_id} for BOS and {manifest.tokenizer.fim_ids} "
            f"for fill in the middle, but {encoder.backend.version} gives {ours[0]} and {ours[1]}",
            next_step="install the versions named under software in manifest.json, then run again",
        )


def _refuse_changed_source(manifest: Manifest, corpus: Corpus) -> None:
    present = {file.path: file for file in corpus.files}
    recorded = {file.path: file for file in manifest.files}
    for path in sorted(present.keys() | recorded.keys()):
        pair = recorded.get(path), present.get(path)
        described = [f"{file.nbytes} bytes" if file is not None else "no such file" for file in pair]
        etags = [file.etag for file in pair if file is not None and file.etag is not None]
        if described[0] == described[1] and len(set(etags)) == 2:
            described = [f"ETag {etag}" for etag in etags]
        if described[0] != described[1]:
            raise SourceChangedError(
                f"{corpus.name_of(path)}: the source changed since this data root was begun: "
                f"expected {described[0]}, found {described[1]}",
                next_step="restore the file, or start in another directory" if pair[0] is not None else _GREW,
            )


def refuse_other_form(root: Path, manifest: Manifest, record: Consolidated | None, *, consolidated: bool) -> None:
    """Require that a data root which was begun as shards continues as shards, and one begun as `tokens.bin` as that."""
    join = f"run: tokenmill consolidate {root}"
    if record is None:
        if consolidated and manifest.is_begun:
            raise DataRootError(
                f"{root}: was begun as shards, and cannot continue as {layout.TOKENS}",
                next_step=join if manifest.complete else f"run the command without --consolidated, then {join}",
            )
    elif record.complete:
        return
    elif manifest.is_begun and any(root.glob(layout.SHARD_GLOB)):
        raise DataRootError(f"{root}: its shards are being consolidated", next_step=join)
    elif manifest.is_begun and not consolidated:
        raise DataRootError(
            f"{root}: was begun as {layout.TOKENS}, and cannot continue as shards",
            next_step="run the command with --consolidated",
        )


def consumed(root: Path) -> Consolidated | None:
    """Return the record of `tokens.bin` where it is all that holds the tokens; None where there are shard files.

    Raises:
        DataRootError: it should be, and is not there.
    """
    record = load_consolidated(root)
    if record is None or any(root.glob(layout.SHARD_GLOB)):
        return None
    if not is_whole(root, record):
        raise DataRootError(
            f"{root}: {layout.TOKENS} or {layout.SAMPLE_IDS} is missing, or not of the size {layout.CONSOLIDATED} says",
            next_step="run the command with --consolidated: what is missing is made again from the corpus",
        )
    return record


def damaged_sidecars(root: Path, manifest: Manifest) -> list[str]:
    """Return documents sidecars that are missing, or not what the manifest records."""
    return [name for record in manifest.shards if (name := damaged_sidecar(root, record)) is not None]


def refuse_lost_sidecars(root: Path, manifest: Manifest) -> None:
    """Where only `tokens.bin` holds the tokens, a sidecar is made again with it, or not at all.

    Raises:
        DataRootError: one is lost.
    """
    lost = damaged_sidecars(root, manifest)
    if lost:
        raise DataRootError(
            f"{root}: {lost[0]} is missing, or not the file that the manifest records ({len(lost)} such files)",
            next_step="run the command with --consolidated: it is made again from the corpus",
        )


def set_lost_aside(root: Path, manifest: Manifest, file: TokensFile, *, with_gaps: bool) -> list[str]:
    """Let `file` adopt the shards the manifest records, as far as it holds them; the names of the others.

    Their records move to `damaged`. `with_gaps` keeps those after a missing one, too, for a run that can fill gaps.
    """
    records, manifest.shards, manifest.tokens, manifest.documents = manifest.shards, [], 0, 0
    lost: list[ShardRecord] = []
    for record in records:
        begin = record.index * manifest.recipe.shard_size * manifest.itemsize
        nbytes = record.tokens * manifest.itemsize
        header = npy.npy_header(npy.token_dtype(manifest.recipe.dtype), record.tokens)
        if (
            (begin != file.nbytes and not with_gaps)
            or file.stored_nbytes < begin + nbytes
            or file.digest(header, nbytes, at=begin) != record.sha256
            or damaged_sidecar(root, record) is not None
        ):
            lost.append(record)
            continue
        if begin == file.nbytes:
            file.adopt(nbytes)
        manifest.add(record)
    manifest.damaged.extend(lost)
    names = [layout.shard_name(record.index) for record in lost]
    for name in names:
        log.warning("%s does not hold what the manifest records as %s; it will be made again", layout.TOKENS, name)
    return names


def missing_ranges(manifest: Manifest) -> list[tuple[int, int | None]]:
    """Runs of shards to make, as `(first, end)`; the last is open-ended unless `total_tokens` are there.

    A gap between finished shards is made alone; the rest is made from the last shard's cursor on.
    """
    present = [shard.index for shard in manifest.shards]
    ranges: list[tuple[int, int | None]] = []
    expected = 0
    for index in present:
        if index > expected:
            ranges.append((expected, index))
        expected = index + 1
    total = manifest.recipe.total_tokens
    if total is None or expected * manifest.recipe.shard_size < total:
        ranges.append((expected, None))
    return ranges
