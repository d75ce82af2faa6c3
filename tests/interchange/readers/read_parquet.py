"""Print what Hugging Face's `datasets` reads of exports, by way of the dataset card."""

import json
import sys
import tempfile

from datasets import load_dataset

found = []
for out in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as cache:
        splits = load_dataset(out, cache_dir=cache)
        found.append({split: [dict(row) for row in rows] for split, rows in splits.items()})
        found[-1]["type"] = str(splits["train"].features["input_ids"])
print(json.dumps(found))
