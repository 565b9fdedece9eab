"""Trains llama-2-tiny and writes its folder, in the release's own layout: python
llama-2-tiny/train.py

The corpus is drawn from world.py, so that the only input is a seed. About twenty minutes on two CPU
cores.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import fire
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # runs from a clone, installed or not

import world  # noqa: E402

from llama.chat import encode_dialog  # noqa: E402
from llama.model import ModelArgs, Transformer  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402

SEED = 1
VOCAB_SIZE = 1280
PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 6,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
STEPS = 2300
BATCH_TOKENS = 4096
LEARNING_RATE = 3e-3
IGNORED = -100

Example = tuple[list[int], list[int]]  # tokens, and for each one its successor or IGNORED


def train_tokenizer(path: Path, documents: int = 20000) -> None:
    """A SentencePiece model with the settings of Llama's, on text of the world."""
    rng = Random(SEED)
    # every character gets a piece of its own
    lines = [string.punctuation + string.ascii_letters + string.digits] * 10
    for _ in range(documents):
        document = world.document(rng)
        contents = (
            [document]
            if isinstance(document, str)
            else [message["content"] for message in document]
        )
        if not isinstance(document, str):
            lines.append("[INST] <<SYS>> <</SYS>> [/INST]")
        # Without line breaks and what is not ASCII, which are left to the byte pieces.
        lines += [
            line.encode("ascii", "ignore").decode()
            for text in contents
            for line in text.splitlines()
        ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    path.write_bytes(model.getvalue())


def encode(document: world.Document, tokenizer: Tokenizer) -> Example:
    """A text is learnt whole; of a dialog, what the assistant says."""
    if isinstance(document, str):
        tokens = tokenizer.encode(document, bos=True, eos=True)
        return tokens, [*tokens[1:], IGNORED]
    tokens = []
    targets: list[int] = []
    first = 1 if document[0]["role"] == "system" else 0
    for end in range(first + 1, len(document), 2):
        prompt = encode_dialog(document[:end], tokenizer)
        answer = tokenizer.encode(document[end]["content"], bos=False, eos=True)
        # What is new since the turn before, and with it that turn's answer in the form of a
        # finished exchange, whose trailing space a model that answers never sees: its target is the
        # end of the answer.
        tokens = prompt + answer
        targets = [*targets, *[IGNORED] * (len(prompt) - len(targets) - 1), *answer]
    return tokens, [*targets, IGNORED]


def batches(tokenizer: Tokenizer, rng: Random, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded tokens and targets, one document a row, so that no document sees another's
    system message.
    """
    produced = 0
    while produced < steps:
        pool = [encode(world.document(rng), tokenizer) for _ in range(4096)]
        pool.sort(key=lambda example: len(example[0]))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups[: steps - produced]:
            yield (
                pad([tokens for tokens, _ in group], 0),
                pad([targets for _, targets in group], IGNORED),
            )
            produced += 1


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def loss_sum(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(tokens)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def train_model(model: Transformer, tokenizer: Tokenizer, steps: int) -> None:
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    # Warm-up, then a cosine to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    progress = tqdm(batches(tokenizer, Random(SEED), steps), total=steps, unit="step")
    for step, (tokens, targets) in enumerate(progress):
        loss = loss_sum(model, tokens, targets) / (targets != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def perplexity(model: Transformer, tokenizer: Tokenizer, documents: int = 1000) -> float:
    """Of new documents, whose questions are in wordings that were kept from training."""
    rng = Random(SEED + 1)
    loss = 0.0
    count = 0
    for _ in range(documents):
        tokens, targets = encode(world.document(rng, held_out=True), tokenizer)
        loss += loss_sum(model, torch.tensor([tokens]), torch.tensor([targets])).item()
        count += sum(target != IGNORED for target in targets)
    return math.exp(loss / count)


def save(model: Transformer, folder: Path) -> None:
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    names = ("consolidated.00.pth", "params.json", "tokenizer.model")
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))


def main(folder: str = str(FOLDER), steps: int = STEPS) -> None:
    """Train for `steps` batches and write the files of a checkpoint to `folder`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    path = Path(folder)
    train_tokenizer(path / "tokenizer.model")
    tokenizer = Tokenizer(path / "tokenizer.model")
    model = Transformer(ModelArgs(**{**PARAMS, "vocab_size": tokenizer.n_words}))
    train_model(model, tokenizer, steps)
    save(model, path)
    print(f"held-out perplexity: {perplexity(model, tokenizer):.3f}")


if __name__ == "__main__":
    fire.Fire(main)
