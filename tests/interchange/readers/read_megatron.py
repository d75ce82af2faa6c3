"""Print what `megatron-core` reads of exports: tokens and lengths of documents, and samples of its GPT data set."""

import json
import sys
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split


class Tokenizer:
    eod = 2
    pad = 0
    vocab_size = 4096
    unique_identifiers = ("demo",)


found = []
for out in sys.argv[1:]:
    prefix = str(Path(out) / "train")
    dataset = IndexedDataset(prefix, mmap=True)
    documents = [dataset[i].tolist() for i in range(len(dataset))]
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    dtype = dataset.index.dtype
    builder = IndexedDatasetBuilder(str(Path(out) / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(str(Path(out) / "theirs.idx"))
    theirs, ours = ([Path(out, f"{name}.{end}").read_bytes() for end in ("bin", "idx")] for name in ("theirs", "train"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([prefix], None),
        split="1",
        path_to_cache=None,
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    numbers = np.arange(len(dataset), dtype=np.int32)
    trained = GPTDataset(dataset, prefix, numbers, 5, Split.train, config)
    samples = [trained[i]["tokens"].tolist() for i in range(5)]
    found.append(
        {
            "tokens": [token for document in documents for token in document],
            "lengths": dataset.sequence_lengths.tolist(),
            "same bytes": theirs == ours,
            "samples": samples,
        }
    )
print(json.dumps(found))
