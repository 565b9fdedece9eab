"""Checkpoints and models that several tests use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from forked import ROOT
from release_server import Release

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoints.names import shard_dim

GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "llama-2-tiny"
GOLDEN_FOLDERS = ["mha-mp1", "mha-mp2", "gqa-mp1", "gqa-mp2", "gqa-mp4"]

# models this small gain nothing from threads, and lose much where cores are busy
torch.set_num_threads(1)

# What torchrun sets; a test that runs inside such a job must not hand it on.
RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# A shell starts `pytest &` with SIGINT ignored, and child processes would inherit that. The programs
# that tests interrupt have to see the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def expected(folder: str) -> dict[str, Any]:
    """What the original computes from a golden folder."""
    return json.loads((GOLDEN / f"{folder.split('-')[0]}-expected.json").read_text())


def build_golden(
    folder: str = "gqa-mp1", max_seq_len: int = 64, max_batch_size: int = 4, **options: Any
) -> Llama:
    options = {"device": "cpu", "dtype": "float32"} | options
    return Llama.build(
        GOLDEN / folder, GOLDEN / "tokenizer.model", max_seq_len, max_batch_size, **options
    )


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def run_python(
    *words: str | Path, input: str = "", timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python *words` does, without the seconds of its imports; run_fresh where they matter."""
    return forked.run(words, [clean_environment() | environment], input, timeout)


def run_ranks(
    count: int, *words: str | Path, input: str = "", timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The same on so many ranks, without torchrun's part in it."""
    _store, environments = forked.ranks(count)  # the ranks meet there until all have ended
    return forked.run(words, [clean_environment() | own for own in environments], input, timeout)


def run_fresh(
    *words: str | Path, timeout: float = 240, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT / "tests")} | options.pop("env", {})
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment,
        **options,
    )


def wait_for_line(job: subprocess.Popen[str], word: str) -> None:
    """Read the job's standard output until a line with this word."""
    assert job.stdout is not None
    for line in job.stdout:
        if word in line:
            return
    raise AssertionError(f"the program ended before it printed {word!r}")


def launcher(nproc: int) -> list[str]:
    """torchrun on this machine, as words for Python."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]


def torchrun(nproc: int, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return run_fresh(*launcher(nproc), *words, env={"OMP_NUM_THREADS": "1"}, **options)


def random_state(args: ModelArgs, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough that attention and the feed-forward matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 1.5 / shape[1] ** 0.5
        for name, shape in shapes.items()
    }


def write_release(
    folder: Path, args: ModelArgs, state: dict[str, torch.Tensor], shards: int = 1
) -> Path:
    """A folder in the release's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        shard = {}
        for name, tensor in state.items():
            dim = shard_dim(name)
            shard[name] = (
                tensor.clone() if dim is None else tensor.chunk(shards, dim)[number].clone()
            )
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    keys = (
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
    )
    params = {key: getattr(args, key) for key in keys if getattr(args, key) is not None} | {
        "vocab_size": -1
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def huggingface_config(args: ModelArgs) -> dict[str, Any]:
    """The arguments of transformers' LlamaConfig for a model of this shape."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }


def real_tokenizer() -> Tokenizer:
    return Tokenizer(real_tokenizer_path())


def real_tokenizer_path() -> Path:
    """The Llama 2 tokenizer, which the project may not ship: skips where it is not at hand."""
    beside = ROOT.parent / "shared" / "data" / "llama-2-tokenizer.model"
    path = Path(os.environ.get("LLAMA2_TOKENIZER", beside))
    if not path.is_file():
        pytest.skip("set LLAMA2_TOKENIZER to the Llama 2 tokenizer.model to run this test")
    return path


@pytest.fixture(scope="session")
def llm() -> Llama:
    """The grouped-query golden model in float32, 4 rows × 64 positions."""
    return build_golden()


@pytest.fixture
def release() -> Iterator[Release]:
    server = Release()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def args() -> ModelArgs:
    return ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=512,
        multiple_of=32,
        max_batch_size=4,
        max_seq_len=64,
    )
