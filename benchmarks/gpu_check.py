"""Check the library on an NVIDIA GPU: python benchmarks/gpu_check.py

Prints pass or FAIL for each check. With `--device cpu`, the checks run as far as a CPU supports
them, which tests the script itself.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch

from llama import Llama
from llama.checkpoints import memory_needs
from llama.quantization.formats import Int8, few_rows_on_gpu

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "llama-2-tiny"
QUESTIONS = [
    "Where does the owl live?",
    "What does the rabbit eat?",
    "What does the bear like to do?",
]


class Checks:
    """Each method is a check. It raises an exception on failure, and may return a note to print."""

    def __init__(self, device: str):
        self.device = device

    def build(self, folder: Path = TINY, rows: int = 4, **options: Any) -> Llama:
        return Llama.build(folder, None, 512, rows, device=self.device, **options)

    def answers(self, **options: Any) -> list[str]:
        dialogs: Any = [[{"role": "user", "content": question}] for question in QUESTIONS]
        results = self.build(**options).chat_completion(dialogs, temperature=0, max_gen_len=24)
        return [result["generation"]["content"] for result in results]

    def used(self) -> int:
        return torch.cuda.memory_reserved() if self.device == "cuda" else 0

    def golden_numbers_in_float32(self) -> None:
        for name in ("mha-mp1", "gqa-mp1"):
            golden = json.loads((GOLDEN / f"{name[:3]}-expected.json").read_text())
            options: dict[str, Any] = {"device": self.device, "dtype": "float32"}
            llm = Llama.build(GOLDEN / name, GOLDEN / "tokenizer.model", 64, 4, **options)
            tokens, logprobs = llm.generate(golden["prompt_tokens"], 20, 0, logprobs=True)
            assert tokens == golden["greedy"]["tokens"], tokens
            assert logprobs is not None
            for ours, theirs in zip(logprobs, golden["greedy"]["logprobs"], strict=True):
                assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3

    def answers_in_16_bits_equal_the_cpus(self) -> None:
        wanted = Checks("cpu").answers(dtype="float32")
        for dtype in ("bfloat16", "float16"):
            assert self.answers(dtype=dtype) == wanted, dtype

    def answers_in_8_and_4_bits_equal_the_cpus(self) -> None:
        wanted = Checks("cpu").answers(dtype="float32")
        assert self.answers(quantize="int8") == wanted
        assert self.answers(quantize="int4") is not None

    def int8_of_few_rows_equals_float64(self) -> str:
        if self.device != "cuda":
            return "skipped: needs a GPU"
        assert few_rows_on_gpu(torch.float32), (
            "Triton does not run here: int8 dequantizes every weight at every step"
        )
        torch.manual_seed(0)
        for dtype, near in (torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4):
            for n, rows, columns in (
                (1, 4096, 4096),
                (3, 1000, 777),
                (16, 11008, 4096),
                (70, 96, 11008),
            ):
                store = Int8(torch.randn(rows, columns, device="cuda") / columns**0.5)
                x = torch.randn(n, 1, columns, device="cuda", dtype=dtype)
                want = x.double() @ store.dequantize().double().T
                error = float((store(x) - want).norm() / want.norm())
                assert error < near, (dtype, n, rows, columns, error)
                assert torch.equal(store(x[-1:]), store(x)[-1:]), (
                    "a row's product depends on the number of rows"
                )
        return "within rounding"

    def a_captured_step_equals_an_eager_one(self) -> None:
        assert self.answers(dtype="float32") == self.answers(dtype="float32", cuda_graph=False)

    def a_compiled_step_equals_an_eager_one(self) -> None:
        assert self.answers(dtype="float32", compile=True) == self.answers(
            dtype="float32", cuda_graph=False
        )

    def many_shapes_share_the_memory_of_one(self) -> str:
        llm = self.build(rows=16)
        used = [self.used()]
        for rows in (1, 2, 4, 8, 16):
            llm.generate([[1, 30 + row] for row in range(rows)], 200, 0)
            used.append(self.used())
        assert used[-1] - used[1] < 64 * 2**20, used
        return f"{(used[-1] - used[0]) / 2**20:.0f} MB for five shapes"

    def memory_is_what_is_said_before_loading(self) -> str:
        if self.device != "cuda":
            return "skipped: needs a GPU"
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        llm = self.build(rows=8, dtype="bfloat16")
        llm.generate([[1] + [30] * 400] * 8, 8, 0)
        said = memory_needs(llm.model.params, 1, torch.bfloat16, 2).total(8)
        seen = torch.cuda.max_memory_allocated() - before
        assert seen <= 1.2 * said + 64 * 2**20, (seen, said)
        return f"{seen / 1e6:.0f} MB used, {said / 1e6:.0f} MB predicted"

    def a_gguf_file_runs(self) -> None:
        from llama.checkpoints.convert import convert

        with tempfile.TemporaryDirectory() as folder:
            convert(str(TINY), f"{folder}/a.gguf", "gguf", "q8_0")
            llm = Llama.build(f"{folder}/a.gguf", None, 512, 4, device=self.device)
            assert llm.chat_completion([[{"role": "user", "content": QUESTIONS[0]}]], temperature=0)

    def all_gpus_share_a_model(self) -> str:
        count = torch.cuda.device_count() if self.device == "cuda" else 2
        ranks = max(n for n in (1, 2, 4) if n <= count)
        script = (
            "from llama import Llama\n"
            f"llm = Llama.build({str(TINY)!r}, None, 512, 4, device={self.device!r}, dtype='float32')\n"
            f"dialogs = [[{{'role': 'user', 'content': q}}] for q in {QUESTIONS!r}]\n"
            "print([r['generation']['content'] for r in llm.chat_completion(dialogs, temperature=0, max_gen_len=24)])\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ranks.py")
            path.write_text(script)
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(ranks),
            ]
            job = subprocess.run(
                [*launcher, str(path)], capture_output=True, text=True, timeout=300
            )
        assert job.returncode == 0, job.stderr[-2000:]
        assert str(Checks("cpu").answers(dtype="float32")) in job.stdout, job.stdout
        return f"{ranks} rank(s)"

    def fewer_bits_and_graphs_are_not_slower(self) -> str:
        times = {}
        for name, options in {
            "bfloat16": {"dtype": "bfloat16"},
            "without graphs": {"dtype": "bfloat16", "cuda_graph": False},
            "int8": {"quantize": "int8"},
            "int4": {"quantize": "int4"},
        }.items():
            llm = self.build(rows=1, **options)
            llm.tokenizer.eos_id = -1
            llm.generate([[1, 30]], 64, 0)
            rounds = []
            for number in range(5):
                start = time.perf_counter()
                llm.generate([[1, 40 + number]], 64, 0)
                rounds.append((time.perf_counter() - start) / 64 * 1e3)
            times[name] = statistics.median(rounds)
        told = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
        if self.device == "cuda":
            assert times["bfloat16"] <= times["without graphs"], told
            assert times["int8"] <= 1.3 * times["bfloat16"], told
        return told + " per step; this model is small: see speed.py --shape 7b"


def main(device: str = "cuda", only: str = "") -> None:
    """Run the checks whose names contain `only`; the exit status is the number of failures."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU found: use --device cpu to run the checks that a CPU supports")
    names = [
        name
        for name in vars(Checks)
        if not name.startswith("_") and name not in ("build", "answers", "used")
    ]
    failed = 0
    for name in names:
        if only not in name:
            continue
        check: Callable[[], str | None] = getattr(Checks(device), name)
        try:
            told = check() or ""
            print(f"pass  {name.replace('_', ' ')}" + f" ({told})" * bool(told), flush=True)
        except Exception:
            failed += 1
            reason = traceback.format_exc().strip().splitlines()[-1][:300]
            print(f"FAIL  {name.replace('_', ' ')}: {reason}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    fire.Fire(main)
