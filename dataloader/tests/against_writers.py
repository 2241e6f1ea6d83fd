#!/usr/bin/env python3
"""Compares what `dataloader` reads from files of other writers with the same texts as lines, and lets others read its files.

    python against_writers.py DATALOADER

Parquet files are written by pyarrow: with every codec, both versions of data pages, encodings with and without dictionary,
a column within a struct, rows without text, and groups larger than a unit; and with damage that the page checksums must
reveal. Token ids are written by NumPy, and in the formats of OLMo, nanoGPT and llm.c.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet

TOKENIZER = Path(__file__).resolve().parent.parent.parent / "tests/golden/tiny/tokenizer.model"
SAME = ["documents", "characters", "bytes", "short_characters", "short_tokens", "held_out", "tokens"]


def write_plan(place, files, column, data="", source=""):
    (place / "plan.toml").write_text(
        f'[model]\npreset = "openelm-270m"\n[train]\nsequences = 1\nmicro_batch = 1\nheld_out_every = 0\n[tokenizer]\nfile = "{TOKENIZER}"\n'
        f'[data]\nunit = "256KiB"\nlanes = 1\n{data}'
        f'[[data.source]]\nname = "texts"\nurl = "{place}"\nfiles = ["{files}"]\ntext = "{column}"\n{source}'
    )
    return ["--plan", place / "plan.toml"]


def call(program, *arguments, **options):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, **options)


def count(program, place, files, column, data="", source=""):
    done = call(program, "count", "--json", *write_plan(place, files, column, data, source))
    if done.returncode != 0:
        return done.returncode, done.stderr
    found = json.loads(done.stdout)[0]
    return 0, {key: found[key] for key in SAME}


def whole_texts(program, place, texts, check):
    """Writes shards of texts and of token ids, and reads them."""
    to = ["--to", place / "shards", "--shard", "1MB"]
    done = call(program, "pack", *write_plan(place, "lines.jsonl", "text"), *to)
    shards = sorted((place / "shards/texts").glob("*.parquet"))
    read = [text for shard in shards for text in pyarrow.parquet.read_table(shard)["text"].to_pylist()]
    check("pack: pyarrow reads the same texts", len(shards) > 3 and read == texts, done.stderr)
    groups = [pyarrow.parquet.ParquetFile(shard).metadata.row_group(0).column(0).total_uncompressed_size for shard in shards]
    check("pack: a row group fits in a unit", all(size < 300 << 10 for size in groups), groups)

    lines = "".join(json.dumps(text) + "\n" for text in texts)
    encoded = call(program, "encode", "--tokenizer", TOKENIZER, "--no-bos", "--no-eos", input=lines).stdout
    ids = [json.loads(line) for line in encoded.splitlines()]
    everything = 'normalize = "none"\nmin_characters = 0\nmin_tokens = 0\nholdout = 0.0\n'
    to = ["--to", place / "tokens", "--shard", "1MB"]
    done = call(program, "tokenize", *write_plan(place, "lines.jsonl", "text", everything), *to)
    shards = [numpy.load(shard) for shard in sorted((place / "tokens/texts").glob("*.npy"))]
    with_ends = [token for document in ids for token in [*document, 2]]
    same = shards and numpy.concatenate(shards).tolist() == with_ends
    check("tokenize: numpy loads the same ids", same and shards[0].dtype == numpy.uint16, done.stderr)

    tokens = sum(len(document) + 2 for document in ids)
    first = [token for document in ids for token in [1, *document]]
    header = numpy.zeros(256, dtype=numpy.int32)
    header[:3] = 20240520, 1, len(first)

    def raw(dtype):
        mapped = numpy.memmap(place / "ids.npy", dtype=dtype, mode="w+", shape=(len(with_ends),))
        mapped[:] = with_ends
        mapped.flush()

    both = [token for document in ids for token in [1, *document, 2]]
    cases = {
        "numpy.save of two bytes": (lambda: numpy.save(place / "ids.npy", numpy.array(with_ends, numpy.uint16)), "ids.npy", ""),
        "numpy.save of four bytes": (lambda: numpy.save(place / "ids.npy", numpy.array(both, numpy.uint32)), "ids.npy", ""),
        "numpy.save of rows": (
            lambda: numpy.save(place / "ids.npy", numpy.array(with_ends, numpy.uint16).reshape(1, -1)), "ids.npy", "",
        ),
        "OLMo, two bytes": (lambda: raw(numpy.uint16), "ids.npy", "u16"),
        "OLMo, four bytes": (lambda: raw(numpy.uint32), "ids.npy", "u32"),
        "nanoGPT": (lambda: numpy.array(with_ends, numpy.uint16).tofile(place / "ids.bin"), "ids.bin", "u16"),
        "llm.c": (
            lambda: (place / "ids.bin").write_bytes(header.tobytes() + numpy.array(first, numpy.uint16).tobytes()),
            "ids.bin", "",
        ),
    }
    for name, (write, file, form) in cases.items():
        write()
        source = f'format = "{form}"\n' if form else ""
        code, found = count(program, place, file, "", everything, source)
        check(name, code == 0 and (found["documents"], found["tokens"]) == (len(ids), tokens), found)
    numpy.save(place / "ids.npy", numpy.array(with_ends))
    code, message = count(program, place, "ids.npy", "", everything)
    check("numbers of eight bytes are refused", code == 2 and "<i8" in message, message)


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
        check("half a file is refused", code == 5 and "is damaged" in message, message)
        code, message = count(program, place, "lines.jsonl", "txt")
        check("a wrong key is named", code == 2 and '["text"]' in message, message)

        whole_texts(program, place, [text for text in rows if text is not None], check)
    print(f"{failed} failed" if failed else "all the same")
    sys.exit(1 if failed else 0)


main()
