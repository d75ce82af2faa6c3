"""Print what MosaicML's `streaming` reads of exports: samples."""

import json
import sys
import warnings

warnings.simplefilter("ignore")

from streaming import StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


def main() -> None:
    found = []
    for out in sys.argv[1:]:
        clean_stale_shared_memory()
        dataset = StreamingDataset(local=out, remote=None, split="train", shuffle=False, batch_size=1)
        blocks = [dataset[i]["tokens"].tolist() for i in range(len(dataset))]
        assert [sample["tokens"].tolist() for sample in dataset] == blocks
        found.append({"blocks": blocks, "dtype": str(dataset[0]["tokens"].dtype)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
