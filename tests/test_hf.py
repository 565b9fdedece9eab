"""The Hugging Face layout and PEFT adapters, compared with transformers and peft."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, huggingface_config, random_state, run_python, run_ranks, write_release
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama, ModelArgs
from llama.checkpoints import Checkpoint
from llama.checkpoints.convert import convert, reshard
from llama.checkpoints.huggingface import feed_forward_params

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(512, (3, 20), generator=torch.Generator().manual_seed(0))


def save_judge(folder: Path, args: ModelArgs, parts: str = "5GB", **config: Any) -> torch.Tensor:
    """Save random weights with transformers alone; return its logits for TOKENS."""
    torch.manual_seed(1)
    judge = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**huggingface_config(args) | config)
    ).eval()
    for name, parameter in judge.named_parameters():
        torch.nn.init.normal_(
            parameter, float("norm" in name), 0.1 if "norm" in name else 1.5 * args.dim**-0.5
        )
    judge.save_pretrained(folder, max_shard_size=parts)
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    with torch.no_grad():
        return judge(TOKENS).logits


def build(folder: Path, **options: Any) -> Llama:
    options = {"device": "cpu", "dtype": "float32"} | options
    return Llama.build(folder, max_seq_len=64, max_batch_size=4, **options)


def assert_logits(folder: Path, logits: torch.Tensor, **options: Any) -> None:
    torch.testing.assert_close(build(folder, **options).model(TOKENS, 0), logits, atol=1e-4, rtol=0)


@pytest.fixture
def judged(tmp_path: Path, args: ModelArgs) -> tuple[Path, torch.Tensor]:
    folder = tmp_path / "judged"
    return folder, save_judge(folder, args)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("n_kv_heads", [None, 4])
@pytest.mark.parametrize("parts", ["5GB", "40KB"])
def test_what_transformers_saved_has_its_logits(
    tmp_path: Path, args: ModelArgs, n_kv_heads: int | None, parts: str
) -> None:
    args.n_kv_heads = n_kv_heads
    logits = save_judge(tmp_path, args, parts)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or parts == "40KB"
    assert_logits(tmp_path, logits)


@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"intermediate_size": 96},  # narrower than by the release's formula
        {"intermediate_size": 1000},
        {"rms_norm_eps": 0.1},
    ],
    ids=lambda config: next(iter(config)),
)
def test_settings_that_change_the_logits_are_honoured(
    tmp_path: Path, args: ModelArgs, config: dict[str, Any]
) -> None:
    assert_logits(tmp_path, save_judge(tmp_path, args, **config))


def test_the_older_spelling_of_rope_settings_is_read(
    judged: tuple[Path, torch.Tensor], args: ModelArgs
) -> None:
    folder, logits = judged
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("rope_parameters", None) or config.pop("rope_theta", None)
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_theta": 10000.0, "rope_scaling": None})
    )
    assert_logits(folder, logits)
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    scaled = save_judge(
        folder.with_name("scaled"),
        args,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    assert_logits(folder, scaled)


def test_bin_files_are_read_and_their_old_buffers_ignored(
    judged: tuple[Path, torch.Tensor],
) -> None:
    from safetensors.torch import load_file

    folder, logits = judged
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        folder / "pytorch_model.bin",
    )
    assert_logits(folder, logits)
    first = dict(list(tensors.items())[:5])
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    (folder / "pytorch_model.bin").unlink()
    torch.save(first, folder / "a.bin")
    torch.save(rest, folder / "b.bin")
    weight_map = dict.fromkeys(first, "a.bin") | dict.fromkeys(rest, "b.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_logits(folder, logits)
    (folder / "b.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"b\.bin is missing: pytorch_model\.bin\.index\.json lists it"
    ):
        build(folder)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_read_their_slices_and_have_the_logits_of_transformers(
    judged: tuple[Path, torch.Tensor], tmp_path: Path, world_size: int
) -> None:
    folder, logits = judged
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import sys, torch
from test_hf import TOKENS, Path, build
torch.save(build(Path({str(folder)!r})).model(TOKENS, 0), {str(tmp_path / "logits")!r})
""")
    job = run_ranks(world_size, script)
    assert job.returncode == 0, job.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "auto"}],
    ids=str,
)
def test_types_and_quantisations_are_those_of_the_releases_layout(
    judged: tuple[Path, torch.Tensor], tmp_path: Path, options: dict[str, Any]
) -> None:
    convert(str(judged[0]), str(tmp_path / "release"), "meta")
    ours, released = (build(folder, **options) for folder in (judged[0], tmp_path / "release"))
    assert torch.equal(ours.model(TOKENS, 0), released.model(TOKENS, 0))


