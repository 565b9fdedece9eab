"""Run every golden folder on the ranks of a job; rank 0 writes the results to the given path."""

import json
import sys

import torch
import torch.distributed as dist
from conftest import GOLDEN_FOLDERS, build_golden, expected

results = {}
for folder in GOLDEN_FOLDERS:
    llm, golden = build_golden(folder), expected(folder)
    greedy, echo = (
        llm.generate(
            golden["prompt_tokens"],
            golden[name]["max_gen_len"],
            0,
            logprobs=True,
            echo=name == "greedy_echo",
        )
        for name in ("greedy", "greedy_echo")
    )
    text, chat = golden["text_completion"], golden["chat_completion"]
    with torch.no_grad():
        logits = llm.model(torch.tensor(golden["prompt_tokens"][:1]), 0)[0, :, :8]
    results[folder] = {
        "local_parameters": sum(parameter.numel() for parameter in llm.model.parameters()),
        "logits": logits.tolist(),
        "greedy": greedy,
        "greedy_echo": echo,
        "text": [
            r["generation"]
            for r in llm.text_completion(text["prompts"], 0, max_gen_len=text["max_gen_len"])
        ],
        "chat": [
            r["generation"]
            for r in llm.chat_completion(chat["dialogs"], 0, max_gen_len=chat["max_gen_len"])
        ],
        "sampled": llm.generate(golden["prompt_tokens"], 20, 1.0, 1.0, seed=3)[0],
    }
everywhere: list[object] = [None] * dist.get_world_size()
dist.all_gather_object(everywhere, results)
assert all(json.dumps(other) == json.dumps(everywhere[0]) for other in everywhere), "ranks disagree"
if dist.get_rank() == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
