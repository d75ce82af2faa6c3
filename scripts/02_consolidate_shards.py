"""The original consolidation script's command line over tokenmill.

    python scripts/02_consolidate_shards.py --data_root <DATA_ROOT>

Flags: --data_root --seq_len --token_dtype --skip_validation (or --skip-validation), and the others of
`tokenmill consolidate`, below. Shards without a manifest must be those of the published Templar data
set, unless validation is skipped.
"""

import argparse
import sys

from tokenmill.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage="%(prog)s --data_root DIR [flags]", add_help=False, allow_abbrev=False)
    parser.add_argument("--data_root", "--data-root")
    ours, others = parser.parse_known_args()
    if {"-h", "--help"} & set(others):
        print(__doc__)
        main(["consolidate", "--help"])
    if ours.data_root is None:
        parser.error("--data_root is required: the directory that holds the shards")
    sys.argv[0] = "tokenmill"
    main(["consolidate", ours.data_root, "--published", "templar-150b", *others])
