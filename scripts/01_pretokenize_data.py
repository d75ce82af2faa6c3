"""The original pretokenization script's command line over tokenmill.

    python scripts/01_pretokenize_data.py --output_dir <DATA_ROOT> --num_proc -1

Flags: --dataset --tokenizer --output_dir --shard_size --total_tokens --seed --buffer_size --num_proc
--chunk_size, and all of `tokenmill pretokenize`; defaults are the built-in recipe templar-150b.
"""

import argparse

from tokenmill.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default=[], type=lambda path: [path])
    ours, others = parser.parse_known_args()
    main(["pretokenize", *ours.output_dir, "--recipe", "templar-150b", "--num-proc", "-1", *others])
