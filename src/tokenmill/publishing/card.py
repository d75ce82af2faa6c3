"""Card: a data root → `README.md`, `croissant.json` and a preview, as the hub wants them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tokenmill.corpus.location import without_secrets
from tokenmill.dataroot import atomic
from tokenmill.errors import DataRootError, TokenizerError
from tokenmill.loading.view import open_root
from tokenmill.publishing.croissant import CROISSANT, croissant
from tokenmill.publishing.facts import Facts, find_facts, short_name
from tokenmill.publishing.preview import PREVIEW, preview

README = "README.md"
_MADE_BY = "<!-- Made by tokenmill card; SHA-256 of the rest: {} -->"
_DIGEST = re.compile("^" + re.escape(_MADE_BY).replace(re.escape("{}"), "([0-9a-f]{64})") + "\n\n", re.MULTILINE)
_MOST_SOURCES = 100
_MOST_SHOWN_DOMAINS = 20
_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}
"""The hub's vocabulary `size_categories`, with the size below which each applies."""


class CardReport(msgspec.Struct):
    """What `write_card` wrote."""

    root: str
    files: list[str]
    notes: list[str]


def write_card(
    root: Path | str,
    *,
    name: str | None = None,
    license: str | None = None,  # what the hub calls it
    url: str | None = None,
    overwrite: bool = False,
) -> CardReport:
    """Write `README.md`, `croissant.json` and `preview/samples.parquet` into a finished data root.

    They say what the records and sidecars of the data root say, and nothing else but the arguments.

    Args:
        root: the data root.
        name: of the data set; None: that of its directory.
        license: identifier, as the hub and SPDX have it; None: none is named.
        url: of the data set's page.
        overwrite: replace a README.md that this did not write, or that was changed afterwards.

    Raises:
        DataRootError: it is not finished, is a view, or has a README.md that would be lost.
        StorageError: a file cannot be written.
    """
    root = Path(root)
    facts = find_facts(root, name=name, license=license, url=url)
    path = root / README
    _require_ours(root, overwrite=overwrite)
    notes = []
    if url is not None and not url.startswith(("http://", "https://")):
        notes.append(f"--url {url}: expected a page on the web, https://...")
    if license is None:
        notes.append("no license is named: give --license, as the hub and its users ask for one")
    try:
        data = preview(open_root(root))  # type: ignore[arg-type]  # it is no view
    except TokenizerError as error:
        notes.append(f"there is no preview: {error.message}")
    else:
        with atomic.translate_write_errors((root / PREVIEW).parent):
            (root / PREVIEW).parent.mkdir(exist_ok=True)
        atomic.write_whole(root / PREVIEW, data)
        facts.files[PREVIEW] = (len(data), hashlib.sha256(data).hexdigest())
    atomic.write_whole(root / CROISSANT, croissant(facts))
    atomic.write_whole(path, readme(facts).encode("utf-8", "backslashreplace"))
    written = [name for name in (README, CROISSANT, PREVIEW) if name != PREVIEW or PREVIEW in facts.files]
    return CardReport(str(root), written, notes)


def _require_ours(root: Path, *, overwrite: bool) -> None:
    """Refuse to replace what `write_card` did not write, or what was changed since."""
    path = root / README
    with atomic.translate_read_errors(path):
        card = path.read_text("utf-8", "replace") if path.exists() else None
    lost = [path] if card is not None and not _is_as_written(card) else []
    lost += [root / name for name in (CROISSANT, PREVIEW) if card is None and (root / name).exists()]
    if lost and not overwrite:
        raise DataRootError(
            f"{lost[0]}: was not made by tokenmill card, or was changed since, and would be replaced",
            next_step="move it away, or say --overwrite (overwrite=True)",
        )


def _is_as_written(text: str) -> bool:
    """Return whether tokenmill wrote a card and no one changed it since."""
    found = _DIGEST.search(text)
    return found is not None and found[1] == _digest(text[: found.start()] + text[found.end() :])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def readme(facts: Facts) -> str:
    """Return the card, with its YAML, and the digest by which it knows whether it was changed."""
    head, body = "\n".join(_yaml(facts)) + "\n\n", _body(facts)
    return f"{head}{_MADE_BY.format(_digest(head + body))}\n\n{body}"


