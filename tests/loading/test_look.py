"""Look: info, show, where and stats say what the slow way says."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_cli, write_parquet
from support.reference import documents
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest
from tokenmill.loading import info as infos
from tokenmill.loading import provenance
from tokenmill.loading import stats as statistics
from tokenmill.loading.data_root import Piece, TokenStream
from tokenmill.loading.order_quality import order_quality
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe
from tokenmill.shards.consolidate import consolidate
from tokenmill.views.build import build_view
from tokenmill.views.spec import ViewSource, ViewSpec

EOS = 2


class Made:
    """A data root in one of its forms, and its documents as the slow way makes them."""

    def __init__(self, root: Path, recipe: Recipe, form: str) -> None:
        self.root, self.form = root, form
        self.seq_len = recipe.seq_len
        pretokenize(recipe, root, consolidated=form == "straight")
        if form == "both":
            consolidate(root)
        order = {"order": recipe.order, "buffer_size": recipe.buffer_size, "seed": recipe.seed}
        self.documents = list(documents(Path(recipe.dataset), TOKENIZER / "tokenizer.json", EOS, False, **order))
        self.stream = [token for _, _, tokens in self.documents for token in tokens]
        self.samples = len(self.stream) // self.seq_len


@pytest.fixture(params=["shards", "both", "straight"])
def made(tmp_path: Path, corpus: Path, request: pytest.FixtureRequest) -> Made:
    write_parquet(corpus / "long.parquet", ["one document over several shards " * 300, "short"])
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), buffer_size=40, shard_size=1_000, seed=3, seq_len=64)
    return Made(tmp_path / "out", recipe, request.param)


@pytest.mark.usefixtures("opened_once")
def test_where_every_sample_comes_from(made: Made) -> None:
    owner = [(name, row, at) for name, row, tokens in made.documents for at in range(len(tokens))]
    for sample in range(made.samples):
        place = provenance.where_sample(made.root, sample)
        begin, end = sample * made.seq_len, (sample + 1) * made.seq_len
        assert (place.begin, place.end) == (begin, end)
        found = [
            (part.source, part.row, part.document_begin + i)
            for part in place.documents
            for i in range(part.end - part.begin)
        ]
        assert found == owner[begin:end]
        assert (place.sample_id is None) is (made.form == "shards")


@pytest.mark.usefixtures("opened_once")
def test_where_a_token_and_where_a_row(made: Made) -> None:
    start = 0
    for name, row, tokens in made.documents[:: max(1, len(made.documents) // 25)]:
        start = next(
            at
            for at in range(start, len(made.stream))
            if made.stream[at : at + len(tokens)] == tokens
            and provenance.where_token(made.root, at).documents[0].document_begin == 0
        )
        [part] = provenance.where_token(made.root, start).documents
        assert (part.source, part.row, part.document_begin, part.document_tokens) == (name, row, 0, len(tokens))
        found = provenance.where_row(made.root, name, row)
        assert (found.begin, found.end) == (start, start + len(tokens))
        whole = range(start // made.seq_len, (start + len(tokens) - 1) // made.seq_len + 1)
        assert found.samples == [sample for sample in whole if sample < made.samples]
    last = provenance.where_token(made.root, len(made.stream) - 1)
    assert last.sample == (made.samples - 1 if len(made.stream) % made.seq_len == 0 else None)


@pytest.mark.usefixtures("opened_once")
def test_show_gives_the_text(made: Made) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    for sample in range(0, made.samples, 7):
        shown = provenance.show(made.root, sample)
        ids = made.stream[sample * made.seq_len : (sample + 1) * made.seq_len]
        assert [token.id for token in shown.tokens] == ids
        at = 0
        for part in shown.place.documents:
            size = part.end - part.begin
            text = "".join(token.text for token in shown.tokens[at : at + size])
            expected = tokenizer.decode(ids[at : at + size], skip_special_tokens=False)
            assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")  # a character cut off shows as it is
            at += size
        assert at == made.seq_len


def test_stats(made: Made) -> None:
    figures = statistics.stats(made.root)
    counts = Counter(made.stream)
    assert (figures.tokens, figures.distinct_ids) == (len(made.stream), len(counts))
    assert (figures.id_min, figures.id_max) == (min(counts), max(counts))
    assert figures.id_mean == pytest.approx(np.mean(made.stream))
    assert [token.count for token in figures.top] == [count for _, count in counts.most_common(20)]
    assert all(counts[token.id] == token.count and token.name for token in figures.top)
    lengths = [len(tokens) for _, _, tokens in made.documents]
    assert figures.documents == len(lengths)
    assert figures.document_tokens["50"] == pytest.approx(np.median(lengths))
    assert figures.document_tokens["100"] == max(lengths)
    by_source: Counter[str] = Counter()
    for name, _, tokens in made.documents:
        by_source[name] += len(tokens)
    assert figures.tokens_by_source == dict(by_source)
    assert (figures.duplicates is None) is (made.form == "shards")
    assert sum(each.documents for each in figures.document_histogram) == len(lengths)
    assert sum(each.tokens for each in figures.document_histogram) == sum(lengths)
    for each in figures.document_histogram:
        inside = [length for length in lengths if each.low <= length < each.high]
        assert (each.documents, each.tokens) == (len(inside), sum(inside))
        assert each.high - each.low == 1 or each.high <= each.low * 1.5
    ranked = [count for _, count in counts.most_common()]
    assert [(rank, ranked[rank - 1]) for rank, _ in figures.rank_frequency] == figures.rank_frequency
    assert figures.rank_frequency[-1][0] == len(ranked)
    assert {token.text: token.count for token in figures.control_tokens} == {
        "<unk>": counts[0],
        "</s>": counts[EOS] - len(lengths),  # it stands in the text of the corpus, too
    }


def test_bytes_of_text_are_those_of_the_corpus(made: Made) -> None:
    """The demo's tokenizer puts a blank before every text, and after every control token; EOS is no text."""
    nbytes = Counter()
    corpus = made.root.parent / "corpus"
    for name, row, _ in made.documents:
        text = pq.read_table(corpus / name)["text"][row].as_py()
        segments = re.split("</s>|<unk>", text)
        nbytes[name] += len("".join(segments).encode()) + sum(map(bool, segments)) + 5 * text.count("<unk>")
    assert statistics.stats(made.root).text_nbytes_by_source == nbytes


