"""Checks and times Ulmus on a GPU, with PyTorch beside it by turns, and writes report.json and report.md.

    deploy/gpu-check/build.sh                                   # anywhere, with the Rust toolchain
    python deploy/gpu-check/gpu_check.py --out gpu-report       # on the GPU machine, with PyTorch

The parts, each by itself with `--only`: `parity` (every kernel and the golden run against the CPU and the reference),
`collectives` (up to four processes that sum by NCCL, one of which is killed; on one GPU that needs NCCL 2.30, see `--nccl`),
`training` (tokens/s and MFU of bf16 training, 2048 positions), `inference` (the paper's table: 35 tokens of prompt,
1024 new ones, batch 1), `norms` (what RMS norm costs as the authors wrote it, fused, and layer norm). Every figure is
the median of `--rounds` runs, each in a process of its own; Ulmus and its peer take turns. A part that fails is told
in the report and ends nothing else; the exit code is 1 then.
"""

import argparse
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = HERE / "bin"
PEER = ROOT / "benches/peers/torch_openelm.py"
# Dense bf16 TFLOP/s and GB/s of memory, by the vendor's data sheets.
LIMITS = {"H100": (989.5, 3350), "H200": (989.5, 4800), "A100": (312, 2039), "4090": (165, 1008)}


def query(fields, every=False):
    """Of the first GPU, or of all."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines if every else lines[0]


class Failed(Exception):
    pass


def nccl(folder):
    """Folder and version of NCCL: that one, or PyTorch's."""
    try:
        if folder is None:
            import nvidia.nccl

            folder = Path(list(nvidia.nccl.__path__)[0]) / "lib"
        version = ctypes.c_int()
        ctypes.CDLL(str(folder / "libnccl.so.2")).ncclGetVersion(ctypes.byref(version))
    except (ImportError, OSError) as error:
        raise Failed(f"no NCCL: {error}; name the folder of libnccl.so.2 with --nccl")
    return folder, (version.value // 10000, version.value // 100 % 100)


class Peak:
    """The most memory in use on the GPU while something runs, in MiB."""

    def __enter__(self):
        self.most, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(0.5):
            self.most = max(self.most, int(query("memory.used")))

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def run(command, limit):
    begun = time.monotonic()
    with Peak() as peak:
        try:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(map(str, command))}: not done after {limit} s")
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-1500:]}")
    result = json.loads(done.stdout[done.stdout.index("{") :])
    return {**result, "gpu_memory_mib": peak.most, "wall_seconds": round(time.monotonic() - begun, 1)}


