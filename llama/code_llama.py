"""Code Llama's own prompts, for tokenizers that have the pieces they need.

Rozière et al. 2023, arXiv:2308.12950. Infilling, with the 7B and 13B models, writes the text
between two others. Steps are the dialogs of CodeLlama-70b-Instruct.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

# Begins a text, so that SentencePiece's own space before a text's first word comes before it and is
# cut off with it.
MARK = "☺"

STEP = "<step>"


def check_infilling(tokenizer: Tokenizer, prefixes: Sequence[str], suffixes: Sequence[str]) -> None:
    """Raise ValueError unless the tokenizer can mark prefix, suffix, middle and end.

    There have to be as many prefixes as suffixes.
    """
    ids = {
        "▁<PRE>": tokenizer.prefix_id,
        "▁<SUF>": tokenizer.suffix_id,
        "▁<MID>": tokenizer.middle_id,
        "▁<EOT>": tokenizer.eot_id,
    }
    for piece, token in ids.items():
        if token < 0:
            raise ValueError(
                f"tokenizer has no piece {piece}: "
                "infilling needs the 7B or 13B Code Llama and its tokenizer"
            )
    if len(prefixes) != len(suffixes):
        raise ValueError(
            f"prefixes are {len(prefixes)} and suffixes {len(suffixes)}: pass as many of each"
        )


def encode_infilling(
    prefix: str, suffix: str, tokenizer: Tokenizer, suffix_first: bool = False
) -> list[int]:
    """BOS <PRE> prefix <SUF> suffix <MID>, or BOS <PRE> <SUF> suffix <MID> prefix.

    The latter with `suffix_first`. The suffix has no space before its first word.
    """
    before = tokenizer.encode(prefix, bos=False, eos=False)
    mark = tokenizer.encode(MARK, bos=False, eos=False)
    after = tokenizer.encode(MARK + suffix, bos=False, eos=False)[len(mark) :]
    opening = [tokenizer.bos_id, tokenizer.prefix_id]
    closing = [tokenizer.suffix_id, *after, tokenizer.middle_id]
    if suffix_first:
        return opening + closing + before
    return opening + before + closing


def encode_steps(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    """One BOS, then each message (role, content) and <step>, then the head of the answer.

    A message is its head, " Source: {role}", and, unless it is empty, its body, "\\n\\n {content}",
    stripped; each is encoded by itself. There is always a system message, without a body where none
    is given.
    """
    if messages[0][0] != "system":
        messages = [("system", ""), *messages]
    tokens = [tokenizer.bos_id]
    for role, content in messages:
        tokens += tokenizer.encode(f" Source: {role}", bos=False, eos=False)
        if content:
            tokens += tokenizer.encode(f"\n\n {content.strip()}", bos=False, eos=False)
        tokens.append(tokenizer.step_id)
    tokens += tokenizer.encode(" Source: assistant\nDestination: user", bos=False, eos=False)
    return tokens + tokenizer.encode("\n\n ", bos=False, eos=False)