def _body(facts: Facts) -> str:
    manifest = facts.manifest
    recipe = manifest.recipe
    lines = [f"# {_text(facts.name)}", "", _text(facts.description), ""]
    settings = {
        "tokens": f"{manifest.tokens:,}, {facts.dtype}, little-endian",
        "documents": f"{manifest.documents:,}, each ended by {_code(recipe.eos_token or '')} = "
        f"{manifest.tokenizer.eos_id}",
        "tokenizer": f"{_code(short_name(manifest.tokenizer.name))}, {manifest.tokenizer.vocab_size:,} ids, "
        f"`tokenizer.json` SHA-256 `{manifest.tokenizer.sha256}`",
        "order": f"shuffled through a buffer of {recipe.buffer_size:,} rows, seed {recipe.seed}"
        if recipe.order == "buffer"
        else "as stored",
        "samples": f"{manifest.tokens // recipe.seq_len:,} of {recipe.seq_len:,} tokens"
        if facts.record is None
        else f"{facts.record.samples:,} of {facts.record.seq_len:,} tokens",
        "fingerprint": f"`{manifest.fingerprint}`",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.software.items()),
    }
    lines += _table(("", ""), list(settings.items()))
    lines += _sources(facts)
    if facts.domains is not None:
        lines += _domains(facts)
    lines += _rows(facts)
    lines += ["", "## Files", "", *_table(("file", "bytes", "SHA-256"), _file_rows(facts))]
    lines += [
        "",
        "`tokenmill download` or any other means brings the files here; `tokenmill verify DIRECTORY` compares every "
        "byte with `manifest.json`, and `tokenmill.TokenDataset(DIRECTORY)` opens it for training.",
        "",
    ]
    return "\n".join(lines)


def _yaml(facts: Facts) -> list[str]:
    """Return the head of the card; JSON strings are YAML strings, too."""
    size = next((name for most, name in _SIZES.items() if facts.manifest.documents < most), "n>1B")
    lines = ["---", f"pretty_name: {json.dumps(facts.name, ensure_ascii=False)}"]
    if facts.license:
        lines.append(f"license: {json.dumps(facts.license)}")
    lines += ["task_categories:", "- text-generation", "size_categories:", f"- {size}", "tags:", "- tokenized"]
    if PREVIEW in facts.files:
        lines += ["configs:", "- config_name: preview", "  data_files:", "  - split: train", f"    path: {PREVIEW}"]
    return [*lines, "---"]


def _sources(facts: Facts) -> list[str]:
    lines = ["", "## Sources", ""]
    lines += [f"- {_text(source.name)}" + (f": <{source.url}>" if source.url else "") for source in facts.lineage]
    manifest = facts.manifest
    ledger = {entry.path: entry for entry in manifest.ledger}
    largest = sorted(manifest.files, key=lambda file: (-file.nbytes, file.path))
    rows = [
        (_code(file.path), f"{file.nbytes:,}", *(f"{number:,}" for number in (entry.rows, entry.documents)))
        for file in largest[:_MOST_SOURCES]
        if (entry := ledger.get(file.path)) is not None
    ]
    lines += ["", *_table(("source file", "bytes", "rows", "documents"), rows)]
    if len(largest) > _MOST_SOURCES:
        rest = largest[_MOST_SOURCES:]
        lines += ["", f"And {len(rest):,} smaller files of {sum(file.nbytes for file in rest):,} bytes together."]
    return lines


def _domains(facts: Facts) -> list[str]:
    found = facts.domains
    assert found is not None
    lines = ["", "## Domains", ""]
    lines.append(
        f"{found.documents:,} documents name a URL, of {found.hosts:,} different hosts; {found.without:,} name none. "
        "The largest tenth of the hosts, at least 20 and at most 1,000, with their share of the tokens that have a URL:"
    )
    rows = [
        (_code(each.host), f"{each.documents:,}", f"{each.tokens:,}", f"{each.tokens / max(1, found.tokens):.3%}")
        for each in found.top
    ]
    head = ("host", "documents", "tokens", "share")
    lines += ["", *_table(head, rows[:_MOST_SHOWN_DOMAINS])]
    if len(rows) > _MOST_SHOWN_DOMAINS:
        rest = _table(head, rows[_MOST_SHOWN_DOMAINS:])
        lines += [
            "",
            f"<details><summary>{len(rows) - _MOST_SHOWN_DOMAINS:,} more</summary>",
            "",
            *rest,
            "",
            "</details>",
        ]
    return lines


def _rows(facts: Facts) -> list[str]:
    """Say what became of every row."""
    ledger = facts.manifest.ledger
    counts = {
        "documents": sum(entry.documents for entry in ledger),
        "without a value": sum(entry.null for entry in ledger),
        "without text": sum(entry.empty for entry in ledger),
        "not what their format says, left out": sum(entry.bad for entry in ledger),
        "after the end of the stream": sum(entry.unused for entry in ledger),
    }
    rows = [(name, f"{number:,}") for name, number in counts.items() if number or name == "documents"]
    return [
        "",
        "## What became of the rows",
        "",
        *_table(("", "rows"), rows),
        *(f"\n{_text(n)}" for n in facts.manifest.notes),
    ]


def _file_rows(facts: Facts) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (_code(name), f"{nbytes:,}", f"`{sha256}`") for name, (nbytes, sha256) in facts.files.items()
    ]
    if len(rows) <= _MOST_SOURCES:
        return rows
    more = f"{len(rows) - _MOST_SOURCES:,} more, all in `{CROISSANT}`"
    return [*rows[:_MOST_SOURCES], (more, "", "")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _text(text: str) -> str:
    """Return text that Markdown and HTML leave as it is, on one line."""
    safe = without_secrets(text)
    assert isinstance(safe, str)
    for character, code in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        safe = safe.replace(character, code)
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c if c.isprintable() else " " for c in safe)


def _code(text: str) -> str:
    """Return text as code in a cell of a table."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")
