"""Jobs of gloo ranks on this machine, started by torchrun if it is part of the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    GOLDEN,
    GOLDEN_FOLDERS,
    ROOT,
    TINY,
    build_golden,
    expected,
    random_state,
    run_ranks,
    torchrun,
    write_release,
)

from llama import ModelArgs, Transformer
from llama.checkpoints.convert import reshard

# Starts programs, jobs of several ranks, servers or a browser.
pytestmark = pytest.mark.slow

WORKERS = ROOT / "tests" / "workers"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_shard_count_on_every_world_size_equals_the_original(
    tmp_path: Path, world_size: int
) -> None:
    start = torchrun if world_size == 2 else run_ranks
    job = start(world_size, WORKERS / "golden.py", tmp_path / "results.json")
    assert job.returncode == 0, job.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    for folder in GOLDEN_FOLDERS:
        golden, result = expected(folder), results[folder]
        for ours, theirs in zip(result["logits"], golden["logits_prompt_0"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        for name in ("greedy", "greedy_echo"):
            tokens, logprobs = result[name]
            assert tokens == golden[name]["tokens"]
            for ours, theirs in zip(logprobs, golden[name]["logprobs"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        assert result["text"] == [r["generation"] for r in golden["text_completion"]["results"]]
        assert result["chat"] == [r["generation"] for r in golden["chat_completion"]["results"]]
        alone = build_golden(folder)
        assert result["sampled"] == alone.generate(golden["prompt_tokens"], 20, 1.0, 1.0, seed=3)[0]
        norms = (2 * 2 + 1) * 64  # replicated on every rank; everything else is split evenly
        whole = sum(parameter.numel() for parameter in alone.model.parameters())
        assert result["local_parameters"] == (whole - norms) // world_size + norms


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resharded_folders_have_equal_logits_on_every_world_size(
    tmp_path: Path, args: ModelArgs, world_size: int
) -> None:
    args.n_kv_heads = 8
    write_release(tmp_path / "1", args, random_state(args))
    for shards in (2, 4, 8):
        reshard(str(tmp_path / "1"), str(tmp_path / str(shards)), shards)
    script = tmp_path / "logits.py"
    script.write_text(f"""
import torch
from conftest import GOLDEN
from llama import Llama
tokens = torch.arange(3, 40)[None]
logits = [
    Llama.build(f"{tmp_path}/{{n}}", GOLDEN / "tokenizer.model", 64, 1, device="cpu", dtype="float32").model(tokens, 0)
    for n in (1, 2, 4, 8)
]
assert all(torch.equal(other, logits[0]) for other in logits)
torch.save(logits[0], "{tmp_path}/logits")
""")
    job = run_ranks(world_size, script)
    assert job.returncode == 0, job.stderr
    model = Transformer(args)
    model.load_state_dict(random_state(args))
    wanted = model(torch.arange(3, 40)[None]).detach()
    torch.testing.assert_close(torch.load(tmp_path / "logits"), wanted, atol=1e-4, rtol=0)


def test_the_model_may_be_split_over_fewer_ranks_than_there_are(tmp_path: Path) -> None:
    script = tmp_path / "two_pairs.py"
    script.write_text(f"""
import torch.distributed as dist
from conftest import build_golden, expected
from fairscale.nn.model_parallel.initialize import get_model_parallel_world_size
llm, golden = build_golden("gqa-mp4", model_parallel_size=2), expected("gqa")
assert (dist.get_world_size(), get_model_parallel_world_size()) == (4, 2)
assert llm.generate(golden["prompt_tokens"], 20, 0)[0] == golden["greedy"]["tokens"]
try:
    build_golden(model_parallel_size=3)
except ValueError as error:
    assert str(error).startswith("model_parallel_size is 3, which does not divide the 4 ranks: use 1, 2 or 4")
    open({str(tmp_path)!r} + f"/{{dist.get_rank()}}", "w").close()
""")
    job = run_ranks(4, script)
    assert job.returncode == 0, job.stderr
    assert all((tmp_path / str(rank)).exists() for rank in range(4))


def test_ranks_that_disagree_on_logits_emit_the_first_ranks_tokens(tmp_path: Path) -> None:
    script = tmp_path / "noise.py"
    script.write_text("""
