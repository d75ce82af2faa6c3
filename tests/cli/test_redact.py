"""Secrets: none leaves in an error, a log or a record, wherever it was planted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import IMPATIENT, command
from tokenmill.cli.demo import TOKENIZER
from tokenmill.errors import SourceError
from tokenmill.redact import GONE, redact, redact_url

SECRETS = st.text("abcXYZ0189+=._-", min_size=10, max_size=40).map(lambda text: f"s{text}e")
PLACES = [
    "s3://KEY:{}@bucket/x",
    "s3://KEY:ab/{}@bucket/x",
    "ftp://user:{}@host/x",
    "https://user:{}@host/path?x=1",
    "https://{}@host/path",
    "https://host/path?X-Amz-Signature={}&x=1",
    "https://host/path?x=1&sig={}",
    "it said: Authorization: Bearer {}",
    "{{'Authorization': 'Basic {}'}}",
    '{{"x-amz-security-token": "{}"}}',
    "aws_secret_access_key = {}",
    "Invalid endpoint: https://u:{}@h",
]


@given(
    secret=SECRETS, place=st.sampled_from(PLACES), before=st.text(max_size=9), after=st.sampled_from(["", " and on"])
)
def test_no_secret_passes(secret: str, place: str, before: str, after: str) -> None:
    said = place.format(secret)
    for text in (redact(f"{before} {said}{after}"), str(SourceError(said, next_step=said))):
        assert secret not in text
    assert secret not in redact_url(said) or "://" not in said.split(" ")[0]


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8080/x@y",
        "hf://datasets/owner/name@main/x",
        "s3://bucket/a@b",
        "a.parquet: row 3: token 55: expected 17",
        "no end-of-sequence token: expected eos_token in tokenizer_config.json",
        "user@host",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    assert redact_url(text) == text


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "MY_PASSWORD"):
        monkeypatch.setenv(name, f"value-of-{name.lower()}")
        assert redact(f"<value-of-{name.lower()}>") == f"<{GONE}>"


PLANTED = "pl4nted" + "S3cret" * 3
DATASETS = [
    f"s3://KEYKEYKEY:{PLANTED}@bucket/x",
    f"s3://KEYKEYKEY:a/{PLANTED}@bucket/x",
    f"ftp://user:{PLANTED}@127.0.0.1/x",
    f"https://user:{PLANTED}@127.0.0.1:9/x.jsonl",
    f"https://user:{PLANTED}@127.0.0.1:notaport/x.jsonl",
    f"https://127.0.0.1:9/x.jsonl?X-Amz-Signature={PLANTED}",
    f"hf://user:{PLANTED}@datasets/a/b",
]


@pytest.mark.parametrize("dataset", DATASETS)
def test_nothing_that_leaves_a_run_has_it(dataset: str, tmp_path: Path) -> None:
    line = [sys.executable, "-c", IMPATIENT, "pretokenize", "out", "--dataset", dataset, "--tokenizer", str(TOKENIZER)]
    options = {"cwd": tmp_path, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "timeout": 100}
    result = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    assert result.returncode in (2, 3), result.stderr
    assert "Traceback" not in result.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert PLANTED not in result.stdout + result.stderr + written


def test_transfers_refuse_credentials_in_urls(tmp_path: Path) -> None:
    for line in (
        ["upload", tmp_path, f"s3://KEY:{PLANTED}@bucket/x"],
        ["download", f"ftp://u:{PLANTED}@h/x", tmp_path],
    ):
        result = subprocess.run(command(*line), capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 6
        assert PLANTED not in result.stdout + result.stderr


def test_a_bugs_traceback_has_none(tmp_path: Path) -> None:
    program = (
        "import sys; from tokenmill.loading import info; from tokenmill.cli import main\n"
        f"def broken(*_): raise RuntimeError('https://u:{PLANTED}@h')\n"
        "info.info = broken; main(['info', 'x'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "RuntimeError" in result.stderr
    assert json.dumps(PLANTED)[1:-1] not in result.stderr.replace(program, "")