@pytest.mark.parametrize("n_kv_heads", [None, 4])
@pytest.mark.parametrize("shards", [1, 4])
def test_to_hugging_face_and_back_are_the_same_tensors(
    tmp_path: Path, args: ModelArgs, n_kv_heads: int | None, shards: int
) -> None:
    args.n_kv_heads = n_kv_heads
    state = {name: tensor.bfloat16() for name, tensor in random_state(args).items()}
    write_release(tmp_path / "release", args, state, shards)
    convert(str(tmp_path / "release"), str(tmp_path / "hf"), "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), "meta")
    back = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True)
    assert back.keys() == state.keys()
    assert all(
        back[name].dtype == torch.bfloat16 and torch.equal(back[name], state[name])
        for name in state
    )
    ours, theirs = (
        Checkpoint(tmp_path / folder).model_args(9, 9) for folder in ("back", "release")
    )
    assert ours.hidden_dim == theirs.hidden_dim
    assert replace(ours, multiple_of=32) == theirs


def test_transformers_reads_what_we_write(
    judged: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.checkpoints.convert.PART_BYTES", 100_000)
    convert(str(judged[0]), str(tmp_path / "written"), "hf")
    assert len(list((tmp_path / "written").glob("*.safetensors"))) > 1
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, judged[1], atol=1e-5, rtol=0)


@given(dim=st.integers(1, 64).map(lambda n: 8 * n), hidden=st.integers(1, 5000))
def test_any_feed_forward_width_is_had_from_the_releases_formula(dim: int, hidden: int) -> None:
    assert ModelArgs(dim=dim, **feed_forward_params(dim, hidden)).hidden_dim == hidden