import torch, torch.distributed as dist
from conftest import build_golden
llm = build_golden("gqa-mp2", model_parallel_size=2)
inner = llm.model.forward
torch.manual_seed(dist.get_rank())
def noisy(tokens, start_pos):
    logits = inner(tokens, start_pos)
    return logits + 3 * dist.get_rank() * torch.randn(logits.shape)
llm.model.forward = noisy
ours = [llm.generate([[1, 30], [1] * 9], 30, t, logprobs=True, seed=2) for t in (0, 1.0)]
everywhere = [None, None]
dist.all_gather_object(everywhere, ours)
assert everywhere[0] == everywhere[1], everywhere
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize(
    "own", ["", 'dist.init_process_group("gloo")'], ids=["builds", "a caller's"]
)
def test_no_thread_of_the_process_group_outlives_the_last_exit_handler(
    tmp_path: Path, own: str
) -> None:
    script = tmp_path / "threads.py"
    script.write_text(f"""
import atexit, os
import torch, torch.distributed as dist
def count():
    return len(os.listdir("/proc/self/task"))
@atexit.register  # before the library is imported, so run last
def check():
    if count() != before:
        os._exit(7)
import llama, tqdm
from conftest import build_golden
tqdm.tqdm.monitor_interval = 0  # a thread of its own
before = count()
{own}
llm = build_golden("gqa-mp2", model_parallel_size=2)  # a global: still there when the handlers run
alone = build_golden("gqa-mp2", model_parallel_size=1)
assert llm.generate([[1, 30]], 5, 0) == alone.generate([[1, 30]], 5, 0)
assert count() > before + 2
""")
    job = torchrun(2, script)
    assert job.returncode == 0, job.stderr


