"""Summary: what a run did."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from tokenmill.corpus.choice import format_of
from tokenmill.dataroot.proof import Proof
from tokenmill.pipeline.job import Job
from tokenmill.redact import escape_surrogates


class Summary(msgspec.Struct, kw_only=True):
    """What a run did."""

    root: str
    status: str
    """`complete` or `already complete`."""
    tokens: int
    documents: int
    shards: int
    dtype: str
    new_tokens: int
    """Number of tokens that this run made."""
    seconds: float
    tokens_per_second: float
    rows: int
    skipped_null: int
    skipped_empty: int
    skipped_bad: int
    """Number of rows that are not what their format says; `skipped.jsonl` lists them."""
    retries: int
    """Number of requests to a store that failed and were tried again."""
    special_documents: int
    """Number of documents that hold a control-token string."""
    audited_documents: int
    engine: str
    """The tokenizer backend and its version."""
    remade: list[str]
    """Files of an earlier run that were missing or not what the manifest says."""
    uploaded_to: str | None = None
    notes: list[str] = []
    """What a user should know about the corpus and the tokenizer."""
    proof: Proof | None = None
    """The proof of `tokens.bin` and `sample_ids.bin`, where there are such."""


class Made(msgspec.Struct):
    """What a run made, as far as the manifest does not say."""

    audited_documents: int = 0
    retries: int = 0


def summarize(
    job: Job,
    status: str,
    done_before: int,
    started: float,
    *,
    made: Made | None = None,
    remade: Sequence[str] = (),
    proof: Proof | None = None,
) -> Summary:
    """Summarize a run that began at `started` (`time.monotonic`) with `done_before` tokens made by earlier runs."""
    manifest = job.manifest
    seconds = time.monotonic() - started
    new_tokens = manifest.tokens - done_before
    made = made or Made(retries=job.inputs.corpus.retries)
    return Summary(
        root=escape_surrogates(job.root),
        status=status,
        tokens=manifest.tokens,
        documents=manifest.documents,
        shards=len(manifest.shards),
        dtype=manifest.recipe.dtype,
        new_tokens=new_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(new_tokens / seconds),
        rows=sum(entry.rows - entry.unused for entry in manifest.ledger),
        skipped_null=sum(entry.null for entry in manifest.ledger),
        skipped_empty=sum(entry.empty for entry in manifest.ledger),
        skipped_bad=sum(entry.bad for entry in manifest.ledger),
        retries=made.retries,
        special_documents=sum(entry.special for entry in manifest.ledger),
        audited_documents=made.audited_documents,
        engine=job.inputs.encoder.backend.version,
        remade=list(remade),
        uploaded_to=job.destination.sender.name if job.destination else None,
        notes=[*job.inputs.notes, *_notes_after(job)],
        proof=proof,
    )


def _notes_after(job: Job) -> list[str]:
    """Return notes that only reading the whole corpus can give."""
    recipe, manifest = job.inputs.recipe, job.manifest
    notes = []
    texts = [file for file in manifest.files if format_of(file.path) == "text"]
    separator = recipe.text_separator
    if separator is not None and texts and all(file.rows is not None and file.rows <= 1 for file in texts):
        notes.append(f"--text-separator {separator!r} divides none of {len(texts):,} text files: each is one document")
    if recipe.total_tokens is not None and manifest.tokens < recipe.total_tokens:
        notes.append(
            f"--total-tokens {recipe.total_tokens:,}: the corpus ended after {manifest.tokens:,} tokens, "
            f"{recipe.total_tokens - manifest.tokens:,} short of that"
        )
    return notes