def test_tokens_by_value_and_long_lists(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for number in range(25):
        texts = [f"text {number} {row}" for row in range(4)]
        columns = {"lang": ["en", "de", None, "en"], "n": [1, 2, 3, number]}
        write_parquet(corpus / f"{number:02}.parquet", texts, **columns)
    columns = ("lang", "n:int64")
    recipe = Recipe(dataset=str(corpus), tokenizer=str(TOKENIZER), shard_size=100, metadata_columns=columns)
    pretokenize(recipe, tmp_path / "out")
    found = statistics.stats(tmp_path / "out")
    assert set(found.tokens_by_value["lang"]) == {"en", "de", statistics.NULL}
    assert sum(found.tokens_by_value["lang"].values()) == sum(found.tokens_by_value["n"].values()) == found.tokens
    assert "24" in found.tokens_by_value["n"]
    for name, table in (("stats", "bytes per token"), ("info", "documents")):
        few, every = (run_cli(name, tmp_path / "out", *more).stdout for more in ([], ["--all"]))
        assert table in few
        assert "--all lists them" in few
        assert len(re.findall(r"\d\d\.parquet", few)) == 20
        assert len(re.findall(r"\d\d\.parquet", every)) == 25
        assert "--all" not in every


def test_show_as_plain_text_and_its_beginning(made: Made) -> None:
    whole = run_cli("show", made.root, "--sample", 1, "--plain").stdout
    tokens = provenance.show(made.root, 1).tokens
    assert "\u2502" not in whole
    assert whole.replace("\n", "") == "".join(token.text for token in tokens if token.text != "\n")
    first = run_cli("show", made.root, "--sample", 1, "--ids", "--limit", 3).stdout
    assert first.count("\n") >= 6
    assert f"{made.seq_len - 3} tokens more" in first
    assert f"{made.seq_len - 3} tokens more" in run_cli("show", made.root, "--sample", 1, "--limit", 3).stdout
    assert run_cli("show", made.root, "--sample", 1, "--ids", "--plain").returncode == 2


def test_null_and_the_word_null_are_two_values(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "c" / "a.parquet", [f"text {row}" for row in range(6)], v=[None, "null", "x", None, "null", "x"]
    )
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), metadata_columns=("v",))
    pretokenize(recipe, tmp_path / "out")
    found = statistics.stats(tmp_path / "out")
    assert set(found.tokens_by_value["v"]) == {statistics.NULL, "null", "x"}
    assert sum(found.tokens_by_value["v"].values()) == found.tokens