def test_ranks_agree_on_scores_checks_streams_and_after_another_build(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text("""
import torch, torch.distributed as dist
from conftest import build_golden
llm = build_golden("gqa-mp2", model_parallel_size=2)
rank = dist.get_rank()
other = build_golden("gqa-mp1", model_parallel_size=1)
other.generate([[1, 30]], 3)
inner = llm.model.forward
torch.manual_seed(rank)
def noisy(tokens, start_pos):
    logits = inner(tokens, start_pos)
    return logits + 3 * rank * torch.randn(logits.shape)
llm.model.forward = noisy
dialogs = [[{"role": "user", "content": content}] for content in ("one", "two", "three")]
only_here = lambda text: "No." if rank == 0 and text == "two" else "Yes?" if rank == 1 else None
ours = [
    llm.generate([[1, 30], [1] * 9], 9, 0, logprobs=True, echo=True),
    llm.chat_completion(dialogs, 0, max_gen_len=5, input_check=only_here),
    llm.chat_completion(dialogs, 0, max_gen_len=5, output_check=lambda text: f"{rank}"),
    list(llm.stream_text_completion(["a", "b c"], 1.0, max_gen_len=12, stop=["e"])),
]
next(llm.stream_text_completion(["a", "b"]))
ours.append(llm.generate([[1, 30]], 3))
everywhere = [None, None]
dist.all_gather_object(everywhere, ours)
assert everywhere[0] == everywhere[1], everywhere
assert [r["generation"]["content"] == "No." for r in ours[1]] == [False, True, False]
""")
    job = torchrun(2, script)
    assert job.returncode == 0, job.stderr


@pytest.mark.parametrize(
    ("nproc", "arguments", "sentence"),
    [
        (
            3,
            {},
            "has 8 attention heads and 4 key/value heads, which 3 ranks cannot share: use 1, 2 or 4",
        ),
        (2, {"ckpt_dir": "/nowhere"}, "no folder /nowhere: pass the folder that holds params.json"),
        (
            2,
            {"tokenizer_path": GOLDEN / "tokenizer.model"},
            "tokenizer has 512 pieces, the checkpoint's embedding",
        ),
    ],
)
def test_a_job_with_a_bad_argument_ends_with_the_sentence(
    nproc: int, arguments: dict[str, object], sentence: str
) -> None:
    options = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    job = torchrun(nproc, ROOT / "example_text_completion.py", "--ckpt_dir", TINY, *options)
    assert job.returncode != 0
    assert sentence in job.stderr


@pytest.mark.parametrize("name", ["text", "chat"])
def test_an_example_prints_the_same_once_on_one_rank_and_on_two(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Packed bfloat16 rounds each rank's partial sum, which can change greedy output. The format for
    # AVX2 does not.
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    script = ROOT / f"example_{name}_completion.py"
    one, two = (torchrun(n, script, "--temperature", "0", "--max_batch_size", "4") for n in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    answers = [job.stdout for job in (one, two)]
    assert answers[0] == answers[1]
    assert answers[0].count("\n> ") == (4 if name == "text" else 6)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama.distributed import select_device

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"^4 processes on this node, but 1 GPU: run with --nproc_per_node 1$"
    ):
        select_device("cuda")


def test_what_one_rank_refuses_or_is_given_otherwise_is_refused_on_all(tmp_path: Path) -> None:
    script = tmp_path / "unlike.py"
    script.write_text("""
import torch.distributed as dist
from conftest import build_golden
llm = build_golden("gqa-mp2")
rank = dist.get_rank()
want = llm.generate([[1, 30]], 5, 0)
def refused(error, sentence, call, *args, **options):
    try:
        list(call(*args, **options))
    except error as caught:
        assert sentence in str(caught), caught
    else:
        raise SystemExit(f"rank {rank} got an answer")
    assert llm.generate([[1, 30]], 5, 0) == want
alike = "2 ranks were given different requests: pass the same to each of them"
refused(ValueError, alike, llm.generate, [[1, 30 + rank]], 5)
refused(ValueError, alike, llm.generate, [[1, 30]], 5, 0.5 + rank)
refused(ValueError, alike, llm.stream_text_completion, ["ab"[rank]])
refused(ValueError, "max_seq_len is 64" if rank else alike, llm.generate, [[1] * (20 + 60 * rank)], 5)
def check(text):
    raise ZeroDivisionError(f"on rank {rank}")
dialogs = [[{"role": "user", "content": "hi"}]]
for which in ("input_check", "output_check"):
    for call in (llm.chat_completion, llm.stream_chat_completion):
        refused(ZeroDivisionError, "on rank 0", call, dialogs, 0, max_gen_len=3, **{which: check})
class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)
def odd(text):
    raise Odd("one", "two")
refused(Odd if rank == 0 else RuntimeError, "one", llm.chat_completion, dialogs, 0, max_gen_len=3, input_check=odd)
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr


def test_threads_on_several_ranks_and_checks_that_ask_the_model_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text("""
import threading
from conftest import build_golden
llm = build_golden("gqa-mp2")
stream = llm.stream_text_completion(["a"], 0, max_gen_len=9)
next(stream)
said = []
def ask():
    try:
        llm.generate([[1, 30]], 5)
    except RuntimeError as error:
        said.append(str(error))
threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert said == ["several threads call one model on 2 ranks: use one thread"] * 3, said
list(stream)
def check(text):
    return llm.text_completion(["a"])[0]["generation"]
try:
    llm.chat_completion([[{"role": "user", "content": "hi"}]], max_gen_len=3, output_check=check)
except RuntimeError as error:
    assert "a check called the model, but only the first of 2 ranks runs checks: call the model after the check" in str(error)
else:
    raise SystemExit("the check's question was answered")
llm.generate([[1, 30]], 5)
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr


def test_a_hook_on_one_rank_leaves_the_ranks_on_one_schedule(tmp_path: Path) -> None:
    script = tmp_path / "hooked.py"
    script.write_text("""
import torch.distributed as dist
from conftest import build_golden
llm = build_golden("gqa-mp2")
prompt = [1, 30, 31, 32, 33, 34, 35, 36]
want = llm.generate([prompt], 8, 0)
seen = []
if dist.get_rank() == 0:
    llm.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
stream = llm.stream_text_completion(["a text"], 0, max_gen_len=20)
next(stream)
assert llm.generate([prompt], 8, 0) == want
assert llm.generate([prompt], 8, 0) == want
assert list(stream)
assert bool(seen) == (dist.get_rank() == 0)
""")
    job = run_ranks(2, script)
    assert job.returncode == 0, job.stderr
