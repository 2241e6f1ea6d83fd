"""Times the evaluator and lm-evaluation-harness on the same tasks, in turn, and prints the ratios as Markdown.

    python -m venv peers && peers/bin/pip install torch==2.11.0 lm_eval[hf]==0.4.13 pyarrow safetensors
    cargo build --release
    peers/bin/python benches/peers/harness.py [--rounds 3] [--threads 2] [--work mmlu truthfulqa ...] [--json FILE]
                                              [--peer-rows N]

The model is OpenELM-270M with random weights in float32. Rows are synthetic: words whose prompts have about as many tokens
as those of the published tasks. The harness runs the PyTorch model of `torch_openelm.py` at the fastest of its batch
sizes, which are tried first; its time is that of the evaluation alone, ours that of the whole program, loading included.
Both must find the same numbers. The harness may take an hour for all of it; with --peer-rows it evaluates so many rows of
each task, and its time is scaled up to all of them, since it shares nothing between rows.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness_model import TINY, harness_model, read_from, write_model
from torch_openelm import SHAPES

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = "the old teacher paints a quiet song of cold metal under bright lamp near long river seven apples".split()
BATCHES = [1, 4, 16, 32]
# Examples make prompts so long that more of them at once do not fill the processor any better, but the memory.
LONG_BATCHES = [1, 4]
# Tasks, examples, rows; and how many of the published rows they stand for.
WORK = {
    "mmlu": (["mmlu_abstract_algebra", "mmlu_anatomy"], 5, 100, 14_042),
    "truthfulqa": (["truthfulqa_mc2"], 0, 100, 817),
    "hellaswag": (["hellaswag"], 10, 40, 10_042),
    "arc": (["arc_challenge"], 25, 40, 1_172),
    "zeroshot": (["arc_easy", "hellaswag", "piqa", "sciq", "winogrande"], 0, 60, 2_376 + 10_042 + 1_838 + 1_000 + 1_267),
}


class Rows:
    """Rows in the columns of the published data sets, with texts of about so many tokens."""

    def __init__(self, tokenizer):
        self.random, self.tokenizer = random.Random(7), tokenizer

    def text(self, tokens):
        words = []
        while len(self.tokenizer.encode(" ".join(words), add_special_tokens=False).ids) < tokens:
            words.append(self.random.choice(WORDS))
        return " ".join(words)

    def mmlu(self):
        # Each question with its four choices has 115 tokens.
        choices = [self.text(14) for _ in range(4)]
        return {"question": self.text(40), "subject": "", "choices": choices, "answer": self.random.randrange(4)}

    def truthfulqa(self):
        targets = {"choices": [self.text(12) for _ in range(7)], "labels": [1, 1, 1, 0, 0, 0, 0]}
        return {"question": self.text(12), "mc1_targets": targets, "mc2_targets": targets}

    def hellaswag(self):
        endings = [self.text(28) for _ in range(4)]
        label = str(self.random.randrange(4))
        return {"activity_label": self.text(4), "ctx_a": self.text(28), "ctx_b": self.text(14), "endings": endings, "label": label}

    def arc(self, question, choice):
        choices = {"text": [self.text(choice) for _ in range(4)], "label": list("ABCD")}
        return {"id": "", "question": self.text(question), "choices": choices, "answerKey": self.random.choice("ABCD")}

    def piqa(self):
        return {"goal": self.text(10), "sol1": self.text(24), "sol2": self.text(24), "label": self.random.randrange(2)}

    def sciq(self):
        answers = {key: self.text(3) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")}
        return {"question": self.text(18), "support": self.text(100), **answers}

    def winogrande(self):
        sentence = f"{self.text(16)} _ {self.text(6)}"
        return {"sentence": sentence, "option1": "Omar", "option2": "Maria", "answer": str(self.random.randrange(1, 3))}


def write_data(folder, tokenizer):
    """Data sets in the layout of the hub."""
    import pyarrow
    import pyarrow.parquet

    rows = Rows(tokenizer)

    def write(path, count, make):
        path = folder / f"{path}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([make() for _ in range(count)]), path)

    for subject in ("abstract_algebra", "anatomy"):
        write(f"cais/mmlu/{subject}/test", 100, rows.mmlu)
        write(f"cais/mmlu/{subject}/dev", 5, rows.mmlu)
    write("truthfulqa/truthful_qa/multiple_choice/validation", 100, rows.truthfulqa)
    for split, count in (("train", 200), ("validation", 60)):
        write(f"Rowan/hellaswag/data/{split}", count, rows.hellaswag)
        write(f"baber/piqa/data/{split}", count, rows.piqa)
        write(f"allenai/winogrande/winogrande_xl/{split}", count, rows.winogrande)
    for split, count in (("train", 200), ("test", 60)):
        write(f"allenai/ai2_arc/ARC-Challenge/{split}", count, lambda: rows.arc(28, 8))
        write(f"allenai/ai2_arc/ARC-Easy/{split}", count, lambda: rows.arc(24, 6))
        write(f"allenai/sciq/data/{split}", count, rows.sciq)


def peer(arguments):
    """Evaluates with the harness, in a process of its own, and prints its results and its time."""
    import torch
    from lm_eval import simple_evaluate

    read_from(Path(arguments.data))
    torch.set_num_threads(arguments.threads)
    model = harness_model(Path(arguments.model), SHAPES["openelm-270m"], max_length=2048, batch_size=arguments.batch)
    begun = time.perf_counter()
    results = simple_evaluate(
        model, tasks=arguments.tasks, num_fewshot=arguments.shots, limit=arguments.limit, bootstrap_iters=0, log_samples=False
    )
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "results": results["results"]}))


def run(command):
    begun = time.perf_counter()
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-3000:]}")
    return result.stdout, time.perf_counter() - begun


def numbers(results):
    return {
        (task, key): value
        for task, values in results.items()
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }


def compare(name, arguments, model, data):
    tasks, shots, rows, _ = WORK[name]

    def theirs(batch, limit):
        command = [sys.executable, __file__, "--peer", "--model", model, "--data", data, "--threads", arguments.threads]
        output, _ = run([*command, "--batch", batch, "--shots", shots, "--limit", limit, "--tasks", *tasks])
        return json.loads(output.splitlines()[-1])

    def ours(rows):
        command = [arguments.binaries / "evaluator", "run", "--model", model, "--data", data, "--tasks", ",".join(tasks)]
        output, seconds = run([*command, "--num-fewshot", shots, "--limit", rows, "--threads", arguments.threads, "--json"])
        return {"seconds": seconds, "results": json.loads(output)["results"]}

    peer_rows = min(rows, arguments.peer_rows or rows)
    batches = LONG_BATCHES if shots else BATCHES
    best = min(batches, key=lambda batch: theirs(batch, min(peer_rows, max(4, rows // 10)))["seconds"])
    found = {"ulmus": [], "harness": []}
    for _ in range(arguments.rounds):
        found["ulmus"].append(ours(rows))
        found["harness"].append(theirs(best, peer_rows))
    same_rows = found["ulmus"][0] if peer_rows == rows else ours(peer_rows)
    a, b = (numbers(results["results"]) for results in (same_rows, found["harness"][0]))
    # A row may be decided by less than the rounding of float32 sums.
    differing = [key for key, value in b.items() if abs(a[key] - value) > 1.01 / peer_rows]
    if differing:
        sys.exit(f"the numbers differ: {[(key, a[key], b[key]) for key in differing]}")
    seconds = {who: statistics.median(each["seconds"] for each in runs) for who, runs in found.items()}
    seconds["harness"] *= rows / peer_rows
    return {"work": name, "batch": best, "rows": rows * len(tasks), **seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--binaries", type=Path, default=ROOT / "target/release")
    parser.add_argument("--peer-rows", type=int, help="rows of each task that the harness evaluates [all]")
    parser.add_argument("--json", type=Path, help="file for all figures")
    for name in ("--peer", "--model", "--data", "--tasks", "--shots", "--limit", "--batch"):
        kind = {"--peer": {"action": "store_true"}, "--tasks": {"nargs": "+"}}
        parser.add_argument(name, help=argparse.SUPPRESS, **kind.get(name, {"type": int if name in ("--shots", "--limit", "--batch") else str}))
    arguments = parser.parse_args()
    if arguments.peer:
        return peer(arguments)
    from tokenizers import Tokenizer

    print(f"{os.cpu_count()} cores, {datetime.date.today()}, {arguments.rounds} rounds, {arguments.threads} threads\n")
    print("| work | examples | rows | Ulmus, s | lm_eval, s | its batch | ratio |\n|---|---|---|---|---|---|---|")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "model", Path(folder) / "data"
        write_model(model, SHAPES["openelm-270m"])
        write_data(data, Tokenizer.from_file(str(TINY / "tokenizer.json")))
        for name in arguments.work:
            figure = compare(name, arguments, model, data)
            figures.append(figure)
            ratio = figure["harness"] / figure["ulmus"]
            cells = [name, WORK[name][1], figure["rows"], f"{figure['ulmus']:.1f}", f"{figure['harness']:.1f}", figure["batch"], f"{ratio:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if set(arguments.work) == set(WORK):
        total = {
            who: sum(figure[who] / figure["rows"] * WORK[figure["work"]][3] for figure in figures) for who in ("ulmus", "harness")
        }
        ratio = total["harness"] / total["ulmus"]
        print(f"\ncomputed for the published numbers of rows of all these tasks: {ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
