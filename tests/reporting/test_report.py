"""The report: its figures are those of `stats`, and a browser shows it without loading or running what it must not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import run_cli, write_parquet
from tokenmill import build_view, consolidate, errors, load_spec, pretokenize, report
from tokenmill.cli.demo import TOKENIZER
from tokenmill.dataroot import manifest as manifests
from tokenmill.loading.stats import stats
from tokenmill.recipe import Recipe
from tokenmill.reporting.figures import figures, random_samples, source_link

HOSTILE = (
    "</script><script>window.broken = 1</script> <img src=x onerror='window.broken = 2'> "
    "<!-- ]]> \u202eolleh\u202c \u2066x\u2069 \u2028 \x00 \x1b[31m {{7*7}} {% raw %} ${x} &lt;b&gt; "
)
SPEC = """
seq_len = 128
packing = "best-fit"
[[sources]]
name = "web"
root = "{web}"
weight = 0.7
max_epochs = 3
where = "lang is null or lang <> 'de'"
[[sources]]
name = "code"
root = "{code}"
weight = 0.3
max_epochs = 9
[[stages]]
samples = 300
[[stages]]
[stages.weights]
web = 0.2
code = 0.8
"""


class Made:
    """Two data roots, one of them of text that would like to be markup, and a mixture of both; and their reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        texts: list[str | None] = [f"{HOSTILE} {row} " * (1 + row % 40) for row in range(250)]
        texts[3:7] = ["x" * 100_000, None, "", texts[8]]
        langs = [("en", "de", "</script><b>", None)[row % 4] for row in range(250)]
        write_parquet(folder / "web" / "<b>&'\".parquet", texts, lang=langs)
        write_parquet(folder / "code" / "c.parquet", [f"def f{row}(x):\n\treturn x\n" * 30 for row in range(200)])
        shared = {"tokenizer": str(TOKENIZER), "shard_size": 20_000, "seq_len": 128, "buffer_size": 50}
        dataset = f"--dataset {folder / 'web'} --tokenizer {TOKENIZER} --shard-size 20000 --seq-len 128"
        assert run_cli("pretokenize", self.web, *dataset.split(), "--metadata-column", "lang").returncode == 0
        consolidate(self.web)
        pretokenize(Recipe(dataset=str(folder / "code"), **shared), self.code)
        (folder / "mix.toml").write_text(SPEC.format(web=self.web, code=self.code))
        build_view(load_spec(folder / "mix.toml"), self.mix)
        for root in (self.web, self.mix):
            report(root, self.page(root))

    @property
    def web(self) -> Path:
        return self.folder / "web-tokens"

    @property
    def code(self) -> Path:
        return self.folder / "code-tokens"

    @property
    def mix(self) -> Path:
        return self.folder / "mix"

    def page(self, root: Path) -> Path:
        return self.folder / f"{root.name}.html"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("report"))


