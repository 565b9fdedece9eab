"""Servers that never stop at EOS: python benchmarks/endless.py llama FOLDER PORT ROWS

serving.py starts them. Random weights generate EOS by chance, but no contender may stop early.
`loop` is this library without a server. No tokenizer file works for all contenders, so prompts are
token ids. For servers that only take text, they are ids separated by spaces: `1 17 350`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import fire
from contender import seconds

CONTEXT = 512


def llama(folder: str, port: int, rows: int) -> None:
    from llama.cli.serve import serve
    from llama.generation import BuildOptions
    from llama.tokenizer import Tokenizer

    init = Tokenizer.__init__

    def init_without_end(self: Tokenizer, path: Any) -> None:
        init(self, path)
        self.eos_id = -1

    Tokenizer.__init__ = init_without_end  # type: ignore[method-assign]
    serve(folder, port=port, build=BuildOptions(max_seq_len=CONTEXT, max_batch_size=rows))


def llama_cpp(file: str, port: int, threads: int) -> None:
    import llama_cpp.llama
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    llama_cpp.llama_token_is_eog = lambda vocab, token: False
    llama_cpp.Llama.tokenize = lambda self, text, add_bos=True, special=False: [
        int(word) for word in text.split()
    ]
    model = ModelSettings(
        model=file,
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        verbose=False,
    )
    # A new request must not interrupt a stream.
    app = create_app(
        server_settings=ServerSettings(interrupt_requests=False), model_settings=[model]
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def loop(folder: str, rows: int, new: int) -> None:
    """Read batches of prompts from standard input and print the seconds of each, both as JSON.

    The first batch is a warm-up.
    """
    from llama import Llama

    llm = Llama.build(folder, None, CONTEXT, rows)
    llm.tokenizer.eos_id = -1
    print(
        json.dumps(
            [
                seconds(lambda batch=batch: llm.generate(batch, new, 0))
                for batch in json.load(sys.stdin)
            ]
        )
    )


if __name__ == "__main__":
    fire.Fire({"llama": llama, "llama_cpp": llama_cpp, "loop": loop})
