"""Train the small Llama-style tokenizer that ships for `tokenmill demo`.

    python scripts/train_demo_tokenizer.py [--check]

BPE with byte fallback, 4,096 ids, trained on the standard library of the running Python. The same
library text gives the same file; `trained_on.json` records its digest. `--check` trains anew and
compares, or says that this Python's library is another one.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import sys
from collections import Counter

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

from tokenmill.cli.demo import TOKENIZER, library_texts

VOCABULARY = 4_096
ALPHABET = 200
"""Characters with an id of their own; others become bytes."""
CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train(texts: list[str]) -> str:
    """The contents of `tokenizer.json`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always")
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*CONTROL, *BYTES],
        max_token_length=16,
        show_progress=False,
    )
    # The trainer's own limit_alphabet breaks ties by chance.
    counts = Counter(itertools.chain.from_iterable(texts))
    alphabet = set(sorted(counts, key=lambda character: (-counts[character], character))[:ALPHABET])
    rare = {ord(character): " " for character in counts if character not in alphabet}
    tokenizer.train_from_iterator((text.translate(rare) for text in texts), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    # As Llama-2's tokenizer.json: spaces become U+2581, and there is no pre-tokenizer.
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, token in enumerate(CONTROL)
    ]
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def main() -> int:
    """Train and write, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped file; write nothing")
    check = parser.parse_args().check
    texts = [text for _, text in library_texts()]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    record = TOKENIZER / "trained_on.json"
    if check and json.loads(record.read_text())["text_sha256"] != digest:
        print(f"not comparable: Python {platform.python_version()} has another standard library than {record} names")
        return 0
    trained = train(texts)
    if check:
        same = trained == (TOKENIZER / "tokenizer.json").read_text("utf-8")
        print("the shipped tokenizer is what this script makes" if same else "DIFFERS from the shipped tokenizer")
        return 0 if same else 1
    TOKENIZER.mkdir(exist_ok=True)
    (TOKENIZER / "tokenizer.json").write_text(trained, "utf-8")
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}) + "\n", "utf-8")
    record.write_text(json.dumps({"python": platform.python_version(), "text_sha256": digest}) + "\n", "utf-8")
    print(f"wrote {TOKENIZER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
