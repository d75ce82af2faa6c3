"""URLs, each scheme parsed in one place, for corpora and for transfers alike. Opens nothing."""

from __future__ import annotations

import re
import urllib.parse

from tokenmill.errors import SourceError, TokenmillError
from tokenmill.redact import redact_url


def parse_s3_url(url: str, kind: type[TokenmillError], next_step: str) -> tuple[str, str]:
    """Return bucket and key of `s3://BUCKET/KEY`.

    Raises:
        TokenmillError: of class `kind`: there is no bucket in it, or there are credentials in it.
    """
    name, _, key = url.partition("://")[2].partition("/")
    if re.search(r"[@:]", name) or redact_url(url) != url:
        raise kind(
            f"{redact_url(url)}: a URL must hold no credentials",
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and give s3://BUCKET/PREFIX",
        )
    if not name:
        raise kind(f"{url}: expected s3://BUCKET/PREFIX", next_step=next_step)
    return name, key


def local_path(entry: str) -> str:
    """Return the path that a `file://` URL or a path means."""
    return urllib.parse.unquote(entry.removeprefix("file://")) if entry.startswith("file://") else entry


def split_web_url(url: str) -> urllib.parse.SplitResult:
    """Split the URL of a web server.

    Raises:
        SourceError: it is not a URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # a wrong one is found when it is asked for
    except ValueError:  # its text repeats the URL
        raise SourceError(f"{redact_url(url)}: not a URL", next_step="correct --dataset") from None
    return parts