def embedded(page: Path) -> dict[str, Any]:
    """The figures that a page holds."""
    (found,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(found)


def test_the_numbers_of_the_page_are_those_of_stats(made: Made) -> None:
    for root in (made.web, made.mix):
        page = embedded(made.page(root))
        assert page["stats"] == json.loads(run_cli("stats", root, "--json").stdout)
        text = made.page(root).read_text("utf-8")
        for number in (page["stats"]["tokens"], page["samples"], page["stats"]["documents"]):
            assert f"<dd>{number:,}</dd>" in text
    page = embedded(made.page(made.web))
    assert page["order"] == json.loads(run_cli("stats", made.web, "--order", "--json").stdout)
    assert page["info"] == json.loads(run_cli("info", made.web, "--json").stdout)


def test_flows_balance_and_name_every_reason(made: Made) -> None:
    found = figures(made.web)
    ledger = manifests.load(made.web).ledger
    assert {flow.target: flow.count for flow in found.flow} == {
        "documents": 248,
        "without a value (null)": 1,
        "without text (empty)": 1,
        "not what their format says (bad)": 0,
        "after the end of the stream (unused)": 0,
    }
    assert sum(flow.count for flow in found.flow) == sum(entry.rows for entry in ledger)
    view = figures(made.mix)
    for source in view.view.sources:
        assert sum(flow.count for flow in view.flow if flow.source == source.name) == source.documents


def test_shares_and_fill_are_those_of_the_view(made: Made) -> None:
    found = figures(made.mix)
    for number, stage in enumerate(found.view.stages, start=1):
        for name, taken in stage.taken.items():
            counted = sum(s.share * (s.end - s.begin) for s in found.shares if (s.stage, s.source) == (number, name))
            assert counted == pytest.approx(taken)
    epoch = sum(source.samples for source in found.view.sources)
    assert sum(each.samples for each in found.fill) == epoch
    full = found.view.seq_len * epoch - found.view.padding
    assert sum(each.low / 100 * found.view.seq_len * each.samples for each in found.fill) <= full


def test_samples_are_drawn_alike_and_name_their_rows(made: Made) -> None:
    assert random_samples(1000, "a") == random_samples(1000, "a") != random_samples(1000, "b")
    assert random_samples(7, "a") == list(range(7))
    shown = figures(made.web).shown
    assert len(shown) == 100
    for sample in shown[::10]:
        place = json.loads(run_cli("show", made.web, "--sample", sample.sample, "--json").stdout)
        ids = [token[0] for token in place[1]]
        assert [id for part in sample.documents for id in part.ids] == ids
        assert sample.id == place[0]["sample_id"]
        for part, expected in zip(sample.documents, place[0]["documents"], strict=True):
            assert (part.source, part.row, part.first) == (
                expected["source"],
                expected["row"],
                expected["document_begin"],
            )
            assert part.link.startswith("file:///")
            assert part.link.endswith(f".parquet#row={part.row}")


def test_links_lead_to_the_source_wherever_it_lies(made: Made) -> None:
    def link(dataset: str, path: str, revision: str | None = None) -> str | None:
        found = manifests.load(made.web)
        found.recipe = msgspec.structs.replace(found.recipe, dataset=dataset)
        found.source_revision = revision
        return source_link(found, path)

    hub = "https://huggingface.co/datasets/owner/name/blob"
    assert link("hf://datasets/owner/name@v1/data", "data/a b.parquet", "abc") == f"{hub}/abc/data/a%20b.parquet"
    assert link("owner/name", "a.parquet", "abc") == f"{hub}/abc/a.parquet"
    assert link("https://host.example/x/a.parquet", "a.parquet") == "https://host.example/x/a.parquet"
    assert link("s3://bucket/prefix", "a.parquet") is None
    assert link("gone/", "a.parquet") is None


def test_a_page_stays_below_five_megabytes(tmp_path: Path) -> None:
    """Samples of 8,192 tokens of markup, each character of which stands in the page as a code of six."""
    write_parquet(tmp_path / "c" / "a.parquet", ["<&>" * 40_000 + f" {row}" for row in range(30)])
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), shard_size=1_000_000, seq_len=8192)
    pretokenize(recipe, tmp_path / "out")
    found = report(tmp_path / "out", tmp_path / "r.html")
    assert found.nbytes == (tmp_path / "r.html").stat().st_size < 5_000_000
    page = embedded(tmp_path / "r.html")
    assert len(page["shown"]) == 100
    assert re.search(r"Of each sample the page holds the first [\d,]+ tokens", page["shown_note"])
    assert all(page["shown"][0]["documents"][0]["texts"])


