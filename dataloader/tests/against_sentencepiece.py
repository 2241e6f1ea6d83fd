"""Compares the tokenizer with Google's SentencePiece: ids and decoded texts, for models of many kinds.

    python -m venv venv && venv/bin/pip install sentencepiece==0.2.3 protobuf
    venv/bin/python dataloader/tests/against_sentencepiece.py PATH/dataloader [MODEL ...] [--texts FOLDER]

Small models of every kind are trained on the texts; MODELs are compared as well. FOLDER (this repository) holds the
texts: its .md, .rs and .txt files. Prints a line per model, and fails if any id or decoded text differs.
"""

import argparse
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ROOT = Path(__file__).resolve().parent.parent.parent
ODD = [
    "", " ", "  ", "\n", "\t x", "a  b   c    d", " lead", "trail ", "  both  ", "<s> </s> <unk> <0x41> <pad>", "▁", "▁▁ ▁x",
    "日本語テキスト", "naïve café e\u0301", "\u200b\ufeff", "ＦＵＬＬ ｗｉｄｔｈ ﬁ ½ ①", "😀👩‍👩‍👧🏽", "\u0000\u0001\u007f", "…“quotes”—dash",
    "=" * 300, " " * 200 + "x", "ab" * 500, "Ünïcödé " * 40, "\r\n\r\n", "12345678901234567890", "[user] token[user]",
    "𝒳𝓎𝓏", "क्षत्रिय", "ﷺ", "İıŞş",
]
KINDS = {
    "as LLaMA": dict(
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True,
    ),
    "unknown piece": dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
    "default": dict(),
    "nfkc, case folding": dict(normalization_rule_name="nmt_nfkc_cf", byte_fallback=True),
    "no prefix": dict(normalization_rule_name="identity", add_dummy_prefix=False, byte_fallback=True),
    "suffix": dict(treat_whitespace_as_suffix=True, byte_fallback=True),
    "across spaces": dict(split_by_whitespace=False, normalization_rule_name="identity", byte_fallback=True),
    "user-defined pieces": dict(user_defined_symbols=["[user]", "the", "th", "ab", "▁▁"], byte_fallback=True),
    "user-defined pieces, unknown piece": dict(
        user_defined_symbols=["[user]", "é", "=="], normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
}


def trained(texts, options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=1500, minloglevel=2,
        character_coverage=0.9995, **options,
    )
    return out.getvalue()


def changed(model, change):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(proto)
    return proto.SerializeToString()


def equal_scores(proto):
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.score = -float(int(-piece.score) // 50)


def some_unused(proto):
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    for piece in random.Random(1).sample(normal, len(normal) // 10):
        piece.type = piece.UNUSED


def odd_characters(proto):
    """Makes pieces of one character that no text leads to."""
    characters = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) == 1]
    for number, piece in enumerate(random.Random(2).sample(characters, len(characters) // 3)):
        piece.type = piece.UNUSED if number % 2 else piece.CONTROL


def two_zeros(proto):
    for number, piece in enumerate(piece for piece in proto.pieces if piece.type == piece.NORMAL):
        piece.score = -0.0 if number % 3 else 0.0


def not_escaped(proto):
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        if piece.type == piece.NORMAL:
            piece.piece = piece.piece.replace("▁", " ")


def large(proto):
    """Moves all ordinary pieces beyond 16 bits."""
    ordinary = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    others = [piece for piece in proto.pieces if piece.type != piece.NORMAL]
    filler = [proto.SentencePiece(piece=f"\U000f0000{number}", score=-1e6, type=1) for number in range(70_000)]
    del proto.pieces[:]
    proto.pieces.extend(others + filler + ordinary)


def models(texts):
    sample = [line for text in texts for line in text.splitlines()][:20_000]
    for name, options in KINDS.items():
        model = trained(sample, options)
        yield name, model
        if name in ("as LLaMA", "unknown piece"):
            for change in (equal_scores, some_unused, odd_characters, two_zeros, not_escaped, large):
                yield f"{name}, {change.__name__.replace('_', ' ')}", changed(model, change)


def filtered(command, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    result = subprocess.run(command, input=text.encode(), capture_output=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {result.stderr.decode()}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def random_ids(pieces, count):
    """Lists of ids that no text leads to, including bytes and control pieces."""
    numbers = random.Random(2)
    few = [*range(3), *range(3, min(pieces, 259), 16)]
    return [
        [numbers.choice(few) if numbers.random() < share else numbers.randrange(pieces) for _ in range(12)]
        for share in (0.3, 0.95)
        for _ in range(count)
    ]


def compare(name, model, texts, program):
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model)
        file.flush()
        ours = filtered([program, "encode", "--no-bos", "--no-eos", "--tokenizer", file.name], texts)
        expected = reference.encode(texts)
        lists = expected + random_ids(reference.get_piece_size(), 500)
        ours_decoded = filtered([program, "decode", "--tokenizer", file.name], lists)
        expected_decoded = [reference.decode(ids) for ids in lists]
    wrong_ids = [index for index in range(len(texts)) if ours[index] != expected[index]]
    wrong_texts = [index for index in range(len(lists)) if ours_decoded[index] != expected_decoded[index]]
    print(f"{name}: {len(texts)} texts, {len(wrong_ids)} with other ids; {len(wrong_texts)} of {len(lists)} decoded differently")
    for index in wrong_ids[:2]:
        at = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours[index], expected[index])) if a != b)
        print(f"  {texts[index][:60]!r}, id {at}: {ours[index][at:at + 6]}, not {expected[index][at:at + 6]}")
    for index in wrong_texts[:2]:
        print(f"  {lists[index][:12]}: {ours_decoded[index][:60]!r}, not {expected_decoded[index][:60]!r}")
    return not wrong_ids and not wrong_texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--texts", type=Path, default=ROOT)
    arguments = parser.parse_args()
    paths = [path for path in arguments.texts.rglob("*") if path.suffix in (".md", ".rs", ".txt") and "target" not in path.parts]
    texts = [path.read_text(errors="replace") for path in sorted(paths)]
    found = [(path.name, path.read_bytes()) for path in arguments.models]
    results = [compare(name, model, texts + ODD, arguments.program.resolve()) for name, model in [*found, *models(texts)]]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
