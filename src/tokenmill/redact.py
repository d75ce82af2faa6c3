"""Redact: what leaves this process in words, without what may be a credential. Pure but for the environment's secrets.

Every error, log line and record passes through `redacted`; a URL that is recorded through `redacted_url`.
"""

from __future__ import annotations

import os
import re
import urllib.parse

GONE = "***"

_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)(?!\[)([^\s/@'\"]*:(?!\d+/)[^\s'\"]*|[^\s/@'\"]+)@")
"""Before a host: `user:password@`, where a password may have slashes, or `token@`. A port is none: `host:80/a@b`."""
_QUERY = re.compile(r"(\b(?:https?|s3|ftp)://[^\s?'\"<>]*\?)[^\s'\"<>]+", re.IGNORECASE)
_NAMES = (
    r"(?:x-amz-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig|token|access_token|api[_-]?key|"
    r"password|passwd|secret|secret_access_key|aws_secret_access_key|aws_session_token|session_token)"
)
_SIGNED = re.compile(rf"(?i)\b({_NAMES}(?:\s*=\s*|['\"]\s*:\s*['\"]))[^\s&'\",;}}]+")
_HEADER = re.compile(
    r"(?i)(\b(?:authorization|proxy-authorization|cookie|set-cookie|x-amz-security-token|x-api-key)['\"]?\s*[:=]\s*['\"]?)"
    r"(?:(?:bearer|basic|token|aws4-hmac-sha256)\s+)?[^'\"\r\n]+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w+/=.~-]{8,}")
_KEY = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,})\b")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|CREDENTIAL")
_SHORTEST = 8
"""Characters of a secret in the environment that is looked for: shorter ones are words."""


def escape_surrogates(text: object) -> str:
    """Return a path or other text as any terminal, log or JSON takes it: bytes that are not UTF-8 are written out."""
    try:
        return os.fsencode(str(text)).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name has
        return str(text).encode("utf-8", "backslashreplace").decode()


def redact(text: str) -> str:
    """Replace every credential in a text: in URLs, queries and headers, and the values of those in the environment."""
    for secret in _environment_secrets():
        text = text.replace(secret, GONE)
    text = _USER.sub(rf"\g<1>{GONE}@", text) if "@" in text else text
    text = _QUERY.sub(rf"\g<1>{GONE}", text) if "://" in text else text
    text = _HEADER.sub(rf"\g<1>{GONE}", text)
    text = _SIGNED.sub(rf"\g<1>{GONE}", text)
    return _KEY.sub(GONE, _BEARER.sub(rf"\g<1> {GONE}", text))


def redact_url(url: str) -> str:
    """Return a URL as it is recorded: without user, password, query and fragment; anything else as it is."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme.lower() in ("hf", "file"):
        return url
    rest = _USER.sub(r"\g<1>", f"{scheme}://{rest}").partition("://")[2]
    if scheme.lower() in ("http", "https"):
        try:
            parts = urllib.parse.urlsplit(f"{scheme}://{rest}")
        except ValueError:
            return redact(f"{scheme}://{rest}")
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{scheme}://{rest}"


def _environment_secrets() -> list[str]:
    """Values of variables that are named like credentials, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name.upper()) and not value.startswith(("/", "~", "."))
    }
    return sorted(found, key=len, reverse=True)
