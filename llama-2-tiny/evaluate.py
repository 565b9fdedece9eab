"""Evaluates llama-2-tiny on questions with wordings that were held out from training.

Run it with: python llama-2-tiny/evaluate.py
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # runs from a clone, installed or not

import world  # noqa: E402

from llama import Llama  # noqa: E402


def evaluate(
    folder: Path = FOLDER, count: int = 100, show_wrong: bool = False
) -> dict[str, tuple[int, int, int]]:
    """Answer tasks of each kind greedily. Returns (right, ended, total) for each kind.

    An answer is right if it matches the expected answer word for word, including the form that the
    system message asks for. An answer that stopped by itself counts as ended.
    """
    llm = Llama.build(folder, folder / "tokenizer.model", max_seq_len=512, max_batch_size=25)
    figures = {}
    for kind, tasks in world.evaluation(count=count).items():
        results = llm.chat_completion(
            [task.dialog for task in tasks], temperature=0, max_gen_len=64
        )
        answers = [result["generation"]["content"] for result in results]
        right = [task.passed(answer) for task, answer in zip(tasks, answers, strict=True)]
        ended = sum(result["finish_reason"] == "stop" for result in results)
        figures[kind] = (sum(right), ended, len(tasks))
        if show_wrong:
            for task, answer, is_right in zip(tasks, answers, right, strict=True):
                if not is_right:
                    print(f"{kind}: {task.dialog[-1]['content']} {task.answer!r}, got {answer!r}")
    return figures


if __name__ == "__main__":
    for kind, (right, ended, count) in evaluate(show_wrong=True).items():
        print(f"{kind:9}  right {right} of {count}, ended {ended} of {count}")
