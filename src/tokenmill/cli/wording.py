"""Wording: results → lines of text for a person. Pure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenmill.dataroot.layout import SAMPLE_IDS, SCHEDULE_PERIOD, SKIPPED, TOKENS
from tokenmill.options import MAX_VALUES, MOST_GROUPS
from tokenmill.progress import count, duration, plural

if TYPE_CHECKING:  # names of types only: what a command does not use it does not wait for
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from tokenmill.cli.first_shard import ShardStatistics
    from tokenmill.comparison.compare import Comparison
    from tokenmill.dataroot.manifest import Consolidated, FileLedger
    from tokenmill.dataroot.proof import Check, Proof
    from tokenmill.dataroot.view_record import ViewRecord
    from tokenmill.interchange.export import ExportReport
    from tokenmill.interchange.importing import ImportReport
    from tokenmill.loading.info import Info
    from tokenmill.loading.order_quality import OrderQuality
    from tokenmill.loading.provenance import DocumentSlice, Provenance, Sample, Samples, Token
    from tokenmill.loading.stats import Stats, TokenCount
    from tokenmill.pipeline.job import RunInputs
    from tokenmill.pipeline.preflight import Preflight
    from tokenmill.pipeline.summary import Summary
    from tokenmill.publishing.hub import PublishReport
    from tokenmill.recipe import Recipe
    from tokenmill.shards.consolidate import ConsolidationReport
    from tokenmill.transfer.selection import TransferReport as Transfer
    from tokenmill.verification.verify import Verification
    from tokenmill.views.build import PackingPlan
    from tokenmill.views.disjoint import Disjointness
    from tokenmill.views.write import WriteReport


def _framing(recipe: Recipe) -> dict[str, str]:
    """Describe what surrounds and divides documents, besides EOS."""
    found = {"begin with": f"BOS {recipe.bos_token}"} if recipe.bos == "prepend" else {}
    if recipe.fim_rate:
        found["fill in"] = (
            f"{recipe.fim_rate:.1%} of the documents are taken apart at {' '.join(recipe.fim_tokens or ())}, "
            f"{recipe.fim_spm_rate:.1%} of these as suffix, prefix, middle"
        )
    return found


def plan_lines(prepared: RunInputs, figures: Preflight, output: Path, workers: int) -> list[str]:
    """Return the plan of a dry run."""
    recipe, corpus, encoder = prepared
    about = "" if figures.rows_exact else "about "
    order = f"buffer of {recipe.buffer_size:,} rows, seed {recipe.seed}" if recipe.order == "buffer" else "sequential"
    limit = "the whole corpus" if recipe.total_tokens is None else f"stops at {recipe.total_tokens:,}"
    lines = {
        "output": str(output),
        "corpus": f"{corpus.location.name}: {figures.files:,} files, {figures.source_nbytes / 1e9:.3f} GB, "
        f"{about}{figures.rows:,} rows",
        "tokenizer": f"{encoder.tokenizer.name}: {encoder.tokenizer.vocab_size:,} ids, EOS {recipe.eos_token} "
        f"= {encoder.tokenizer.eos_id}, backend {encoder.backend.version}",
        **_framing(recipe),
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
    return [f"{name:<10} {value}" for name, value in lines.items()] + [f"{'note':<10} {note}" for note in figures.notes]


def summary_lines(summary: Summary, said: Collection[str] = ()) -> list[str]:
    """Return what a run of `pretokenize` did; notes that were `said` when it began are not said again."""
    place = _shards(summary.shards) if summary.proof is None else TOKENS
    made = f"{summary.root}: {summary.tokens:,} tokens in {place} ({summary.dtype}), "
    proof = proof_lines(summary.proof) if summary.proof else []
    if summary.status == "already complete":
        done = f"{summary.root}: already complete: {summary.tokens:,} tokens in {place}; nothing to do"
        return [done, *_sent_lines(summary), *proof]
    return [
        *(f"{name} was missing or damaged: made again" for name in summary.remade),
        f"{made}{summary.documents:,} documents",
        f"rows {summary.rows:,} = {summary.documents:,} documents + {summary.skipped_null:,} null + "
        f"{summary.skipped_empty:,} empty{_bad(summary.skipped_bad)}; {summary.special_documents:,} documents hold "
        "control-token strings",
        *([f"requests that failed and were tried again: {summary.retries:,}"] if summary.retries else []),
        f"{summary.new_tokens:,} tokens in {summary.seconds:.1f} s, {summary.tokens_per_second / 1e6:.1f} M tokens/s; "
        f"{summary.audited_documents:,} documents checked with the reference backend, all equal",
        *(f"note: {note}" for note in summary.notes if note not in said),
        *_sent_lines(summary),
        *proof,
    ]


def _sent_lines(summary: Summary) -> list[str]:
    return [f"{summary.uploaded_to}: has all of it"] if summary.uploaded_to else []


def transfer_lines(result: Transfer) -> list[str]:
    """Return what a transfer did, or would do."""
    moved, nbytes = result.moved, sum(file.moved_nbytes for file in result.files)
    there = plural(len(result.files) - len(moved), "file")
    if result.dry_run:
        lines = [f"{file.nbytes:>16,}  {file.path}" for file in moved]
        return [*lines, f"{plural(len(moved), 'file')}, {nbytes / 1e9:.3f} GB to transfer; {there} there already"]
    speed = f" in {result.seconds:.1f} s, {nbytes / 1e6 / max(1e-9, result.seconds):.0f} MB/s" if nbytes else ""
    lines = [
        f"{result.source} \u2192 {result.target}: {plural(len(moved), 'file')}, {nbytes / 1e9:.3f} GB{speed}; "
        f"{there} there already"
    ]
    proofs = {
        "sha256": "SHA-256 of the manifest",
        "etag": "the store's ETag",
        "twice": "a second reading, which gave the same: the store tells nothing of the bytes",
    }
    for name, what in proofs.items():
        if count := sum(file.checked == name for file in result.files):
            lines.append(f"{plural(count, 'file')} compared with {what}")
    if result.retries:
        lines.append(f"requests that failed and were tried again: {result.retries:,}")
    return lines


def published_lines(found: PublishReport) -> list[str]:
    """Say what was sent to the hub, or would be."""
    total = f"{plural(len(found.files), 'file')}, {sum(found.files.values()) / 1e9:.3f} GB"
    notes = [f"note: {note}" for note in found.notes]
    if not found.commit:
        lines = [f"{nbytes:>16,}  {name}" for name, nbytes in found.files.items()]
        return [*lines, f"{total} to send to {found.url}", *notes]
    return [f"{found.url}: {total}, compared with the digests that the hub has, at commit {found.commit}", *notes]


def _bad(count: int) -> str:
    return f" + {count:,} bad (listed in {SKIPPED})" if count else ""


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def consolidation_lines(result: ConsolidationReport, *, skipped: bool) -> list[str]:
    """Return what a consolidation did, and the proof of it."""
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
    """Return what the two files are."""
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
        if not (check.passed and check in shards):
            lines += _check_lines(check)
    if not proof.passed:
        return [*lines, "\u274c Preprocessing failed validation!"]
    if not proof.against:
        return [
            *lines,
            "Nothing to compare with: there is no manifest.json, and no published data set has this many tokens. "
            "The digests above are recorded, not proven.",
        ]
    return [*lines, f"compared with {proof.against}", "\u2705 Preprocessing complete!"]


def _check_lines(check: Check) -> list[str]:
    if check.passed:
        return [f"{check.name:<24} PASS  {check.found}"]
    return [f"{check.name:<24} FAIL", f"  expected  {check.expected}", f"  actual    {check.found}"]


def receipt_lines(receipts: Mapping[str, Sequence[Check]]) -> list[str]:
    """PASS or FAIL of every check of every receipt, the verdict on each last."""
    lines: list[str] = []
    for name, checks in receipts.items():
        lines += [line for check in checks for line in _check_lines(check)]
        lines.append(f"{name}: {'true' if all(check.passed for check in checks) else 'NOT TRUE'}")
    return lines


def statistics_lines(figures: ShardStatistics) -> list[str]:
    """Return what the original test-shard script prints."""
    return [
        "",
        "Saved representative shard:",
        f"   Path: {figures.path}",
        f"   Tokens: {figures.tokens:,}",
        f"   Size: {figures.nbytes / 1024**2:.1f} MB",
        f"   Dtype: {figures.dtype}",
        "",
        "Quick Stats:",
        f"   Vocab range: {figures.id_min} - {figures.id_max}",
        f"   Unique tokens: {figures.unique_ids:,}",
        f"   Mean token ID: {figures.id_mean:.1f}",
    ]


def verification_lines(result: Verification) -> list[str]:
    """Return what was checked, every finding, and the verdict last."""
    lines = [f"{'ok' if not check.findings else 'WRONG':<6} {check.what}" for check in result.checked]
    for finding in result.findings:
        lines += [
            f"{finding.file}: {finding.position}: {finding.what}",
            f"  expected  {finding.expected}",
            f"  found     {finding.found}",
        ]
    read = f"{result.nbytes / 1e9:.3f} GB read in {result.seconds:.1f} s"
    if result.findings:
        return [*lines, f"\u274c {plural(len(result.findings), 'finding')}; {read}"]
    if result.elsewhere:
        lines += elsewhere_lines(result.elsewhere)
        return [*lines, f"\u2705 what is here of {result.root} is what its records say; {read}"]
    return [*lines, f"\u2705 {result.root} is what its records say; {read}"]


def elsewhere_lines(files: Mapping[str, str]) -> list[str]:
    """Return files of a data set that are in a store and not here."""
    stores: dict[str, list[str]] = {}
    for name, store in files.items():
        stores.setdefault(store, []).append(name)
    return [
        f"not here but in {store}: {plural(len(names), 'file')}: {names[0]}{f' to {names[-1]}' if names[1:] else ''}"
        for store, names in stores.items()
    ]


def info_lines(found: Info, *, every: bool = False) -> list[str]:
    """Describe a data root at a glance."""
    lines = {
        "data root": f"{found.root}: {'complete' if found.complete else 'NOT complete'}, stored as "
        f"{' and '.join(found.stored_as) or ('nothing here' if found.elsewhere else 'nothing yet')}",
        "tokens": f"{found.tokens:,} ({found.dtype})",
    }
    if found.recipe is not None and found.tokenizer is not None:
        recipe, tokenizer = found.recipe, found.tokenizer
        datasets = recipe.dataset if isinstance(recipe.dataset, str) else ", ".join(recipe.dataset)
        order = (
            f"buffer of {recipe.buffer_size:,} rows, seed {recipe.seed}" if recipe.order == "buffer" else "as stored"
        )
        lines |= {
            "documents": f"{found.documents:,}",
            "corpus": f"{datasets}: {plural(found.files or 0, 'file')}, {(found.source_nbytes or 0) / 1e9:.3f} GB",
            "tokenizer": f"{tokenizer.name}: {tokenizer.vocab_size:,} ids, EOS {recipe.eos_token} = {tokenizer.eos_id}",
            "": f"tokenizer.json sha256 {tokenizer.sha256}",
            "order": order,
            "recipe": f"shard_size {recipe.shard_size:,}, total_tokens {recipe.total_tokens}, "
            f"special_in_text {recipe.special_in_text}, seq_len {recipe.seq_len:,}",
            **_framing(recipe),
            "fingerprint": found.fingerprint or "",
            "made with": ", ".join(f"{name} {version}" for name, version in found.software.items()),
        }
    shown = [f"{name:<12} {value}" for name, value in lines.items()]
    shown += [f"{'note':<12} {note}" for note in found.notes]
    if found.ledger:
        shown += [
            "",
            f"{'rows':>12} {'documents':>12} {'null':>9} {'empty':>9} {'special':>9} {'unused':>9}  source file",
        ]
        ledger = {entry.path: entry for entry in found.ledger}
        names, _ = _largest({path: entry.rows for path, entry in ledger.items()}, every=every)
        shown += [_ledger_line(ledger[name]) for name in names]
        if len(names) < len(ledger):
            shown.append(_ledger_line(_sum_of(found.ledger, f"all {len(ledger):,} files; --all lists them")))
    if found.shards:
        shown += ["", f"{'tokens':>15} {'documents':>12}  {'sha256':<64}  shard"]
        few = found.shards if every else found.shards[:MOST_ROWS]
        shown += [f"{s.tokens:>15,} {s.documents:>12,}  {s.sha256}  {s.name}" for s in few]
        if len(few) < len(found.shards):
            documents = sum(shard.documents for shard in found.shards)
            of_all = f"{'':<64}  all {len(found.shards):,} shards; --all lists them"
            shown.append(f"{found.tokens:>15,} {documents:>12,}  {of_all}")
    if found.consolidated is not None and found.consolidated.complete:
        shown += ["", *file_lines(found.consolidated)]
    if found.elsewhere:
        shown += ["", *elsewhere_lines(found.elsewhere)]
    return shown


def _ledger_line(e: FileLedger) -> str:
    counts = f"{e.rows:>12,} {e.documents:>12,} {e.null:>9,} {e.empty:>9,} {e.special:>9,} {e.unused:>9,}"
    return f"{counts}  {_one_line(e.path)}"


def _sum_of(entries: Sequence[FileLedger], name: str) -> FileLedger:
    return type(entries[0])(
        name,
        *(sum(getattr(entry, field) for entry in entries) for field in ("rows", "documents", "null", "empty")),
        *(sum(getattr(entry, field) for entry in entries) for field in ("special", "unused", "bad")),
    )


def place_lines(place: Provenance) -> list[str]:
    """Return tokens and the documents they come from."""
    sample = "in no single whole sample" if place.sample is None else f"sample {place.sample:,}"
    known = f", id {place.sample_id}" if place.sample_id else ""
    span = f"token {place.begin:,}" if place.end == place.begin + 1 else f"tokens {place.begin:,} to {place.end - 1:,}"
    origins = [f"  {_origin(part)}{_identity(part)}" for part in place.documents]
    return [f"{sample}{known}: {span} of the stream", *origins]


def _identity(part: DocumentSlice) -> str:
    """Return the hash of a document's text and its metadata, as far as they are known."""
    hashed = f", text_xxh3 {part.text_xxh3}" if part.text_xxh3 else ""
    return hashed + "".join(
        f", {_one_line(name)} {_one_line(json.dumps(value, ensure_ascii=False))}"
        for name, value in part.metadata.items()
    )


