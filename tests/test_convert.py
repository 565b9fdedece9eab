"""python -m llama info, verify, reshard and convert."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TINY, random_state, run_fresh, run_python, write_release

from llama import Llama, ModelArgs, Tokenizer, compat
from llama.checkpoints import Checkpoint
from llama.checkpoints.convert import convert, reshard
from llama.cli.info import info, verify

TOKENS = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(folder: Path) -> torch.Tensor:
    llm = Llama.build(folder, GOLDEN / "tokenizer.model", 64, 4, device="cpu", dtype="float32")
    return llm.model(TOKENS, 0)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_resharded_checkpoints_are_the_same_model(tmp_path: Path, shards: int) -> None:
    for folder in ("gqa-mp1", "gqa-mp4", "mha-mp2"):
        out = tmp_path / f"{folder}-{shards}"
        assert reshard(str(GOLDEN / folder), str(out), shards) == f"{out}: {shards} shard(s)"
        assert len(list(out.glob("consolidated.*.pth"))) == shards
        assert torch.equal(logits(out), logits(GOLDEN / folder))
        source, written = (Checkpoint(path).model_args(8, 8) for path in (GOLDEN / folder, out))
        assert source == written
        assert (out / "tokenizer.model").read_bytes() == (GOLDEN / "tokenizer.model").read_bytes()


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists: choose another name, or remove it"):
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "there"), 2)
    with pytest.raises(
        FileNotFoundError, match="no folder .*nowhere to write out into: make it first"
    ):
        convert(str(GOLDEN / "gqa-mp1"), str(tmp_path / "nowhere" / "out"), "hf")
    with pytest.raises(ValueError, match="which 3 ranks cannot share: use 1, 2 or 4"):
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), 3)
    with pytest.raises(ValueError, match="model_parallel_size is 0: use 1 or more"):
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), 0)
    with pytest.raises(TypeError, match="model_parallel_size is 'two': use an integer"):
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), "two")
    with pytest.raises(TypeError, match="max_batch_size is 'x': use an integer"):
        info(str(GOLDEN / "gqa-mp1"), 8, "x")
    with pytest.raises(ValueError, match="to is 'onnx': use 'hf', 'meta' or 'gguf'"):
        convert(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        convert(str(GOLDEN / "gqa-mp1"), str(tmp_path / "hf"), "hf")
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "two"), 2)
    finally:
        os.umask(before)
    for path in (tmp_path / "hf", tmp_path / "two"):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
        assert all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in path.iterdir())


def test_paths_to_read_and_to_write_are_as_users_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    reshard(GOLDEN / "gqa-mp1", "~/two", 2)
    convert("~/two", 7, "hf")  # a command line may parse 7 as an integer
    assert info(7).startswith("7: Hugging Face layout")
    assert {path.name for path in tmp_path.iterdir()} == {"two", "7"}
    with pytest.raises(TypeError, match="out is None: use a path"):
        reshard("~/two", None, 2)
    assert verify("~/7") == "4 file(s) are whole"
    (tmp_path / "7" / "checklist.chk").unlink()
    assert verify("~/7") == "21 tensors are whole, as far as can be seen without a checklist.chk"
    with pytest.raises(
        FileNotFoundError, match="no folder nowhere: pass the folder that holds checklist.chk"
    ):
        verify("nowhere")


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_a_disk_known_to_be_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100_000, 100_000))
    monkeypatch.setattr(torch, "save", lambda *_: pytest.fail("written"))
    with pytest.raises(
        OSError,
        match=r"could not write to .* \(too little space\): 0\.4 GB are needed, and 0\.1 MB",
    ):
        monkeypatch.setattr("llama.checkpoints.convert.size_of", lambda *_: 400_000_000)
        convert(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), to)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file size")
@pytest.mark.parametrize(
    "command", [["convert", "--to", "hf"], ["reshard", "--model_parallel_size", "2"]]
)
def test_a_disk_that_fills_up_in_the_writing_leaves_nothing(
    tmp_path: Path, command: list[str]
) -> None:
    """A limit on file size makes a write fail in the middle, as a full disk does."""
    script = tmp_path / "limited.py"
    script.write_text("""
