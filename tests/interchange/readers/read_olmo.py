"""Print what OLMo-core reads of exports: documents by the csv, documents by their EOS, and samples."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from olmo_core.data.numpy_dataset import NumpyFSLDataset
from olmo_core.data.utils import iter_document_indices, load_array_slice

found = []
for out in sys.argv[1:]:
    record = json.loads((Path(out) / "export.json").read_text())
    file, eos = str(Path(out) / "train" / "part-00000.npy"), record["eos_id"]
    dtype, tokens = np.uint16, record["splits"]["train"]["tokens"]
    listed = [[int(a), int(b)] for a, b in iter_document_indices(file, use_array_if_local=False, dtype=dtype)]
    scanned = [
        [int(a), int(b)] for a, b in iter_document_indices(file, use_array_if_local=True, eos_token_id=eos, dtype=dtype)
    ]
    with tempfile.TemporaryDirectory() as folder:
        dataset = NumpyFSLDataset(
            file,
            sequence_length=16,
            pad_token_id=0,
            eos_token_id=eos,
            vocab_size=record["vocab_size"],
            dtype=dtype,
            generate_doc_lengths=True,
        )
        dataset.work_dir = folder
        dataset.prepare()
        blocks = [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]
    whole = load_array_slice(file, 0, tokens, dtype).tolist()
    found.append({"tokens": whole, "listed": listed, "scanned": scanned, "blocks": blocks})
print(json.dumps(found))
