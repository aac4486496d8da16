"""What `titanbit tokenize` is measured against: Python `tokenizers.encode_batch`.

    python -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python benches/peers/tokenizers_encode_batch.py TOKENIZER.json TEXT [--check TRAIN.bin]

TEXT is a .jsonl file with a `text` field, one document a line, as `make_sample.py` writes it.
Documents are encoded in batches of 256 on as many threads as there are cores; best of three
passes; reading the file is not timed. With --check the ids are compared with those in a token
file that `titanbit tokenize` made of the same two files.
"""

import json
import struct
import sys
import time

import tokenizers

BATCH = 256


def main():
    tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    eos = tokenizer.token_to_id("<|endoftext|>")
    size = sum(len(document.encode()) for document in documents)
    best = float("inf")
    for _ in range(3):
        ids = []
        start = time.perf_counter()
        for first in range(0, len(documents), BATCH):
            batch = documents[first : first + BATCH]
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids += encoding.ids
                ids.append(eos)
        best = min(best, time.perf_counter() - start)
    print(f"tokenizers {tokenizers.__version__}: {len(documents)} documents, {len(ids)} tokens, "
          f"{size / 1e6:.1f} MB in {best:.2f} s, {size / 1e6 / best:.2f} MB/s")
    if "--check" in sys.argv:
        with open(sys.argv[sys.argv.index("--check") + 1], "rb") as file:
            tokens = file.read()[1024:]
        same = struct.pack(f"<{len(ids)}H", *ids) == tokens
        print("ids are", "the same" if same else "DIFFERENT")
        sys.exit(not same)


main()
