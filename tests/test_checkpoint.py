from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, build_golden, random_state, write_release
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, ModelArgs
from llama.checkpoints import Checkpoint, check_world_size, memory_needs
from llama.checkpoints.files import give_back
from llama.checkpoints.memory import (
    CHUNK_TOKENS,
    Memory,
    container_memory,
    free_memory,
)
from llama.checkpoints.names import TENSORS, gguf_name, huggingface_name, shard_dim
from llama.cli.allocator import keep_freed_memory, return_freed_memory
from llama.quantization.formats import select_dtype

COUNTS = [1, 2, 4, 8]


@pytest.fixture
def state(args: ModelArgs) -> dict[str, torch.Tensor]:
    args.n_kv_heads = 8
    return random_state(args)


@pytest.mark.parametrize("shards", COUNTS)
@pytest.mark.parametrize("world_size", COUNTS)
def test_any_shard_count_is_read_onto_any_world_size(
    tmp_path: Path, args: ModelArgs, state: dict[str, torch.Tensor], shards: int, world_size: int
) -> None:
    checkpoint = Checkpoint(write_release(tmp_path / "release", args, state, shards))
    for name, tensor in state.items():
        dim = shard_dim(name)
        wanted = [tensor] * world_size if dim is None else tensor.chunk(world_size, dim)
        for rank, part in enumerate(wanted):
            out = torch.full_like(part, torch.nan)
            checkpoint.copy(name, rank, out)
            assert torch.equal(out, part)


def test_the_table_names_every_tensor_of_a_model_in_every_layout(args: ModelArgs) -> None:
    args.n_layers = 12
    names = random_state(args).keys()
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in names} == {
        f"{stem}.weight" for stem in TENSORS
    }
    for other in (huggingface_name, gguf_name):
        assert len(set(map(other, names))) == len(names)
    name = "layers.11.feed_forward.w2.weight"
    assert (huggingface_name(name), gguf_name(name)) == (
        "model.layers.11.mlp.down_proj.weight",
        "blk.11.ffn_down.weight",
    )
    assert gguf_name("norm.weight") == "output_norm.weight"


def test_the_golden_shards_are_one_model() -> None:
    models = [
        build_golden(folder).model.state_dict() for folder in ("gqa-mp1", "gqa-mp2", "gqa-mp4")
    ]
    for name, tensor in models[0].items():
        assert all(torch.equal(tensor, model[name]) for model in models)


def test_weights_are_copies_so_that_a_changed_file_cannot_change_the_model(
    golden_copy: Path,
) -> None:
    llm = build(golden_copy)
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    file = golden_copy / "consolidated.00.pth"
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.model.state_dict().items())


def test_pages_given_back_are_the_tensors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Recorder:
        def madvise(self, first: Any, length: Any, advice: int) -> None:
            calls.append((first.value, first.value + length.value))

    monkeypatch.setattr("ctypes.CDLL", lambda name: Recorder())
    whole = torch.zeros(64, 5000, dtype=torch.float16)
    for part in (whole, whole.narrow(1, 4000, 1000), whole.narrow(0, 60, 4)):
        give_back(part)
        first, end = calls.pop()
        assert end == part[-1, -1:].data_ptr() + 2
        assert part.data_ptr() - 2**16 < first <= part.data_ptr()


@pytest.mark.parametrize(
    "kind", [torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn, "sparse", "scalar"]
)
def test_weights_of_other_types_are_refused(golden_copy: Path, kind: Any) -> None:
    def change(shard: dict[str, torch.Tensor]) -> None:
        name = "tok_embeddings.weight" if kind == "scalar" else "layers.0.attention.wq.weight"
        weight = shard[name]
        shard[name] = (
            weight.to_sparse()
            if kind == "sparse"
            else torch.tensor(3.0)
            if kind == "scalar"
            else weight.to(kind)
        )

    rewrite(golden_copy, change)
    with pytest.raises(
        ValueError,
        match=r"00\.pth(: layers.0.attention.wq.weight has type .*: only dense float32| lacks)",
    ):
        build(golden_copy)


