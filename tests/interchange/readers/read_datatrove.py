"""Print what `datatrove` reads of exports: windows and where documents begin."""

import json
import sys
from pathlib import Path

from datatrove.utils.dataset import DatatroveFileDataset, DatatroveFolderDataset

found = []
for out in sys.argv[1:]:
    record = json.loads((Path(out) / "export.json").read_text())
    tokens = record["splits"]["train"]["tokens"]
    file = str(Path(out) / "train" / "00000_train.ds")
    size = 2 if record["vocab_size"] <= 1 << 16 else 4
    whole = DatatroveFileDataset(file, seq_len=tokens - 1, token_size=size, return_positions=True)[0]
    positions = whole["positions"].tolist()
    starts = [i for i, position in enumerate(positions) if position == 0]
    lengths = [end - begin for begin, end in zip(starts, [*starts[1:], tokens], strict=True)]
    folder = DatatroveFolderDataset(
        str(Path(out) / "train"), seq_len=16, token_size=size, filename_pattern="*.ds", recursive=False
    )
    windows = [folder[i]["input_ids"].tolist() for i in range(len(folder))]
    found.append({"tokens": whole["input_ids"].tolist(), "lengths": lengths, "windows": windows})
print(json.dumps(found))