def _origin(part: DocumentSlice) -> str:
    row, whole = f"{_one_line(part.source)} row {part.row:,}", f"of {part.document_tokens:,}"
    if part.end == part.begin + 1:
        return f"{row}, token {part.document_begin:,} {whole}"
    return f"{row}, tokens {part.document_begin:,} to {part.document_end - 1:,} {whole}"


def samples_lines(found: Samples) -> list[str]:
    """Return the samples of a source row."""
    nowhere = "none: after the last whole sample" if found.begin is not None else "none: no stage gets so far"
    numbers = ", ".join(f"{sample:,}" for sample in found.samples) or nowhere
    where = (
        "in pieces"
        if found.begin is None or found.end is None
        else (f"tokens {found.begin:,} to {found.end - 1:,} of the stream")
    )
    return [f"{found.source} row {found.row:,}: {where}", f"  samples {numbers}"]


_COLOURS = ("\x1b[97;48;5;236m", "\x1b[97;48;5;24m")
_PLAIN = "\x1b[0m"


def plain_lines(found: Sample, limit: int | None) -> list[str]:
    """Return the text alone, document after document, without bounds of tokens."""
    lines: list[str] = []
    for tokens in _tokens_of(found, limit):
        lines += [*([""] if lines else []), *_printable("".join(token.text for token in tokens)).split("\n")]
    return lines