def test_what_a_report_can_do_without(made: Made, tmp_path: Path) -> None:
    """Shards without a manifest; a tokenizer that is gone; a data root without a whole sample; an import; no log."""
    bare = tmp_path / "bare"
    shutil.copytree(made.code, bare)
    (bare / "manifest.json").unlink()
    consolidate(bare)
    page = report(bare, tmp_path / "bare.html")
    assert "there is no manifest" in Path(page.path).read_text("utf-8")
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    recipe = Recipe(dataset=str(made.folder / "code"), tokenizer=str(tmp_path / "tokenizer"), seq_len=1 << 20)
    pretokenize(recipe, tmp_path / "lost")
    assert figures(tmp_path / "lost").shown_note.startswith("there is no whole sample")
    shutil.rmtree(tmp_path / "tokenizer")
    page = report(tmp_path / "lost", tmp_path / "lost.html")
    assert "has no progress of a run" in Path(page.path).read_text("utf-8")
    assert run_cli("export", made.code, tmp_path / "megatron", "--to", "megatron").returncode == 0
    imported = ["--from", "megatron", "--tokenizer", TOKENIZER]
    assert run_cli("import", tmp_path / "megatron", tmp_path / "imported", *imported).returncode == 0
    assert "entries of" in Path(report(tmp_path / "imported", tmp_path / "i.html").path).read_text("utf-8")


def test_what_cannot_be_reported(made: Made, tmp_path: Path) -> None:
    refused = run_cli("report", tmp_path, "-o", tmp_path / "r.html")
    assert refused.returncode == 5
    assert not (tmp_path / "r.html").exists()
    refused = run_cli("report", made.code, "-o", tmp_path / "none" / "r.html")
    assert refused.returncode == 6
    assert "Traceback" not in refused.stderr
    program = (
        "import sys; sys.modules['altair'] = None\n"
        f"import tokenmill; tokenmill.report({str(made.code)!r}, {str(tmp_path / 'r.html')!r})"
    )
    lacking = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert "pip install 'tokenmill[report]'" in lacking.stderr
    done = run_cli("report", made.code, "-o", tmp_path / "r.html", "--json")
    assert json.loads(done.stdout)["nbytes"] == (tmp_path / "r.html").stat().st_size


def test_a_report_replaces_only_a_report(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.code, tmp_path / "out")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "out" / "manifest.json", tmp_path / "fifo", tmp_path / "out"):
        with pytest.raises(errors.StorageError, match="is there and is no HTML page"):
            report(tmp_path / "out", path)
    assert run_cli("verify", tmp_path / "out").returncode == 0
    report(tmp_path / "out", tmp_path / "r.html")
    report(tmp_path / "out", tmp_path / "r.html")


def test_metadata_that_would_fill_a_page(tmp_path: Path) -> None:
    """Values that are long, and columns that are many."""
    columns = {f"c{number}": [f"{row}" + "\U0001f990" * 300 for row in range(150)] for number in range(40)}
    write_parquet(tmp_path / "c" / "a.parquet", [f"text {row}" for row in range(150)], **columns)
    recipe = Recipe(dataset=str(tmp_path / "c"), tokenizer=str(TOKENIZER), metadata_columns=tuple(columns), seq_len=4)
    pretokenize(recipe, tmp_path / "out")
    assert report(tmp_path / "out", tmp_path / "r.html").nbytes < 5_000_000


