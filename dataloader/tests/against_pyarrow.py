#!/usr/bin/env python3
"""What `dataloader` reads from parquet files as pyarrow writes them, against the same texts as lines.

    python against_pyarrow.py DATALOADER

Every codec, both versions of data pages, encodings with and without dictionary, a column within a struct, rows without
text, groups larger than a unit; and damage, which pyarrow's page checksums must uncover.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "tests/golden/tiny/tokenizer.model"
SAME = ["documents", "characters", "bytes", "short_characters", "short_tokens", "held_out", "tokens"]


def count(program, place, files, column):
    plan = place / "plan.toml"
    plan.write_text(
        f'[model]\npreset = "openelm-270m"\n[train]\nsequences = 1\nmicro_batch = 1\n[tokenizer]\nfile = "{TOKENIZER}"\n'
        f'[data]\nunit = "256KiB"\nlanes = 1\n'
        f'[[data.source]]\nname = "texts"\nurl = "{place}"\nfiles = ["{files}"]\ntext = "{column}"\n'
    )
    done = subprocess.run([program, "count", "--json", "--plan", plan], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        return done.returncode, done.stderr
    found = json.loads(done.stdout)[0]
    return 0, {key: found[key] for key in SAME}


def main():
    program, failed = sys.argv[1], 0
    draw = random.Random(3)
    words = ["".join(draw.choices("etaoinshrdluéß中", k=draw.randint(1, 9))) for _ in range(500)]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 900))) for _ in range(1500)]
    rows = [None if number % 97 == 5 else text for number, text in enumerate(texts)]

    def check(name, condition, told=""):
        nonlocal failed
        failed += not condition
        print(f"{'ok    ' if condition else 'FAILED'} {name}{'' if condition else f': {told}'}")

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows if row is not None)
        (place / "lines.jsonl").write_text(lines)
        code, expected = count(program, place, "lines.jsonl", "text")
        check("lines", code == 0 and expected["tokens"] > 100_000, expected)
        flat = pyarrow.table({"id": range(len(rows)), "text": pyarrow.array(rows, pyarrow.string())})
        large = pyarrow.table({"text": pyarrow.array(rows, pyarrow.large_string())})
        struct = pyarrow.table({"doc": [{"meta": "x", "body": {"text": row}} for row in rows]})
        cases = {
            codec: (flat, "text", {"compression": codec}) for codec in ["none", "snappy", "gzip", "brotli", "lz4", "zstd"]
        } | {
            "data pages of version 2": (flat, "text", {"data_page_version": "2.0", "compression": "zstd"}),
            "delta encodings": (flat, "text", {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "id": "PLAIN"}}),
            "delta lengths": (flat, "text", {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY", "id": "PLAIN"}}),
            "no dictionary": (flat, "text", {"use_dictionary": False}),
            "small groups": (flat, "text", {"row_group_size": 7}),
            "small pages": (flat, "text", {"data_page_size": 1000, "write_page_index": True}),
            "large strings": (large, "text", {}),
            "a column within structs": (struct, "doc.body.text", {"compression": "zstd", "row_group_size": 400}),
        }
        for name, (table, column, options) in cases.items():
            pyarrow.parquet.write_table(table, place / "texts.parquet", **options)
            code, found = count(program, place, "texts.parquet", column)
            check(name, code == 0 and found == expected, found)

        options = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
        pyarrow.parquet.write_table(flat.select(["text"]), place / "texts.parquet", **options)
        whole = (place / "texts.parquet").read_bytes()
        check("checksums", count(program, place, "texts.parquet", "text") == (0, expected))
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 4
        (place / "texts.parquet").write_bytes(damaged)
        code, message = count(program, place, "texts.parquet", "text")
        check("a flipped bit is found", code == 5 and "texts.parquet is damaged" in message, message)
        (place / "texts.parquet").write_bytes(whole[: len(whole) // 2])
        code, message = count(program, place, "texts.parquet", "text")
        check("half a file is refused", code == 2 and "is not parquet" in message, message)
        code, message = count(program, place, "lines.jsonl", "txt")
        check("a wrong key is named", code == 2 and '["text"]' in message, message)
    print(f"{failed} failed" if failed else "all the same")
    sys.exit(1 if failed else 0)


main()