def _tokens_of(found: Sample, limit: int | None) -> list[list[Token]]:
    """Return the tokens of each document of a sample, the first `limit` of all."""
    begin = found.place.begin
    end = found.place.end if limit is None else min(found.place.end, begin + limit)
    parts = [part for part in found.place.documents if part.begin < end]
    return [found.tokens[part.begin - begin : min(part.end, end) - begin] for part in parts]


def _rest_lines(found: Sample, limit: int | None) -> list[str]:
    more = len(found.tokens) - limit if limit is not None else 0
    return ["", f"\u2500\u2500 {plural(more, 'token')} more \u2500\u2500"] if more > 0 else []


def sample_lines(found: Sample, *, colour: bool, limit: int | None = None) -> list[str]:
    """Return the text with the bounds of its tokens: shades on a terminal, bars elsewhere."""
    lines = place_lines(found.place)[:1]
    shown = _tokens_of(found, limit)
    for part, original in zip(found.place.documents, found.originals, strict=True):
        if not shown:
            break
        tokens = shown.pop(0)
        lines += ["", f"\u2500\u2500 {_origin(part)} \u2500\u2500", *_bounded(tokens, colour).split("\n")]
        if original is not None:
            lines += [
                "",
                "\u2500\u2500 its text before it was taken apart \u2500\u2500",
                *_printable(original).split("\n"),
            ]
    return lines + (_rest_lines(found, limit) or _padding_lines(found))


