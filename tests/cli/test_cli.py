"""What a user sees: commands and flags (frozen), help, plans, summaries, Ctrl-C, the original script."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec
import pytest

import tokenmill
from conftest import REPOSITORY, command, run_cli, shared, write_parquet
from support.runs import every_digest, shard_digests
from tokenmill import errors
from tokenmill.cli.demo import TOKENIZER
from tokenmill.cli.main import EXIT_CODES, cli
from tokenmill.dataroot import layout, manifest
from tokenmill.dataroot.lock import lock_data_root
from tokenmill.errors import TokenmillError
from tokenmill.pipeline.pretokenize import pretokenize
from tokenmill.recipe import Recipe, builtin_recipes, load_recipe

RECIPE_FLAGS = [
    *("--recipe", "--dataset", "--tokenizer", "--text-column", "--metadata-column", "--text-separator", "--shuffle"),
    *("--order", "--seed", "--buffer-size"),
    *("--shard-size", "--total-tokens", "--dtype", "--special-in-text", "--eos-token"),
    *("--bos", "--bos-token", "--fim-rate", "--fim-spm-rate", "--fim-tokens", "--seq-len"),
]


def flags(name: str) -> list[str]:
    options = [option for parameter in cli.commands[name].params for option in parameter.opts if option.startswith("-")]
    assert options[-2:] == ["-v", "--verbose"]
    return options[:-2]


def test_commands_flags_and_names_are_frozen() -> None:
    names = "card consolidate demo download export help import info pretokenize receipts report show stats test-shard "
    names += "tokenizers upload verify view watch where"
    assert sorted(cli.commands) == names.split()
    workers = ["--workers", "--num-proc"]
    speed = [*workers, "--chunk-size", "--tokenizer-backend", "--engine-tokenizer"]
    quiet, as_json = ["-q", "--quiet"], ["--json"]
    straight, bad = ["--consolidated", "--id-scheme"], ["--on-bad-rows", "--max-document-size"]
    store, away = ["--endpoint-url", "--anonymous"], ["--upload-to", "--keep-local"]
    away += ["--engine", "--ray-address", "--only-new", "--dry-run", "--metrics"]
    assert flags("pretokenize") == [*RECIPE_FLAGS, *speed, *straight, *bad, *store, *away, *quiet, *as_json]
    assert flags("test-shard") == [*RECIPE_FLAGS, *speed, *bad, *store, *quiet]
    files = ["--include", "--exclude", "--shards"]
    move = [*files, *store, "--dry-run", *quiet]
    assert flags("download") == [*move, *as_json]
    assert flags("upload") == [*move, "--private", "--license", *as_json]
    assert flags("card") == ["--name", "--license", "--url", "--overwrite", *as_json]
    assert flags("report") == ["-o", "--output", "--comparison", *quiet, *as_json]
    compare = [o for p in cli.commands["tokenizers"].commands["compare"].params for o in p.opts if o.startswith("-")]
    source = ["--dataset", "--text-column", "--text-separator", "--metadata-column"]
    assert compare == [*source, "--sample", "--lossy", *store, *as_json]
    join = ["--seq-len", "--token-dtype", "--id-scheme", "--consume", "--skip-validation", "--published"]
    assert flags("consolidate") == [*join, *quiet, *as_json]
    deep = ["--quick", "--deep", "--dataset", "--tokenizer", "--max-document-size", *store, *workers]
    assert flags("verify") == [*deep, *quiet, *as_json]
    assert flags("info") == [*store, "--all", *as_json]
    assert flags("stats") == ["--order", "--all", *as_json]
    assert flags("receipts") == as_json
    assert flags("show") == ["--sample", "--ids", "--plain", "--limit", *as_json]
    assert flags("watch") == ["--once", *as_json]
    assert flags("where") == [
        "--sample",
        "--token",
        "--sample-id",
        "--source",
        "--row",
        "--trainer",
        "--position",
        *as_json,
    ]
    assert flags("demo") == workers
    incoming = ["--from", "--split", "--tokenizer", "--eos-id", "--dtype", "--seq-len", "--shard-size"]
    assert flags("import") == [*incoming, "--append-eos", "--copy", *quiet, *as_json]
    assert flags("export") == ["--to", "--split", "--copy", "--dry-run", *quiet, *as_json]
    views = cli.commands["view"].commands
    assert {name: [o for p in views[name].params for o in p.opts if o.startswith("-")] for name in views} == {
        "plan": [*quiet, *as_json],
        "build": [*quiet, *as_json],
        "write": ["--shard-size", *workers, "--engine", "--ray-address", *quiet, *as_json],
        "prove-disjoint": as_json,
    }
    assert tokenmill.__all__ == [
        *(
            "EpochSampler",
            "Receipt",
            "ReceiptWriter",
            "Recipe",
            "Selection",
            "SequentialSampler",
            "StoreOptions",
            "Summary",
        ),
        *("TokenDataset", "TokenmillError", "ValidatorSampler", "ViewSource", "ViewSpec", "ViewStage", "WindowSampler"),
        *(
            "buffer_order",
            "build_view",
            "check_receipt",
            "compare_tokenizers",
            "consolidate",
            "download",
            "export",
            "import_data",
        ),
        *(
            "load_receipt",
            "load_recipe",
            "load_spec",
            "merge",
            "plan_export",
            "plan_view",
            "pretokenize",
            "prove_disjoint",
            "report",
            "tokenize",
        ),
        *("upload", "upload_to_hub", "verify", "write_card"),
    ]
    for name in tokenmill.__all__ * 2:  # a module of the same name would stand in its place the second time
        assert callable(getattr(tokenmill, name))


def test_every_recipe_field_has_its_flag_and_help_tells_its_default() -> None:
    fields = {field.name: field for field in msgspec.structs.fields(Recipe)}
    options = {p.name: p for p in cli.commands["pretokenize"].params if isinstance(p, click.Option)}
    assert fields.keys() <= options.keys()
    for name, field in fields.items():
        if field.default not in (msgspec.NODEFAULT, None, ()):
            shown = options["shuffle"] if name == "order" else options[name]
            assert f"[default: {field.default}]" in shown.help


def test_help_and_version() -> None:
    assert "Usage:" in run_cli("--help").stdout
    assert "it resumes after" in run_cli("pretokenize", "--help").stdout
    assert run_cli("--version").stdout == f"python -m tokenmill, version {tokenmill.__version__}\n"
    assert run_cli("help", "verify").stdout == run_cli("verify", "--help").stdout.replace(
        "  -h, --help", "  -h, --help"
    )
    assert run_cli("help").stdout == run_cli("--help").stdout
    assert run_cli("help", "view", "plan").stdout == run_cli("view", "plan", "--help").stdout
    assert run_cli("help", "view", "nonsense").returncode == run_cli("help", "verify", "more").returncode == 2
    result = run_cli("help", "nonsense")
    assert (result.returncode, "No such command 'nonsense'" in result.stderr) == (2, True)


def test_the_exit_codes_of_help_are_those_of_the_manual_and_of_the_errors() -> None:
    told = re.findall(r"^  (\d+(?:, \d+)*) +\S", EXIT_CODES, re.MULTILINE)
    manual = (REPOSITORY / "docs" / "exit-codes.md").read_text()
    assert told == re.findall(r"^\| (\d+(?:, \d+)*) \|", manual, re.MULTILINE)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TokenmillError)]
    assert {str(kind.exit_code) for kind in kinds} <= set(told)


def test_what_help_repeats_without_loading_it() -> None:
    schemes = next(p for p in cli.commands["consolidate"].params if p.name == "id_scheme").type.choices
    assert tuple(schemes) == layout.ID_SCHEMES
    for name in builtin_recipes():
        assert name in next(p for p in cli.commands["pretokenize"].params if p.name == "recipe").help


def test_other_words_for_commands_and_options(tmp_path: Path, corpus: Path) -> None:
    first = run_cli("tokenize", tmp_path / "a", *options(corpus, "--shuffle", "none", "--workers", 1))
    second = run_cli(
        *("pretokenize", tmp_path / "b"),
        *options(corpus, "--order", "sequential", "--num_proc", 1, "--engine-tokenizer", "auto"),
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert every_digest(tmp_path / "a") == every_digest(tmp_path / "b")
    assert run_cli("merge", tmp_path / "a").returncode == run_cli("consolidate", tmp_path / "b").returncode == 0
    assert (tokenmill.tokenize, tokenmill.merge) == (tokenmill.pretokenize, tokenmill.consolidate)
    result = run_cli("tokenize", tmp_path / "c", *options(corpus, "--shuffle", "none", "--order", "buffer"))
    assert (result.returncode, "--shuffle none contradicts --order buffer" in result.stderr) == (2, True)


def test_verbose_prints_the_log(tmp_path: Path, corpus: Path) -> None:
    for line in (["-v", "pretokenize"], ["pretokenize", "--verbose"]):
        root = tmp_path / line[0].strip("-")
        result = run_cli(*line, root, *options(corpus))
        assert result.returncode == 0, result.stderr
        assert "INFO train_000000.npy: 2000 tokens" in result.stderr
        assert "INFO train_000000.npy: 2000 tokens" in (root / "tokenmill.log").read_text()
    assert "INFO" not in run_cli("info", root).stderr


def test_wrong_usage_exits_2(tmp_path: Path) -> None:
    result = run_cli("pretokenize", tmp_path, "--nonsense")
    assert (result.returncode, "No such option" in result.stderr) == (2, True)
    assert run_cli("pretokenize").returncode == 2


def options(corpus: Path, *more: object) -> list[object]:
    return ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard-size", 2000, "--buffer-size", 50, *more]


def test_dry_run_makes_nothing(tmp_path: Path, corpus: Path) -> None:
    result = run_cli("pretokenize", tmp_path / "out", *options(corpus, "--dry-run"))
    assert result.returncode == 0
    for word in ("corpus", "4 files", "300 rows", "tokens", "shards", "uint16", "disk", "free", "memory", "time"):
        assert word in result.stdout
    assert not (tmp_path / "out").exists()
    figures = json.loads(run_cli("pretokenize", tmp_path / "out", *options(corpus, "--dry-run", "--json")).stdout)
    assert figures["preflight"]["rows"] == 300
    assert figures["recipe"]["eos_token"] == "</s>"


def test_estimate_is_near(tmp_path: Path, corpus: Path) -> None:
    figures = json.loads(run_cli("pretokenize", tmp_path / "out", *options(corpus, "--dry-run", "--json")).stdout)
    summary = json.loads(run_cli("pretokenize", tmp_path / "out", *options(corpus, "--json")).stdout)
    assert summary["tokens"] * 0.7 < figures["preflight"]["tokens"] < summary["tokens"] * 1.3


def test_summary_quiet_json_and_log(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    first = run_cli("pretokenize", out, *options(corpus))
    assert "rows 300 = 296 documents + 2 null + 2 empty" in first.stdout
    again = run_cli("pretokenize", out, *options(corpus))
    assert (again.returncode, "already complete" in again.stdout) == (0, True)
    quiet = run_cli("pretokenize", out, *options(corpus, "--quiet"))
    assert (quiet.stdout, quiet.stderr) == ("", "")
    summary = json.loads(run_cli("pretokenize", out, *options(corpus, "--json")).stdout)
    assert summary["status"] == "already complete"
    assert "train_000000.npy: 2000 tokens" in (out / "tokenmill.log").read_text()


def test_both_spellings_of_every_flag(tmp_path: Path, corpus: Path) -> None:
    arguments = [
        str(a).replace("-", "_").replace("__", "--", 1) if str(a).startswith("--") else a for a in options(corpus)
    ]
    assert run_cli("pretokenize", tmp_path / "a", *arguments, "--num_proc", "-1").returncode == 0
    assert run_cli("pretokenize", tmp_path / "b", *options(corpus), "--num-proc", "3").returncode == 0
    assert every_digest(tmp_path / "a") == every_digest(tmp_path / "b")


def test_recipe_file_with_overrides(tmp_path: Path, corpus: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'dataset = "{corpus}"\ntokenizer = "{TOKENIZER}"\nseed = 1\nshard_size = 500\n')
    assert run_cli("pretokenize", tmp_path / "out", "--recipe", recipe, "--seed", 2).returncode == 0
    made = manifest.load(tmp_path / "out").recipe
    assert (made.seed, made.shard_size, made.dtype) == (2, 500, "uint16")


def test_templar_recipe_is_the_published_one() -> None:
    recipe = load_recipe("templar-150b")
    assert (recipe.dataset, recipe.tokenizer) == (
        "mlfoundations/dclm-baseline-1.0-parquet",
        "togethercomputer/LLaMA-2-7B-32K",
    )
    assert (recipe.shard_size, recipe.total_tokens) == (1 << 30, 150 << 30)
    assert (recipe.seed, recipe.buffer_size, recipe.dtype, recipe.order) == (42, 10_000, "uint16", "buffer")


SCRIPT = REPOSITORY / "scripts" / "01_pretokenize_data.py"


def test_original_command_line(tmp_path: Path, corpus: Path) -> None:
    """Its flags, over a corpus at hand; the result is the recipe with those fields changed."""
    arguments = ["--dataset", corpus, "--tokenizer", TOKENIZER, "--shard_size", 2000, "--total_tokens", 5000]
    more = ["--seed", 7, "--buffer_size", 30, "--num_proc", -1, "--chunk_size", 9]
    result = run_cli("--output_dir", tmp_path / "out", *arguments, *more, script=SCRIPT, from_scratch=True)
    assert result.returncode == 0, result.stderr
    made = manifest.load(tmp_path / "out")
    assert (made.tokens, made.recipe.seed, made.recipe.buffer_size, made.recipe.dtype) == (5000, 7, 30, "uint16")
    assert sorted(shard_digests(tmp_path / "out")) == [f"train_00000{i}.npy" for i in range(3)]


def test_original_command_line_alone_asks_for_the_corpus(tmp_path: Path) -> None:
    """Without a network its defaults cannot be met: one clear error."""
    result = run_cli("--output_dir", tmp_path / "out", "--num_proc", "-1", script=SCRIPT)
    assert result.returncode == 3
    assert "mlfoundations/dclm-baseline-1.0-parquet" in result.stderr
    forgotten = run_cli("--num_proc", "-1", script=SCRIPT)
    assert (forgotten.returncode, "--output_dir is required" in forgotten.stderr) == (2, True)
    assert "--output_dir <DATA_ROOT>" in run_cli("--help", script=SCRIPT).stdout


def test_original_command_line_on_the_real_corpus(tmp_path: Path) -> None:
    arguments = ["--dataset", shared("data/corpus"), "--tokenizer", shared("data/llama2-tokenizer")]
    sizes = ["--shard_size", 262144, "--total_tokens", 1000000, "--buffer_size", 500]
    assert run_cli("--output_dir", tmp_path / "out", *arguments, *sizes, script=SCRIPT).returncode == 0
    digest = shard_digests(tmp_path / "out")["train_000000.npy"]
    assert digest == "e311845d722b2169b4a058e1d63e0be1786ffaae9ae3d9a45f9ee8fb3975becc"


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    root = tmp_path / "long"
    for number in range(20):
        write_parquet(root / f"{number}.parquet", [f"number {i} " * 300 for i in range(1500)], row_group_size=100)
    return root


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_cleanly_and_goes_on(tmp_path: Path, long_corpus: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    line = command("pretokenize", out, *options(long_corpus, "--shard-size", 200_000))
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("train_*.npy")):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode == code, stderr
    match = re.search(r"stopped: (\d+) shards with [\d,]+ tokens are done in .*; run the same command again", stderr)
    assert match, stderr
    assert int(match[1]) == len(list(out.glob("train_*.npy"))) == len(manifest.load(out).shards)
    assert "Traceback" not in stderr
    assert not list(out.glob("*.partial"))
    assert subprocess.run([*line, "--quiet"], check=True, timeout=120).returncode == 0
    run_cli("pretokenize", tmp_path / "whole", *options(long_corpus, "--shard-size", 200_000))
    assert every_digest(out) == every_digest(tmp_path / "whole")


def test_a_second_process_is_refused(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock_data_root(out):
        second = run_cli("pretokenize", out, *options(corpus, "--shard-size", 2_000))
    assert (second.returncode, "another tokenmill process" in second.stderr) == (5, True)
    assert run_cli("pretokenize", out, *options(corpus, "--shard-size", 2_000)).returncode == 0


def test_live_line_on_a_terminal(tmp_path: Path, long_corpus: Path) -> None:
    driver, terminal = pty.openpty()
    run = subprocess.Popen(
        command("pretokenize", tmp_path / "out", *options(long_corpus, "--shard-size", 1_000_000)),
        stderr=terminal,
        stdout=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and select.select([driver], [], [], 5)[0]:
        try:
            data = os.read(driver, 65536)
        except OSError:  # Linux reports the closed terminal so
            break
        if not data:  # and macOS so
            break
        seen += data
    os.close(driver)
    assert run.wait(30) == 0
    assert re.search(rb"tokenizing .*\d+%.* tokens .*/s.*left.*documents.*shard.*GB memory", seen)
    assert b"30,000 documents" in seen


def test_error_is_logged_without_traceback(tmp_path: Path, corpus: Path) -> None:
    run_cli("pretokenize", tmp_path / "out", *options(corpus))
    refused = run_cli("pretokenize", tmp_path / "out", *options(corpus, "--seed", 1))
    assert refused.returncode == 5
    assert "made by another recipe: seed = 42 there, 1 here" in refused.stderr
    assert "made by another recipe" in (tmp_path / "out" / "tokenmill.log").read_text()


def test_demo(tmp_path: Path) -> None:
    result = run_cli("demo", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    for word in ("tokens/s", "The data is in", "Next", "tokenmill pretokenize"):
        assert word in result.stdout
    state = manifest.load(tmp_path / "demo" / "tokens")
    assert len(state.shards) >= 3
    assert "already complete" in run_cli("demo", tmp_path / "demo").stdout
    assert run_cli("consolidate", tmp_path / "demo" / "tokens", "--consume").returncode == 0
    again = run_cli("demo", tmp_path / "demo")
    assert (again.returncode, "The data is in" in again.stdout) == (0, True), again.stderr


SIGNAL_AT_THE_END = """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from tokenmill.cli import main
main()
"""
"""Program text: the command line, which gets a Ctrl-C when it has returned and Python takes itself down."""


@pytest.mark.parametrize(("name", "status"), [("consolidate", 0), ("info", -signal.SIGINT)])
def test_a_signal_after_the_work_is_no_traceback(name: str, status: int, tmp_path: Path, recipe: Recipe) -> None:
    pretokenize(recipe, tmp_path / "out")
    line = [sys.executable, "-c", SIGNAL_AT_THE_END, name, str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