def test_figures_of_a_stream_that_ends_inside_a_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c" / "a.parquet", ["some words of a text " * 40, "and of another " * 40])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), total_tokens=57, shard_size=50)
    pretokenize(recipe, tmp_path / "out")
    found = statistics.stats(tmp_path / "out")
    assert found.tokens_by_source == {"a.parquet": 57}
    assert 57 < found.text_nbytes_by_source["a.parquet"] < 57 * 6


def test_a_view_whose_ids_are_few(tmp_path: Path) -> None:
    """Its data root has documents with greater ids, which lie between those of the view."""
    texts = ["aa " * 30 if row % 2 else "\U0001f680 zz \u65e5 " * 30 for row in range(40)]
    write_parquet(tmp_path / "c" / "a.parquet", texts, plain=[row % 2 == 1 for row in range(40)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), metadata_columns=("plain:bool",), seq_len=8)
    pretokenize(recipe, tmp_path / "out")
    spec = ViewSpec(seq_len=8, sources=[ViewSource(name="a", root=str(tmp_path / "out"), where="plain")])
    build_view(spec, tmp_path / "view")
    found = statistics.stats(tmp_path / "view")
    assert found.documents == 20
    assert found.text_nbytes_by_source == {"a/a.parquet": 20 * (90 + 1)}


def test_a_sidecar_with_other_documents_than_the_manifest(made: Made) -> None:
    path = made.root / "documents_000000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    for look in (statistics.stats, order_quality):
        with pytest.raises(errors.DataRootError, match=r"expected \d+ documents, found 3"):
            look(made.root)


def test_tokens_that_cannot_be_decoded_do_not_end_the_program(tmp_path: Path) -> None:
    """A character that is cut off, before another token; a vocabulary that cannot write the letter a."""
    tokens = [
        *tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).encode("x \U0001f990").ids[:-2],
        EOS,
    ] * 9
    np.array(tokens, "<u2").tofile(tmp_path / "t.bin")
    arguments = ["--from", "raw", "--dtype", "uint16", "--tokenizer", TOKENIZER, "--seq-len", 4]
    assert run_cli("import", tmp_path / "t.bin", tmp_path / "imported", *arguments).returncode == 0
    for name, more in (("show", ["--sample", 0]), ("stats", []), ("card", [])):
        done = run_cli(name, tmp_path / "imported", *more)
        assert done.returncode == 0, done.stderr
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "<end>": 2}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    write_parquet(tmp_path / "c" / "a.parquet", ["the cat the cat"])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(tmp_path / "words"), eos_token="<end>")
    pretokenize(recipe, tmp_path / "out")
    assert statistics.stats(tmp_path / "out").top[0].text


def test_the_replacement_character_of_a_text_is_text(tmp_path: Path) -> None:
    text = "caf\ufffd na\ufffdve \ufffd\ufffd " * 20
    write_parquet(tmp_path / "c" / "a.parquet", [text])
    pretokenize(Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER)), tmp_path / "out")
    found = statistics.stats(tmp_path / "out")
    assert found.text_nbytes_by_source["a.parquet"] == len(text.encode()) + 1


