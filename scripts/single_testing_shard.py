"""The original test-shard script's command line over tokenmill.

    python scripts/single_testing_shard.py --output_dir ./test_shard

Flags: --dataset --tokenizer --output_dir --shard_size --seed --buffer_size --num_proc --chunk_size, and the
others of `tokenmill test-shard`, below. Without them: the built-in recipe templar-150b, ./test_shard, and 75%
of the cores.
"""

import argparse
import sys
from pathlib import Path

from tokenmill.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="./test_shard")
    ours, others = parser.parse_known_args()
    if {"-h", "--help"} & set(others):
        print(__doc__)
        main(["test-shard", "--help"])
    sys.argv[0] = "tokenmill"
    output = str(Path(ours.output_dir).expanduser())
    main(["test-shard", output, "--recipe", "templar-150b", "--num-proc", "-1", *others])
