"""SentencePiece models written from what other files say of a vocabulary.

The format is protobuf's (sentencepiece_model.proto), of which a few fields are enough, so that no package is needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN, USER_DEFINED, UNUSED, BYTE = 2, 4, 5, 6  # kinds of pieces, numbered alike in GGUF
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
        value, shift = 0, 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
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
    pieces = [{2: 0.0, 3: 1} | dict(fields(value)) for number, value in fields(proto) if number == 1]
    return [(piece[1].decode(), piece[2], piece[3]) for piece in pieces]


def with_added(proto: bytes, number: int, added: Mapping[int, str]) -> bytes:
    """A SentencePiece model of so many pieces with more, by their ids, which are found in a text before it is split.

    Those that the model has already are left out, as are those after an id that is not given.
    """
    while number in added:
        proto += piece(added[number], 0.0, USER_DEFINED)
        number += 1
    return proto


def with_padding(proto: bytes, number: int, rows: int) -> bytes:
    """A SentencePiece model of so many pieces with as many unused ones more as an embedding has rows for."""
    return proto + b"".join(piece(f"[PAD{token}]", 0.0, UNUSED) for token in range(number, rows))


def adds_prefix(proto: bytes) -> bool:
    """Whether a SentencePiece model puts a space before a text."""
    specs = [dict(fields(value)) for number, value in fields(proto) if number == 3]
    return all(spec.get(3, 1) for spec in specs)


def proto_of(name: str, metadata: dict[str, Any]) -> bytes:
    """The SentencePiece model that a GGUF file's metadata describes. Raises ValueError for vocabularies of other kinds,
    and for one that SentencePiece could not split text with."""
    if (model := metadata.get("tokenizer.ggml.model")) != "llama":
        raise ValueError(f"{name} has tokenizer.ggml.model {model!r}: not supported, only 'llama' (SentencePiece) is")
    lists: list[Any] = [metadata.get(f"tokenizer.ggml.{what}") for what in ("tokens", "scores", "token_type")]
    texts, scores, kinds = lists
    if not all(isinstance(values, list) and len(values) == len(texts or []) > 0 for values in lists):
        raise ValueError(f"{name} lacks tokenizer.ggml.tokens, scores or token_type, one for each: download it again")
    wrong = [
        f"piece {i} {value!r}"
        for i, value in enumerate(zip(texts, scores, kinds, strict=True))
        if not (isinstance(value[0], str) and isinstance(value[1], float) and math.isfinite(value[1]))
        or value[2] not in range(1, 7)
    ]
    if wrong or kinds.count(UNKNOWN) != 1:
        reason = wrong[0] if wrong else f"{kinds.count(UNKNOWN)} unknown pieces"
        raise ValueError(f"{name} has a vocabulary with {reason}: download it again")
    if set(scores) == {NO_SCORE}:
        raise ValueError(f"{name} has a vocabulary without scores, made without tokenizer.model: convert it again")
    special = {}
    for what in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{what}_token_id")
        if type(token) is not int or not 0 <= token < len(texts):
            raise ValueError(f"{name} has tokenizer.ggml.{what}_token_id {token!r}: download it again")
        special[what] = token
    trainer = field(3, BPE) + field(4, len(texts)) + field(35, int(BYTE in kinds))  # whether it falls back to bytes
    trainer += field(40, kinds.index(UNKNOWN)) + field(41, special["bos"]) + field(42, special["eos"]) + field(43, -1)
    trainer += field(45, texts[kinds.index(UNKNOWN)]) + field(46, texts[special["bos"]])
    trainer += field(47, texts[special["eos"]])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = field(1, "identity") + field(3, int(bool(prefix))) + field(4, 0) + field(5, 1)
    pieces = b"".join(map(piece, texts, scores, kinds))
    return pieces + field(2, trainer) + field(3, normalizer)
