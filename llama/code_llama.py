"""Code Llama's prompts: infilling, and the dialogs of its 70B chat model.

Rozière et al. 2023, arXiv:2308.12950. Infilling (7B and 13B) generates the text between a prefix
and a suffix. CodeLlama-70b-Instruct ends each message of a dialog with <step>.
"""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

# A character that is encoded in front of a suffix. Its ids are then removed, together with the
# space that SentencePiece adds before the first word.
MARK = "☺"

STEP = "<step>"


def check_infilling(tokenizer: Tokenizer, prefixes: Sequence[str], suffixes: Sequence[str]) -> None:
    """Raise ValueError unless the tokenizer has the pieces for infilling.

    Also raises ValueError if the number of prefixes differs from the number of suffixes.
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
            f"got {len(prefixes)} prefixes and {len(suffixes)} suffixes: pass equal numbers"
        )


def encode_infilling(
    prefix: str, suffix: str, tokenizer: Tokenizer, suffix_first: bool = False
) -> list[int]:
    """BOS <PRE> prefix <SUF> suffix <MID>, or BOS <PRE> <SUF> suffix <MID> prefix.

    The second form is for `suffix_first`. The suffix gets no space before its first word.
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
    """BOS, then each message (role, content) followed by <step>, then the answer's header.

    A message is its header, " Source: {role}", and, unless the content is empty, its body,
    "\\n\\n {content}", with the content stripped. Header and body are encoded separately. A missing
    system message is added, without a body.
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