def test_shards_of_two_models_of_one_shape_are_warned_of(
    golden_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(golden_copy, lambda shard: shard.update({"norm.weight": torch.ones(64)}), "02")
    build(golden_copy)
    assert caplog.messages == [
        f"{golden_copy}/consolidated.02.pth: norm.weight differs from shard 00: the shards may be from different models"
    ]


def test_types_that_differ_between_weights_are_not_narrowed(golden_copy: Path) -> None:
    def change(shard: dict[str, torch.Tensor]) -> None:
        shard["tok_embeddings.weight"] = shard["tok_embeddings.weight"].half()
        shard["layers.0.feed_forward.w1.weight"] = (
            shard["layers.0.feed_forward.w1.weight"].float() * 0 + 1e5
        )

    for number in range(4):
        rewrite(golden_copy, change, f"0{number}")
    llm = Llama.build(golden_copy, GOLDEN / "tokenizer.model", 64, 4, device="cpu", quantize="int8")
    weight = llm.model.state_dict()["layers.0.feed_forward.w1.weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, 1e5), atol=0, rtol=0.01)


def test_rope_freqs_is_the_only_key_that_is_ignored(golden_copy: Path) -> None:
    rewrite(golden_copy, lambda shard: shard.update({"rope.freqs": torch.ones(4)}))
    build(golden_copy)
    rewrite(golden_copy, lambda shard: shard.update({"layers.0.attention.wq.bias": torch.ones(4)}))
    with pytest.raises(
        ValueError,
        match=r"consolidated\.00\.pth holds unknown tensor layers\.0\.attention\.wq\.bias",
    ):
        build(golden_copy)


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_dtype_is_honoured(dtype: str, wanted: torch.dtype) -> None:
    llm = build_golden(dtype=dtype)
    assert (
        {tensor.dtype for tensor in llm.model.state_dict().values()}
        == {llm.model.cache.dtype}
        == {wanted}
    )


def test_dtype_auto_is_the_stored_16_bit_type_on_a_gpu_and_float32_on_a_cpu() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert select_dtype("auto", torch.float16, gpu) == torch.float16
    assert select_dtype("auto", torch.float32, gpu) == torch.bfloat16
    assert select_dtype("auto", torch.float16, cpu) == torch.float32
    with pytest.raises(
        ValueError, match="dtype is 'int3': use 'auto', 'float32', 'bfloat16', 'float16'"
    ):
        select_dtype("int3", torch.float16, cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_may_be_pytorchs_own(dtype: torch.dtype) -> None:
    assert select_dtype(dtype, torch.float32, torch.device("cpu")) is dtype
    assert (
        select_dtype(str(dtype).removeprefix("torch."), torch.float32, torch.device("cpu")) is dtype
    )
    assert build_golden(dtype=dtype).model.norm.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int8, None, 16, ["float32"]])
def test_what_is_no_dtype_is_refused(dtype: Any) -> None:
    sentence = f"dtype is {dtype!r}: use 'auto', 'float32', 'bfloat16', 'float16'"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build_golden(dtype=dtype)


# The shapes of the releases.
LLAMA_7B = ModelArgs(vocab_size=32000)
LLAMA_13B = ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000)
LLAMA_70B = ModelArgs(
    dim=8192,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    multiple_of=4096,
    ffn_dim_multiplier=1.3,
    vocab_size=32000,
)


@pytest.mark.slow
def test_ranks_that_cannot_share_a_model_are_refused_with_those_that_can() -> None:
    with pytest.raises(ValueError) as error:
        check_world_size("llama-2-13b", LLAMA_13B, 3)
    assert str(error.value) == (
        "llama-2-13b has 40 attention heads and 40 key/value heads, which 3 ranks cannot share: use 1, 2, 4 or 8"
    )
    with pytest.raises(
        ValueError,
        match="13824 feed-forward channels, which 5 ranks cannot share: use 1, 2, 4 or 8",
    ):
        check_world_size("llama-2-13b", LLAMA_13B, 5)
    with pytest.raises(
        ValueError, match="64 attention heads and 8 key/value heads, which 16 ranks cannot share"
    ):
        check_world_size("llama-2-70b", LLAMA_70B, 16)
    for ranks in (1, 2, 4, 8, 16, 32):
        check_world_size("llama-2-7b", LLAMA_7B, ranks)


