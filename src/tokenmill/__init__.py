"""tokenmill: text corpora into training data for language models.

Importing this loads nothing heavy; a name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.consolidation import consolidate as consolidate
    from tokenmill.dataset import TokenDataset as TokenDataset
    from tokenmill.downloads import download as download
    from tokenmill.errors import TokenmillError as TokenmillError
    from tokenmill.options import StoreOptions as StoreOptions
    from tokenmill.order import buffer_order as buffer_order
    from tokenmill.pipeline import Summary as Summary
    from tokenmill.pipeline import pretokenize as pretokenize
    from tokenmill.receipts import Receipt as Receipt
    from tokenmill.receipts import ReceiptWriter as ReceiptWriter
    from tokenmill.receipts import check_receipt as check_receipt
    from tokenmill.receipts import load_receipt as load_receipt
    from tokenmill.recipe import Recipe as Recipe
    from tokenmill.recipe import load_recipe as load_recipe
    from tokenmill.samplers import EpochSampler as EpochSampler
    from tokenmill.samplers import ValidatorSampler as ValidatorSampler
    from tokenmill.samplers import WindowSampler as WindowSampler
    from tokenmill.transfer import Selection as Selection
    from tokenmill.uploads import upload as upload
    from tokenmill.verification import verify as verify

_HOMES = {
    "EpochSampler": "samplers",
    "Receipt": "receipts",
    "ReceiptWriter": "receipts",
    "Recipe": "recipe",
    "Selection": "transfer",
    "StoreOptions": "options",
    "Summary": "pipeline",
    "TokenDataset": "dataset",
    "TokenmillError": "errors",
    "ValidatorSampler": "samplers",
    "WindowSampler": "samplers",
    "buffer_order": "order",
    "check_receipt": "receipts",
    "consolidate": "consolidation",
    "download": "downloads",
    "load_receipt": "receipts",
    "load_recipe": "recipe",
    "pretokenize": "pipeline",
    "upload": "uploads",
    "verify": "verification",
}

__all__ = [
    "EpochSampler",
    "Receipt",
    "ReceiptWriter",
    "Recipe",
    "Selection",
    "StoreOptions",
    "Summary",
    "TokenDataset",
    "TokenmillError",
    "ValidatorSampler",
    "WindowSampler",
    "buffer_order",
    "check_receipt",
    "consolidate",
    "download",
    "load_receipt",
    "load_recipe",
    "pretokenize",
    "upload",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}")
    return getattr(import_module(f"tokenmill.{_HOMES[name]}"), name)