def test_the_tokenizer_is_found_in_the_folder_or_beside_it(
    judged: tuple[Path, torch.Tensor],
) -> None:
    folder = judged[0]
    build(folder)
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    build(folder)
    (folder.parent / "tokenizer.model").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer\.model in .* or beside it: pass tokenizer_path"
    ):
        build(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model_type": "mistral"},
            "config.json has model_type 'mistral': not supported, only 'llama' is",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"has architectures \['LlamaForSequenceC",
        ),
        (
            {"attention_bias": True},
            "config.json has attention_bias True: not supported, only False is",
        ),
        ({"mlp_bias": True}, "config.json has mlp_bias True: not supported"),
        (
            {"hidden_act": "gelu"},
            "config.json has hidden_act 'gelu': not supported, only 'silu' is",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "config.json has quant_method 'fp8': not supported, only gptq",
        ),
        (
            {"quantization_config": "int4"},
            "config.json has quantization_config 'int4': expected a dict",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling of type 'dynamic': not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling of type 'llama3': not supported",
        ),
        ({"rope_scaling": "linear"}, "config.json has rope_scaling 'linear': expected a dict"),
        ({"rope_parameters": [1]}, r"config.json has rope_parameters \[1\]: expected a dict"),
        ({"architectures": 5}, "config.json has architectures 5: not supported, only"),
        (
            {"num_key_value_heads": 0},
            "config.json has num_key_value_heads 0: expected a positive integer",
        ),
        ({"rms_norm_eps": 0}, "config.json has rms_norm_eps 0: expected a positive number"),
        (
            {"rope_parameters": {"rope_theta": 0}},
            "config.json has rope_theta 0: expected a positive number",
        ),
        (
            {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None},
            "64 attention heads and 64 key/value heads, which do",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "has rope_scaling_factor None: expected a positive number",
        ),
        ({"head_dim": 16}, "config.json has head_dim 16: not supported, only 8 is"),
        ({"hidden_size": None}, "config.json lacks key 'hidden_size'"),
        (
            {"max_position_embeddings": "4k"},
            "config.json has max_position_embeddings '4k': expected a positive int",
        ),
        (
            {"num_hidden_layers": -2},
            "config.json has num_hidden_layers -2: expected a positive integer",
        ),
        (
            {"num_attention_heads": "8"},
            "config.json has num_attention_heads '8': expected a positive integer",
        ),
        (
            {"num_hidden_layers": 3},
            "lacks tensor layers.2.attention_norm.weight: config.json is from another model",
        ),
        ({"num_hidden_layers": 1}, "holds unknown tensor model.layers.1.input_layernorm.weight"),
        (
            {"intermediate_size": 64},
            r"gate_proj.weight has shape \(192, 64\), and config.json requires \(64, 64\)",
        ),
        (
            {"vocab_size": 500},
            "config.json has vocab_size 500, the checkpoint's embedding 512 rows",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configs_that_mean_another_model_are_refused(
    judged: tuple[Path, torch.Tensor], changes: dict[str, Any], sentence: str
) -> None:
    edit_config(judged[0], **changes)
    with pytest.raises(ValueError, match=sentence):
        build(judged[0])


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({"max_position_embeddings": 40}, 40),
        ({"max_position_embeddings": 20, "rope_scaling": {"type": "linear", "factor": 2.0}}, 40),
        ({"max_position_embeddings": None}, None),
    ],
    ids=["plain", "scaled", "unknown"],
)
def test_a_length_beyond_what_the_model_was_made_for_is_warned_of_once(
    judged: tuple[Path, torch.Tensor],
    changes: dict[str, Any],
    longest: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit_config(judged[0], rope_parameters=None, **changes)
    Llama.build(judged[0], max_seq_len=longest or 64, max_batch_size=1, device="cpu")
    assert caplog.messages == []
    Llama.build(judged[0], max_seq_len=64, max_batch_size=1, device="cpu")
    assert caplog.messages == [
        "max_seq_len is 64, and judged was made for 40 tokens (config.json): text beyond that may make no sense"
    ] * bool(longest)


def test_the_length_that_a_model_was_made_for_survives_conversion(
    judged: tuple[Path, torch.Tensor], args: ModelArgs, tmp_path: Path
) -> None:
    def converted(folder: Path) -> int:
        convert(str(folder), str(folder.with_name(f"{folder.name}-hf")), "hf")
        return json.loads((folder.with_name(f"{folder.name}-hf") / "config.json").read_text())[
            "max_position_embeddings"
        ]

    edit_config(judged[0], max_position_embeddings=2048)
    assert converted(judged[0]) == 2048
    release = write_release(tmp_path / "llama", args, random_state(args))
    assert converted(release) == 4096
    params = json.loads((release / "params.json").read_text()) | {"rope_theta": 1e6}
    code = Path(shutil.copytree(release, tmp_path / "code-llama"))
    (code / "params.json").write_text(json.dumps(params))
    assert converted(code) == 16384


def test_files_that_are_broken_are_named(judged: tuple[Path, torch.Tensor]) -> None:
    folder = judged[0]
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    for content in (b"", b"<!DOCTYPE html>", whole[:-1000], b"\xff" * 16 + whole[16:]):
        weights.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors is not a whole safetensors file: download it again",
        ):
            build(folder)
    weights.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no model\.safetensors, pytorch_model\.bin or index of either in"
    ):
        build(folder)
    weights.mkdir()
    with pytest.raises(
        OSError,
        match=r"model\.safetensors cannot be read \(Is a directory\): check that it exists",
    ):
        build(folder)
    config.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object: download it again"):
        build(folder)
    weights.rmdir()
    config.write_text(json.dumps(huggingface_config(ModelArgs(dim=64, vocab_size=512))))
    for name in ("../a.safetensors", 3):
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": name}})
        )
        with pytest.raises(ValueError, match="has no weight_map of file names in its folder"):
            build(folder)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_safetensors_are_refused_or_do_not_matter(data: st.DataObject) -> None:
    whole = SAVED.read_bytes()
    damaged = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, 3000), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(SAVED.parent, folder, dirs_exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(damaged)
        try:
            build(Path(folder))
        except ValueError as error:
            assert folder in str(error)


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    global SAVED
    SAVED = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_judge(
        SAVED.parent,
        ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=512, multiple_of=32, max_seq_len=64),
    )


