"""Compare the library's speed with alternatives: python benchmarks/speed.py --shape 1b

Makes a random checkpoint of the shape and measures every contender in a process of its own; the
contenders take turns over several rounds. Writes medians and the limits of the machine to results/,
as Markdown and as a chart.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
import weights
from contender import CONTENDERS, DECODE_PROMPT, RAGGED_LENGTHS, RAGGED_NEW, names, seconds

HERE = Path(__file__).resolve().parent
WORKS = {
    "load": "load, s",
    "prefill_128": "prefill of 128 tokens, tokens/s",
    "prefill_512": "prefill of 512 tokens, tokens/s",
    "decode_1": "decode, 1 row, ms/step",
    "decode_4": "decode, 4 rows, ms/step",
    "decode_16": "decode, 16 rows, ms/step",
    "ragged": f"16 prompts of 8 to 512 tokens, {RAGGED_NEW} new tokens each, s",
    "peak": "peak memory, GB",
}
# The works in the chart, with the titles of its panels.
CHARTED = {
    "prefill_512": "512-token prompt: tokens/s\n(more is better)",
    "decode_16": "16 sequences: ms per step\n(less is better)",
    "decode_1": "1 sequence: ms per token\n(less is better)",
}
# Pairs to compare. q8_0 and q4_0 are the same file in both programs.
PAIRS = [
    ("llama auto", "llama.cpp f16"),
    ("llama int8", "llama.cpp q8_0"),
    ("llama q8_0", "llama.cpp q8_0"),
    ("llama int4", "llama.cpp q4_0"),
    ("llama int4", "llama.cpp q4_1"),
    ("llama q4_0", "llama.cpp q4_0"),
    ("llama auto", "transformers bfloat16"),
    ("llama int8", "llama auto"),
    ("llama int4", "llama auto"),
]
NEEDS = {"transformers": ["transformers", "safetensors"], "llama.cpp": ["llama_cpp", "gguf"]}


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    def finished() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    finished()
    return statistics.median(seconds(finished) for _ in range(repeats))


def machine() -> dict[str, Any]:
    """Measure the read bandwidth in bytes/s and the matrix rate of each type in operations/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Far larger than any cache.
    data = torch.ones(2**27 if device == "cpu" else 2**31, device=device)
    bandwidth = data.nbytes / median_seconds(data.sum, 9)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = (
            2 * 2048**3 / median_seconds(lambda a=a, b=b: a @ b, 9)
        )
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "bandwidth": bandwidth,
        "rates": rates,
    }


def cpu_name() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    brand = flags.get("cpu_name") or platform.processor() or platform.machine()
    # A process may be limited to fewer instructions than the CPU has.
    native = "AVX512" in capability and flags.get("avx512_bf16")
    return f"{brand} {capability}{' BF16' if native else ''}"


def bytes_per_weight(contender: str) -> float:
    kinds = {
        "float32": 4.0,
        "int8": 34 / 32,
        "q8_0": 34 / 32,
        "int4": 20 / 32,
        "q4_0": 18 / 32,
        "q4_1": 20 / 32,
    }
    return kinds.get(contender.split()[1], 2.0)


def floor(work: str, contender: str, folder: Path, limits: dict[str, Any]) -> float | None:
    """Return the machine's limit for a kind of work, in the unit of its result.

    The limit is set by bytes read and the bandwidth, or by operations and the matrix rate.
    """
    args = weights.args_of(folder)
    layer = (
        args.dim * args.head_dim * 2 * (args.n_heads + args.kv_heads)
        + 3 * args.dim * args.hidden_dim
    )
    linear = args.n_layers * layer + args.dim * args.vocab_size
    if work.startswith("decode"):
        rows = int(work.split("_")[1])
        cache = 2 * args.n_layers * args.kv_heads * args.head_dim * rows * (DECODE_PROMPT + 12) * 2
        return (linear * bytes_per_weight(contender) + cache) / limits["bandwidth"] * 1e3
    if work.startswith("prefill"):
        return max(limits["rates"].values()) / (2 * (linear - args.dim * args.vocab_size))
    if work == "ragged":
        fastest = max(limits["rates"].values())
        steps = RAGGED_NEW * linear * bytes_per_weight(contender) / limits["bandwidth"]
        return float(2 * linear * sum(RAGGED_LENGTHS) / fastest + steps)
    return None


def available(contender: str) -> bool:
    return all(importlib.util.find_spec(need) for need in NEEDS.get(contender.split()[0], []))


