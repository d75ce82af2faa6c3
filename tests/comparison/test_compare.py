"""Comparison: figures are those of the slow way, intervals cover what they say, and lost text is told."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from conftest import run_cli, text, write_parquet
from tokenmill import compare_tokenizers, errors, pretokenize
from tokenmill.cli.demo import TOKENIZER
from tokenmill.comparison.compare import ratio
from tokenmill.loading.stats import NULL
from tokenmill.recipe import Recipe


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with few merges, so that many tokens are parts of characters."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    made.train_from_iterator(["the cat def return"] * 50, trainer)
    return save(made, tmp_path_factory.mktemp("bpe") / "byte-level")


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that loses capitals, and words that it does not know."""
    made = tokenizers.Tokenizer(models.WordPiece({"<end>": 0, "[UNK]": 1, "the": 2, "cat": 3}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return save(made, tmp_path_factory.mktemp("wp") / "lower")


@pytest.fixture
def langs(tmp_path: Path) -> Path:
    for number in range(3):
        texts: list[str | None] = [text(row, 5 + row % 60) for row in range(number * 200, number * 200 + 200)]
        texts[7], texts[8] = None, ""
        lang = [("en", "de", None)[row % 3] for row in range(200)]
        write_parquet(tmp_path / "corpus" / f"{number}.parquet", texts, lang=lang)
    return tmp_path / "corpus"


def test_figures_are_those_of_the_slow_way(langs: Path, byte_level: Path) -> None:
    found = compare_tokenizers([str(TOKENIZER), str(byte_level)], str(langs), metadata_columns=["lang"])
    tables = {path.name: pq.read_table(path).to_pylist() for path in sorted(langs.glob("*.parquet"))}
    rows = [(name, row) for name, table in tables.items() for row in table if row["text"]]
    assert (found.documents, found.corpus_documents) == (len(rows), len(rows))
    assert found.nbytes == found.corpus_text_nbytes == sum(len(row["text"].encode()) for _, row in rows)
    assert found.characters == sum(len(row["text"]) for _, row in rows)
    first: list[int] = []
    for figures, folder in zip(found.tokenizers, (TOKENIZER, byte_level), strict=True):
        slow = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = [slow.encode(row["text"], add_special_tokens=False).ids for _, row in rows]
        counts = [len(each) for each in ids]
        first = first or counts
        assert figures.tokens == sum(counts)
        assert figures.bytes_per_token.value == pytest.approx(found.nbytes / sum(counts))
        assert figures.characters_per_token.value == pytest.approx(found.characters / sum(counts))
        assert figures.relative_tokens.value == pytest.approx(sum(counts) / sum(first))
        every = [token for each in ids for token in each]
        assert figures.used_ids == len(set(every))
        assert figures.projected_tokens == sum(counts) + len(rows)  # the sample is all there is
        assert (figures.dtype, figures.projected_nbytes) == ("uint16", 2 * figures.projected_tokens)
        for lang, key in (("en", "en"), ("de", "de"), (None, NULL)):
            here = [at for at, (_, row) in enumerate(rows) if row["lang"] == lang]
            nbytes = sum(len(rows[at][1]["text"].encode()) for at in here)
            assert figures.by_value["lang"][key].value == pytest.approx(nbytes / sum(counts[at] for at in here))
        here = [at for at, (name, _) in enumerate(rows) if name == "1.parquet"]
        nbytes = sum(len(rows[at][1]["text"].encode()) for at in here)
        assert figures.by_source["1.parquet"].value == pytest.approx(nbytes / sum(counts[at] for at in here))
        assert figures.lost_share == 0
        assert figures.tokens_per_second > 0
        assert figures.longest[0].nbytes == max(token.nbytes for token in figures.longest)
    parts = found.tokenizers[1].byte_share
    emoji = sum(row["text"].count("\U0001f680") * 4 + row["text"].count("日本") * 6 for _, row in rows)
    assert parts * found.tokenizers[1].tokens >= emoji * 0.99
    assert found.tokenizers[0].unknown_share > 0  # `<unk>` stands in the text


def test_the_projection_is_what_a_run_makes(langs: Path, tmp_path: Path) -> None:
    found = compare_tokenizers([str(TOKENIZER)], str(langs), sample_nbytes=20_000)
    summary = pretokenize(Recipe(dataset=str(langs), tokenizer=str(TOKENIZER)), tmp_path / "out")
    assert found.documents < summary.documents / 2
    assert found.tokenizers[0].projected_tokens == pytest.approx(summary.tokens, rel=0.1)
    again = compare_tokenizers([str(TOKENIZER)], str(langs), sample_nbytes=20_000)
    for each in (found, again):
        each.tokenizers = [
            msgspec.structs.replace(f, seconds=0, tokens_per_second=0, nbytes_per_second=0) for f in each.tokenizers
        ]
    assert found == again


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.lognormal(5, 1.2, 20_000).astype(np.int64) + 1
    nbytes = (tokens * rng.normal(4, 0.5, 20_000)).astype(np.int64)
    truth = nbytes.sum() / tokens.sum()
    inside = 0
    for _ in range(400):
        drawn = rng.integers(0, len(tokens), 300)
        found = ratio(nbytes[drawn], tokens[drawn])
        inside += found.low <= truth <= found.high
    assert 360 <= inside <= 396  # 95% of 400, within three standard deviations, and a little for skewness
    assert ratio(np.array([3]), np.array([1])).low is None


def test_lost_text_is_refused_or_told(langs: Path, lower: Path) -> None:
    with pytest.raises(errors.TokenizerError, match=r"do not come back .* became ") as refused:
        compare_tokenizers([str(TOKENIZER), str(lower)], str(langs))
    assert "--lossy" in refused.value.next_step
    found = compare_tokenizers([str(TOKENIZER), str(lower)], str(langs), lossy=True)
    assert found.tokenizers[1].lost_share == 1
    assert found.tokenizers[1].unknown_share > 0.5
    assert any("do not come back" in note for note in found.notes)


def test_other_formats_and_many_files(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{number:03}.txt").write_text(text(number, 20))
    found = compare_tokenizers([str(TOKENIZER)], str(tmp_path / "c"))
    assert (found.documents, found.corpus_files) == (256, 300)
    assert found.corpus_documents == pytest.approx(300, abs=2)
    assert not any("first documents" in note for note in found.notes)  # each was read whole
    lines = "".join(json.dumps({"text": text(row, 30), "lang": "en"}) + "\n" for row in range(500))
    (tmp_path / "a.jsonl").write_text(lines + "not json\n")
    jsonl = compare_tokenizers([str(TOKENIZER)], str(tmp_path / "a.jsonl"), metadata_columns=["lang"])
    assert jsonl.documents == 500
    assert [note for note in jsonl.notes if "rows were left out" in note]
    few = compare_tokenizers([str(TOKENIZER)], str(tmp_path / "a.jsonl"), sample_nbytes=2_000)
    assert any("first documents" in note for note in few.notes)
    assert set(jsonl.tokenizers[0].by_value["lang"]) == {"en"}


def test_lost_text_is_found_wherever_it_lies(tmp_path: Path, lower: Path) -> None:
    """The first files are fine; the text that the tokenizer does not know is in the last."""
    write_parquet(tmp_path / "c" / "a.parquet", ["the cat " * 30] * 4000, row_group_size=1000)
    write_parquet(tmp_path / "c" / "b.parquet", ["Omega Psi " * 30] * 3000, row_group_size=1000)
    with pytest.raises(errors.TokenizerError, match="do not come back"):
        compare_tokenizers([str(lower)], str(tmp_path / "c"))


def test_files_that_compress_differently_are_weighed_by_their_text(tmp_path: Path, byte_level: Path) -> None:
    rng = np.random.default_rng(0)
    write_parquet(tmp_path / "c" / "a.parquet", [f"the cat {row:03} " * 500 for row in range(400)], row_group_size=400)
    random_text = ["".join(map(chr, rng.integers(0x4E00, 0x9FFF, 300))) for _ in range(400)]
    write_parquet(tmp_path / "c" / "b.parquet", random_text, row_group_size=400)
    whole = compare_tokenizers([str(byte_level)], str(tmp_path / "c"), sample_nbytes=1 << 30).tokenizers[0]
    part = compare_tokenizers([str(byte_level)], str(tmp_path / "c"), sample_nbytes=200_000).tokenizers[0]
    assert part.tokens < whole.tokens / 4
    assert part.projected_tokens == pytest.approx(whole.projected_tokens, rel=0.1)
    assert part.bytes_per_token.value == pytest.approx(whole.bytes_per_token.value, rel=0.1)


def test_unknown_words_of_unigram_and_tokenizers_without_eos(tmp_path: Path, langs: Path) -> None:
    made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581cat", -1.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    folder = save(made, tmp_path / "unigram")
    (folder / "tokenizer_config.json").unlink()
    found = compare_tokenizers([str(folder)], str(langs), lossy=True).tokenizers[0]
    assert found.unknown_share > 0.3
    with pytest.raises(errors.RecipeError, match="named twice"):
        compare_tokenizers([str(folder)], str(langs), metadata_columns=["a=lang", "a=lang"])


def test_the_command(langs: Path, byte_level: Path, lower: Path, tmp_path: Path) -> None:
    dataset = ["--dataset", langs, "--metadata-column", "lang"]
    shown = run_cli("tokenizers", "compare", TOKENIZER, byte_level, *dataset)
    assert shown.returncode == 0, shown.stderr
    for word in ("bytes per token", "\u00b1", "tokens of all", "byte-level", "bytes per token by lang", "1.parquet"):
        assert word in shown.stdout
    refused = run_cli("tokenizers", "compare", TOKENIZER, lower, *dataset)
    assert refused.returncode == 4
    assert run_cli("tokenizers", "compare", TOKENIZER, TOKENIZER, *dataset).returncode == 2
    assert run_cli("tokenizers", "compare", TOKENIZER, "--dataset", tmp_path / "none").returncode == 3
    told = run_cli("tokenizers", "compare", TOKENIZER, byte_level, *dataset, "--json")
    (tmp_path / "c.json").write_text(told.stdout)
    assert [each["name"] for each in json.loads(told.stdout)["tokenizers"]] == [str(TOKENIZER), str(byte_level)]
    pretokenize(Recipe(dataset=str(langs), tokenizer=str(TOKENIZER)), tmp_path / "out")
    page = tmp_path / "r.html"
    done = run_cli("report", tmp_path / "out", "-o", page, "--comparison", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert 'id="tokenizers"' in page.read_text("utf-8")
    (tmp_path / "c.json").write_text("{}")
    wrong = run_cli("report", tmp_path / "out", "-o", page, "--comparison", tmp_path / "c.json")
    assert (wrong.returncode, "no comparison of tokenizers" in wrong.stderr) == (2, True)