import resource, signal, sys
from llama.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main()
""")
    out = tmp_path / "out" / "model"
    out.parent.mkdir()
    job = run_python(script, command[0], GOLDEN / "gqa-mp1", out, *command[1:])
    assert job.returncode == 1
    last = job.stderr.strip().splitlines()[-1]
    assert (
        last.startswith(f"error: could not write to {out.parent} (")
        and "MB are needed, and" in last
    ), job.stderr
    assert not list(out.parent.iterdir())


def test_transformers_reads_the_tokenizer_of_a_converted_folder(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert(str(TINY), str(tmp_path / "hf"), "hf")
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
        Tokenizer(TINY / "tokenizer.model"),
    )
    for text in (
        "The fox lives",
        "[INST] Where does it live? [/INST]",
        "Question: x\n\nAnswer:",
        "über 2 ☺\t.",
    ):
        assert theirs(text).input_ids == ours.encode(text, bos=True, eos=False)
    assert theirs.eos_token_id == ours.eos_id


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reshard(str(GOLDEN / "gqa-mp1"), str(tmp_path / "out"), 2)
    assert not list(tmp_path.iterdir())


def test_verify_compares_every_file_with_checklist_chk(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "gqa-mp2", tmp_path / "model"))
    sums = {
        file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.glob("*.[pj]*")
    }
    (folder / "checklist.chk").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    )
    assert verify(str(folder)) == f"{len(sums)} file(s) are whole"
    data = bytearray((folder / "consolidated.01.pth").read_bytes())
    data[1000] ^= 1
    (folder / "consolidated.01.pth").write_bytes(data)
    with pytest.raises(
        ValueError,
        match=rf"^consolidated\.01\.pth has MD5 \w+, but checklist\.chk has {sums['consolidated.01.pth']}: ",
    ):
        verify(str(folder))
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"consolidated\.01\.pth cannot be read \(No such file"
    ):
        verify(str(folder))
    (folder / "checklist.chk").write_text("<html>403</html>")
    with pytest.raises(
        ValueError,
        match=r"checklist\.chk has lines that are not an MD5 sum and a file name: download",
    ):
        verify(str(folder))


def test_info_describes_a_folder(tmp_path: Path) -> None:
    args = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=512, multiple_of=32)
    state = {name: tensor.half() for name, tensor in random_state(args).items()}
    write_release(tmp_path / "llama-2-70b", args, state, 4)
    lines = info(str(tmp_path / "llama-2-70b")).splitlines()
    assert (
        lines[0] == "llama-2-70b: release layout, 4 file(s) of weights, 172,352 parameters, float16"
    )
    assert (
        lines[1]
        == "dim 64, 2 layers, 8 heads, 8 key/value heads, 192 feed-forward channels, 512 pieces"
    )
    assert (
        lines[3]
        == "Per rank; cache for max_batch_size 8 and max_seq_len 512, and one pass, in 16 bits:"
    )
    assert [line.split()[0] for line in lines[5:]] == ["1", "2", "4", "8"]
    # The cache has 4,096 positions. A pass has 520, each with 4 × 64 + 6 × 192 / ranks channels of
    # 2 bytes and 512 logits of 6 bytes.
    assert [line.split()[-4:] for line in lines[5:7]] == [
        ["2.1", "MB", "3.1", "MB"],
        ["1.0", "MB", "2.5", "MB"],
    ]
    convert(str(tmp_path / "llama-2-70b"), str(tmp_path / "other"), "hf")
    assert info(str(tmp_path / "other")).startswith(
        "other: Hugging Face layout, 1 file(s) of weights, 172,352 param"
    )


@pytest.mark.slow
def test_the_commands_run_from_a_shell(tmp_path: Path) -> None:
    out = tmp_path / "two"
    job = run_python("-m", "llama", "reshard", TINY, out, "--model_parallel_size", "2")
    assert (job.returncode, job.stdout) == (0, f"{out}: 2 shard(s)\n"), job.stderr
    job = run_python("-m", "llama", "info", out, "--max_seq_len", "128")
    assert job.returncode == 0 and "two: release layout, 2 file(s)" in job.stdout, job.stderr
    job = run_python("-m", "llama", "verify", out)
    assert (job.returncode, job.stdout) == (0, "4 file(s) are whole\n"), job.stderr
    job = run_python("-m", "llama", "info", tmp_path / "nowhere")
    assert job.stderr.startswith(
        f"error: no folder {tmp_path}/nowhere: pass the folder that holds params.json"
    )


WATCH = """
import sys, threading, time
from pathlib import Path
import torch
from llama import Llama
from llama.checkpoints.convert import reshard
from llama.cli.allocator import build_llama
from llama.generation import BuildOptions
sys.path.insert(0, {tests!r})
from conftest import build_golden
torch.set_num_threads(2)
build_golden()  # what is imported and started at first use is not counted
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
def watch():
    while not done:
        peaks.append(anonymous())
        time.sleep(0.001)
before, peaks, done = anonymous(), [], False
thread = threading.Thread(target=watch)
thread.start()
{work}
done = True
thread.join()
print(max(peaks) - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 153 million parameters in bfloat16."""
    args = ModelArgs(dim=1024, n_layers=11, n_heads=8, vocab_size=512, multiple_of=256)
    state = {name: tensor.bfloat16() for name, tensor in random_state(args).items()}
    return write_release(tmp_path_factory.mktemp("large") / "release", args, state, 2)


# Each thread makes a float32 copy of a matrix for FBGEMM to pack. bfloat16 is not packed.
PACKING = 1.25 if compat.has_bfloat16_products() else 1.4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("work", "share", "limit"),
    [
        ("llm = Llama.build({large!r}, {tokenizer!r}, 1, 1, dtype='bfloat16')", 1, 1.15),
        ("llm = Llama.build({large!r}, {tokenizer!r}, 1, 1, dtype='float32')", 2, 1.15),
        ("llm = build_llama({large!r}, BuildOptions({tokenizer!r}, 1, 1))", 1, PACKING),
        ("reshard({large!r}, {out!r}, 1)", 1, 1.15),
        ("reshard({large!r}, {out!r}, 4)", 1 / 4, 1.15),
    ],
    ids=["bfloat16", "float32", "auto", "to one shard", "to four shards"],
)
def test_memory_holds_one_ranks_weights_and_little_more(
    tmp_path: Path, large: Path, work: str, share: float, limit: float
) -> None:
    tokenizer, out = str(GOLDEN / "tokenizer.model"), str(tmp_path / "out")
    script = tmp_path / "watch.py"
    work = work.format(large=str(large), tokenizer=tokenizer, out=out)
    script.write_text(WATCH.format(tests=str(Path(__file__).parent), work=work))
    job = run_fresh(script)
    assert job.returncode == 0, job.stderr
    weights = sum(file.stat().st_size for file in large.glob("*.pth")) * share
    assert int(job.stdout.splitlines()[-1]) <= limit * weights + 8e6
