#!/usr/bin/env python3
"""Measures how often `dataloader normalize --as ftfy` agrees with Python's ftfy.

    python against_ftfy.py DATALOADER [FOLDER]

FOLDER has texts (*.md, *.txt); without it, the Markdown files of the crates that cargo has unpacked. From them and from
some sentences in many scripts, texts are made that were encoded and decoded in the wrong way, once or twice. Ends with an
error if fewer texts agree than docs/data.md states.
"""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import ftfy

# Minimum share of texts that must agree: of unchanged ones, and of texts that were decoded wrongly on purpose.
LEAST = {"texts": 0.998, "spoilt texts": 0.96}
SENTENCES = [
    "L’été à Paris — “naïve” café", "Größe: ±5 °C für Änderungen", "Привет, мир — «ёлки»", "日本語のテキスト", "¿Dónde está? ¡Olé!",
    "Zażółć gęślą jaźń", "&lt;p&gt; AT&amp;T &quot;x&quot;", "“quoted” ‘single’ … – —", "\x1b[31mred\x1b[0m text", "ﬁne ﬂow ＡＢＣ",
    "soft\u00adhyphen \ufeffbom", "one\r\ntwo\rthree\u2028x", "\x85 \x92s control", "a < b &copy; &amp;amp;", "ελληνικά και עברית",
]
ENCODINGS = ["latin-1", "windows-1252", "windows-1251", "macroman", "cp437", "iso-8859-2"]


def main():
    program = sys.argv[1]
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else home / "registry/src"
    files = sorted(file for suffix in ("md", "txt") for file in folder.rglob(f"*.{suffix}"))
    texts = [file.read_text(errors="replace")[:20_000] for file in files[:5000]] + SENTENCES
    draw = random.Random(5)
    other = [text for text in texts if not text.isascii()]
    spoilt = []
    for _ in range(3000):
        text = draw.choice(SENTENCES)
        if draw.random() < 0.4:
            whole = draw.choice(other)
            start = draw.randrange(max(1, len(whole) - 200))
            text = whole[start : start + 200]
        for _ in range(draw.choice([1, 1, 2])):
            text = text.encode().decode(draw.choice(ENCODINGS), "ignore")
        spoilt.append(draw.choice(["", draw.choice(SENTENCES) + " "]) + text)
    failed = False
    for name, group in (("texts", texts), ("spoilt texts", spoilt)):
        lines = "".join(json.dumps(text) + "\n" for text in group)
        done = subprocess.run([program, "normalize", "--as", "ftfy"], input=lines.encode(), capture_output=True, check=True)
        ours = [json.loads(line) for line in done.stdout.splitlines()]
        theirs = [ftfy.fix_text(text, normalization="NFC") for text in group]
        agree = sum(a == b for a, b in zip(ours, theirs, strict=True))
        plain = sum(unicodedata.normalize("NFC", text) == fixed for text, fixed in zip(group, theirs))
        print(f"{name}: {agree} of {len(group)} agree with ftfy {ftfy.__version__}; NFC alone: {plain}")
        failed |= agree < LEAST[name] * len(group)
    sys.exit(1 if failed else 0)


main()
