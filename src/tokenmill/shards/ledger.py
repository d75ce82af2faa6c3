"""Ledger: every row of the corpus is a document or was left out for a reason, and the counts balance."""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenmill.dataroot.manifest import Count, FileLedger, Manifest, save
from tokenmill.errors import LedgerError, SourceError


def balance(root: Path, manifest: Manifest) -> None:
    """Fill the ledger, per source file.

    Raises:
        LedgerError: rows are missing or counted twice.
        SourceError: no row had text.
    """
    if not manifest.shards:
        rows = sum(count.rows for count in manifest.tail)
        raise SourceError(
            f"{root}: the corpus has {rows} rows and none has text", next_step="name the text column with --text-column"
        )
    totals = [Count(index) for index in range(len(manifest.files))]
    for count in itertools.chain(*(shard.ledger for shard in manifest.shards), manifest.tail):
        totals[count.file].add(count)
    manifest.ledger = [
        FileLedger(
            path=file.path,
            rows=count.rows if file.rows is None else file.rows,
            documents=count.documents,
            null=count.null,
            empty=count.empty,
            special=count.special,
            bad=count.bad,
            # A file that was not read to its end may have more rows after the end of the stream.
            unused=0 if file.rows is None else file.rows - count.rows,
        )
        for file, count in zip(manifest.files, totals, strict=True)
    ]
    end = manifest.shards[-1].next_cursor
    emitted = end.position + (end.offset > 0) + sum(count.rows for count in manifest.tail)
    stopped = manifest.tokens == manifest.recipe.total_tokens
    for entry in manifest.ledger:
        if entry.unused < 0 or (entry.unused > 0 and not stopped):
            raise LedgerError(
                f"{root}: {entry.path}: {entry.rows} rows read, but {entry.documents} documents + {entry.null} null "
                f"+ {entry.empty} empty + {entry.bad} bad = {entry.rows - entry.unused}",
                next_step="report this with manifest.json; do not train on this data root",
            )
    counted = sum(entry.rows - entry.unused for entry in manifest.ledger)
    if counted != emitted or sum(entry.documents for entry in manifest.ledger) != manifest.documents:
        raise LedgerError(
            f"{root}: {emitted} rows emitted and {manifest.documents} documents recorded, but the ledger has "
            f"{counted} rows and {sum(entry.documents for entry in manifest.ledger)} documents",
            next_step="report this with manifest.json; do not train on this data root",
        )


def complete(root: Path, manifest: Manifest) -> None:
    """Record that the data set is complete, once its ledger balances."""
    manifest.complete = True
    save(root, manifest)