def build(folder: Path, tokenizer: Path = GOLDEN / "tokenizer.model", **options: int) -> Llama:
    sizes = {"max_seq_len": 64, "max_batch_size": 4} | options
    return Llama.build(folder, tokenizer, **sizes, device="cpu", dtype="float32")


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "00"
) -> None:
    path = folder / f"consolidated.{file}.pth"
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


def edit_params(folder: Path, **changes: object) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def golden_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "gqa-mp4", tmp_path / "llama-2-small"))


class Attack:
    """Unpickling this object without restrictions creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(golden_copy: Path, tmp_path: Path) -> None:
    torch.save(
        {"tok_embeddings.weight": Attack(tmp_path / "touched")}, golden_copy / "consolidated.02.pth"
    )
    with pytest.raises(
        ValueError,
        match=r"consolidated\.02\.pth is not a whole PyTorch checkpoint: download it again",
    ):
        build(golden_copy)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html><body>403</body></html>", b"PK\x03\x04 cut short"]
)
def test_a_file_that_is_no_checkpoint_is_refused(golden_copy: Path, content: bytes) -> None:
    (golden_copy / "consolidated.01.pth").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"consolidated\.01\.pth is not a whole PyTorch checkpoint: download it again",
    ):
        build(golden_copy)


def test_a_truncated_file_is_refused(golden_copy: Path) -> None:
    file = golden_copy / "consolidated.03.pth"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(
        ValueError,
        match=r"consolidated\.03\.pth is not a whole PyTorch checkpoint: download it again",
    ):
        build(golden_copy)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_bytes_are_refused_with_the_files_name_or_do_not_matter(
    data: st.DataObject,
) -> None:
    whole = (GOLDEN / "gqa-mp1" / "consolidated.00.pth").read_bytes()
    # The pickle and the archive's directory are near the ends of the file. The weights between them
    # may have any value.
    ends = st.integers(0, 6000) | st.integers(len(whole) - 6000, len(whole) - 1)
    damaged = bytearray(whole)
    for at in data.draw(st.lists(ends, max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(GOLDEN / "gqa-mp1" / "params.json", folder)
        (Path(folder) / "consolidated.00.pth").write_bytes(damaged)
        try:
            build(Path(folder))
        except ValueError as error:
            assert "consolidated.00.pth" in str(error) or "not its tokenizer" in str(error)


def test_missing_files_are_named(golden_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere: pass the folder that holds params\.json"
    ):
        build(tmp_path / "nowhere")
    (golden_copy / "consolidated.01.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"consolidated\.01\.pth is missing: shards 00, 02, 03 are present"
    ):
        build(golden_copy)
    for file in golden_copy.glob("*.pth"):
        file.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no consolidated\.\*\.pth in .*: is this the folder that download\.sh",
    ):
        build(golden_copy)
    shutil.copy(GOLDEN / "gqa-mp1" / "consolidated.00.pth", golden_copy)
    (golden_copy / "params.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"no params\.json in .*: is this the folder that download\.sh made\?",
    ):
        build(golden_copy)


@pytest.mark.parametrize("option", ["ckpt_dir", "adapter_dir"])
def test_a_name_on_the_hub_is_told_how_to_get_the_folder(option: str, tmp_path: Path) -> None:
    folders = {"ckpt_dir": GOLDEN / "gqa-mp1"} | {option: "meta-llama/Llama-2-7b-hf"}
    with pytest.raises(FileNotFoundError) as error:
        Checkpoint(**folders)
    assert str(error.value).startswith(
        "no folder meta-llama/Llama-2-7b-hf: pass the folder that holds "
    )
    assert str(error.value).endswith(
        "; if it is a name on the Hugging Face hub, run hf download meta-llama/Llama-2-7b-hf --local-dir "
        "Llama-2-7b-hf and pass Llama-2-7b-hf"
    )
    for path in (
        "tests/Llama-2-7b-hf",
        "./Llama-2-7b-hf",
        "Llama-2-7b-hf",
        tmp_path / "Llama-2-7b-hf",
    ):
        with pytest.raises(
            FileNotFoundError, match="no folder .*Llama-2-7b-hf: pass the folder that holds [^;]*$"
        ):
            Checkpoint(**folders | {option: path})


def test_a_file_in_place_of_its_folder_is_told_what_to_pass(
    golden_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("consolidated.00.pth", "model.safetensors", "params.json"):
        (golden_copy / name).touch()
        with pytest.raises(
            ValueError, match=f"{name} is a file: pass the folder that holds it, {golden_copy}$"
        ):
            build(golden_copy / name)
    monkeypatch.chdir(golden_copy)
    with pytest.raises(
        ValueError, match=rf"^params\.json is a file: pass the folder that holds it, {golden_copy}$"
    ):
        build(Path("params.json"))


def test_paths_are_as_users_write_them(golden_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = golden_copy.parent
    monkeypatch.setenv("HOME", str(home))
    shutil.copy(GOLDEN / "tokenizer.model", home)
    golden_copy.rename(home / "7")
    build(Path("~/7"), Path("~/tokenizer.model"))
    Llama.build("~/7", "~/tokenizer.model", 64, 4, device="cpu")
    monkeypatch.chdir(home)
    Llama.build(7, None, 64, 4, device="cpu")  # a command line may parse --ckpt_dir 7 as an integer
    shutil.copy(GOLDEN / "tokenizer.model", home / "8")
    Llama.build(7, 8, 64, 4, device="cpu")
    with pytest.raises(FileNotFoundError, match="no folder ~/elsewhere: pass the folder"):
        Checkpoint("~/elsewhere")
    for path in (None, 7.5, True, [home / "7"], b"7"):
        with pytest.raises(TypeError, match=re.escape(f"ckpt_dir is {path!r}: use a path")):
            Checkpoint(path)
    with pytest.raises(TypeError, match="adapter_dir is 0.5: use a path"):
        Checkpoint(7, 0.5)


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_tokenizer_beside_a_link_to_the_folder_or_beside_the_folder_is_found(
    golden_copy: Path,
) -> None:
    links = golden_copy.parent / "links"
    links.mkdir()
    (links / "model").symlink_to(golden_copy)
    for beside in (links, golden_copy.parent):
        shutil.copy(GOLDEN / "tokenizer.model", beside)
        assert Checkpoint(links / "model").tokenizer_path == beside / "tokenizer.model"
        (beside / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="or beside it: pass tokenizer_path"):
        _ = Checkpoint(links / "model").tokenizer_path


def test_a_missing_last_shard_shows_in_the_shapes(golden_copy: Path) -> None:
    (golden_copy / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError, match="a shard is missing or from another model"):
        build(golden_copy)


def test_shards_of_two_models_are_refused(golden_copy: Path) -> None:
    shutil.copy(GOLDEN / "mha-mp2" / "consolidated.01.pth", golden_copy)
    with pytest.raises(
        ValueError, match=r"consolidated\.01\.pth: .* has shape .*, and params\.json requires"
    ):
        build(golden_copy)


def test_a_missing_tensor_is_named(golden_copy: Path) -> None:
    rewrite(golden_copy, lambda shard: shard.pop("layers.1.ffn_norm.weight"), "02")
    with pytest.raises(
        ValueError, match=r"consolidated\.02\.pth lacks tensor layers\.1\.ffn_norm\.weight"
    ):
        build(golden_copy)


def test_params_that_mean_another_model_are_refused(golden_copy: Path) -> None:
    edit_params(golden_copy, use_scaled_rope=True)
    with pytest.raises(
        ValueError,
        match=r"params\.json has unknown key 'use_scaled_rope' \(Llama 3\.1\): not supported",
    ):
        build(golden_copy)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"params\.json is not JSON"),
        ("[1]", r"params\.json is not a JSON object"),
        ('{"dim": 64}', r"params\.json lacks key 'n_layers'"),
    ],
)
def test_params_that_are_broken_are_refused(golden_copy: Path, text: str, sentence: str) -> None:
    (golden_copy / "params.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        build(golden_copy)


def test_params_out_of_range_are_refused(golden_copy: Path) -> None:
    edit_params(golden_copy, n_heads=-8)
    with pytest.raises(
        ValueError, match=r"params\.json has n_heads -8: expected a positive integer"
    ):
        build(golden_copy)
    edit_params(golden_copy, n_heads=64)
    with pytest.raises(
        ValueError, match="dim 64, 64 attention heads and 4 key/value heads, which do not divide"
    ):
        build(golden_copy)
    edit_params(golden_copy, n_heads=8, n_layers=2 * 10**9)
    with pytest.raises(
        ValueError,
        match="lacks tensor layers.1999999999.attention_norm.weight: params.json is from ano",
    ):
        build(golden_copy)
    edit_params(golden_copy, n_heads=7, n_layers=2)
    with pytest.raises(
        ValueError, match="dim 64, 7 attention heads and 4 key/value heads, which do not divide"
    ):
        build(golden_copy)


def test_params_of_another_vocabulary_are_refused(golden_copy: Path) -> None:
    edit_params(golden_copy, vocab_size=32000)
    with pytest.raises(
        ValueError, match=r"params\.json has vocab_size 32000, the checkpoint's embedding 512 rows"
    ):
        build(golden_copy)


def test_a_tokenizer_of_another_model_is_refused(golden_copy: Path) -> None:
    rewrite(golden_copy, lambda shard: shard.update({"tok_embeddings.weight": torch.ones(600, 16)}))
    with pytest.raises(ValueError) as error:
        build(golden_copy)
    assert str(error.value) == (
        "tokenizer has 512 pieces, the checkpoint's embedding 600 rows: this is not its tokenizer"
    )


def test_too_little_memory_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Cache of one slot: 2 layers × 4 heads × 8 channels × 64 positions × 2 (k and v) × 4 bytes.
    # One pass: 4 × 64 positions × (4 × 64 model channels + 6 × 224 feed-forward channels + 2 × 512
    # logits) × 4 bytes.
    row, one_pass = 32_768, 2_686_976
    monkeypatch.setattr("llama.checkpoints.loading.load", lambda *_: pytest.fail("loaded"))
    weights = (
        sum(
            tensor.numel() for tensor in torch.load(GOLDEN / "gqa-mp1/consolidated.00.pth").values()
        )
        * 4
    )
    monkeypatch.setattr(
        "llama.checkpoints.memory.free_memory", lambda device: weights + one_pass + 3 * row
    )
    with pytest.raises(ValueError) as error:
        build_golden()
    assert str(error.value) == (
        "gqa-mp1 needs 0.7 MB for its weights, 0.1 MB for a cache of max_batch_size 4 × max_seq_len 64 and 2.7 MB for "
        "a pass, per rank, and cpu has 3.5 MB free for it: build with max_batch_size 3 or a smaller max_seq_len"
    )
    monkeypatch.setattr("llama.checkpoints.memory.free_memory", lambda device: weights - 1)
    with pytest.raises(
        ValueError, match="use fewer bits per weight, more ranks or a smaller model"
    ):
        build_golden()
    monkeypatch.setattr(
        "llama.checkpoints.memory.free_memory",
        lambda device: weights * 6 // 10 + one_pass + 4 * row,
    )
    for options in ({"quantize": "int8", "dtype": "auto"}, {"dtype": "bfloat16"}):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            build_golden(**options)


def control_group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_containers_limit_counts_as_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    assert container_memory(tmp_path, own) == math.inf
    assert container_memory(tmp_path, tmp_path / "none") == math.inf
    control_group(
        tmp_path, memory__max="max", memory__current=700, memory__stat="anon 400\nfile 200\nshmem 0"
    )
    assert container_memory(tmp_path, own) == math.inf
    control_group(tmp_path, memory__max=1000)
    assert container_memory(tmp_path, own) == 500
    monkeypatch.setattr("llama.checkpoints.memory.container_memory", lambda: 4e6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 2_000_000


def test_shared_memory_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    control_group(
        tmp_path,
        memory__max=1000,
        memory__current=700,
        memory__stat="anon 400\nfile 200\nshmem 150",
    )
    assert container_memory(tmp_path, tmp_path / "own") == 350


def test_the_tightest_limit_of_nested_control_groups_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("12:cpu,cpuacct:/a/b\n0::/c/d\n")
    control_group(root / "c", memory__max=900, memory__current=100, memory__stat="file 10\nshmem 0")
    control_group(
        root / "c" / "d", memory__max="max", memory__current=50, memory__stat="file 5\nshmem 0"
    )
    assert container_memory(root, own) == 810
    control_group(root / "c" / "d", memory__max=500)
    assert container_memory(root, own) == 455
    # In a container, the name may be that of a group on the host. Then the root is the container's
    # own group.
    shutil.rmtree(root / "c")
    control_group(root, memory__max=400, memory__current=100, memory__stat="file 60\nshmem 20")
    assert container_memory(root, own) == 340


@pytest.mark.parametrize(
    ("largest", "set_to"), [(2**25, 2**25), (2**31, 2**30)], ids=["older glibc", "newer"]
)
def test_freed_memory_is_kept_as_far_as_the_c_library_lets(
    monkeypatch: pytest.MonkeyPatch, largest: int, set_to: int
) -> None:
    values = {}

    class Library:
        def malloc_trim(self, pad: int) -> int:
            return 1

        def mallopt(self, parameter: int, value: int) -> int:
            if parameter == -3 and value > largest:
                return 0
            values[parameter] = value
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.31"))
    return_freed_memory()
    keep_freed_memory()
    assert values == {-1: 2**31 - 1, -3: set_to}


def test_the_room_for_a_pass_does_not_grow_with_the_longest_prompt() -> None:
    def needs(**sizes: int) -> Memory:
        return memory_needs(replace(LLAMA_7B, **sizes), 1, torch.bfloat16, 2)

    short, long = needs(max_seq_len=1024), needs(max_seq_len=100_000)
    assert short.pass_bytes == long.pass_bytes
    assert long.total(3) - long.total(2) == long.cache_row
    assert (
        needs(max_seq_len=16, max_batch_size=2).pass_bytes * (CHUNK_TOKENS + 32)
        == short.pass_bytes * 32
    )


def test_what_is_counted_as_weights_is_what_each_rank_loads() -> None:
    args = Checkpoint(GOLDEN / "gqa-mp1").model_args(64, 4)
    own = sum(tensor.nbytes for tensor in build_golden("gqa-mp1").model.state_dict().values())
    norms = 5 * 64 * 4
    for ranks in (1, 2, 4):
        assert memory_needs(args, ranks, torch.float32, 4).weights == (own - norms) // ranks + norms
    cache = build_golden().model.cache
    assert args.max_batch_size * memory_needs(args, 1, torch.float32, 4).cache_row == sum(
        t.nbytes for t in (*cache.k, *cache.v)
    )


def test_a_length_that_no_memory_holds_is_refused_before_it_is_tried() -> None:
    with pytest.raises(
        ValueError, match=r"max_batch_size 4 × max_seq_len 1000000000 and .* per rank, and cpu has"
    ):
        build_golden(max_seq_len=10**9)
    with pytest.raises(ValueError, match="max_seq_len is 1000.*: use 1 or more and less than"):
        build_golden(max_seq_len=10**30)


@pytest.mark.parametrize("device", ["cuda", "gpu", None, "mps"])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(
        ValueError, match="device is .*, which this machine does not have: use 'auto' or 'cpu'"
    ):
        build_golden(device=device)


@pytest.mark.slow
def test_loading_holds_the_ranks_own_tensors_and_no_more_than_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_golden()  # torch's meta context stores torch.empty at its first use
    allocated = []
    empty = torch.empty

    def recorded(*sizes: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*sizes, **options)
        if tensor.device.type == "cpu" and tensor.numel():
            allocated.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    model = build_golden("gqa-mp4").model
    monkeypatch.undo()
    own = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert {tensor.data_ptr(): tensor.nbytes for tensor in allocated} == own


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
def test_sizes_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: use 1 or more"):
        build_golden(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} is '64': use an integer"):
        build_golden(**{name: "64"})