def save_adapter(base: Path, out: Path, config: dict[str, Any]) -> torch.Tensor:
    """Save a random adapter with peft; return the logits of the merged model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    adapted.save_pretrained(out)
    with torch.no_grad():
        return adapted.merge_and_unload().eval()(TOKENS).logits


ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL_PROJECTIONS},
        {"r": 8, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": ALL_PROJECTIONS, "layers_to_transform": [1]},
        {"r": 2, "lora_alpha": 2, "target_modules": ALL_PROJECTIONS, "layers_to_transform": 0},
    ],
    ids=["all", "rslora", "one layer", "layer 0"],
)
@pytest.mark.parametrize("n_kv_heads", [None, 4])
def test_an_adapter_merged_by_us_equals_one_merged_by_peft(
    tmp_path: Path, args: ModelArgs, config: dict[str, Any], n_kv_heads: int | None
) -> None:
    args.n_kv_heads = n_kv_heads
    plain = save_judge(tmp_path / "base", args)
    logits = save_adapter(tmp_path / "base", tmp_path / "adapter", config)
    assert (logits - plain).abs().max() > 0.1
    assert_logits(tmp_path / "base", logits, adapter_dir=tmp_path / "adapter")
    reshard(str(tmp_path / "base"), str(tmp_path / "release"), 4)
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    assert_logits(tmp_path / "release", logits, adapter_dir=tmp_path / "adapter")


def test_adapters_that_would_change_the_result_otherwise_are_refused(
    judged: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, adapter = judged[0], tmp_path / "adapter"
    save_adapter(folder, adapter, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, sentence in (
        (
            {"peft_type": "IA3"},
            "adapter_config.json has peft_type 'IA3': not supported, only 'LORA' is",
        ),
        (
            {"bias": "all"},
            "adapter_config.json has bias 'all', which would change the result: not supported",
        ),
        ({"use_dora": True}, "has use_dora True, which would change the result"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save .*, which would change the result"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank_pattern .*, which would change the result"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out True, which would change the result"),
        (
            {"init_lora_weights": "pissa"},
            "has init_lora_weights 'pissa', which would change the result",
        ),
        ({"a_later_invention": 1}, "has a_later_invention 1, which would change the result"),
        (
            {"r": 8},
            r"lora_A.weight has shape \(4, 64\), and the model requires \(8, 64\): it is an adapter for another",
        ),
        ({"lora_alpha": "8"}, "adapter_config.json has lora_alpha '8': expected a positive number"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=sentence):
            build(folder, adapter_dir=adapter)
    path.write_text(json.dumps(config))
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    other = name.replace("q_proj", "rotary")
    save_file({other: tensors[name].clone()} | tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match="has tensor .*rotary.*: only down_proj, gate_proj, k_proj, .* can be adapted",
    ):
        build(folder, adapter_dir=adapter)
    save_file(
        {n: t for n, t in tensors.items() if n != name}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=f"lacks tensor {name}: download it again"):
        build(folder, adapter_dir=adapter)
    save_file(
        {n: t for n, t in tensors.items() if "layers.1." not in n},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"lacks tensor .*layers\.1\.self_attn\.q_proj\.lora_A\.weight: download"
    ):
        build(folder, adapter_dir=adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no tensors: download it again"):
        build(folder, adapter_dir=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.safetensors cannot be read \(No such file"
    ):
        build(folder, adapter_dir=adapter)


def test_without_safetensors_the_error_says_what_to_install(
    judged: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    script = tmp_path / "without.py"
    script.write_text(f"""
import sys
sys.modules["safetensors"] = None
from test_checkpoint import Path, build
try:
    build(Path({str(judged[0])!r}))
except ImportError as error:
    print(error)
