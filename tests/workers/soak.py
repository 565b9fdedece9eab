"""Run 2,000 requests of random shape through one Llama; check that memory does not grow.

After the first 200 requests, memory may grow by 2%.
"""

import random
from pathlib import Path

from conftest import build_golden


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


llm = build_golden(max_seq_len=128)
rng = random.Random(0)
question = [[1, 30, 31], [1] * 40]
first = llm.generate(question, 20, 0, logprobs=True)
done, settled, highest = 0, 0, 0
while done < 2000:
    n = rng.randint(1, 9)
    prompts = [[1, *rng.choices(range(3, 512), k=rng.randint(0, 100))] for _ in range(n)]
    length, warm = rng.randint(1, 25), rng.choice([0, 0.7])
    kind = rng.randrange(4)
    if kind == 0:
        llm.generate(prompts, length, warm, logprobs=rng.random() < 0.5, echo=rng.random() < 0.5)
    elif kind == 1:
        stream = llm.stream_text_completion(
            ["".join(rng.choices("abc ", k=30)) for _ in range(n)], warm, 0.9, length
        )
        for _ in range(rng.randint(0, 30)):  # some are read to the end, the others abandoned
            next(stream, None)
    elif kind == 2:
        llm.chat_completion(
            [[{"role": "user", "content": "hello"}]] * n, warm, max_gen_len=length, stop=["e"]
        )
    else:
        try:
            llm.generate([*prompts, [1] * 129], length)
        except ValueError:
            pass
        else:
            raise AssertionError("a prompt that is too long was run")
    done += n
    if done < 200:
        settled = resident()
    highest = max(highest, resident()) if done >= 200 else 0
assert highest <= 1.02 * settled, f"{settled} kB after 200 requests, {highest} at most since"
tokens, logprobs = llm.generate(question, 20, 0, logprobs=True)
assert tokens == first[0]
for ours, before in zip(logprobs, first[1], strict=True):
    assert all(abs(a - b) < 1e-4 for a, b in zip(ours, before, strict=True))
print(f"{settled} kB after 200 requests, {highest} at most since")
