"""Python time per document, without text: what the driver and the writer spend beside the encoders.

    python benchmarks/driver.py [--documents 1000000] [--tokens 1000]

order    the shuffle alone, in blocks of a batch
driver   order, reorder buffer and cutting: all a document costs the thread that feeds the workers
writer   the copy of its tokens into the arrays that are hashed and written, on the writer's thread
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tokenmill.corpus.order import BufferOrder
from tokenmill.encoding.encoder import EncodedBatch
from tokenmill.shards.pack import cut
from tokenmill.shards.reorder_buffer import ReorderBuffer

BATCH_TOKENS = 4_000_000
"""Those of 16 MB of text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1_000, help="mean length of a document")
    arguments = parser.parse_args()
    batch_rows = max(1, BATCH_TOKENS // arguments.tokens)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * arguments.tokens, batch_rows)
    flags, hashes = np.zeros(batch_rows, np.uint8), np.zeros(batch_rows, np.uint64)
    batch = EncodedBatch(np.zeros(lengths.sum(), np.uint16), lengths, flags, hashes, 0, 0, {})
    order, buffer = BufferOrder(10_000, 42), ReorderBuffer()
    position = taken = 0
    driver = writer = 0.0
    for at in range(0, arguments.documents, batch_rows):
        begin = time.perf_counter()
        buffer.add(np.array([[at], [0], [at]]), batch, pending=batch_rows)
        block = buffer.take(order.push(batch_rows))
        parts = list(cut(position, block.length, shard_size=1 << 30, stop=None))
        position += block.tokens
        taken += len(block)
        driver += time.perf_counter() - begin
        begin = time.perf_counter()
        for part in parts:
            for _ in block.rows(part.begin, part.end).gather(part.skip, part.tokens):
                pass
        writer += time.perf_counter() - begin
    order, rows = BufferOrder(10_000, 42), 10_000_000
    begin = time.perf_counter()
    for _ in range(0, rows, batch_rows):
        order.push(batch_rows)
    print(f"order  {rows / (time.perf_counter() - begin) / 1e6:.1f} M rows/s")
    print(f"driver {driver / taken * 1e6:.3f} us a document, writer {writer / taken * 1e6:.3f} us a document")


if __name__ == "__main__":
    main()
