"""Compare the server with other servers: python benchmarks/serving.py --shape 1b

1, 4 and 16 clients each send several prompts of 33 to 256 tokens, one after another, and stream 32
tokens for each. Every server is a process of its own on 127.0.0.1; the servers take turns over
several rounds. This library's own loop without HTTP, with one batch per turn of the clients, shows
what HTTP costs. Medians go to results/, as Markdown and as a chart.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fire
import torch
import weights
from contender import names, prompt_of
from endless import CONTEXT
from speed import HERE, cpu_name

NEW_TOKENS = 32
ROWS = 16  # slots of this library's server
TURNS = {1: 6, 4: 4, 16: 3}  # clients -> prompts per client
OWN = "llama auto"
LOOP = "llama auto without HTTP"
TOKENS = "tokens"
FIRST = "first"
FIRST_95 = "first_95"
BETWEEN = "between"
BETWEEN_95 = "between_95"
WORKS = {TOKENS: "total tokens/s", FIRST: "first token, s", BETWEEN: "between tokens, ms"}
GREEDY = {"stream": True, "temperature": 0, "max_tokens": NEW_TOKENS}


class Contender(NamedTuple):
    # (checkpoint, port, number of clients) -> command line of the server
    command: Callable[[Path, int, int], list[str]]
    needs: list[str]  # packages
    ready: str = "/health"  # returns 200 once the model is loaded
    texts: bool = False  # prompts are ids as text
    fields: dict[str, Any] = {}  # of its requests, in addition to GREEDY  # noqa: RUF012


def endless(*arguments: Any) -> list[str]:
    return [sys.executable, str(HERE / "endless.py"), *map(str, arguments)]


def llama_server(kind: str) -> Contender:
    def command(folder: Path, port: int, clients: int) -> list[str]:
        options = {
            "-m": weights.as_gguf(folder, kind),
            "--port": port,
            "-np": clients,
            "-c": clients * CONTEXT,
            "-t": torch.get_num_threads(),
            "-tb": torch.get_num_threads(),
            "--cache-ram": 0,
        }
        return [
            "llama-server",
            "--host",
            "127.0.0.1",
            "-cb",
            *(str(x) for pair in options.items() for x in pair),
        ]

    return Contender(command, ["gguf"], fields={"ignore_eos": True, "cache_prompt": False})


def transformers(*options: str) -> Contender:
    def command(folder: Path, port: int, clients: int) -> list[str]:
        model = of_ids(weights.as_huggingface(folder))
        arguments = [
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--device",
            "cpu",
            *options,
        ]
        return [
            sys.executable,
            "-c",
            "from transformers.cli.transformers import main; main()",
            *arguments,
        ]

    return Contender(command, ["transformers", "fastapi", "openai"], texts=True)


def of_ids(huggingface: Path) -> Path:
    """Make a copy with a tokenizer that reads ids separated by spaces, and without EOS.

    The weights are symbolic links.
    """
    folder = huggingface.with_name("huggingface-ids")
    folder.mkdir(exist_ok=True)
    for file in [*huggingface.glob("*.safetensors*"), huggingface / "config.json"]:
        with contextlib.suppress(FileExistsError):
            (folder / file.name).symlink_to(file.resolve())
    model = {
        "type": "WordLevel",
        "vocab": {str(i): i for i in range(weights.VOCAB_SIZE)},
        "unk_token": "0",
    }
    whole = {
        "version": "1.0",
        "model": model,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "generation_config.json").write_text("{}")
    return folder


CONTENDERS = {
    OWN: Contender(
        lambda folder, port, clients: endless("llama", folder, port, ROWS), ["uvicorn", "starlette"]
    ),
    LOOP: Contender(lambda folder, port, clients: endless("loop", folder, ROWS, NEW_TOKENS), []),
    "llama-server f16": llama_server("f16"),
    "llama-server bf16": llama_server("bf16"),
    "llama-cpp-python f16": Contender(
        lambda folder, port, clients: endless(
            "llama_cpp", weights.as_gguf(folder, "f16"), port, torch.get_num_threads()
        ),
        ["llama_cpp", "fastapi", "sse_starlette", "gguf"],
        ready="/v1/models",
        texts=True,
    ),
    "transformers bfloat16": transformers("--dtype", "bfloat16"),
    "transformers bfloat16 batched": transformers("--dtype", "bfloat16", "--continuous-batching"),
}


def batches_of(clients: int, seed: int) -> list[list[list[int]]]:
    """Return one prompt per client for each turn.

    The lengths are the same for all seeds, and their mean is the same for all numbers of clients.
    No two prompts share more than BOS as a prefix.
    """
    turns = TURNS[clients]
    rng = random.Random(f"{clients} {seed}")
    n = clients * turns
    lengths = [33 + round(223 * i / max(1, n - 1)) for i in range(n)]
    rng.shuffle(lengths)
    prompts = [prompt_of(length, rng.randrange(2**31)) for length in lengths]
    return [prompts[turn * clients : (turn + 1) * clients] for turn in range(turns)]


@contextlib.contextmanager
def running(command: list[str], port: int, ready: str) -> Iterator[None]:
    """Start a server and wait until it is ready; end it when the block is left."""
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            for _ in range(1200):
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"exited before it was ready: {log.read().strip()[-300:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
                    break
                time.sleep(0.25)
            yield
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(port: int, body: dict[str, Any]) -> list[float]:
    """Return the time at which the request was sent, and the time of each of its tokens."""
    times = [time.perf_counter()]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    reason = None
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()[:300]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            data = json.loads(line[6:])
            if "error" in data:
                raise RuntimeError(str(data["error"])[:300])
            for choice in data["choices"]:
                times += [now] * bool(choice.get("text"))
                reason = choice.get("finish_reason") or reason
    connection.close()
    if reason != "length":
        raise RuntimeError(
            f"finish_reason {reason!r} instead of 'length' after {len(times) - 1} pieces of text"
        )
    return times


def talk(contender: Contender, port: int, batches: list[list[list[int]]]) -> list[list[float]]:
    """Run all clients at the same time; return the times of every request."""
    times: list[list[float]] = []
    errors: list[Exception] = []

    def client(number: int) -> None:
        try:
            for batch in batches:
                prompt: Any = (
                    " ".join(map(str, batch[number])) if contender.texts else batch[number]
                )
                times.append(ask(port, GREEDY | contender.fields | {"prompt": prompt}))
        except Exception as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(batches[0]))]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    if errors:
        raise errors[0]
    return times


def measure(contender: Contender, checkpoint: Path, clients: int, seed: int) -> dict[str, float]:
    """Measure one server, or the loop without HTTP, which only reports its seconds."""
    warming = [[p[:33] for p in batches_of(clients, -1 - seed)[0]]]
    batches = batches_of(clients, seed)
    tokens = sum(map(len, batches)) * NEW_TOKENS
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = contender.command(checkpoint, port, clients)
    if contender is CONTENDERS[LOOP]:
        job = subprocess.run(
            command, input=json.dumps(warming + batches), capture_output=True, text=True, check=True
        )
        return {TOKENS: tokens / sum(json.loads(job.stdout.splitlines()[-1])[1:])}
    with running(command, port, contender.ready):
        talk(contender, port, warming)  # the first passes allocate
        times = talk(contender, port, batches)
    first = [t[1] - t[0] for t in times]
    gaps = [(after - before) * 1e3 for t in times for before, after in itertools.pairwise(t[1:])]
    return {
        TOKENS: tokens / (max(t[-1] for t in times) - min(t[0] for t in times)),
        FIRST: statistics.median(first),
        FIRST_95: percentile(first, 95),
        BETWEEN: statistics.median(gaps),
        BETWEEN_95: percentile(gaps, 95),
    }


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# (contender, number of clients) -> the results of each round
Results = dict[tuple[str, int], list[dict[str, float]]]


def median(rounds: list[dict[str, float]], work: str) -> float:
    return statistics.median(result[work] for result in rounds)


def report(title: str, text: str, results: Results) -> str:
    heads = [
        "server",
        "clients",
        WORKS[TOKENS],
        "relative to the loop without HTTP",
        f"{WORKS[FIRST]} (95th percentile)",
    ]
    heads.append(f"{WORKS[BETWEEN]} (95th percentile)")
    lines = [f"## {title}", "", text, "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for (name, clients), rounds in results.items():
        loop = results.get((LOOP, clients), [])
        # Compare neighbouring runs: the speed of a machine drifts.
        shares = [a[TOKENS] / b[TOKENS] for a, b in zip(rounds, loop, strict=False)]
        cells = [name, str(clients), f"{median(rounds, TOKENS):.1f}"]
        cells.append(f"{statistics.median(shares):.2f}" if shares else "–")
        if FIRST in rounds[0]:
            cells.append(f"{median(rounds, FIRST):.2f} ({median(rounds, FIRST_95):.2f})")
            cells.append(f"{median(rounds, BETWEEN):.0f} ({median(rounds, BETWEEN_95):.0f})")
        else:
            cells += ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chart(title: str, results: Results, target: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no chart: matplotlib is not installed", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(WORKS), figsize=(13, 4.5))
    shown = list(dict.fromkeys(name for name, _ in results))
    greys = iter(["#777777", "#999999", "#b9b9b9", "#d5d5d5"] * 2)
    colours = {name: {OWN: "#3b6ea5", LOOP: "#9dbbdb"}.get(name) or next(greys) for name in shown}
    for axis, (work, label) in zip(axes, WORKS.items(), strict=True):
        for i, name in enumerate(shown):
            at = {
                c: rounds for (n, c), rounds in results.items() if n == name and work in rounds[0]
            }
            places = [
                list(TURNS).index(clients) + (i - len(shown) / 2 + 0.5) * 0.8 / len(shown)
                for clients in at
            ]
            heights = [median(rounds, work) for rounds in at.values()]
            axis.bar(places, heights, 0.8 / len(shown), color=colours[name], label=name)
        axis.set_xticks(
            range(len(TURNS)), [f"{clients} client{'s' * (clients > 1)}" for clients in TURNS]
        )
        axis.set_title(label, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def available(contender: str) -> bool:
    found = contender.split()[0] != "llama-server" or shutil.which("llama-server")
    return bool(found) and all(
        importlib.util.find_spec(need) for need in CONTENDERS[contender].needs
    )


def main(
    shape: str = "1b",
    rounds: int = 2,
    quick: bool = False,
    contenders: tuple[str, ...] | str = (),
    clients: tuple[int, ...] | int = tuple(TURNS),
    folder: str | None = None,
    llama_server: str | None = None,
) -> None:
    """Measure the servers and write the results.

    `quick`: shape tiny, one round. `contenders`, `clients`: separated by commas. `folder`: keep the
    weights there. `llama_server`: path of llama.cpp's server if it is not on PATH.
    """
    # Unwind the stack, so that the running server ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if quick:
        shape = "tiny"
        rounds = 1
    if llama_server:
        os.environ["PATH"] = (
            f"{Path(llama_server).resolve().parent}{os.pathsep}{os.environ['PATH']}"
        )
    chosen = names(contenders) or list(CONTENDERS)
    for name in [name for name in chosen if not available(name)]:
        print(f"{name} is skipped: see benchmarks/README.md for its requirements", file=sys.stderr)
        chosen.remove(name)
    results: Results = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = weights.make(shape, Path(folder or scratch))
        for name in chosen:
            # Convert the checkpoint now and not between two measurements.
            CONTENDERS[name].command(checkpoint, 0, 1)
        for seed in range(rounds):
            for count in [clients] if isinstance(clients, int) else clients:
                for name in list(chosen):
                    try:
                        result = measure(CONTENDERS[name], checkpoint, count, seed)
                    except (
                        OSError,
                        RuntimeError,
                        subprocess.SubprocessError,
                        http.client.HTTPException,
                    ) as error:
                        print(f"{name} failed with {count} clients: {error}", file=sys.stderr)
                        chosen.remove(name)
                        continue
                    print(
                        name,
                        count,
                        {key: round(value, 3) for key, value in result.items()},
                        file=sys.stderr,
                    )
                    results.setdefault((name, count), []).append(result)
    if not results:
        sys.exit("no contender was measured")
    machine = cpu_name()
    threads = torch.get_num_threads()
    results = dict(
        sorted(results.items(), key=lambda item: (list(CONTENDERS).index(item[0][0]), item[0][1]))
    )
    text = (
        f"{machine}, {threads} threads, torch {torch.__version__}; prompts of 33 to 256 tokens, {NEW_TOKENS} new ones "
        f"each; medians, with the 95th percentile in parentheses."
    )
    table = report(f"{shape}, server", text, results)
    print(table)
    if not quick:
        stem = re.sub(
            r"[^a-z0-9]+", "-", f"{machine} {threads} threads {shape} serving".lower()
        ).strip("-")
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{stem}.md").write_text(table)
        chart(f"{shape}, server. Blue: this library", results, HERE / "results" / f"{stem}.png")


if __name__ == "__main__":
    fire.Fire(main)