@given(
    documents=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=9), min_size=1, max_size=30),
    taken=st.integers(1, 4),
    chunk=st.sampled_from([4, 16, 1 << 22]),
)
def test_hashes_of_tokens_are_equal_where_the_tokens_are(documents: list[list[int]], taken: int, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.bin")
        np.concatenate(documents).astype("<u2").tofile(path)
        stream = TokenStream([Piece(path, sum(map(len, documents)))], np.dtype("<u2"))
        ends = np.cumsum([len(each) for each in documents])
        some = slice(None, None, taken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenmill.loading.stats.CHUNK_TOKENS", chunk)
            found = statistics.token_hashes(stream, (ends - [len(each) for each in documents])[some], ends[some])
    for hashed, tokens in zip(found, documents[some], strict=True):
        same = [other == tokens for other in documents[some]]
        assert same == (found == hashed).tolist()


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60))
def test_percentiles_from_counts_are_those_of_numpy(lengths: list[int]) -> None:
    found = statistics.percentiles(*np.unique(lengths, return_counts=True))
    assert list(found.values()) == pytest.approx(np.percentile(lengths, [float(name) for name in found]))


def test_info(made: Made) -> None:
    found = infos.info(made.root)
    state = manifest.load(made.root)
    assert found.complete
    assert (
        found.stored_as
        == {"shards": ["shards"], "both": ["shards", "tokens.bin"], "straight": ["tokens.bin"]}[made.form]
    )
    assert (found.tokens, found.documents) == (len(made.stream), len(made.documents))
    assert [shard.sha256 for shard in found.shards] == [shard.sha256 for shard in state.shards]
    assert found.ledger == state.ledger
    printed = run_cli("info", made.root).stdout
    for word in (state.fingerprint, state.tokenizer.sha256, state.shards[0].sha256, "a.parquet", "gigatoken", "seed 3"):
        assert word in printed
    fields = json.loads(run_cli("info", made.root, "--json").stdout)
    assert fields["recipe"]["seed"] == 3
    if made.form != "shards":
        assert fields["consolidated"]["tokens_sha256"] in printed


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Samples 0, 2 and 4 are the same text, 1 and 3 too."""
    texts = ["alpha beta gamma", "one two three"] * 2 + ["alpha beta gamma"]
    write_parquet(tmp_path / "corpus" / "a.parquet", texts)
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    lengths = {len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts}
    size = max(lengths) + 1
    words = {
        text: text + " x" * (size - 1 - len(tokenizer.encode(text, add_special_tokens=False).ids)) for text in texts
    }
    write_parquet(tmp_path / "corpus" / "a.parquet", [words[text] for text in texts])
    recipe = Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER), order="sequential", seq_len=size)
    pretokenize(recipe, tmp_path / "out", consolidated=True)
    return tmp_path / "out"


def test_the_same_text_twice(twice: Path) -> None:
    same = statistics.stats(twice).duplicates
    assert (same.ids, same.samples, same.first) == (2, 3, [[0, 2, 4], [1, 3]])
    places = provenance.where_sample_id(twice, provenance.where_sample(twice, 2).sample_id)
    assert [place.sample for place in places] == [0, 2, 4]
    assert "2 sample ids occur more than once, 3 samples too many" in run_cli("stats", twice).stdout


def test_ids_without_tokens_are_not_duplicates(twice: Path) -> None:
    tokens = manifest.load(twice).tokens
    consolidate(twice, seq_len=2, id_scheme="templar-v1" if tokens % 2 == 0 else None)
    same = statistics.stats(twice).duplicates
    assert same.without_tokens == (tokens // 2 - tokens // 4 if tokens % 2 == 0 else 0)


def test_what_is_not_there_is_told(made: Made) -> None:
    with pytest.raises(errors.QueryError, match=rf"sample {made.samples}: the data set has {made.samples} samples"):
        provenance.where_sample(made.root, made.samples)
    with pytest.raises(errors.QueryError, match="the data set has"):
        provenance.where_token(made.root, len(made.stream))
    with pytest.raises(errors.QueryError, match=r"not a source file of this data set, .* such as a\.parquet"):
        provenance.where_row(made.root, "z.parquet", 0)
    with pytest.raises(errors.QueryError, match=r"row 3 of a\.parquet, which has 120 rows, is in no sample"):
        provenance.where_row(made.root, "a.parquet", 3)
    if made.form == "shards":
        with pytest.raises(errors.DataRootError, match="it has no sample ids"):
            provenance.where_sample_id(made.root, "00")
    else:
        for wrong in ("not hex", "f" * 17):
            with pytest.raises(errors.QueryError, match="expected up to 16 hexadecimal digits"):
                provenance.where_sample_id(made.root, wrong)
        with pytest.raises(errors.QueryError, match="no sample has the id"):
            provenance.where_sample_id(made.root, "0123456789abcdef")


def test_bare_shards(tmp_path: Path) -> None:
    """Downloaded without a manifest: what can be told is, what cannot says why."""
    root = tmp_path / "root"
    root.mkdir()
    np.save(root / "train_000000.npy", np.arange(1_000, dtype=np.uint16))
    with pytest.raises(errors.DataRootError, match="found neither"):
        infos.info(root)
    consolidate(root, seq_len=100)
    assert infos.info(root).stored_as == ["shards", "tokens.bin"]
    figures = statistics.stats(root)
    assert (figures.distinct_ids, figures.documents, figures.duplicates.ids) == (1_000, None, 0)
    result = run_cli("where", root, "--sample", 3)
    assert (result.returncode, "where its tokens come from is not known" in result.stderr) == (5, True)
    assert run_cli("info", root).returncode == 0
    assert "1,000 different" in run_cli("stats", root).stdout


def test_unfinished_and_torn_roots(made: Made) -> None:
    path = made.root / ("tokens.bin" if made.form != "shards" else "train_000001.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.DataRootError, match=r"expected \d+ bytes, found"):
        provenance.where_sample(made.root, 1)
    path.unlink()
    with pytest.raises(errors.DataRootError, match="is missing"):
        statistics.stats(made.root)


def test_another_tokenizer_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    import shutil

    shutil.copytree(TOKENIZER, tmp_path / "t")
    pretokenize(msgspec.structs.replace(recipe, tokenizer=str(tmp_path / "t"), seq_len=64), tmp_path / "out")
    with (tmp_path / "t" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(errors.TokenizerError, match="is not the one that made"):
        provenance.show(tmp_path / "out", 0)
    assert statistics.stats(tmp_path / "out").top[0].name is None


def test_command_line(made: Made) -> None:
    shown = run_cli("show", made.root, "--sample", 2).stdout
    assert re.search(r"^sample 2(, id \w{16})?: tokens 128 to 191 of the stream$", shown, re.MULTILINE)
    assert "│" in shown
    assert re.search(r"── \S+\.parquet row \d+, tokens? [\d,]+", shown)
    ids = run_cli("show", made.root, "--sample", 2, "--ids").stdout
    assert len(re.findall(r"^ +1[2-9]\d +\d+  '", ids, re.MULTILINE)) == 64
    where = run_cli("where", made.root, "--sample", 2).stdout
    assert where.startswith("sample 2")
    fields = json.loads(run_cli("where", made.root, "--sample", 2, "--json").stdout)
    assert fields[0]["begin"] == 128
    back = run_cli(
        "where", made.root, "--source", fields[0]["documents"][0]["source"], "--row", fields[0]["documents"][0]["row"]
    )
    assert "samples" in back.stdout
    assert json.loads(run_cli("show", made.root, "--sample", 2, "--json").stdout)
    assert json.loads(run_cli("stats", made.root, "--json").stdout)["tokens"] == len(made.stream)
    for wrong in ([], ["--sample", 1, "--token", 2], ["--source", "a.parquet"], ["--row", 1]):
        result = run_cli("where", made.root, *wrong)
        assert (result.returncode, "give one of" in result.stderr) == (2, True)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    write_parquet(tmp_path / "corpus" / "a.parquet", ["\x1b[2J\x07bad\rtext " * 30])
    recipe = Recipe(dataset=str(tmp_path / "corpus"), tokenizer=str(TOKENIZER), seq_len=32)
    pretokenize(recipe, tmp_path / "out")
    shown = run_cli("show", tmp_path / "out", "--sample", 1).stdout
    assert not set(shown) & set("\x1b\x07\r")
    assert "\\x1b" in shown
