"""The original pretokenization script's command line over tokenmill.

    python scripts/01_pretokenize_data.py --output_dir <DATA_ROOT> --num_proc -1

Flags: --dataset --tokenizer --output_dir --shard_size --total_tokens --seed --buffer_size --num_proc
--chunk_size, and the others of `tokenmill pretokenize`, below. Without them: the built-in recipe
templar-150b, and 75% of the cores.
"""

import argparse
import sys

from tokenmill.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="%(prog)s --output_dir DIR [flags]", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir")
    ours, others = parser.parse_known_args()
    if {"-h", "--help"} & set(others):
        print(__doc__)
        main(["pretokenize", "--help"])
    if ours.output_dir is None:
        parser.error("--output_dir is required: the directory for the shards")
    sys.argv[0] = "tokenmill"
    main(["pretokenize", ours.output_dir, "--recipe", "templar-150b", "--num-proc", "-1", *others])
