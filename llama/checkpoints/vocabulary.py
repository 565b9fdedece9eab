"""SentencePiece models written from what other files say of a vocabulary.

The format is protobuf's (sentencepiece_model.proto), of which a few fields are enough, so that no
package is needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

# kinds of pieces, numbered alike in GGUF
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
BPE = 2
NO_SCORE = -1000.0  # what a file has that was made without tokenizer.model


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a protobuf message: an integer, a float32, or bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def piece(text: str, score: float, kind: int) -> bytes:
    """A piece of the vocabulary; those that follow a whole model's bytes are added to it."""
    return field(1, field(1, text) + field(2, score) + field(3, kind))


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a protobuf message's fields: bytes, integers, and float32."""
    position = 0

    def number() -> int:
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = message[position]
            position = position + 1
            value = value | (byte & 127) << shift
            shift = shift + 7
            if byte < 128:
                return value

    while position < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        length = number() if kind == 2 else {1: 8, 5: 4}[kind]
        value = message[position : position + length]
        position += length
        yield key >> 3, struct.unpack("<f", value)[0] if kind == 5 else value


def pieces_of(proto: bytes) -> list[tuple[str, float, int]]:
    """Text, score and kind of each piece of a SentencePiece model."""
    pieces = [
        {2: 0.0, 3: 1} | dict(fields(value)) for number, value in fields(proto) if number == 1
    ]
    return [(piece[1].decode(), piece[2], piece[3]) for piece in pieces]


def with_rows(proto: bytes, added: Mapping[int, str], rows: int) -> bytes:
    """A SentencePiece model with pieces for all rows of an embedding, as far as they are explained.

    `added` tokens follow the model's own without a gap, and are found in a text before it is split.
    Rows that fill these up to a round number are unused pieces.
    """
    texts = {text for text, _, _ in pieces_of(proto)}
    first = number = len(texts)
    while number in added and number < rows:
        text = added[number].replace(" ", "\u2581")  # as SentencePiece has spaces
        proto += (
            piece(f"[{number}]", 0.0, UNUSED) if text in texts else piece(text, 0.0, USER_DEFINED)
        )
        texts.add(text)
        number += 1
    if is_padding(number, rows, extended=number > first):
        proto += b"".join(piece(f"[PAD{token}]", 0.0, UNUSED) for token in range(number, rows))
    return proto


def is_padding(pieces: int, rows: int, extended: bool) -> bool:
    """Whether an embedding has no more rows than fill its pieces up to a round number.

    A multiple of 64 or more, as trainers make it for speed; of 8 or more where the vocabulary is
    known to be an `extended` one. Another tokenizer's vocabulary must not pass for padding.
    """
    round_numbers = (8, 16, 32, 64, 128, 256) if extended else (64, 128, 256)
    return any(rows % number == 0 and 0 < rows - pieces <= number for number in round_numbers)


def adds_prefix(proto: bytes) -> bool:
    """Whether a SentencePiece model puts a space before a text."""
    specs = [dict(fields(value)) for number, value in fields(proto) if number == 3]
    return all(spec.get(3, 1) for spec in specs)


def proto_of(name: str, metadata: dict[str, Any]) -> bytes:
    """The SentencePiece model that a GGUF file's metadata describes.

    Raises ValueError for vocabularies of other kinds, and for one that SentencePiece could not
    split text with.
    """
    if (model := metadata.get("tokenizer.ggml.model")) != "llama":
        raise ValueError(
            f"{name} has tokenizer.ggml.model {model!r}: not supported, only 'llama' (SentencePiece) is"
        )
    lists: list[Any] = [
        metadata.get(f"tokenizer.ggml.{what}") for what in ("tokens", "scores", "token_type")
    ]
    texts, scores, kinds = lists
    if not all(
        isinstance(values, list) and len(values) == len(texts or []) > 0 for values in lists
    ):
        raise ValueError(
            f"{name} lacks tokenizer.ggml.tokens, scores or token_type, one for each: download it again"
        )
    wrong = [
        f"piece {i} {value!r}"
        for i, value in enumerate(zip(texts, scores, kinds, strict=True))
        if not (
            isinstance(value[0], str) and isinstance(value[1], float) and math.isfinite(value[1])
        )
        or value[2] not in range(1, 7)
    ]
    special = {}
    for what, usual in (("bos", 1), ("eos", 2)):
        token = metadata.get(f"tokenizer.ggml.{what}_token_id", usual)
        if type(token) is not int or not 0 <= token < len(texts):
            raise ValueError(
                f"{name} has tokenizer.ggml.{what}_token_id {token!r}: download it again"
            )
        special[what] = token
    # What begins and ends a text is a control piece to SentencePiece, whatever fine-tuning made of
    # it.
    kinds = [CONTROL if token in special.values() else kind for token, kind in enumerate(kinds)]
    if wrong or kinds.count(UNKNOWN) != 1:
        reason = wrong[0] if wrong else f"{kinds.count(UNKNOWN)} unknown pieces"
        raise ValueError(f"{name} has a vocabulary with {reason}: download it again")
    if set(scores) == {NO_SCORE}:
        raise ValueError(
            f"{name} has a vocabulary without scores, made without tokenizer.model: convert it again"
        )
    seen: set[str] = set()
    # SentencePiece takes no piece twice, and none without text
    for token, text in enumerate(texts):
        if not text or text in seen:
            texts[token], kinds[token] = f"[{token}]", UNUSED
        seen.add(texts[token])
    # whether it falls back to bytes
    trainer = field(3, BPE) + field(4, len(texts)) + field(35, int(BYTE in kinds))
    trainer += (
        field(40, kinds.index(UNKNOWN))
        + field(41, special["bos"])
        + field(42, special["eos"])
        + field(43, -1)
    )
    trainer += field(45, texts[kinds.index(UNKNOWN)]) + field(46, texts[special["bos"]])
    trainer += field(47, texts[special["eos"]])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = field(1, "identity") + field(3, int(bool(prefix))) + field(4, 0) + field(5, 1)
    pieces = b"".join(map(piece, texts, scores, kinds))
    return pieces + field(2, trainer) + field(3, normalizer)
