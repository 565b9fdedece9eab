"""Build SentencePiece models from the vocabularies of other files.

The format is protobuf (sentencepiece_model.proto). Only a few fields are needed, so this module
encodes them without the protobuf package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

# Types of pieces. GGUF uses the same numbers.
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

BPE = 2  # a type of model
NO_SCORE = -1000.0  # of every piece, if a file was converted without tokenizer.model

# Field numbers in the messages ModelProto and NormalizerSpec.
PIECES = 1
TRAINER = 2
NORMALIZER = 3
ADD_PREFIX = 3  # in NormalizerSpec

# Protobuf's wire types.
VARINT = 0
LENGTH_PREFIXED = 2
FLOAT = 5
FIXED_BYTES = {1: 8, FLOAT: 4}


def field(number: int, value: int | float | bytes | str) -> bytes:
    """Encode a field of a protobuf message: an integer, a float32, or bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | FLOAT) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    if isinstance(value, str):
        value = value.encode()
    return varint(number << 3 | LENGTH_PREFIXED) + varint(len(value)) + value


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def piece(text: str, score: float, kind: int) -> bytes:
    """Encode a vocabulary piece. Appending it to the bytes of a model adds it to the model."""
    return field(PIECES, field(1, text) + field(2, score) + field(3, kind))


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value (bytes, integer or float) of each field of a protobuf message."""
    position = 0

    def number() -> int:
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = number()
        kind = key & 7
        value: Any
        if kind == VARINT:
            value = number()
        else:
            length = number() if kind == LENGTH_PREFIXED else FIXED_BYTES[kind]
            value = message[position : position + length]
            position += length
        if kind == FLOAT:
            value = struct.unpack("<f", value)[0]
        yield key >> 3, value


def pieces_of(proto: bytes) -> list[tuple[str, float, int]]:
    """Return text, score and type of each piece of a SentencePiece model."""
    pieces = []
    for number, value in fields(proto):
        if number == PIECES:
            values = {2: 0.0, 3: 1} | dict(fields(value))
            pieces.append((values[1].decode(), values[2], values[3]))
    return pieces


def with_rows(proto: bytes, added: Mapping[int, str], rows: int) -> bytes:
    """Extend a SentencePiece model to one piece per embedding row, as far as rows are known.

    Adds `added` tokens as long as they follow the model's own ids without a gap. They are matched
    before text is split into pieces. Rows that only pad the embedding to a round number become
    unused pieces. Other rows get no piece.
    """
    texts = {text for text, _, _ in pieces_of(proto)}
    first = len(texts)
    number = first
    while number in added and number < rows:
        text = added[number].replace(" ", "\u2581")  # SentencePiece's space
        if text in texts:
            proto += piece(f"[{number}]", 0.0, UNUSED)
        else:
            proto += piece(text, 0.0, USER_DEFINED)
        texts.add(text)
        number += 1
    if is_padding(number, rows, extended=number > first):
        proto += b"".join(piece(f"[PAD{token}]", 0.0, UNUSED) for token in range(number, rows))
    return proto


def is_padding(pieces: int, rows: int, extended: bool) -> bool:
    """Whether the rows beyond `pieces` only pad an embedding to a round number.

    Trainers pad to a multiple of 64 or more for speed. Multiples of 8 or more count only if the
    vocabulary is known to be `extended`: another tokenizer's vocabulary must not pass for padding.
    """
    round_numbers = [64, 128, 256]
    if extended:
        round_numbers += [8, 16, 32]
    return any(rows % number == 0 and 0 < rows - pieces <= number for number in round_numbers)


def adds_prefix(proto: bytes) -> bool:
    """Whether a SentencePiece model adds a space before a text."""
    specs = [dict(fields(value)) for number, value in fields(proto) if number == NORMALIZER]
    return all(spec.get(ADD_PREFIX, 1) for spec in specs)


def proto_of(name: str, metadata: dict[str, Any]) -> bytes:
    """Build the SentencePiece model that a GGUF file's metadata describes.

    Raises ValueError if the vocabulary is of another type, or if SentencePiece could not tokenize
    with it.
    """
    texts, scores, kinds = columns_of(name, metadata)
    wrong = wrong_pieces(texts, scores, kinds)
    bos = special_id(name, metadata, "bos", 1, len(texts))
    eos = special_id(name, metadata, "eos", 2, len(texts))
    # SentencePiece requires control pieces here, even if fine-tuning changed their types.
    kinds[bos] = CONTROL
    kinds[eos] = CONTROL
    if not wrong and kinds.count(UNKNOWN) != 1:
        wrong = [f"{kinds.count(UNKNOWN)} unknown pieces"]
    if wrong:
        raise ValueError(f"{name} has a vocabulary with {wrong[0]}: download it again")
    if set(scores) == {NO_SCORE}:
        raise ValueError(
            f"{name} has a vocabulary without scores, converted without tokenizer.model: "
            "convert it again"
        )
    # SentencePiece rejects duplicate pieces and empty pieces.
    seen: set[str] = set()
    for token, text in enumerate(texts):
        if not text or text in seen:
            texts[token] = f"[{token}]"
            kinds[token] = UNUSED
        seen.add(texts[token])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # Fields: name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces.
    normalizer = (
        field(1, "identity") + field(ADD_PREFIX, int(bool(prefix))) + field(4, 0) + field(5, 1)
    )
    pieces = b"".join(map(piece, texts, scores, kinds))
    trainer = trainer_spec(texts, kinds, bos, eos)
    return pieces + field(TRAINER, trainer) + field(NORMALIZER, normalizer)


def columns_of(name: str, metadata: dict[str, Any]) -> tuple[list[str], list[float], list[int]]:
    """Return texts, scores and types of the pieces in a GGUF file's metadata.

    The lists have equal lengths; their values are not checked. Raises ValueError if one is missing
    or the vocabulary is of another type.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise ValueError(
            f"{name} has tokenizer.ggml.model {model!r}: "
            "not supported, only 'llama' (SentencePiece) is"
        )
    columns = []
    for what in ("tokens", "scores", "token_type"):
        values = metadata.get(f"tokenizer.ggml.{what}")
        columns.append(list(values) if isinstance(values, list) else [])
    texts, scores, kinds = columns
    if not texts or len(scores) != len(texts) or len(kinds) != len(texts):
        raise ValueError(
            f"{name} lacks tokenizer.ggml.tokens, scores or token_type, or their lengths differ: "
            "download it again"
        )
    return texts, scores, kinds