class Check:
    def __init__(self, arguments):
        self.arguments = arguments
        self.report = {"date": str(datetime.date.today()), "parts": {}}
        name = query("name")
        self.report["gpu"] = {"name": name, "driver": query("driver_version"), "memory_mib": query("memory.total")}
        self.limits = next((limits for key, limits in LIMITS.items() if key in name), None)
        self.lines = []
        self.failed = False

    def say(self, line=""):
        self.lines.append(line)
        print(line, flush=True)

    def attempt(self, what, work):
        try:
            return work()
        except Failed as error:
            self.failed = True
            self.say(f"\n**{what} failed**\n\n```\n{error}\n```\n")
            return None

    def by_turns(self, title, contestants):
        """Medians of what each contestant says, over rounds in which every one runs once."""
        results = {name: [] for name in contestants}
        for _ in range(self.arguments.rounds):
            for name, command in contestants.items():
                result = self.attempt(f"{title}, {name}", lambda: run(command, self.arguments.limit))
                if result:
                    results[name].append(result)
        return {name: found for name, found in results.items() if found}

    def parity(self):
        self.say("\n## Parity\n")
        environment = {"ULMUS_GOLDEN": str(ROOT / "tests/golden/a")}
        return self.tests([("cuda", []), ("golden", ["cuda::"])], environment)

    def collectives(self):
        found = self.attempt("collectives", lambda: nccl(self.arguments.nccl))
        if not found:
            return {}
        folder, version = found
        self.say(f"\n## Collectives, NCCL {version[0]}.{version[1]}\n")
        if version < (2, 30) and len(query("name", every=True)) < 4:
            self.say("Not run: four processes on fewer GPUs need NCCL 2.30; name the folder of one with --nccl.")
            return {"nccl": version}
        paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
        environment = {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}
        return {"nccl": version, **self.tests([("nccl", [])], environment)}

    def tests(self, programs, environment):
        """Runs test programs; says what became of each test."""
        self.say("| test | result |\n|---|---|")
        environment = {**os.environ, **environment, "RUST_BACKTRACE": "0"}
        results = {}
        for program, filters in programs:
            command = [BIN / program, "--ignored", "--test-threads", "1", *filters]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
            for line in done.stdout.splitlines():
                if line.startswith("test ") and " ... " in line:
                    name, _, outcome = line[5:].partition(" ... ")
                    results[f"{program}: {name}"] = outcome
                    self.say(f"| {program}: {name} | {outcome} |")
            if done.returncode != 0:
                self.failed = True
                self.say(f"\n```\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}\n```\n")
        return results

    def training(self):
        peak = self.limits[0] if self.limits else None
        self.say("\n## Training, bf16, sequences of 2048, one micro-batch per update\n")
        self.say("Ulmus with `train.algorithms = \"measured\"`, and, in brackets, with `library`.\n")
        self.say("| model | batch | Ulmus tokens/s | MFU | memory, GB | PyTorch (torch.compile) | memory, GB | ratio |")
        self.say("|---|---|---|---|---|---|---|---|")
        report = {}
        for preset, batch in self.arguments.training:
            shape = ["--dtype", "bf16", "--batch", batch, "--sequence", 2048, "--steps", 10]
            ulmus = [BIN / "worker", "bench", "--preset", preset, "--device", "cuda", *shape, "--json"]
            found = self.by_turns(f"training {preset}", {
                "ulmus": [*ulmus, "--algorithms", "measured"],
                "library": ulmus,
                "torch": [sys.executable, PEER, "train", "--device", "cuda", "--shape", preset, "--compile", *shape],
            })
            report[preset] = found
            rate = {name: statistics.median(r["tokens_per_second"] for r in of) for name, of in found.items()}
            memory = {name: max(r["gpu_memory_mib"] for r in of) / 953.67 for name, of in found.items()}
            mfu = "-"
            if "ulmus" in found and peak:
                tflops = statistics.median(r["model_tflops"] for r in found["ulmus"])
                mfu = f"{100 * tflops / peak:.1f} %"
            cell = lambda of, name: f"{of[name]:,.0f}" if name in of else "-"
            ratio = f"{rate['ulmus'] / rate['torch']:.2f}" if {"ulmus", "torch"} <= rate.keys() else "-"
            self.say(
                f"| {preset} | {batch} | {cell(rate, 'ulmus')} ({cell(rate, 'library')}) | {mfu} | {cell(memory, 'ulmus')} "
                f"| {cell(rate, 'torch')} | {cell(memory, 'torch')} | {ratio} |"
            )
        for preset, found in report.items():
            if "ulmus" in found:
                kernels = found["ulmus"][-1]["kernels"]
                total = sum(kernel["seconds"] for kernel in kernels)
                self.say(f"\nKernels of a step of {preset}, timed one by one:\n\n| kernel | ms | share |\n|---|---|---|")
                for kernel in kernels:
                    ms, share = 1e3 * kernel["seconds"], 100 * kernel["seconds"] / total
                    self.say(f"| {kernel['kernel']} | {ms:.2f} | {share:.1f} % |")
        return report

    def bench(self, preset, norm):
        lengths = ["--prompt", 35, "--generate", 1024, "--runs", 3, "--dtype", "bf16"]
        return {
            "ulmus": [BIN / "evaluator", "bench", "--preset", preset, "--norm", norm, "--device", "cuda", *lengths,
                      "--json"],
            "torch": [sys.executable, PEER, "infer", "--device", "cuda", "--shape", preset, "--norm", norm, *lengths],
        }

    def rates(self, label, preset, norm):
        found = self.by_turns(f"inference {label}", self.bench(preset, norm))
        middle = lambda name, key: statistics.median(r[key] for r in found[name]) if name in found else None
        cell = lambda value: "-" if value is None else f"{value:,.1f}"
        prompt, generate = "prompt_tokens_per_second", "generate_tokens_per_second"
        share, ratio = "-", "-"
        if "ulmus" in found and self.limits:
            # Every weight is read once per token.
            read = 2 * found["ulmus"][0]["parameters"] * middle("ulmus", generate) / 1e9
            share = f"{100 * read / self.limits[1]:.0f} %"
        if len(found) == 2:
            ratio = f"{middle('ulmus', generate) / middle('torch', generate):.2f}"
        cells = [cell(middle(name, key)) for name in ("ulmus", "torch") for key in (prompt, generate)]
        self.say(f"| {label} | {cells[0]} | {cells[1]} | {share} | {cells[2]} | {cells[3]} | {ratio} |")
        return found

    def table(self, title):
        self.say(f"\n## {title}\n")
        self.say(
            "| model | Ulmus prompt, tokens/s | generation | of memory bandwidth | PyTorch eager prompt | generation "
            "| ratio of generation |\n|---|---|---|---|---|---|---|"
        )

    def inference(self):
        self.table("Inference, bf16, batch 1, 35 + 1024 tokens")
        return {preset: self.rates(preset, preset, "rms") for preset in self.arguments.inference}

    def norms(self):
        self.table("What the norm costs: the same with other norms")
        kinds = ("naive_rms", "rms", "layer")
        label = lambda preset, norm: f"{preset}, {norm}"
        return {
            label(preset, norm): self.rates(label(preset, norm), preset, norm)
            for preset in self.arguments.norms
            for norm in kinds
        }

    def all(self):
        gpu = self.report["gpu"]
        self.say(f"# Ulmus on {gpu['name']}\n\n{self.report['date']}, driver {gpu['driver']}, medians of "
                 f"{self.arguments.rounds} rounds by turns")
        for part in self.arguments.only:
            begun = time.monotonic()
            self.report["parts"][part] = getattr(self, part)()
            self.say(f"\n({part}: {time.monotonic() - begun:.0f} s)")
            self.write()

    def write(self):
        out = self.arguments.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        (out / "report.md").write_text("\n".join(self.lines) + "\n")


def training_subject(text):
    preset, _, batch = text.partition("=")
    return preset, int(batch)


def main():
    parts = ["parity", "collectives", "training", "inference", "norms"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nccl", type=Path, metavar="FOLDER", help="where libnccl.so.2 is [default: PyTorch's]")
    parser.add_argument("--limit", type=int, default=300, help="seconds of one run")
    parser.add_argument("--training", nargs="+", type=training_subject, metavar="MODEL=BATCH",
                        default=[("openelm-270m", 16), ("openelm-1_1b", 8)])
    models = [f"openelm-{size}" for size in ("270m", "450m", "1_1b", "3b")]
    parser.add_argument("--inference", nargs="+", choices=models, default=models)
    parser.add_argument("--norms", nargs="+", choices=models, default=["openelm-1_1b"])
    check = Check(parser.parse_args())
    check.all()
    check.write()
    sys.exit(check.failed)


if __name__ == "__main__":
    main()
