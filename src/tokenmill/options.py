"""Options: what a run does that changes no byte, where several commands share it. Pure."""

from __future__ import annotations

from typing import Literal, NamedTuple

OnBadRows = Literal["error", "skip"]
"""What to do about a row that is not what its format says."""


class StoreOptions(NamedTuple):
    """How to reach stores that are not local."""

    endpoint_url: str | None = None
    """Of an S3 store that is not AWS."""
    anonymous: bool = False
    """Send no credentials to it."""
    revision: str | None = None
    """The commit an earlier run resolved a hub data set to."""