def wrong_pieces(texts: list[str], scores: list[float], kinds: list[int]) -> list[str]:
    """Describe, for error messages, the pieces that SentencePiece would reject."""
    wrong = []
    for number, (text, score, kind) in enumerate(zip(texts, scores, kinds, strict=True)):
        finite = isinstance(score, float) and math.isfinite(score)
        if not isinstance(text, str) or not finite or kind not in range(1, 7):
            wrong.append(f"piece {number} {(text, score, kind)!r}")
    return wrong


def special_id(name: str, metadata: dict[str, Any], what: str, usual: int, pieces: int) -> int:
    """Return the id of the piece that begins or ends a text: `what` is "bos" or "eos"."""
    token = metadata.get(f"tokenizer.ggml.{what}_token_id", usual)
    if type(token) is not int or not 0 <= token < pieces:
        raise ValueError(f"{name} has tokenizer.ggml.{what}_token_id {token!r}: download it again")
    return token


def trainer_spec(texts: list[str], kinds: list[int], bos: int, eos: int) -> bytes:
    """Encode the TrainerSpec: the type of the model, its special ids and its special pieces."""
    unknown = kinds.index(UNKNOWN)
    falls_back_to_bytes = int(BYTE in kinds)
    spec = field(3, BPE) + field(4, len(texts)) + field(35, falls_back_to_bytes)
    # The ids of the unknown, bos, eos and padding pieces.
    spec += field(40, unknown) + field(41, bos) + field(42, eos) + field(43, -1)
    spec += field(45, texts[unknown]) + field(46, texts[bos]) + field(47, texts[eos])
    return spec
