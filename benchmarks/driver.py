"""Python time per document, without text: what the driver and the writer spend beside the encoders.

    python benchmarks/driver.py [--documents 1000000] [--tokens 1000]

order    the shuffle alone, in blocks of a span
driver   order, window and cutting: all a document costs the thread that feeds the workers
writer   views of its tokens and the copy into the shard's buffer, on the writer's thread
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from tokenmill.encode import EncodedSpan
from tokenmill.order import BufferOrder
from tokenmill.pack import Window, cut

SPAN_ROWS = 1_000
BLOCK_ROWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1_000, help="mean length of a document")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * arguments.tokens, SPAN_ROWS)
    span = EncodedSpan(np.zeros(lengths.sum(), np.uint16), lengths, np.zeros(SPAN_ROWS, np.uint8), 0, 0)
    order, window = BufferOrder(10_000, 42), Window()
    buffer = np.empty(4 * BLOCK_ROWS * arguments.tokens, np.uint16)
    position = taken = 0
    driver = writer = 0.0
    for at in range(0, arguments.documents, SPAN_ROWS):
        begin = time.perf_counter()
        window.add(at, 0, at, span, pending=SPAN_ROWS)
        rows = order.push(SPAN_ROWS)
        driver += time.perf_counter() - begin
        for first in range(0, len(rows), BLOCK_ROWS):
            begin = time.perf_counter()
            block = window.take(rows[first : first + BLOCK_ROWS])
            parts = list(cut(position, block.length, shard_size=1 << 30, stop=None))
            position += block.tokens
            taken += len(block)
            driver += time.perf_counter() - begin
            begin = time.perf_counter()
            for part in parts:
                pieces = block.rows(part.begin, part.end).pieces(part.skip, part.tokens)
                np.concatenate(pieces, out=buffer[: part.tokens])
            writer += time.perf_counter() - begin
    order, rows = BufferOrder(10_000, 42), 10_000_000
    begin = time.perf_counter()
    for _ in range(0, rows, SPAN_ROWS):
        order.push(SPAN_ROWS)
    print(f"order  {rows / (time.perf_counter() - begin) / 1e6:.1f} M rows/s")
    print(f"driver {driver / taken * 1e6:.3f} us a document, writer {writer / taken * 1e6:.3f} us a document")


if __name__ == "__main__":
    main()
