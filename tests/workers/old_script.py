"""A script for the original: its own loop around the model, the tokenizer and the sampler.

It prints what it generates. It runs on its own or under torchrun.
"""

import torch
from conftest import build_golden, expected

from llama import Llama
from llama.generation import sample_top_p


@torch.inference_mode()
def continue_prompts(
    llm: Llama, prompts: list[list[int]], max_gen_len: int, temperature: float = 0.6
) -> list[list[int]]:
    """Generate for all prompts, one position at a time; a row keeps its prompt's own tokens."""
    model, tokenizer = llm.model, llm.tokenizer
    lengths = [len(prompt) for prompt in prompts]
    total = min(model.params.max_seq_len, max(lengths) + max_gen_len)
    tokens = torch.full((len(prompts), total), tokenizer.pad_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    given = tokens != tokenizer.pad_id
    done = torch.zeros(len(prompts), dtype=torch.bool)
    prev = 0
    for cur in range(min(lengths), total):
        logits = model.forward(tokens[:, prev:cur], prev)
        if temperature > 0:
            drawn = sample_top_p(torch.softmax(logits[:, -1] / temperature, dim=-1), 0.9).reshape(
                -1
            )
        else:
            drawn = torch.argmax(logits[:, -1], dim=-1)
        tokens[:, cur] = torch.where(given[:, cur], tokens[:, cur], drawn)
        done |= ~given[:, cur] & (drawn == tokenizer.eos_id)
        prev = cur
        if all(done):
            break
    rows = [row[n : n + max_gen_len] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return [row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row for row in rows]


def lines(llm: Llama) -> list[str]:
    golden = expected("mha")
    prompts = golden["prompt_tokens"]
    found = [
        f"completion {i}: {r['generation']!r}"
        for i, r in enumerate(llm.text_completion(["The model is"], 0, 0.9, 9))
    ]
    for token in continue_prompts(llm, prompts[:1], 5, 0)[0]:
        found.append(f"token {token}: {llm.tokenizer.decode(token)!r}")
    torch.manual_seed(3)
    return [*found, *(f"drawn: {row}" for row in continue_prompts(llm, prompts, 9))]


if __name__ == "__main__":
    print("\n".join(lines(build_golden("mha-mp1"))))
