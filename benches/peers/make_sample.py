"""Writes a .jsonl of source text for tokenisation benchmarks.

    python benches/peers/make_sample.py DIRECTORY MEGABYTES OUT.jsonl

Takes the .rs and .md files below DIRECTORY in order of the SHA-256 of their path, without the few
that are longer than 200 kB (generated tables), until MEGABYTES are reached.
"""

import hashlib
import json
import pathlib
import sys

root, megabytes, out = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
files = [path for path in root.rglob("*") if path.suffix in (".rs", ".md") and path.is_file()]
files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
total = 0
with open(out, "w", encoding="utf-8") as lines:
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text or len(text) > 200_000:
            continue
        lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        total += len(text.encode())
        if total >= megabytes * 1e6:
            break