def test_the_report_of_a_data_set_that_is_gone_half_way_is_an_error(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.code, tmp_path / "out")
    (tmp_path / "out" / "documents_000000.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(errors.DataRootError, match="not a documents sidecar"):
        stats(tmp_path / "out")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is at hand (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-sync", "--no-first-run"])
        yield found
        found.close()


class Opened:
    """A page in a browser, and all that it said or asked for."""

    def __init__(self, browser: Any, page: Path, **options: Any) -> None:
        self.tab = browser.new_page(**options)
        self.said: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.tab.on("request", lambda request: self.said.append(request.url) if request.url != page.as_uri() else None)
        self.tab.goto(page.as_uri())
        self.tab.wait_for_function("document.documentElement.dataset.drawn")

    def ask(self, expression: str) -> Any:
        return self.tab.evaluate(expression)


def artefact(name: str, tmp_path: Path) -> Path:
    """Where a screenshot goes: to `ARTEFACTS`, if that is set, to be looked at."""
    folder = Path(os.environ.get("ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["web", "mix"])
def test_a_browser_draws_every_chart(made: Made, browser: Any, which: str, scheme: str, tmp_path: Path) -> None:
    page = made.page(getattr(made, which))
    opened = Opened(browser, page, color_scheme=scheme, viewport={"width": 1200, "height": 900})
    assert opened.said == []
    assert opened.ask("document.documentElement.dataset.drawn") == "all"
    assert opened.ask("document.documentElement.dataset.theme") == scheme
    charts = opened.ask("document.querySelectorAll('[data-chart]').length")
    assert opened.ask("document.querySelectorAll('[data-chart] svg').length") == charts >= 8
    sections = opened.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert {"Ledger", "Documents", "Tokens", "Order", "Samples", "Digests"} <= set(sections)
    assert ({"Mixture", "Packing"} if which == "mix" else {"The run"}) <= set(sections)
    # Every chart is inside its place: nothing is cut off at its left or right.
    outside = """[...document.querySelectorAll('[data-chart]')].filter((chart) => {
        const place = chart.getBoundingClientRect();
        return [...chart.querySelectorAll('svg text')].map((text) => text.getBoundingClientRect())
            .some((text) => text.width && (text.left < place.left - 1 || text.right > place.right + 1));
    }).map((chart) => chart.dataset.chart)"""
    assert opened.ask(outside) == []
    opened.tab.screenshot(path=artefact(f"report-{which}-{scheme}.png", tmp_path), full_page=True)


def test_hostile_text_stays_text(made: Made, browser: Any) -> None:
    opened = Opened(browser, made.page(made.web))
    samples = opened.ask("document.getElementById('sample').length")
    for _ in range(samples):
        opened.tab.click("#after")
    assert opened.said == []
    assert opened.ask("window.broken") is None
    assert opened.ask("document.querySelectorAll('img, script').length") == 4  # ours
    everything = opened.ask("document.getElementById('text').textContent")
    assert "\u202e" not in everything
    texts = opened.ask(
        "[...document.getElementById('sample').options].map((o) => { const s = document.getElementById('sample'); "
        "s.value = o.value; s.dispatchEvent(new Event('change')); return document.getElementById('text').innerText })"
    )
    for sign in (
        "</script><script>window.broken = 1</script>",
        "\\u202e",
        "\\u2028",
        "\\u0000",
        "{{7*7}}",
        "&lt;b&gt;",
    ):
        assert any(sign in text.replace("\n", "") for text in texts), sign
    assert "</script><b>" in opened.ask("document.getElementById('sources').textContent")


def test_a_phone_a_keyboard_and_paper(made: Made, browser: Any, tmp_path: Path) -> None:
    phone = Opened(browser, made.page(made.web), viewport={"width": 360, "height": 740})
    for sample in (0, 50):
        phone.tab.select_option("#sample", index=sample)
        assert phone.ask("document.documentElement.scrollWidth") == 360
    phone.tab.screenshot(path=artefact("report-phone.png", tmp_path), full_page=True)
    opened = Opened(browser, made.page(made.web), color_scheme="dark")
    opened.tab.keyboard.press("Tab")
    assert opened.ask("document.activeElement.textContent") == "Skip to the report"
    opened.tab.focus("#theme")
    opened.tab.keyboard.press("Enter")
    assert opened.ask("document.documentElement.dataset.theme") == "light"
    before = opened.ask("document.getElementById('sample').value")
    opened.tab.focus("#after")
    opened.tab.keyboard.press("Space")
    assert opened.ask("document.getElementById('sample').value") != before
    opened.tab.focus("summary")
    opened.tab.keyboard.press("Enter")
    assert opened.ask("document.querySelector('details').open")
    opened.tab.focus("#theme")
    opened.tab.keyboard.press("Enter")
    opened.tab.emulate_media(media="print")
    assert opened.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = opened.tab.pdf(path=artefact("report.pdf", tmp_path), format="A4")
    assert len(pdf) > 50_000
    missing = opened.ask(
        "[...document.querySelectorAll('button, select, input')]"
        ".filter(e => !(e.textContent || e.labels?.length || e.getAttribute('aria-label'))).length"
    )
    assert missing == 0
