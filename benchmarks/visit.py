"""Print the functions that one call of text_completion enters: python benchmarks/visit.py

The call is the second one in its process. The functions of `llama/` are in the order in which it
first enters them. The last line counts functions, files, and changes of file between one function
and the next.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import llama

ROOT = Path(llama.__file__).parent
TINY = ROOT.parent / "llama-2-tiny"


def visited(call: Callable[[], object]) -> list[tuple[str, str]]:
    """Return (file, function) for each function of the package, in the order first entered."""
    seen: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            event == "call"
            and code.co_filename.startswith(str(ROOT))
            and not code.co_name.startswith("<")
        ):
            name = getattr(code, "co_qualname", code.co_name)
            seen.setdefault((str(Path(code.co_filename).relative_to(ROOT)), name))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(seen)


def main() -> None:
    torch.set_num_threads(1)
    llm = llama.Llama.build(TINY, max_seq_len=128, max_batch_size=1, device="cpu", dtype="float32")

    llm.text_completion(["Every morning, the rabbit"], max_gen_len=16)
    functions = visited(lambda: llm.text_completion(["The owl lives in"], max_gen_len=16))
    for file, name in functions:
        print(f"{file:28} {name}")
    files = [file for file, _ in functions]
    changes = sum(before != after for before, after in itertools.pairwise(files))
    print(f"\n{len(functions)} functions in {len(set(files))} files, {changes} changes of file")


if __name__ == "__main__":
    main()
