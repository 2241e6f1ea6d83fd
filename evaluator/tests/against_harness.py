#!/usr/bin/env python3
"""Checks that lm-evaluation-harness finds the same on rows that were made to be difficult, for all of its tasks.

    python -m venv peers && peers/bin/pip install torch==2.11.0 lm_eval[hf]==0.4.13 pyarrow safetensors
    peers/bin/python evaluator/tests/against_harness.py EVALUATOR [--seeds 3] [--first 1]

Each seed makes rows, a model and settings (shots, limit, context, seed of the examples). Every line of the samples must be
the same but for the log-likelihoods, which may differ by the rounding of float32 sums, and so must all metrics that follow
from them; a metric that such a difference can turn is left out, and counted.
"""

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benches/peers"))

from datasets import disable_progress_bars  # noqa: E402
from harness_model import harness_model, read_from, write_model  # noqa: E402
from torch_openelm import Shape  # noqa: E402

WORDS = "the old teacher paints Paris in a quiet song of cold metal under Bright lamps near rivers seven apples 42 TV".split()
ODD = [
    "ǆungla", "İstanbul", "Straße", "ΑΣ", "naïve", "日本", "🙂", "ﬁn", "\u00a0", "\u2003", "\x1c", "\x85", "\u200b", "<s>", "</s>", "<unk>",
    "[title]", "[header]", "[x y]", "[", "]", "  ", "\t", "\n", "\r\n", '"', "'", "\\", "\\n", "{{x}}", "{%", "#", "_", "._.", "7", "½", "²",
]
ROLLING = [" @-@ ", " @,@ ", " @.@ ", "s '", " : ", " ; ", " . ", " ! ", " ? ", " , ", "( a )", "[ b ]", "{ c }", '" d "', "' e '", "= = =", " ° ", " \n ", " 1 ", " N ", " 's "]
TASKS = [
    "arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "sciq", "winogrande", "openbookqa", "social_iqa", "race",
    "truthfulqa_mc1", "truthfulqa_mc2", "crows_pairs_english", "wikitext",
]
# As the harness has it, without the tasks whose answers are generated; that MMLU is a group must be said to version 0.4.13.
OPENLLM = """group: five_of_openllm
group_alias: Open LLM Leaderboard
task:
  - {task: arc_challenge, fewshot_split: train, num_fewshot: 25}
  - {task: hellaswag, fewshot_split: train, num_fewshot: 10}
  - {task: truthfulqa_mc1, num_fewshot: 0}
  - {task: truthfulqa_mc2, num_fewshot: 0}
  - {group: mmlu, num_fewshot: 5}
  - {task: winogrande, fewshot_split: train, num_fewshot: 5}
metadata:
  version: 2
"""