""")
    job = run_python(script)
    assert (
        "model.safetensors needs the package safetensors: pip install safetensors" in job.stdout
    ), job.stderr


def extended(folder: Path, args: ModelArgs, rows: int, added: list[str], file: str) -> torch.Tensor:
    """Save a model whose embedding has `rows` rows; return its logits.

    `file` lists the tokens `added` to the 512 of tokenizer.model.
    """
    logits = save_judge(folder, replace(args, vocab_size=rows))
    ids = dict(zip(added, range(512, 512 + len(added)), strict=True))
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps(ids))
    elif file == "tokenizer.json":
        entries = [
            {"id": token, "content": text, "special": True}
            for text, token in {"<s>": 1, **ids}.items()
        ]
        (folder / file).write_text(json.dumps({"added_tokens": entries}))
    return logits


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer.json"])
@pytest.mark.parametrize("rows", [514, 520, 576])
def test_tokens_that_were_added_are_part_of_the_vocabulary(
    tmp_path: Path, args: ModelArgs, file: str, rows: int
) -> None:
    folder = tmp_path / "extended"
    logits = extended(folder, args, rows, ["<|im_start|>", "[PAD]"], file)
    assert_logits(folder, logits)
    llm = build(folder)
    assert (llm.tokenizer.n_used, llm.tokenizer.n_words) == (514, rows)
    ids = llm.tokenizer.encode("a<|im_start|>b[PAD]", bos=False, eos=False)
    assert (
        ids.count(512) == ids.count(513) == 1 and llm.tokenizer.decode(ids) == "a<|im_start|>b[PAD]"
    )
    convert(str(folder), str(tmp_path / "again"), "hf")
    convert(str(tmp_path / "again"), str(tmp_path / "release"), "meta")
    for name in ("again", "release"):
        again = build(tmp_path / name).tokenizer
        assert again.encode("[PAD]", bos=False, eos=False)[-1] == 513 and again.n_used == 514


def test_rows_that_only_pad_the_embedding_are_never_drawn(tmp_path: Path, args: ModelArgs) -> None:
    folder = tmp_path / "padded"
    logits = extended(folder, args, 576, [], "")
    assert_logits(folder, logits)
    llm = build(folder)
    llm.model.output.weight[512:] *= 50  # makes them by far the likeliest
    tokens, logprobs = llm.generate([[1, 30], [1, 40]], 40, 2.0, 1.0, logprobs=True)
    assert max(map(max, tokens)) < 512 and logprobs
    prompt = list(range(3, 30))
    _, scored = llm.generate([prompt], 0, 0, logprobs=True, echo=True)
    wanted = llm.model(torch.tensor([prompt]))[0, :, :512].log_softmax(-1)
    exact = wanted[range(26), prompt[1:]].tolist()
    assert scored is not None and scored[0][1:] == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "added"), [(513, []), (516, ["<a>", "<b>"]), (528, []), (1024, []), (544, [])]
)
def test_rows_that_nothing_explains_are_another_tokenizers(
    tmp_path: Path, args: ModelArgs, rows: int, added: list[str]
) -> None:
    extended(tmp_path / "other", args, rows, added, "added_tokens.json")
    with pytest.raises(
        ValueError,
        match=rf"tokenizer has {512 + len(added)} pieces, the checkpoint's embedding {rows} r",
    ):
        build(tmp_path / "other")


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path, args: ModelArgs) -> None:
    folder = tmp_path / "folder"
    # As in Meta's first folders.
    logits = extended(folder, args, 512, ["<pad>"], "added_tokens.json")
    assert_logits(folder, logits)
    assert build(folder).tokenizer.n_words == 512


def test_added_tokens_with_spaces_or_of_pieces_that_are_there(
    tmp_path: Path, args: ModelArgs
) -> None:
    extended(tmp_path / "folder", args, 514, ["<|end of text|>", "</s>"], "added_tokens.json")
    tokenizer = build(tmp_path / "folder").tokenizer
    assert 512 in tokenizer.encode("a<|end of text|>b", bos=False, eos=False)
    assert tokenizer.decode([512]) == "<|end of text|>" and tokenizer.eos_id == 2


def test_a_folder_is_resharded_without_a_tokenizer_that_is_not_its_own(
    tmp_path: Path, args: ModelArgs, caplog: pytest.LogCaptureFixture
) -> None:
    extended(tmp_path / "folder", args, 516, [], "")
    reshard(str(tmp_path / "folder"), str(tmp_path / "out"), 1)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert "writing no tokenizer.model: tokenizer has 512 pieces" in caplog.text


@pytest.mark.parametrize(
    "content", ['{"a": [1]}', '{"a": "b"}', '{"": 512}', '{"a": 512.5}', "[]", "{"]
)
def test_added_tokens_that_are_none_are_refused(
    tmp_path: Path, args: ModelArgs, content: str
) -> None:
    folder = tmp_path / "broken"
    extended(folder, args, 513, [], "")
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(ValueError, match=r"added_tokens\.json .*: download it again"):
        build(folder)
