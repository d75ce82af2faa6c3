"""Certificates: which authorities are trusted, by everything here that connects to a server alike.

The HTTP client, the S3 library and the hub's client each read variables of their own; whichever is set holds for all.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenmill.errors import StorageError

VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE")
"""Variables that name a file of certificates (or a folder, except SSL_CERT_FILE); the first that is set counts."""

CANNOT_VERIFY = (
    "if the server's certificate is signed by an authority of your own, name its file in SSL_CERT_FILE (or "
    "REQUESTS_CA_BUNDLE, AWS_CA_BUNDLE)"
)


def ca_bundle(configured: str | None = None) -> str | None:
    """Return the file that says whom to trust; None: the library's own choice.

    Args:
        configured: what a configuration file says, which variables go before.

    Raises:
        StorageError: there is no such file.
    """
    named = next(((name, os.environ[name]) for name in VARIABLES if os.environ.get(name)), None)
    if named is None and configured:
        named = "ca_bundle of the AWS configuration", configured
    if named is None:
        return None
    if not Path(named[1]).exists():
        raise StorageError(
            f"{named[0]}: {named[1]}: no such file", next_step="name a file of certificates there, or unset it"
        )
    return named[1]
