"""Print what `litdata` reads of exports: blocks of tokens."""

import json
import sys
from pathlib import Path

from litdata import StreamingDataset
from litdata.streaming.item_loader import TokensLoader


def main() -> None:
    found = []
    for out in sys.argv[1:]:
        length = json.loads((Path(out) / "export.json").read_text())["seq_len"]
        loader = TokensLoader(block_size=length)
        dataset = StreamingDataset(str(Path(out) / "train"), item_loader=loader, shuffle=False, drop_last=False)
        found.append({"blocks": [dataset[i].tolist() for i in range(len(dataset))]})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
