"""tokenmill: text corpora into training data for language models.

Importing this loads nothing heavy; a name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
"""The one place of the version."""

if TYPE_CHECKING:
    from tokenmill.comparison.compare import compare_tokenizers as compare_tokenizers
    from tokenmill.corpus.order import buffer_order as buffer_order
    from tokenmill.errors import TokenmillError as TokenmillError
    from tokenmill.interchange.export import export as export
    from tokenmill.interchange.export import plan_export as plan_export
    from tokenmill.interchange.importing import import_data as import_data
    from tokenmill.loading.dataset import TokenDataset as TokenDataset
    from tokenmill.loading.receipts import Receipt as Receipt
    from tokenmill.loading.receipts import ReceiptWriter as ReceiptWriter
    from tokenmill.loading.receipts import check_receipt as check_receipt
    from tokenmill.loading.receipts import load_receipt as load_receipt
    from tokenmill.loading.samplers import EpochSampler as EpochSampler
    from tokenmill.loading.samplers import SequentialSampler as SequentialSampler
    from tokenmill.loading.samplers import ValidatorSampler as ValidatorSampler
    from tokenmill.loading.samplers import WindowSampler as WindowSampler
    from tokenmill.options import StoreOptions as StoreOptions
    from tokenmill.pipeline.pretokenize import pretokenize as pretokenize
    from tokenmill.pipeline.pretokenize import pretokenize as tokenize
    from tokenmill.pipeline.summary import Summary as Summary
    from tokenmill.publishing.card import write_card as write_card
    from tokenmill.publishing.hub import upload_to_hub as upload_to_hub
    from tokenmill.recipe import Recipe as Recipe
    from tokenmill.recipe import load_recipe as load_recipe
    from tokenmill.reporting.report import report as report
    from tokenmill.shards.consolidate import consolidate as consolidate
    from tokenmill.shards.consolidate import consolidate as merge
    from tokenmill.transfer.download import download as download
    from tokenmill.transfer.selection import Selection as Selection
    from tokenmill.transfer.upload import upload as upload
    from tokenmill.verification.verify import verify as verify
    from tokenmill.views.build import build_view as build_view
    from tokenmill.views.build import plan_view as plan_view
    from tokenmill.views.disjoint import prove_disjoint as prove_disjoint
    from tokenmill.views.spec import ViewSource as ViewSource
    from tokenmill.views.spec import ViewSpec as ViewSpec
    from tokenmill.views.spec import ViewStage as ViewStage
    from tokenmill.views.spec import load_spec as load_spec

_HOMES = {
    "EpochSampler": "loading.samplers",
    "Receipt": "loading.receipts",
    "ReceiptWriter": "loading.receipts",
    "Recipe": "recipe",
    "Selection": "transfer.selection",
    "SequentialSampler": "loading.samplers",
    "StoreOptions": "options",
    "Summary": "pipeline.summary",
    "TokenDataset": "loading.dataset",
    "TokenmillError": "errors",
    "ValidatorSampler": "loading.samplers",
    "ViewSource": "views.spec",
    "ViewSpec": "views.spec",
    "ViewStage": "views.spec",
    "WindowSampler": "loading.samplers",
    "buffer_order": "corpus.order",
    "build_view": "views.build",
    "check_receipt": "loading.receipts",
    "compare_tokenizers": "comparison.compare",
    "consolidate": "shards.consolidate",
    "download": "transfer.download",
    "export": "interchange.export",
    "import_data": "interchange.importing",
    "load_receipt": "loading.receipts",
    "load_recipe": "recipe",
    "load_spec": "views.spec",
    "plan_export": "interchange.export",
    "plan_view": "views.build",
    "pretokenize": "pipeline.pretokenize",
    "prove_disjoint": "views.disjoint",
    "report": "reporting.report",
    "upload": "transfer.upload",
    "upload_to_hub": "publishing.hub",
    "verify": "verification.verify",
    "write_card": "publishing.card",
}

__all__ = [
    "EpochSampler",
    "Receipt",
    "ReceiptWriter",
    "Recipe",
    "Selection",
    "SequentialSampler",
    "StoreOptions",
    "Summary",
    "TokenDataset",
    "TokenmillError",
    "ValidatorSampler",
    "ViewSource",
    "ViewSpec",
    "ViewStage",
    "WindowSampler",
    "buffer_order",
    "build_view",
    "check_receipt",
    "compare_tokenizers",
    "consolidate",
    "download",
    "export",
    "import_data",
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
    "upload",
    "upload_to_hub",
    "verify",
    "write_card",
]


_ALIASES = {"tokenize": "pretokenize", "merge": "consolidate"}
"""Other words for functions."""


def __getattr__(name: str) -> object:
    name = _ALIASES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}")
    return getattr(import_module(f"tokenmill.{_HOMES[name]}"), name)