def _padding_lines(found: Sample) -> list[str]:
    padding = len(found.tokens) - sum(part.end - part.begin for part in found.place.documents)
    return ["", f"\u2500\u2500 {plural(padding, 'token')} of padding \u2500\u2500"] if padding else []


def _bounded(tokens: list[Token], colour: bool) -> str:
    texts = [_printable(token.text) for token in tokens if token.text]
    if not colour:
        return "\u2502".join(texts).replace("\n", "\u21b5\n").replace("\n\u2502", "\n")
    shades = [_COLOURS[number % 2] for number in range(len(texts))]
    # A shade must not run to the end of a line.
    return "".join(
        shade + text.replace("\n", f"\u21b5{_PLAIN}\n{shade}") + _PLAIN
        for shade, text in zip(shades, texts, strict=True)
    )


def _one_line(text: str) -> str:
    """Return a name or a value as a cell of a table takes it: on one line, and without what would move a cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor or change its state."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def token_lines(found: Sample, limit: int | None = None) -> list[str]:
    """Return a line for every token."""
    lines = place_lines(found.place)[:1]
    for part, tokens in zip(found.place.documents, _tokens_of(found, limit), strict=False):  # the rest is not shown
        lines += ["", _origin(part), f"{'token':>15} {'id':>8}  text"]
        lines += [f"{at:>15,} {token.id:>8}  {token.text!r}" for at, token in enumerate(tokens, part.begin)]
    return lines + (_rest_lines(found, limit) or _padding_lines(found))


MOST_ROWS = 20
"""Rows of a table, unless `--all` asks for all."""


def _largest(sizes: Mapping[str, int], *, every: bool) -> tuple[list[str], str]:
    """Return the names of the largest, and what to say of the others."""
    names = list(sizes)
    if every or len(names) <= MOST_ROWS:
        return names, ""
    names = sorted(names, key=lambda name: -sizes[name])
    rest = sum(sizes[name] for name in names[MOST_ROWS:])
    return names[:MOST_ROWS], f"{rest:>15,}  in {len(names) - MOST_ROWS:,} more; --all lists them"


def _token(token: TokenCount) -> str:
    """Return a token as its text, which spaces and line ends are visible in; its name where it has no text."""
    return repr(token.text) if token.text else f"{token.name or token.id}"


def stats_lines(found: Stats, *, every: bool = False) -> list[str]:
    """Describe statistics at a glance."""
    vocabulary = f" of {found.vocab_size:,}" if found.vocab_size else ""
    lines = [
        f"tokens        {found.tokens:,}",
        f"ids           {found.distinct_ids:,} different{vocabulary}, {found.id_min} to {found.id_max}, "
        f"mean {found.id_mean:.1f}",
        "most frequent " + ", ".join(f"{_token(token)} {token.count / found.tokens:.2%}" for token in found.top[:10]),
    ]
    if found.document_tokens is not None:
        figures = "  ".join(
            f"{name if name == 'mean' else name + '%'} {value:,.0f}" for name, value in found.document_tokens.items()
        )
        lines += [f"documents     {found.documents:,}", f"their tokens  {figures}"]
    if found.repeated_texts is not None:
        texts, documents = found.repeated_texts.texts, found.repeated_texts.documents
        lines.append(f"same text     {plural(texts, 'text')} more than once, {plural(documents, 'document')} too many")
    if found.duplicates is None:
        lines.append("duplicates    not known: no sample ids are stored (tokenmill consolidate makes a data root's)")
    else:
        same = found.duplicates
        lines.append(f"duplicates    {same.ids:,} sample ids occur more than once, {same.samples:,} samples too many")
        lines += [f"              samples {', '.join(map(str, samples[:10]))}" for samples in same.first]
        if same.without_tokens:
            lines.append(f"              {same.without_tokens:,} ids cover no tokens (templar-v1)")
    if found.control_tokens:
        lines.append("control       " + ", ".join(f"{_token(token)} {token.count:,}" for token in found.control_tokens))
    if found.tokens_by_source is not None:
        lines += _tokens_lines("source file", found.tokens_by_source, found.text_nbytes_by_source or {}, every=every)
    for column, values in (found.tokens_by_value or {}).items():
        if values is None:
            lines += ["", f"{column}: more than {MAX_VALUES:,} different values"]
        else:
            lines += _tokens_lines(column, values, {}, every=every)
    return lines


def _tokens_lines(what: str, tokens: Mapping[str, int], text_nbytes: Mapping[str, int], *, every: bool) -> list[str]:
    names, rest = _largest(tokens, every=every)
    per_token = f"{'bytes per token':>17}" if text_nbytes else ""
    lines = ["", f"{'tokens':>15}{per_token}  {_one_line(what)}"]
    for name in names:
        ratio = f"{text_nbytes[name] / max(1, tokens[name]):>17.3f}" if text_nbytes else ""
        lines.append(f"{tokens[name]:>15,}{ratio}  {_one_line(name)}")
    return lines + ([rest] if rest else [])


def order_lines(quality: OrderQuality) -> list[str]:
    """Say how far the order of documents is from a random one."""
    lines = [
        f"order of {quality.documents:,} documents; a random permutation lies between `low` and `high` 99 times in 100",
        "",
        f"{'found':>12} {'random':>12} {'low':>12} {'high':>12} {'buffer':>12}",
    ]
    for measure in quality.measures:
        figures = (measure.found, measure.random, measure.low, measure.high, measure.buffer)
        verdict = "as random" if measure.is_random else "NOT random"
        lines.append("".join(f"{figure:>12.5g} " for figure in figures) + f" {verdict:<10}  {measure.name}")
    return lines


_REASONS = {
    "unfinished": "the stream of its data root ends inside it",
    "where": "its source's condition is not true",
    "removed": "named in its source's removal list",
    "split": "on the other side of the holdout",
    "duplicate": "an earlier document has the same text",
}


def view_lines(record: ViewRecord, duplicates: int | None = None) -> list[str]:
    """Describe a view: what it takes of each source, and what it leaves out and why."""
    split = f"{record.split}, of a holdout of {record.holdout:g}" if record.holdout else "none"
    order = {"documents": "documents shuffled", "samples": "samples shuffled", "none": "as stored"}[record.shuffle]
    if record.stages:
        tail = sum(source.span - source.samples * record.seq_len for source in record.sources)
    else:
        tail = record.tokens + record.padding - record.samples * record.seq_len
    of_sources = "of the sources: " if record.stages else ""
    taken = f", {record.samples * record.seq_len:,} in all stages" if record.stages else ""
    lines = {
        "documents": f"{of_sources}{record.documents:,}",
        "tokens": f"{of_sources}{record.tokens:,} ({record.dtype}), of which {tail:,} after the last sample",
        "samples": f"{record.samples:,} of {record.seq_len:,} tokens{taken}",
        "packing": _packing(record),
        "order": f"{order}, seed {record.seed}" if record.shuffle != "none" else order,
        "split": split,
        "tokenizer": f"tokenizer.json sha256 {record.tokenizer_sha256}",
    }
    if record.duplicates == "first":
        lines["duplicates"] = "the first of each text is taken"
    elif duplicates is not None:
        lines["duplicates"] = f"{plural(duplicates, 'document')} with a text that an earlier one has"
    shown = [f"{name:<12} {value}" for name, value in lines.items()]
    shown += [f"{'note':<12} {note}" for note in record.notes]
    shown += _stage_lines(record)
    shown += ["", f"{'taken':>13} {'of':>13}  source"]
    for source in record.sources:
        shown.append(f"{source.taken:>13,} {source.documents:>13,}  {source.name}: {source.root}")
        if source.where is not None:
            shown.append(f"{'':>27}  where {source.where}")
        if source.removed:
            shown.append(f"{'':>27}  without {plural(len(source.removed), 'document')} of a removal list")
        shown += [
            f"{'':>13} {count:>13,}  left out: {_REASONS.get(why, why)}" for why, count in source.left_out.items()
        ]
    return shown


def _packing(record: ViewRecord) -> str:
    if record.packing == "concat":
        return "concat: samples are cut from the row of documents"
    row = record.tokens + record.padding
    padding = f"{record.padding:,} tokens of padding ({record.padding / max(1, row):.3%})"
    return f"best-fit: {padding}, {plural(record.cut, 'document')} cut, as longer than a sample"


def _stage_lines(record: ViewRecord) -> list[str]:
    """Describe the stages of a mixture; epochs are counted from the first stage on."""
    shown: list[str] = []
    samples = {source.name: source.samples for source in record.sources}
    taken = dict.fromkeys(samples, 0)
    for number, stage in enumerate(record.stages, start=1):
        tokens = stage.samples * record.seq_len
        shown += ["", f"stage {number}: {stage.samples:,} samples, {tokens:,} tokens"]
        shown.append(f"{'samples':>13} {'tokens':>17} {'share':>8} {'wanted':>8} {'epochs':>8}  source")
        for name, share in stage.shares.items():
            here = stage.taken.get(name, 0)
            taken[name] += here
            met, wanted = here / max(1, stage.samples), share / SCHEDULE_PERIOD
            epochs = taken[name] / max(1, samples[name])
            shown.append(f"{here:>13,} {here * record.seq_len:>17,} {met:>8.4f} {wanted:>8.4f} {epochs:>8.3f}  {name}")
    return shown


def packing_lines(record: ViewRecord, plans: list[PackingPlan]) -> list[str]:
    """Compare ways to make samples, each epoch of each source once; the view's own is marked."""
    shown = ["", f"{'seq_len':>9}  {'packing':<8} {'samples':>13} {'documents':>10} {'cut':>12} {'padding':>13}  tail"]
    shown.append(f"{'':>9}  {'':<8} {'':>13} {'per sample':>10} {'documents':>12} {'':>13}")
    for plan in plans:
        own = " *" if (plan.packing, plan.seq_len) == (record.packing, record.seq_len) else ""
        padding = f"{plan.padding / max(1, plan.samples * plan.seq_len):.3%}"
        shown.append(
            f"{plan.seq_len:>9,}  {plan.packing:<8} {plan.samples:>13,} {plan.documents_per_sample:>10,.2f} "
            f"{plan.cut:>12,} {padding:>13}  {plan.tail:,}{own}"
        )
    return shown


