"""Report: results → lines of text for a person. Pure."""

from __future__ import annotations

from pathlib import Path

from tokenmill.consolidate import Report
from tokenmill.layout import SAMPLE_IDS, TOKENS
from tokenmill.manifest import Consolidated
from tokenmill.pipeline import Prepared, Summary
from tokenmill.preflight import Preflight
from tokenmill.progress import count, duration
from tokenmill.proof import Proof


def plan_lines(prepared: Prepared, figures: Preflight, output: Path, workers: int) -> list[str]:
    """The plan of a dry run."""
    recipe, corpus, encoder = prepared
    about = "" if figures.rows_exact else "about "
    order = f"buffer of {recipe.buffer_size:,} rows, seed {recipe.seed}" if recipe.order == "buffer" else "sequential"
    limit = "the whole corpus" if recipe.total_tokens is None else f"stops at {recipe.total_tokens:,}"
    lines = {
        "output": str(output),
        "corpus": f"{corpus.root}: {figures.files:,} files, {figures.source_nbytes / 1e9:.3f} GB, "
        f"{about}{figures.rows:,} rows",
        "tokenizer": f"{encoder.tokenizer.name}: {encoder.tokenizer.vocab_size:,} ids, EOS {recipe.eos_token} "
        f"= {encoder.tokenizer.eos_id}, engine {encoder.engine.version}",
        "order": order,
        "tokens": f"about {count(figures.tokens)} ({limit}; "
        f"the corpus has about {count(figures.estimated_corpus_tokens)})",
        "done": f"{figures.done_tokens:,} tokens, by an earlier run",
        "shards": f"about {figures.shards:,} of {recipe.shard_size:,} tokens, {figures.dtype}",
        "disk": f"about {figures.disk_needed_nbytes / 1e9:.3f} GB needed, {figures.disk_free_nbytes / 1e9:.1f} GB free",
        "memory": f"about {figures.estimated_memory_nbytes / 1e9:.2f} GB",
        "time": f"about {duration(figures.estimated_seconds)} with {workers} workers",
    }
    if not figures.done_tokens:
        del lines["done"]
    return [f"{name:<10} {value}" for name, value in lines.items()]


def summary_lines(summary: Summary) -> list[str]:
    """What a run of `pretokenize` did."""
    place = _shards(summary.shards) if summary.proof is None else TOKENS
    made = f"{summary.root}: {summary.tokens:,} tokens in {place} ({summary.dtype}), "
    proof = proof_lines(summary.proof) if summary.proof else []
    if summary.status == "already complete":
        return [f"{summary.root}: already complete: {summary.tokens:,} tokens in {place}; nothing to do", *proof]
    return [
        *(f"{name} was missing or damaged: made again" for name in summary.remade),
        f"{made}{summary.documents:,} documents",
        f"rows {summary.rows:,} = {summary.documents:,} documents + {summary.skipped_null:,} null + "
        f"{summary.skipped_empty:,} empty; {summary.special_documents:,} documents hold control-token strings",
        f"{summary.new_tokens:,} tokens in {summary.seconds:.1f} s, {summary.tokens_per_second / 1e6:.1f} M tokens/s; "
        f"{summary.audited_documents:,} documents checked with the reference engine, all equal",
        *proof,
    ]


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def consolidation_lines(result: Report, *, skipped: bool) -> list[str]:
    """What a consolidation did, and the proof of it."""
    record = result.proof.record
    lines = ["already complete; nothing to do"]
    if result.status != "already complete":
        lines = [f"{record.tokens_nbytes / 1e9:.3f} GB in {result.seconds:.1f} s"]
    if result.adopted_nbytes:
        lines.append(f"{result.adopted_nbytes / 1e9:.3f} GB of it had been copied by an earlier run")
    if result.consumed:
        lines.append(f"{_shards(result.consumed)} deleted: {TOKENS} has their bytes")
    if skipped:
        return [*lines, *file_lines(record), "Validation skipped: nothing was compared, so nothing was proven."]
    return [*lines, *proof_lines(result.proof)]


def file_lines(record: Consolidated) -> list[str]:
    """What the two files are."""
    return [
        f"{TOKENS:<15} {record.tokens:,} tokens ({record.dtype})  sha256 {record.tokens_sha256}",
        f"{SAMPLE_IDS:<15} {record.samples:,} ids ({record.id_scheme}, {record.seq_len:,} tokens each)  "
        f"sha256 {record.sample_ids_sha256}",
    ]


def proof_lines(proof: Proof) -> list[str]:
    """PASS or FAIL of every check, the verdict last; shards that pass share a line."""
    lines = file_lines(proof.record)
    shards = [check for check in proof.checks if check.name.startswith("train_")]
    if good := sum(check.passed for check in shards):
        lines.append(f"{'shards sha256':<24} PASS  {good:,} of {len(shards):,}")
    for check in proof.checks:
        if not check.passed:
            lines += [f"{check.name:<24} FAIL", f"  expected  {check.expected}", f"  actual    {check.found}"]
        elif check not in shards:
            lines.append(f"{check.name:<24} PASS  {check.found}")
    if not proof.passed:
        return [*lines, "\u274c Preprocessing failed validation!"]
    if not proof.against:
        return [
            *lines,
            "Nothing to compare with: there is no manifest.json, and no published data set has this many tokens. "
            "The digests above are recorded, not proven.",
        ]
    return [*lines, f"compared with {proof.against}", "\u2705 Preprocessing complete!"]
