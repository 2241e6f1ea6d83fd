"""Times Ulmus and its peers on this machine, in turn, and prints the ratios as Markdown.

    python -m venv peers && peers/bin/pip install torch==2.11.0 numpy gguf trl==1.16.0 peft==0.21.2 transformers==5.24.0
    cargo build --release
    peers/bin/python benches/peers/compare.py [--rounds 5] [--threads 1 2] [--work training tiny inference tuning]
                                              [--dtypes f32 f16 bf16 q8_0] [--llama-bench PATH/llama-bench] [--json FILE]

Each round runs every program once, in a process of its own, one after the other; the table has the median of the
rounds and the ratio to each peer's median. Memory is the peak, for PyTorch without what importing it takes; of pretraining, above 16
bytes per parameter (weights, gradient and both moments in float32). llama.cpp takes part if `llama-bench` is
given; it gets the same shape with random weights.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH, TRL = HERE / "torch_openelm.py", HERE / "trl_openelm.py"
PRESET = "openelm-270m"
PROMPT, GENERATE = 512, 128
DTYPES = ["f32", "f16", "bf16", "q8_0"]


def run(command, environment=None):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout[result.stdout.index("{" if "{" in result.stdout[:2] else "[") :])


class Programs:
    def __init__(self, arguments, folder):
        self.binaries = Path(arguments.binaries)
        self.llama_bench, self.dtypes, self.folder = arguments.llama_bench, arguments.dtypes, Path(folder)

    def ours_training(self, dtype, threads, subject, steps, *more):
        command = [self.binaries / "worker", "bench", *subject, "--dtype", dtype, "--threads", threads]
        result = run([*command, "--steps", steps, "--json", *more])
        above = result["peak_rss_bytes"] - 16 * result["parameters"]
        return {"training": result["tokens_per_second"], "memory": above}

    def torch_training(self, dtype, threads, shape, steps, *more):
        command = [sys.executable, TORCH, "train", "--dtype", dtype, "--threads", threads, "--steps", steps]
        result = run([*command, *shape, *more])
        return {"training": result["tokens_per_second"], "memory": result["peak_bytes"] - 16 * result["parameters"]}

    def trl_tuning(self, what, threads, shape, steps, *more):
        result = run([sys.executable, TRL, what, "--threads", threads, "--steps", steps, *shape, *more])
        return {"training": result["tokens_per_second"], "memory": result["peak_bytes"]}

    def ours_tuning(self, threads, shape, steps, *more):
        command = [self.binaries / "worker", "bench", "--preset", PRESET, "--dtype", "f32", "--threads", threads]
        result = run([*command, "--steps", steps, "--json", *shape, *more])
        return {"training": result["tokens_per_second"], "memory": result["peak_rss_bytes"]}

    def ours_inference(self, dtype, threads):
        command = [self.binaries / "evaluator", "bench", "--preset", PRESET, "--dtype", dtype, "--threads", threads]
        result = run([*command, "--prompt", PROMPT, "--generate", GENERATE, "--runs", 2, "--json"])
        return {"prompt": result["prompt_tokens_per_second"], "generation": result["generate_tokens_per_second"]}

    def torch_inference(self, dtype, threads):
        command = [sys.executable, TORCH, "infer", "--dtype", dtype, "--threads", threads, "--runs", 2]
        result = run([*command, "--prompt", PROMPT, "--generate", GENERATE])
        return {"prompt": result["prompt_tokens_per_second"], "generation": result["generate_tokens_per_second"]}

    def llama_inference(self, dtype, threads):
        model = self.folder / f"{dtype}.gguf"
        if not model.exists():
            command = [sys.executable, HERE / "gguf_openelm.py", PRESET, dtype, model]
            subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        rate = lambda *test: run([self.llama_bench, "-m", model, "-t", threads, "-r", 2, "-o", "json", *test])[0]["avg_ts"]
        # By default, llama-bench generates from an empty context; -d sets the number of earlier tokens.
        return {"prompt": rate("-p", PROMPT, "-n", 0), "generation": rate("-p", 0, "-n", GENERATE, "-d", PROMPT)}


def training(programs, threads):
    """Rows of (title, [(program, measure)])."""
    shape = ["--batch", 4, "--sequence", 512]
    for dtype in (dtype for dtype in ("f32", "bf16") if dtype in programs.dtypes):
        ours = lambda: programs.ours_training(dtype, threads, ["--preset", PRESET], 1, *shape)
        eager = lambda: programs.torch_training(dtype, threads, shape, 1)
        compiled = lambda: programs.torch_training(dtype, threads, shape, 1, "--compile")
        yield f"270M 4x512, {dtype}", [("ulmus", ours), ("torch eager", eager), ("torch.compile", compiled)]


def tiny(programs, threads):
    plan, shape = ["--plan", ROOT / "plans/quickstart.toml"], ["--shape", "quickstart", "--sequence", 256]
    ours = lambda: programs.ours_training("f32", threads, plan, 50)
    eager = lambda: programs.torch_training("f32", threads, shape, 50)
    compiled = lambda: programs.torch_training("f32", threads, shape, 50, "--compile")
    yield "quickstart 4x256, f32", [("ulmus", ours), ("torch eager", eager), ("torch.compile", compiled)]


def inference(programs, threads):
    for dtype in programs.dtypes:
        found = [("ulmus", lambda: programs.ours_inference(dtype, threads))]
        if dtype in ("f32", "bf16"):
            found.append(("torch eager", lambda: programs.torch_inference(dtype, threads)))
        if programs.llama_bench:
            found.append(("llama.cpp", lambda: programs.llama_inference(dtype, threads)))
        yield f"270M, {dtype}", found


def tuning(programs, threads):
    """The last of each row is our own step of all weights, for what an adapter saves."""
    shape, lora = ["--batch", 4, "--sequence", 256], ["--adapter", "lora", "--rank", 32]
    pairs = ["--preferences", "--prompt", 64]
    ours = lambda *more: lambda: programs.ours_tuning(threads, shape, 3, *more)
    theirs = lambda what, *more: lambda: programs.trl_tuning(what, threads, shape, 3, *more)
    yield "270M, answers, 4x256, f32", [("ulmus", ours()), ("trl", theirs("sft"))]
    yield "270M, 2 pairs x 256, f32", [("ulmus", ours(*pairs)), ("trl", theirs("dpo"))]
    whole = ("ulmus, all weights", ours())
    yield "270M, LoRA of rank 32, 4x256, f32", [("ulmus", ours(*lora)), ("trl and peft", theirs("sft", *lora)), whole]


WORK = {"training": training, "tiny": tiny, "inference": inference, "tuning": tuning}
UNITS = {"training": "tokens/s", "memory": "GB", "prompt": "tokens/s", "generation": "tokens/s"}


def figure(measure, value):
    return f"{value / 1e9:.2f}" if measure == "memory" else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def rows(title, threads, medians):
    """One Markdown row per measure of a task."""
    ours = medians["ulmus"]
    peers = {name: values for name, values in medians.items() if name != "ulmus"}
    for measure, own in ours.items():
        if measure == "memory" and title.startswith("quickstart"):
            continue
        theirs = "; ".join(f"{name} {figure(measure, values[measure])}" for name, values in peers.items())
        ratios = "; ".join(f"{own / values[measure]:.2f}" for values in peers.values())
        yield f"| {measure}, {UNITS[measure]} | {title} | {threads} | {figure(measure, own)} | {theirs} | {ratios} |"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the weights of 270M")
    parser.add_argument("--binaries", default=ROOT / "target/release")
    parser.add_argument("--llama-bench")
    parser.add_argument("--json", type=Path, help="file for all single figures")
    arguments = parser.parse_args()
    figures = []
    print(f"{processor()}, {os.cpu_count()} cores, {datetime.date.today()}, {arguments.rounds} rounds\n")
    print("| measure | work | threads | Ulmus | peers | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(arguments, folder)
        for threads in arguments.threads:
            for work in arguments.work:
                for title, contestants in WORK[work](programs, threads):
                    found = {name: [] for name, _ in contestants}
                    for _ in range(arguments.rounds):
                        for name, measure in contestants:
                            found[name].append(measure())
                    figures.append({"work": title, "threads": threads, "figures": found})
                    medians = {
                        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
                        for name, runs in found.items()
                    }
                    for row in rows(title, threads, medians):
                        print(row, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