def run(contender: str, folder: Path, quick: bool, only: str) -> dict[str, Any] | None:
    command = [sys.executable, str(HERE / "contender.py"), contender, str(folder)] + [
        "--only",
        only,
    ] * bool(only)
    job = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True)
    if job.returncode < 0:
        died = f"{contender} was killed by {signal.Signals(-job.returncode).name}"
        advice = "its build may use instructions that this machine lacks: see benchmarks/README.md for a portable build"
        print(f"{died}: {advice}" if contender.startswith("llama.cpp") else died, file=sys.stderr)
        return None
    if job.returncode:
        print(f"{contender} failed: {job.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(job.stdout.strip().splitlines()[-1])
    return result


def report(
    shape: str, folder: Path, limits: dict[str, Any], medians: dict[str, dict[str, float]]
) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits["rates"].items())
    lines = [
        f"## {shape}",
        "",
        f"{limits['name']}, {limits['threads']} threads, torch {torch.__version__}; read bandwidth "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; matrix rate, GFLOP/s: {rates}. In parentheses: floor / time. "
        "The floor of a decode step is (bytes of weights + bytes of cache) / read bandwidth; the floor of a prompt is "
        "operations / best matrix rate.",
        "",
        "| " + " | ".join(["contender", *WORKS.values()]) + " |",
        "| " + " | ".join(["---"] * (1 + len(WORKS))) + " |",
    ]
    for contender, result in medians.items():
        cells = []
        for work in WORKS:
            value = result.get(work)
            if value is None:
                cells.append("–")
                continue
            if work == "peak":
                value /= 1e9
            least = floor(work, contender, folder, limits)
            share = (
                ""
                if least is None
                else f" ({least / value if work[:3] != 'pre' else value / least:.2f})"
            )
            cells.append(f"{value:.1f}{share}" if value >= 10 else f"{value:.2f}{share}")
        lines.append("| " + " | ".join([contender, *cells]) + " |")
    return "\n".join(lines) + "\n"


def ratios(medians: dict[str, dict[str, float]]) -> str:
    """Return a table of the ratios peer's time / our time for the same work."""
    pairs = {
        (ours, peer): f"{ours}: {peer}" for ours, peer in PAIRS if {ours, peer} <= medians.keys()
    }
    lines = [
        "| peer's time / our time | " + " | ".join(pairs.values()) + " |",
        "| --- " * (1 + len(pairs)) + "|",
    ]
    for work, title in WORKS.items():
        cells = []
        for ours, peer in pairs:
            a = medians[ours].get(work)
            b = medians[peer].get(work)
            rate = work.startswith("prefill")
            cells.append("–" if not a or not b else f"{a / b if rate else b / a:.2f}")
        if set(cells) != {"–"}:
            lines.append(
                "| " + " | ".join([title.split(",")[0] if work == "load" else title, *cells]) + " |"
            )
    return "\n".join(lines) + "\n" if pairs else ""


def charts(shape: str, medians: dict[str, dict[str, float]], limits: str, target: Path) -> None:
    """Draw the works of CHARTED, 830 pixels wide (1,660 for high-resolution screens)."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no charts: matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(medians, key=lambda name: -bytes_per_weight(name))
    labels = [re.sub("^llama ", "ours: ", name).replace("auto", "16 bits") for name in order]
    shown = [work for work in CHARTED if any(work in medians[name] for name in order)]
    if not shown:
        return
    height = 1.1 + 0.26 * len(order)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(8.3, height), sharey=True, squeeze=False)
    for axis, work in zip(axes[0], shown, strict=True):
        values = [medians[name].get(work, 0.0) for name in order]
        colours = ["#1f6fb4" if label.startswith("ours") else "#c4c4c4" for label in labels]
        bars = axis.barh(labels, values, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
        axis.set_xlim(0, 1.2 * max(values))
        axis.set_title(CHARTED[work], fontsize=10)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(left=False, labelsize=9.5)
    for label in axes[0][0].get_yticklabels():
        if label.get_text().startswith("ours"):
            label.set_color("#1f6fb4")
            label.set_fontweight("bold")
    axes[0][0].invert_yaxis()
    figure.suptitle(f"Shape {shape}, {limits}. Blue: this library", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=200)


def main(
    shape: str = "1b",
    rounds: int = 3,
    quick: bool = False,
    contenders: tuple[str, ...] | str = (),
    only: tuple[str, ...] | str = (),
    folder: str | None = None,
) -> None:
    """Measure the contenders and write the results.

    `quick`: shape tiny, one round. `contenders`, `only`: names separated by commas. `folder`: keep
    the weights there.
    """
    if quick:
        shape = "tiny"
        rounds = 1
    chosen = names(contenders) or list(CONTENDERS)
    works = ",".join(names(only))
    for name in [name for name in chosen if not available(name)]:
        print(f"{name} is skipped: pip install -r benchmarks/requirements.txt", file=sys.stderr)
        chosen.remove(name)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = weights.make(shape, Path(folder or scratch))
        limits = machine()
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name in chosen:
                result = run(name, checkpoint, quick, works)
                if result is not None:
                    print(
                        name,
                        {key: round(v, 2) for key, v in result.items() if key != "tokens"},
                        file=sys.stderr,
                    )
                    results[name].append(result)
        medians = {
            name: {
                work: statistics.median(r[work] for r in rows) for work in WORKS if work in rows[0]
            }
            for name, rows in results.items()
            if rows
        }
        if not medians:
            sys.exit("no contender was measured")
        text = report(shape, checkpoint, limits, medians)
    text += "\n" + ratios(medians)
    print(text)
    if not quick:
        stem = re.sub(
            r"[^a-z0-9]+", "-", f"{limits['name']} {limits['threads']} threads {shape}".lower()
        ).strip("-")
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{stem}.md").write_text(text)
        title = f"{limits['name']}, {limits['threads']} threads"
        charts(shape, medians, title, HERE / "results" / f"{stem}.png")


if __name__ == "__main__":
    fire.Fire(main)
