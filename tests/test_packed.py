"""GPTQ and AWQ folders, packed by a helper that follows the definitions of the formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, huggingface_config, random_state, run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.checkpoints.convert import convert
from llama.checkpoints.names import huggingface_name, interleave, is_rotary, split_halves
from llama.cli.info import info, verify
from llama.ops import kernels
from llama.parallel import ShardedLinear

ARGS = ModelArgs(
    dim=256, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=256, max_seq_len=64
)
TOKENS = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
built = pytest.mark.skipif(kernels.library() is None, reason="our kernels were not built")


def pack(q: Tensor, bits: int, order: list[int]) -> Tensor:
    """Pack integers (n, m) into 32-bit words (n, m × bits / 32).

    Integer j of a word begins at bit bits × order[j].
    """
    words = q.long().unflatten(1, (-1, 32 // bits))
    packed = sum(words[:, :, j] << bits * place for j, place in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()  # type: ignore[arg-type]


def quantized(
    weight: Tensor, bits: int, groups: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight (out, in) to q (in, out), zeros and scales (groups, out).

    Input i belongs to group groups[i].
    """
    w, count = weight.T, int(groups.max()) + 1
    zeros, scales = torch.empty(count, len(weight)), torch.empty(count, len(weight))
    for g in range(count):
        part = w[groups == g]
        low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales[g] = ((high - low) / (2**bits - 1)).half().float()
        zeros[g] = (
            2.0 ** (bits - 1) if symmetric else (-low / scales[g]).round().clamp(1, 2**bits - 1)
        )
    q = (w / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1)
    return q, zeros, scales