class Rows:
    """Rows in the columns of the published data sets."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self, most, least=1):
        words = [self.random.choice(WORDS if self.random.random() < 0.8 else ODD) for _ in range(self.random.randint(least, most))]
        text = self.random.choice([" ", " ", " ", "", "  "]).join(words)
        # A choice of blanks alone has nothing to be scored.
        return text if text.strip() and self.random.random() < 0.9 else text + self.random.choice(WORDS) + self.random.choice(["", " ", "\n"])

    def choices(self, count, most=8):
        choices = [self.text(most) for _ in range(count)]
        if self.random.random() < 0.2:
            choices[-1] = choices[0]
        return choices

    def arc(self):
        count = self.random.randint(3, 5)
        labels = self.random.choice(["ABCDE", "12345"])[:count]
        choices = {"text": self.choices(count), "label": list(labels)}
        return {"id": self.text(1), "question": self.text(20), "choices": choices, "answerKey": self.random.choice(labels)}

    def boolq(self):
        return {"question": self.text(10), "passage": self.text(40), "idx": self.random.randrange(99), "label": self.random.randrange(2)}

    def hellaswag(self):
        row = {"ind": self.random.randrange(99), "activity_label": self.text(3), "ctx_a": self.text(15), "ctx_b": self.random.choice(["", self.text(8)])}
        row |= {"ctx": row["ctx_a"] + " " + row["ctx_b"], "endings": self.choices(4, 12), "source_id": "made", "split": "val"}
        return row | {"split_type": "zeroshot", "label": str(self.random.randrange(4))}

    def piqa(self):
        return {"goal": self.text(12), "sol1": self.text(10), "sol2": self.text(10), "label": self.random.randrange(2)}

    def sciq(self):
        answers = {key: self.text(4) for key in ("distractor3", "distractor1", "distractor2", "correct_answer")}
        return {"question": self.text(12), **answers, "support": self.random.choice(["", " ", self.text(40)])}

    def winogrande(self):
        sentence = f"{self.text(12)}{self.random.choice([' ', ''])}_{self.random.choice([' ', '', '  '])}{self.text(8)}"
        return {"sentence": sentence, "option1": self.text(2), "option2": self.text(2), "answer": self.random.choice("12")}

    def openbookqa(self):
        row = self.arc()
        labels = row["choices"]["label"]
        key = self.random.choice(["", " "]) + self.random.choice(labels)
        return {"id": row["id"], "question_stem": self.text(12), "choices": row["choices"], "answerKey": key}

    def social_iqa(self):
        answers = {f"answer{letter}": self.text(5) for letter in "ABC"}
        return {"context": self.text(12), "question": self.text(6), **answers, "label": self.random.choice("123")}

    def race(self):
        def problem():
            question = self.random.choice([self.text(8), self.text(8) + "  _  .", "  _  ."])
            return {"question": question, "answer": self.random.choice("ABCD"), "options": self.choices(4)}

        return {"article": self.text(40), "problems": repr([problem() for _ in range(self.random.randint(1, 4))])}

    def crows(self):
        row = {"id": self.random.randrange(99), "sent_more": self.text(15), "sent_less": self.text(15)}
        if self.random.random() < 0.2:
            row["sent_less"] = row["sent_more"]
        return row | {"stereo_antistereo": self.random.randrange(2), "bias_type": "made"}

    def truthfulqa(self):
        labels = [1] + [self.random.randrange(2) for _ in range(self.random.randint(1, 5))] + [0]
        first = {"choices": self.choices(len(labels)), "labels": [1] + [0] * (len(labels) - 1)}
        return {"question": self.text(12), "mc1_targets": first, "mc2_targets": {"choices": self.choices(len(labels)), "labels": labels}}

    def mmlu(self):
        return {"question": self.text(15), "subject": "made", "choices": self.choices(4, 5), "answer": self.random.randrange(4)}

    def wikitext(self):
        parts = [self.text(12) if self.random.random() < 0.6 else self.random.choice(ROLLING) for _ in range(self.random.randint(1, 40))]
        return {"page": self.random.choice(["", " "]).join(parts)}


def subjects():
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    return sorted(file.stem.removeprefix("mmlu_") for file in files)


def write_data(folder, seed):
    """Data sets in the layout of the hub."""
    import pyarrow
    import pyarrow.parquet

    rows = Rows(seed)

    def write(path, splits, make):
        measured = None
        for split, count in splits.items():
            made = [make() for _ in range(count)]
            # Rows that are there twice, and examples that are also asked.
            made += [rows.random.choice(made), *rows.random.sample(measured or made, min(2, len(measured or made)))]
            measured = measured or made
            file = folder / path / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file)

    write("allenai/ai2_arc/ARC-Easy", {"test": 8, "train": 40}, rows.arc)
    write("allenai/ai2_arc/ARC-Challenge", {"test": 8, "train": 40}, rows.arc)
    write("aps/super_glue/boolq", {"validation": 8, "train": 40}, rows.boolq)
    write("Rowan/hellaswag/data", {"validation": 12, "train": 40}, rows.hellaswag)
    write("baber/piqa/data", {"validation": 8, "train": 12}, rows.piqa)
    write("allenai/sciq/data", {"test": 8, "train": 40, "validation": 3}, rows.sciq)
    write("allenai/winogrande/winogrande_xl", {"validation": 12, "train": 40}, rows.winogrande)
    write("allenai/openbookqa/main", {"test": 8, "train": 40, "validation": 3}, rows.openbookqa)
    write("lighteval/siqa/data", {"validation": 8, "train": 40}, rows.social_iqa)
    write("EleutherAI/race/high", {"test": 12}, rows.race)
    write("jannalu/crows_pairs_multilingual/english", {"test": 40}, rows.crows)
    write("truthfulqa/truthful_qa/multiple_choice", {"validation": 10}, rows.truthfulqa)
    write("EleutherAI/wikitext_document_level/wikitext-2-raw-v1", {"test": 5, "train": 8, "validation": 1}, rows.wikitext)
    for subject in subjects():
        write(f"cais/mmlu/{subject}", {"test": rows.random.randint(1, 3), "dev": 6}, rows.mmlu)


def settings_of(seed):
    """What is evaluated, and how: every task without examples, with some, and as the leaderboard has it."""
    choose = random.Random(seed)
    limit = choose.choice([None, 5, 0.5])
    return [
        {"tasks": [*TASKS, "mmlu"], "shots": None, "limit": None, "context": 2048, "seed": 1234},
        {"tasks": [*TASKS, "mmlu_stem"], "shots": choose.randint(1, 6), "limit": limit, "context": choose.randint(300, 900), "seed": choose.randrange(2**31)},
        {"tasks": ["five_of_openllm"], "shots": None, "limit": limit, "context": 2048, "seed": choose.choice([1234, 0, 7])},
    ]


def theirs(model, settings, include, output):
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model, tasks=settings["tasks"], num_fewshot=settings["shots"], limit=settings["limit"], bootstrap_iters=1,
        fewshot_random_seed=settings["seed"], task_manager=TaskManager(include_path=str(include)), log_samples=True, verbosity="ERROR",
    )
    samples = results.pop("samples")
    results = json.loads(json.dumps(results, default=str).replace("five_of_", ""))
    # The files are what the harness itself writes; with them it adds the hashes of tasks to the results.
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.date_id = "now"
    for task, lines in samples.items():
        tracker.save_results_samples(task, lines)
    lines = {
        task: [json.loads(line) for file in output.glob(f"samples_{task}_now.jsonl") for line in file.read_text().split("\n") if line]
        for task in samples
    }
    return results, lines


def ours(evaluator, model, data, settings, output):
    command = [evaluator, "run", "--model", model, "--data", data, "--tasks", ",".join(settings["tasks"]).replace("five_of_", ""), "--context", settings["context"]]
    command += ["--seed", settings["seed"], "--output", output, "--log-samples", "--json"]
    for name, flag in (("shots", "--num-fewshot"), ("limit", "--limit")):
        command += [flag, settings[name]] if settings[name] is not None else []
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-3000:]}")
    results = json.loads(result.stdout)
    return results, {
        file.stem.removeprefix("samples_"): [json.loads(line) for line in file.read_text().split("\n") if line]
        for file in output.glob("samples_*.jsonl")
    }


class Comparison:
    def __init__(self):
        self.wrong, self.compared, self.close, self.turned = [], 0, 0, set()

    def differ(self, place, a, b):
        self.wrong.append(f"{place}: {str(a)[:400]} instead of {str(b)[:400]}")

    def sample(self, task, a, b):
        place = f"{task}, row {b['doc_id']}"
        if set(a) != set(b):
            return self.differ(f"{place}, keys", sorted(a), sorted(b))
        turned = False
        for key, value in sorted(b.items(), key=lambda item: "resps" not in item[0]):
            self.compared += 1
            if key in ("resps", "filtered_resps"):
                lengths = [len(arguments["arg_1"]) - 1 for arguments in b["arguments"].values() if "arg_1" in arguments]
                turned |= self.likelihoods(f"{place}, {key}", a[key], value, lengths)
            elif self.near(a[key], value):
                pass
            elif a[key] != value and isinstance(value, (int, float, list)) and key in b["metrics"] and turned:
                self.close += 1
                self.turned.add(task)
            elif a[key] != value:
                self.differ(f"{place}, {key}", a[key], value)

    @staticmethod
    def near(a, b):
        """Whether metrics are the same but for the rounding of log-likelihoods."""
        if isinstance(b, list) and isinstance(a, list) and len(a) == len(b):
            return all(map(Comparison.near, a, b))
        return a == b or isinstance(b, float) and isinstance(a, (int, float)) and abs(a - b) < 1e-4 * (1 + abs(b) / 100)

    def likelihoods(self, place, a, b, lengths):
        """Compares log-likelihoods, and returns whether two of them are so close that a metric may turn."""
        pairs = [self.pairs(each) for each in (a, b)]
        mine, their = ([float(part[0]) for part in each] for each in pairs)
        if len(mine) != len(their) or any(abs(x - y) > 1e-4 * (1 + abs(y) / 100) for x, y in zip(mine, their)):
            self.differ(place, a, b)
        # Whether each was the likeliest continuation.
        if [part[1:] for part in pairs[0]] != [part[1:] for part in pairs[1]]:
            self.differ(f"{place}, greedy", a, b)
        per_character = [x / length for x, length in zip(their, lengths) if length]
        orders = [sorted(set(their)), sorted(set(per_character))]
        return any(y - x < 1e-3 for order in orders for x, y in zip(order, order[1:]))

    def leaves(self, task, members):
        inner = members.get(task)
        return set().union(*(self.leaves(name, members) for name in inner)) if inner else {task}

    @staticmethod
    def pairs(value):
        """Pairs of a log-likelihood and of whether it is greedy, or log-likelihoods alone, however deep they are."""
        while value and isinstance(value[0], list) and isinstance(value[0][0], list):
            value = [inner for outer in value for inner in outer]
        return [each if isinstance(each, list) else [each] for each in value]

    def results(self, a, b, members):
        if set(a) != set(b):
            self.differ("tasks with results", sorted(a), sorted(b))
        for task in set(a) & set(b):
            if set(a[task]) != set(b[task]):
                self.differ(f"{task}, keys", sorted(a[task]), sorted(b[task]))
            if self.leaves(task, members) & self.turned:
                continue
            for key, value in b[task].items():
                self.compared += 1
                mine = a[task].get(key)
                if isinstance(value, float) and isinstance(mine, (int, float)):
                    rolling = "perplexity" in key or key.startswith("bits") or "likelihood_diff" in key or task.startswith("truthfulqa_mc2")
                    within = 1e-3 * (1 + abs(value)) if rolling else 1e-9
                    if abs(mine - value) > within:
                        self.differ(f"{task}, {key}", mine, value)
                elif mine != value and str(mine) != str(value):
                    self.differ(f"{task}, {key}", mine, value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluator", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    failed = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            shape = Shape(512, 3, 64, 16, 2, (0.5, 1.0), (0.5, 4.0), 16)
            write_model(folder / "model", shape, seed)
            write_data(folder / "data", seed)
            read_from(folder / "data")
            (folder / "tasks").mkdir()
            (folder / "tasks/openllm.yaml").write_text(OPENLLM)
            for number, settings in enumerate(settings_of(seed)):
                their_folder, our_folder = folder / f"theirs-{number}", folder / f"ours-{number}"
                their_folder.mkdir()
                model = harness_model(folder / "model", shape, max_length=settings["context"], batch_size=8)
                results, samples = theirs(model, settings, folder / "tasks", their_folder)
                our_results, our_samples = ours(arguments.evaluator, folder / "model", folder / "data", settings, our_folder)
                comparison = Comparison()
                if set(our_samples) != set(samples):
                    comparison.differ("tasks", sorted(our_samples), sorted(samples))
                for task, lines in samples.items():
                    mine = our_samples.get(task, [])
                    if len(mine) != len(lines):
                        comparison.differ(f"{task}, rows", len(mine), len(lines))
                    for a, b in zip(mine, sorted(lines, key=lambda line: line["doc_id"])):
                        comparison.sample(task, a, b)
                members = results["group_subtasks"]
                comparison.results(our_results["results"], results["results"], members)
                for part in ("groups", "versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks", "task_hashes"):
                    if part == "groups":
                        comparison.results(our_results.get(part, {}), results.get(part, {}), members)
                    elif our_results.get(part) != results.get(part):
                        for name, value in results[part].items():
                            # A text has no examples, whatever number is asked for.
                            value = 0 if (part, name) == ("n-shot", "wikitext") else value
                            if our_results.get(part, {}).get(name) != value:
                                comparison.differ(f"{part} of {name}", our_results.get(part, {}).get(name), value)
                what = {key: value for key, value in settings.items() if key != "tasks"}
                print(f"seed {seed}, {settings['tasks'][-1]} ... {what}: {comparison.compared} values, {len(comparison.wrong)} differ, {comparison.close} too close to tell", flush=True)
                for line in comparison.wrong[:20]:
                    print("   ", line)
                failed += len(comparison.wrong)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
