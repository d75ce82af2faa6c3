"""Preview: some samples of a data root as a parquet file, so that a viewer shows text and tokens."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenmill.loading.data_root import DataRoot
from tokenmill.loading.provenance import show_samples

PREVIEW = "preview/samples.parquet"
SAMPLES = 100
_MOST_TOKENS = 500_000
"""Tokens of all samples together; of longer samples the preview has the beginning."""

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("sources", pa.list_(pa.struct([pa.field("source", pa.string()), pa.field("row", pa.int64())]))),
    ]
)
"""`sample` is its number, `text` what its tokens decode to, `input_ids` the tokens, `sources` where they come from."""


def preview(found: DataRoot) -> bytes:
    """Return `PREVIEW`: samples at even distances, the same each time.

    Raises:
        TokenizerError: the tokenizer is not at hand.
        DataRootError: the data root is not finished.
    """
    samples = found.tokens().tokens // found.seq_len
    chosen = np.unique(np.arange(min(SAMPLES, samples)) * samples // max(1, min(SAMPLES, samples))).tolist()
    rows = [
        {
            "sample": sample.place.sample,
            "text": "".join(token.text for token in sample.tokens),
            "input_ids": [token.id for token in sample.tokens],
            "sources": [{"source": part.source, "row": part.row} for part in sample.place.documents],
        }
        for sample in show_samples(found, chosen, limit=max(1, _MOST_TOKENS // max(1, len(chosen))))
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out, compression="zstd")
    return out.getvalue()
