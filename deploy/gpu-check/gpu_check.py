"""Tests and times Ulmus on a GPU, alternating with PyTorch, and writes report.json and report.md.

    deploy/gpu-check/build.sh                                   # anywhere, with the Rust toolchain
    python deploy/gpu-check/gpu_check.py --out gpu-report       # on the GPU machine, with PyTorch

`--only` selects parts of the check:

- `parity`: every kernel and the golden run against the CPU and the reference.
- `collectives`: up to four processes that reduce with NCCL, one of which is killed. On a single GPU most of this needs
  NCCL 2.30; see `--nccl`.
- `training`: tokens/s and MFU of bf16 training with sequences of 2048.
- `inference`: the paper's table, with a prompt of 35 tokens, 1024 new tokens and batch size 1.
- `norms`: the cost of RMS norm as the authors wrote it, of fused RMS norm, and of layer norm.
- `sanitizer` (not run by default): the kernels under CUDA's compute-sanitizer, which detects races and out-of-bounds
  accesses.

Every figure is the median of `--rounds` runs, each in its own process; Ulmus and its peer alternate. A failure is
reported and does not stop the rest, but the exit code is then 1. The report is written after every run, and nothing
starts after `--deadline`.
"""

import argparse
import ctypes
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BIN = HERE / "bin"
PEER = ROOT / "benches/peers/torch_openelm.py"
# Dense bf16 TFLOP/s and memory bandwidth in GB/s, from the vendor's data sheets.
LIMITS = {"H100": (989.5, 3350), "H200": (989.5, 4800), "A100": (312, 2039), "4090": (165, 1008)}
# Tests of collectives that need only one GPU with any version of NCCL.
ALONE = ["a_group_of_one_gives_the_expected_results", "a_gpu_that_may_not_be_shared_is_refused"]


def query(fields, every=False):
    """What nvidia-smi reports for the first GPU, or for every GPU."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines if every else lines[0]


class Failed(Exception):
    pass


def wheels():
    """The library folders of the NVIDIA wheels that came with PyTorch."""
    try:
        import nvidia
    except ImportError:
        return []
    return [folder for path in nvidia.__path__ for folder in sorted(Path(path).glob("*/lib"))]


def environment(first=()):
    """Environment for Ulmus: the folders in `first`, then LD_LIBRARY_PATH, then the libraries of PyTorch's wheels."""
    folders = [*first, *filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *wheels()]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders)), "RUST_BACKTRACE": "0"}


