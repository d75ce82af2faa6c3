"""tokenmill: text corpora into training data for language models.

Importing this loads nothing heavy; a name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.consolidation import consolidate as consolidate
    from tokenmill.downloads import download as download
    from tokenmill.errors import TokenmillError as TokenmillError
    from tokenmill.options import StoreOptions as StoreOptions
    from tokenmill.order import buffer_order as buffer_order
    from tokenmill.pipeline import Summary as Summary
    from tokenmill.pipeline import pretokenize as pretokenize
    from tokenmill.recipe import Recipe as Recipe
    from tokenmill.recipe import load_recipe as load_recipe
    from tokenmill.transfer import Selection as Selection
    from tokenmill.uploads import upload as upload
    from tokenmill.verification import verify as verify

_HOMES = {
    "Recipe": "recipe",
    "Selection": "transfer",
    "StoreOptions": "options",
    "Summary": "pipeline",
    "TokenmillError": "errors",
    "buffer_order": "order",
    "consolidate": "consolidation",
    "download": "downloads",
    "load_recipe": "recipe",
    "pretokenize": "pipeline",
    "upload": "uploads",
    "verify": "verification",
}

__all__ = [
    "Recipe",
    "Selection",
    "StoreOptions",
    "Summary",
    "TokenmillError",
    "buffer_order",
    "consolidate",
    "download",
    "load_recipe",
    "pretokenize",
    "upload",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}")
    return getattr(import_module(f"tokenmill.{_HOMES[name]}"), name)
