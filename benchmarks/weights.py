"""Make a random checkpoint of a named shape, in each layout that a contender reads.

Every layout has the same weights and is made once.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import torch

from llama import ModelArgs, Transformer
from llama.checkpoints.convert import convert

SHAPES = {
    "tiny": ModelArgs(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, multiple_of=32),
    "110m": ModelArgs(dim=768, n_layers=12, n_heads=12, multiple_of=32),
    "1b": ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4),
    "7b": ModelArgs(dim=4096, n_layers=32, n_heads=32),
}
VOCAB_SIZE = 32000


def make(shape: str, folder: Path) -> Path:
    """Make a release folder: bfloat16, one shard, and a tokenizer of 32,000 made-up words."""
    target = folder / shape
    if not (target / "tokenizer.model").exists():
        target.mkdir(parents=True, exist_ok=True)
        args = SHAPES[shape]
        args.vocab_size = VOCAB_SIZE
        keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps", "vocab_size")
        params = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
        (target / "params.json").write_text(json.dumps(params))
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # faster for billions of numbers
        state = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16, device=device)
            .normal_(std=size[1] ** -0.5)
            .cpu()
            for name, size in shapes.items()
        }
        torch.save(state, target / "consolidated.00.pth")
        make_tokenizer(target / "tokenizer.model")
    return target


def make_tokenizer(path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({"".join(rng.choices(letters, k=6)) for _ in range(VOCAB_SIZE)})[
        : VOCAB_SIZE - 3
    ]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "words.txt"
        text.write_text("\n".join(" ".join(words[i : i + 100]) for i in range(0, len(words), 100)))
        SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(path.with_suffix("")),
            model_type="word",
            vocab_size=VOCAB_SIZE,
            hard_vocab_limit=True,
            minloglevel=2,
        )
    path.with_suffix(".vocab").unlink()
    assert len(words) == VOCAB_SIZE - 3


def load(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(
        folder / "consolidated.00.pth", mmap=True, weights_only=True
    )
    return state


def args_of(folder: Path) -> ModelArgs:
    return ModelArgs(**json.loads((folder / "params.json").read_text()))


def as_huggingface(folder: Path) -> Path:
    """Return the Hugging Face layout, for transformers."""
    target = folder / "huggingface"
    if not target.exists():
        convert(str(folder), str(target), "hf")
    return target


def as_gguf(folder: Path, kind: str) -> Path:
    """Return a GGUF file for llama.cpp: weights in f16, bf16, q8_0, q4_0 or q4_1."""
    target = folder / f"{kind}.gguf"
    if not target.exists():
        convert(str(folder), str(target), "gguf", kind)
    return target