def written_lines(found: WriteReport) -> list[str]:
    """Say what writing a view did."""
    what = f"{_shards(found.shards)}, {plural(found.tokens, 'token')}, {plural(found.documents, 'document')}"
    if found.status != "complete":
        return [f"\u2705 {found.root}: {what}: already complete"]
    rate = count(found.new_tokens / max(1e-9, found.seconds))
    way = ", through files on disk, as the sources do not fit in memory" if found.through_disk else ""
    return [f"{count(found.new_tokens)} tokens in {found.seconds:.1f} s, {rate}/s{way}", f"\u2705 {found.root}: {what}"]


def disjointness_lines(found: Disjointness) -> list[str]:
    """Say what comparing two views found."""
    lines = [
        f"{name}: {plural(documents, 'document')}, {plural(texts, 'text')}"
        for name, documents, texts in zip(found.views, found.documents, found.texts, strict=True)
    ]
    if found.identity == "tokens":
        lines.append("their data roots have no hashes of text: documents were compared by their tokens")
    if found.passed:
        return [*lines, "\u2705 no text is in both"]
    return [*lines, *found.examples, f"\u274c {plural(found.shared, 'text')} in both"]


def comparison_lines(found: Comparison) -> list[str]:
    """Set tokenizers side by side."""
    lines = [
        f"{found.corpus}: {found.corpus_files:,} files, about {count(found.corpus_documents)} documents and "
        f"{found.corpus_text_nbytes / 1e9:.3f} GB of text",
        f"sample of {found.documents:,} documents, {found.nbytes / 1e6:.1f} MB; intervals of 95% confidence",
    ]
    rows: dict[str, list[str]] = {
        "": [each.name for each in found.tokenizers],
        "ids": [f"{each.vocab_size:,}" for each in found.tokenizers],
        "bytes per token": [each.bytes_per_token.text for each in found.tokenizers],
        "characters per token": [each.characters_per_token.text for each in found.tokenizers],
        "tokens, to the first": [each.relative_tokens.text for each in found.tokenizers],
        "ids in use": [f"{each.used_ids:,} ({each.used_ids / each.vocab_size:.1%})" for each in found.tokenizers],
        "parts of characters": [f"{each.byte_share:.3%}" for each in found.tokenizers],
        "unknown": [f"{each.unknown_share:.3%}" for each in found.tokenizers],
        "documents changed": [f"{each.lost_share:.2%}" for each in found.tokenizers],
        "tokens of all": [f"about {count(each.projected_tokens)}" for each in found.tokenizers],
        "size of all": [f"{each.projected_nbytes / 1e9:.3f} GB, {each.dtype}" for each in found.tokenizers],
        "speed": [
            f"{count(each.tokens_per_second)}/s, {each.nbytes_per_second / 1e6:.0f} MB/s" for each in found.tokenizers
        ],
        "by": [each.engine for each in found.tokenizers],
        "longest tokens": [
            ", ".join(f"{token.text[:12]!r}" for token in each.longest[:2]) for each in found.tokenizers
        ],
    }
    if len(found.tokenizers) == 1:
        del rows["tokens, to the first"]
    lines += ["", *_columns(rows)]
    first = found.tokenizers[0]
    groups = {"source file": [each.by_source for each in found.tokenizers]}
    groups |= {column: [each.by_value[column] for each in found.tokenizers] for column in first.by_value}
    for what, estimates in groups.items():
        table = {f"bytes per token by {what}": [each.name for each in found.tokenizers]}
        table |= {name: [each[name].text for each in estimates] for name in estimates[0]}
        lines += ["", *_columns(table)]
        if len(estimates[0]) == MOST_GROUPS:
            lines.append(f"(those with the most text, at most {MOST_GROUPS})")
    return [*lines, *(f"note: {note}" for note in found.notes)]


