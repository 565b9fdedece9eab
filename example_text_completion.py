"""Continue four prompts.

Run it plainly, or on N ranks: torchrun --nproc_per_node N example_text_completion.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import fire
import torch.distributed as dist

from llama import Llama
from llama.cli.program import program

TINY = Path(__file__).parent / "llama-2-tiny"

PROMPTS = [
    "The owl lives in",
    "Once upon a time, there was a little fox who",
    "Every morning, the rabbit",
    # Few-shot: two examples show the pattern for the third.
    """Question: Where does the bear live?
Answer: The bear lives in the cave.

Question: What does the cow eat?
Answer: The cow eats grass.

Question: What does the rabbit eat?
Answer:""",
]


def main(
    ckpt_dir: str = str(TINY),
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    seed: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4"] | None = None,
    adapter_dir: str | None = None,
) -> None:
    """Continue each prompt by at most `max_gen_len` tokens. Temperature 0 is greedy."""
    llm = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        adapter_dir=adapter_dir,
    )
    results = llm.text_completion(
        PROMPTS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len
    )
    if dist.get_rank() != 0:
        return
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    with program(main):
        fire.Fire(main)