def write_folder(
    folder: Path,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    layout: str | None = None,
    **said: Any,
) -> dict[str, Tensor]:
    """Write a folder of random weights; return their exact values in the release's order."""
    folder.mkdir()
    values, tensors = {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, weight in random_state(ARGS).items():
        theirs = split_halves(weight, ARGS.head_dim) if is_rotary(name) else weight
        stem = huggingface_name(name).removesuffix(".weight")
        if weight.dim() == 1 or name in ("tok_embeddings.weight", "output.weight"):
            tensors[f"{stem}.weight"], values[name] = theirs.half(), weight.half().float()
            continue
        rows, inputs = weight.shape
        size = inputs if group_size == -1 else group_size
        groups = torch.arange(inputs) // size
        if act_order:
            # Projections of the same input (q, k and v; gate and up) have the same order.
            groups = groups[
                torch.randperm(
                    inputs, generator=generator.manual_seed(inputs + len(stem.split(".")[2]))
                )
            ]
        q, zeros, scales = quantized(theirs, bits, groups, symmetric)
        exact = ((q - zeros[groups]) * scales[groups]).T
        values[name] = interleave(exact, ARGS.head_dim) if is_rotary(name) else exact
        if method == "gptq":
            stored = zeros if layout == "gptq_v2" else zeros - 1
            in_turn = list(range(32 // bits))
            tensors[f"{stem}.qweight"] = pack(q.T, bits, in_turn).T.contiguous()
            tensors[f"{stem}.qzeros"] = pack(stored, bits, in_turn)
            tensors[f"{stem}.g_idx"] = groups.int()
            tensors[f"{stem}.bias"] = torch.zeros(rows, dtype=torch.float16)
        else:
            order = [0, 4, 1, 5, 2, 6, 3, 7]
            tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"] = (
                pack(q, 4, order),
                pack(zeros, 4, order),
            )
        tensors[f"{stem}.scales"] = scales.half()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    kind = {"quant_method": method, "bits": bits, "group_size": group_size}
    kind |= (
        {"desc_act": act_order, "sym": symmetric}
        if method == "gptq"
        else {"version": "gemm", "zero_point": True}
    )
    kind |= {"checkpoint_format": layout} if layout else {}
    config = huggingface_config(ARGS) | {"model_type": "llama", "quantization_config": kind | said}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return values


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, None, 64, 2, device="cpu", **options)


def layers_of(llm: Llama) -> dict[str, ShardedLinear]:
    return {
        f"{name}.weight": m for name, m in llm.model.named_modules() if isinstance(m, ShardedLinear)
    }


def model_of(values: dict[str, Tensor]) -> Transformer:
    model = Transformer(ARGS)
    model.load_state_dict(values)
    return model


FORMATS: list[dict[str, Any]] = [
    {},
    {"group_size": 32},
    {"group_size": 64, "symmetric": False},
    {"group_size": -1},
    {"symmetric": False},
    {"layout": "gptq"},
    {"layout": "gptq_v2", "symmetric": False},
    {"bits": 8},
    {"bits": 8, "symmetric": False, "group_size": 32},
    {"bits": 8, "layout": "gptq_v2", "group_size": -1},
    {"act_order": True},
    {"act_order": True, "symmetric": False, "group_size": 32},
    {"act_order": True, "group_size": -1},
    {"method": "awq"},
    {"method": "awq", "symmetric": False},
    {"method": "awq", "symmetric": False, "group_size": 32},
    {"method": "awq", "group_size": -1},
]


@pytest.mark.parametrize("how", FORMATS, ids=str)
def test_a_packed_folder_is_the_model_of_its_values(tmp_path: Path, how: dict[str, Any]) -> None:
    values = write_folder(tmp_path / "packed", **how)
    exact = build(tmp_path / "packed", dtype="float32")
    for name, tensor in exact.model.state_dict().items():
        torch.testing.assert_close(tensor, values[name], atol=1e-7, rtol=1e-6)
    wanted = model_of(values)(TOKENS).detach()
    torch.testing.assert_close(exact.model(TOKENS), wanted, atol=1e-4, rtol=0)
    own = build(tmp_path / "packed")
    # The output layer stays in 16 bits, which rounds.
    assert (own.model(TOKENS) - wanted).norm() / wanted.norm() < 0.02
    if kernels.available():
        for name, layer in layers_of(own).items():
            if name != "output.weight":
                assert getattr(layer.packed, "shared", layer.packed).bits == how.get("bits", 4)
                torch.testing.assert_close(
                    layer.packed.dequantize(), values[name], atol=1e-6, rtol=1e-6
                )
        attention = own.model.layers[1].attention
        assert attention.wq.packed.shared is attention.wv.packed.shared


@built
def test_symmetric_weights_take_no_lows(tmp_path: Path) -> None:
    write_folder(tmp_path / "packed")
    store = build(tmp_path / "packed").model.layers[0].attention.wo.packed
    assert sum(buffer.nbytes for buffer in store.buffers()) == 256 * 256 * 18 / 32


@pytest.mark.parametrize("how", [how for how in FORMATS if how.get("group_size") != -1], ids=str)
def test_transformers_reads_the_same_values(tmp_path: Path, how: dict[str, Any]) -> None:
    pytest.importorskip(
        "gptqmodel", reason="transformers needs gptqmodel and optimum to read packed weights"
    )
    transformers = pytest.importorskip("transformers")
    values = write_folder(tmp_path / "packed", **how)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        theirs, ours = judge(TOKENS).logits.float(), model_of(values)(TOKENS)
    assert (theirs - ours).norm() / ours.norm() < 0.01  # transformers computes in 16 bits


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_packed_folder(tmp_path: Path, world_size: int) -> None:
    write_folder(tmp_path / "gptq", symmetric=False, group_size=32)
    write_folder(tmp_path / "awq", "awq", group_size=64)
    write_folder(tmp_path / "order", act_order=True)
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import torch, torch.distributed as dist
from llama import Llama
tokens, logits = torch.arange(3, 40)[None], {{}}
for name, dtype in (("gptq", "auto"), ("awq", "auto"), ("gptq", "float32"), ("order", "float32")):
    llm = Llama.build(f"{tmp_path}/{{name}}", None, 64, 1, device="cpu", dtype=dtype)
    logits[f"{{name}} {{dtype}}"] = llm.model(tokens, 0)
if dist.get_rank() == 0:
    torch.save(logits, "{tmp_path}/logits")
dist.barrier()
Llama.build("{tmp_path}/order", None, 64, 1, device="cpu", quantize="int4")
""")
    job = run_ranks(world_size, script)
    if kernels.available():
        assert job.returncode != 0
        assert (
            "ValueError: order has inputs of layers.0.attention.wo.weight whose groups are scattered (desc_act), which "
            f"{world_size} ranks cannot share: use 1, or dtype='bfloat16'" in job.stderr
        )
    for key, logits in torch.load(tmp_path / "logits").items():
        name, dtype = key.split()
        wanted = build(tmp_path / name, dtype=dtype).model(torch.arange(3, 40)[None])
        assert (logits - wanted).norm() / wanted.norm() < (1e-5 if dtype == "float32" else 0.02)


def test_other_ways_to_hold_a_packed_folder_are_honoured(tmp_path: Path) -> None:
    values = write_folder(tmp_path / "packed", act_order=True)
    wanted = model_of(values)(TOKENS).detach()
    for options, bound in (
        ({"quantize": "int8"}, 0.03),
        ({"dtype": "bfloat16"}, 0.03),
        ({"quantize": "int4"}, 0.1),
    ):
        llm = build(tmp_path / "packed", **options)
        assert (llm.model(TOKENS).float() - wanted).norm() / wanted.norm() < bound


def test_a_packed_folder_is_described_checked_and_converted(tmp_path: Path) -> None:
    values = write_folder(tmp_path / "packed", symmetric=False)
    said = info(str(tmp_path / "packed"))
    assert (
        "packed: Hugging Face layout, 1 file(s) of weights, " in said
        and "GPTQ in 4 bits and float16" in said
    )
    assert said.splitlines()[4].split()[-3:] == ["own", "cache", "pass"]
    assert (
        verify(str(tmp_path / "packed"))
        == "21 tensors are whole, as far as can be seen without a checklist.chk"
    )
    convert(str(tmp_path / "packed"), str(tmp_path / "plain"), "meta")
    state = build(tmp_path / "plain", dtype="float32").model.state_dict()
    assert all(torch.equal(state[name], value.half().float()) for name, value in values.items())


def test_a_zero_of_0_has_borrowed_from_its_neighbour_in_version_1(tmp_path: Path) -> None:
    write_folder(tmp_path / "packed", symmetric=False, layout="gptq_v2")
    file, stem = tmp_path / "packed" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    tensors[f"{stem}.qzeros"][:, 0] &= ~0xF  # the zero point of the first row
    save_file(tensors, file)
    wanted = build(tmp_path / "packed", dtype="float32").model.state_dict()
    zeros = {
        name: tensor - 0x11111111 for name, tensor in tensors.items() if name.endswith(".qzeros")
    }
    save_file(tensors | zeros, file)
    edit_config(tmp_path / "packed", checkpoint_format="gptq")
    ours = build(tmp_path / "packed", dtype="float32").model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def edit_config(folder: Path, **said: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | {"quantization_config": config["quantization_config"] | said})
    )


def test_what_older_packers_wrote_is_found(tmp_path: Path) -> None:
    values = write_folder(tmp_path / "packed")
    folder = tmp_path / "packed"
    config = json.loads((folder / "config.json").read_text())
    kind = config.pop("quantization_config")
    del kind["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(kind))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    state = build(folder, dtype="float32").model.state_dict()
    torch.testing.assert_close(
        state["layers.0.attention.wq.weight"], values["layers.0.attention.wq.weight"]
    )
    (folder / "quantize_config.json").unlink()
    kind = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(kind))
    with pytest.raises(ValueError, match="has shape"):  # GPTQ's shape, not AWQ's
        build(folder)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "config.json has quant_method 'bitsandbytes': not supported, only gptq and awq",
        ),
        (
            {"quant_method": None},
            "config.json has quant_method None: not supported, only gptq and awq are",
        ),
        (
            {"checkpoint_format": "marlin"},
            "weights in gptq's format 'marlin': not supported, only 'gptq' and 'gptq_v2'",
        ),
        ({"bits": 3}, "config.json has bits 3: not supported, only 4 and 8 are"),
        ({"bits": None}, "config.json has bits None: not supported, only 4 and 8 are"),
        ({"checkpoint_format": None, "format": "marlin"}, "weights in gptq's format 'marlin'"),
        ({"group_size": 16}, "has group_size 16: not supported, only -1 and multiples of 32 are"),
        (
            {"group_size": 64},
            r"qzeros has shape \(\d, 32\), which does not fit 4 bits in groups of 64",
        ),
        ({"bits": 8}, "which does not fit 8 bits in groups of 128: download it again"),
        ({"quant_method": "awq"}, "weights in awq's format|does not fit 4 bits"),
    ],
)
def test_other_packings_are_refused_by_name(
    tmp_path: Path, said: dict[str, Any], sentence: str
) -> None:
    write_folder(tmp_path / "packed")
    edit_config(tmp_path / "packed", **said)
    with pytest.raises(ValueError, match=sentence):
        build(tmp_path / "packed")


def test_versions_of_awq_that_pack_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "packed", "awq", version="gemv")
    with pytest.raises(
        ValueError,
        match="config.json has weights in awq's format 'gemv': not supported, only 'gemm' are",
    ):
        build(tmp_path / "packed")


def test_damaged_parts_are_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "packed")
    file, stem = tmp_path / "packed" / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = load_file(file)

    def refused(change: dict[str, Tensor | None], sentence: str) -> None:
        changed = tensors | change  # type: ignore[operator]
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=sentence):
            build(tmp_path / "packed")

    refused(
        {f"{stem}.scales": None},
        rf"{stem}\.scales is missing beside {stem}\.qweight: download it again",
    )
    refused(
        {f"{stem}.qweight": tensors[f"{stem}.qweight"][:-1].contiguous()},
        "does not fit 4 bits in groups of 128",
    )
    refused(
        {f"{stem}.qzeros": tensors[f"{stem}.qzeros"].float()},
        rf"{stem}\.qzeros has type float32: download it again",
    )
    refused(
        {f"{stem}.g_idx": torch.zeros(256, dtype=torch.int32)}, "groups that do not have 128 inputs"
    )
    refused(
        {f"{stem}.scales": torch.tensor(1.0).half()},
        rf"{stem}\.scales has shape \(\): download it again",
    )
    refused(
        {f"{stem}.qweight": torch.tensor(1).int()},
        rf"{stem}\.qweight has shape \(\): download it again",
    )
    refused({f"{stem}.bias": torch.ones(256).half()}, rf"holds unknown tensor {stem}\.bias")
    refused({"model.norm.weight": torch.ones(256).int()}, r"model\.norm\.weight has type int32")