_WIDEST = 40


def _columns(rows: Mapping[str, list[str]]) -> list[str]:
    """Return a table with a column for each tokenizer; where a name is long, its end."""
    width = max(len(_one_line(name)) for name in rows)
    cells = {
        name: [text if len(text) <= _WIDEST else f"\u2026{text[1 - _WIDEST :]}" for text in row]
        for name, row in rows.items()
    }
    widths = [max(map(len, column)) for column in zip(*cells.values(), strict=True)]
    return [
        f"{_one_line(name):<{width}}  " + "  ".join(f"{text:>{size}}" for text, size in zip(row, widths, strict=True))
        for name, row in cells.items()
    ]


_MOST_FILES = 12


def export_lines(found: ExportReport) -> list[str]:
    """Say what an export wrote, or would write."""
    tokens = ", ".join(
        f"{split}: {plural(number, 'token')} in {plural(found.documents[split], 'document')}"
        for split, number in found.tokens.items()
    )
    shown = list(found.files.items())[:_MOST_FILES]
    lines = [tokens, *(f"{nbytes:>18,}  {name}" for name, nbytes in shown)]
    if len(found.files) > len(shown):
        lines.append(f"{sum(found.files.values()):>18,}  in {len(found.files):,} files")
    lines += [f"note: {note}" for note in found.notes]
    if found.status == "planned":
        return [*lines, "nothing was written (--dry-run)"]
    linked = f", {plural(found.linked, 'hard link')}" if found.linked else ""
    status = ": already complete" if found.status != "complete" else ""
    return [
        *lines,
        f"read by {found.reader.replace('OUT', found.out)}",
        f"\u2705 {found.out}: {found.format}, {plural(len(found.files), 'file')}{linked}{status}",
    ]


def import_lines(found: ImportReport) -> list[str]:
    """Say what an import made."""
    what = f"{_shards(found.shards)}, {plural(found.tokens, 'token')}, {plural(found.documents, 'document')}"
    status = ": already complete" if found.status != "complete" else f", in {found.seconds:.1f} s"
    link = ["note: tokens.bin is a link to the file that was imported: do not change that file"] if found.linked else []
    return [*(f"note: {note}" for note in found.notes), *link, f"\u2705 {found.root}: {what}{status}"]