def nccl(folder):
    """Folder and version of NCCL: the given folder, or PyTorch's."""
    try:
        if folder is None:
            import nvidia.nccl

            folder = Path(list(nvidia.nccl.__path__)[0]) / "lib"
        version = ctypes.c_int()
        ctypes.CDLL(str(folder / "libnccl.so.2")).ncclGetVersion(ctypes.byref(version))
    except (ImportError, OSError) as error:
        raise Failed(f"no NCCL: {error}; give the folder of libnccl.so.2 with --nccl")
    return folder, (version.value // 10000, version.value // 100 % 100)


class Peak:
    """Peak memory in use on the GPU while the block runs, in MiB."""

    def __enter__(self):
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=500"]
        self.watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.watch.terminate()
        said = self.watch.communicate()[0].splitlines()
        self.most = max((int(line) for line in said if line.strip().isdigit()), default=0)


def call(command, limit, environment=None):
    """Returns what a program prints; raises `Failed` with the reason if it fails."""
    command = [str(word) for word in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired as expired:
        raise Failed(f"{' '.join(command)}: not done after {limit:.0f} s\n{str(expired.stderr or '')[-1500:]}")
    if done.returncode != 0:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    return done.stdout


class Check:
    def __init__(self, arguments):
        self.arguments = arguments
        self.end = time.monotonic() + arguments.deadline
        self.report = {"date": str(datetime.date.today()), "tests": {}, "runs": {}, "seconds": {}}
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
        except Exception as error:
            self.failed = True
            detail = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            self.say(f"\n**{what} failed**\n\n```\n{detail}\n```\n")
            return None

    def seconds(self):
        """Time limit of the next run, in seconds."""
        left = self.end - time.monotonic()
        if left < 5:
            raise Failed("not started: the deadline has passed")
        return min(self.arguments.limit, left)

    def run(self, command, environment):
        begun = time.monotonic()
        with Peak() as peak:
            said = call(command, self.seconds(), environment)
        result = json.loads(said[said.index("{") :])
        return {**result, "gpu_memory_mib": peak.most, "wall_seconds": round(time.monotonic() - begun, 1)}

    def by_turns(self, title, contestants):
        """Results of each contestant. Every round runs each of them once; one that has failed is not run again."""
        results = {name: [] for name in contestants}
        failed = set()
        for _ in range(self.arguments.rounds):
            for name, command in contestants.items():
                if name in failed:
                    continue
                own = None if name == "torch" else environment()
                result = self.attempt(f"{title}, {name}", lambda: self.run(command, own))
                if result is None:
                    failed.add(name)
                    continue
                results[name].append(result)
                self.report["runs"][title] = results
                self.write()
        return {name: found for name, found in results.items() if found}

    def parity(self):
        self.say("\n## Parity\n")
        golden = {"ULMUS_GOLDEN": str(ROOT / "tests/golden/a")}
        self.tests([("cuda", []), ("golden", ["cuda::"])], {**environment(), **golden})

    def collectives(self):
        found = self.attempt("collectives", lambda: nccl(self.arguments.nccl))
        if not found:
            return
        folder, version = found
        self.say(f"\n## Collectives, NCCL {version[0]}.{version[1]}\n")
        chosen = []
        if version < (2, 30) and len(query("name", every=True)) < 4:
            self.say("Four processes on fewer GPUs need NCCL 2.30; give its folder with --nccl.\n")
            chosen = ALONE
        self.tests([("nccl", chosen)], environment([folder]))

    def sanitizer(self):
        self.say("\n## Compute sanitizer\n")
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        kernels = [BIN / "cuda", "--ignored", "--exact", "kernels_agree_with_those_of_the_cpu"]
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = [program, "--tool", tool, "--error-exitcode", 9, *kernels]
            said = self.attempt(tool, lambda: call(command, self.seconds(), environment()))
            if said is not None:
                self.report["tests"][f"sanitizer: {tool}"] = "ok"
                self.say(f"{tool}: nothing found")
            self.write()

    def tests(self, programs, environment):
        """Runs each test in its own process, because a device fault ends the process. A test that fails is repeated
        without CUDA graphs and programmatic dependent launch, which could be to blame."""
        self.say("| test | result |\n|---|---|")
        problems = []
        for program, filters in programs:
            command = [BIN / program, "--ignored", *filters]
            listed = self.attempt(f"list {program}", lambda: call([*command, "--list"], self.seconds(), environment))
            names = [line.removesuffix(": test") for line in (listed or "").splitlines() if line.endswith(": test")]
            for name in names:
                one = [BIN / program, "--ignored", "--exact", "--nocapture", name]
                try:
                    call(one, self.seconds(), environment)
                    outcome = "ok"
                except Exception as error:
                    self.failed, outcome = True, "FAILED"
                    problems.append(f"{program}: {name}\n{error}")
                    try:
                        call(one, self.seconds(), {**environment, "ULMUS_GPU_SERIAL": "1"})
                        outcome = "FAILED, but not with ULMUS_GPU_SERIAL=1"
                    except Exception as error:
                        problems.append(f"{program}: {name}, ULMUS_GPU_SERIAL=1\n{error}")
                self.report["tests"][f"{program}: {name}"] = outcome
                self.say(f"| {program}: {name} | {outcome} |")
                self.write()
        for problem in problems:
            self.say(f"\n```\n{problem}\n```\n")

    def training(self):
        peak = self.limits[0] if self.limits else None
        self.say("\n## Training, bf16, sequences of 2048, one micro-batch per step\n")
        self.say("Ulmus with `train.algorithms = \"measured\"`; with `library` in brackets.\n")
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
                self.say(f"\nKernels of a step of {preset}, serialised, which adds about 10 us to each call:\n")
                self.say("| kernel | ms | share |\n|---|---|---|")
                for kernel in kernels:
                    ms, share = 1e3 * kernel["seconds"], 100 * kernel["seconds"] / total
                    self.say(f"| {kernel['kernel']} | {ms:.2f} | {share:.1f} % |")

    def bench(self, preset, norm):
        lengths = ["--prompt", 35, "--generate", 1024, "--runs", self.arguments.runs, "--dtype", "bf16"]
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
            # Each weight is read once per token.
            read = 2 * found["ulmus"][0]["parameters"] * middle("ulmus", generate) / 1e9
            share = f"{100 * read / self.limits[1]:.0f} %"
        if len(found) == 2:
            ratio = f"{middle('ulmus', generate) / middle('torch', generate):.2f}"
        cells = [cell(middle(name, key)) for name in ("ulmus", "torch") for key in (prompt, generate)]
        self.say(f"| {label} | {cells[0]} | {cells[1]} | {share} | {cells[2]} | {cells[3]} | {ratio} |")

    def table(self, title):
        self.say(f"\n## {title}\n")
        self.say(
            "| model | Ulmus prompt, tokens/s | generation | memory bandwidth used | PyTorch eager prompt | generation "
            "| generation ratio |\n|---|---|---|---|---|---|---|"
        )

    def inference(self):
        self.table("Inference, bf16, batch 1, 35 + 1024 tokens")
        for preset in self.arguments.inference:
            self.rates(preset, preset, "rms")

    def norms(self):
        self.table("Cost of the norm: the same with other norms")
        for preset in self.arguments.norms:
            for norm in ("naive_rms", "rms", "layer"):
                self.rates(f"{preset}, {norm}", preset, norm)

    def all(self):
        gpu = self.report["gpu"]
        self.say(f"# Ulmus on {gpu['name']}\n\n{self.report['date']}, driver {gpu['driver']}, medians of "
                 f"{self.arguments.rounds} alternating rounds")
        for part in self.arguments.only:
            begun = time.monotonic()
            self.attempt(part, getattr(self, part))
            self.report["seconds"][part] = round(time.monotonic() - begun)
            self.say(f"\n({part}: {self.report['seconds'][part]} s)")
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
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--only", nargs="+", choices=[*parts, "sanitizer"], default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="measured generations per inference run, after a warm-up")
    parser.add_argument("--nccl", type=Path, metavar="FOLDER", help="folder of libnccl.so.2 [default: PyTorch's]")
    parser.add_argument("--limit", type=int, default=300, help="time limit of one run, in seconds")
    parser.add_argument("--deadline", type=int, default=6 * 3600, help="time limit of the whole check, in seconds")
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
