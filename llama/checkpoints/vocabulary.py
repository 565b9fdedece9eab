"""SentencePiece models made from the vocabularies of other files.

The format is protobuf's (sentencepiece_model.proto). A few of its fields are enough, so that no
package is needed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

# kinds of pieces, with the same numbers in GGUF
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

BPE = 2  # a kind of model
NO_SCORE = -1000.0  # of every piece in a file that was made without tokenizer.model

# fields of the messages ModelProto, SentencePiece, TrainerSpec and NormalizerSpec
PIECES = 1
TRAINER = 2
NORMALIZER = 3
ADD_PREFIX = 3  # of the normalizer

# protobuf's kinds of values
VARINT = 0
LENGTH_PREFIXED = 2
FLOAT = 5
FIXED_BYTES = {1: 8, FLOAT: 4}


def field(number: int, value: int | float | bytes | str) -> bytes:
    """A field of a protobuf message: an integer, a float32, or bytes with their length."""
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
    """A piece of the vocabulary. Appending it to the bytes of a model adds it to the model."""
    return field(PIECES, field(1, text) + field(2, score) + field(3, kind))


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a protobuf message's fields: bytes, integers, and float32."""
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
    """Text, score and kind of each piece of a SentencePiece model."""
    pieces = []
    for number, value in fields(proto):
        if number == PIECES:
            values = {2: 0.0, 3: 1} | dict(fields(value))
            pieces.append((values[1].decode(), values[2], values[3]))
    return pieces


def with_rows(proto: bytes, added: Mapping[int, str], rows: int) -> bytes:
    """A SentencePiece model with a piece for each row of an embedding, as far as rows are known.

    `added` tokens follow the model's own without a gap, and are found in a text before it is split.
    Rows that fill these up to a round number are unused pieces.
    """
    texts = {text for text, _, _ in pieces_of(proto)}
    first = len(texts)
    number = first
    while number in added and number < rows:
        text = added[number].replace(" ", "\u2581")  # as SentencePiece has spaces
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
    """Whether an embedding has no more rows than fill its pieces up to a round number.

    A multiple of 64 or more, as trainers make it for speed; of 8 or more where the vocabulary is
    known to be an `extended` one. Another tokenizer's vocabulary must not pass for padding.
    """
    round_numbers = [64, 128, 256]
    if extended:
        round_numbers += [8, 16, 32]
    return any(rows % number == 0 and 0 < rows - pieces <= number for number in round_numbers)


def adds_prefix(proto: bytes) -> bool:
    """Whether a SentencePiece model puts a space before a text."""
    specs = [dict(fields(value)) for number, value in fields(proto) if number == NORMALIZER]
    return all(spec.get(ADD_PREFIX, 1) for spec in specs)


def proto_of(name: str, metadata: dict[str, Any]) -> bytes:
    """The SentencePiece model that a GGUF file's metadata describes.

    Raises ValueError for vocabularies of other kinds, and for one that SentencePiece could not
    split text with.
    """
    texts, scores, kinds = columns_of(name, metadata)
    wrong = wrong_pieces(texts, scores, kinds)
    bos = special_id(name, metadata, "bos", 1, len(texts))
    eos = special_id(name, metadata, "eos", 2, len(texts))
    # SentencePiece needs control pieces here, whatever fine-tuning made of them.
    kinds[bos] = CONTROL
    kinds[eos] = CONTROL
    if not wrong and kinds.count(UNKNOWN) != 1:
        wrong = [f"{kinds.count(UNKNOWN)} unknown pieces"]
    if wrong:
        raise ValueError(f"{name} has a vocabulary with {wrong[0]}: download it again")
    if set(scores) == {NO_SCORE}:
        raise ValueError(
            f"{name} has a vocabulary without scores, made without tokenizer.model: "
            "convert it again"
        )
    # SentencePiece takes no piece twice, and none without text.
    seen: set[str] = set()
    for token, text in enumerate(texts):
        if not text or text in seen:
            texts[token] = f"[{token}]"
            kinds[token] = UNUSED
        seen.add(texts[token])
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    # its name, whether it puts a space before a text, and that it keeps spaces and escapes them
    normalizer = (
        field(1, "identity") + field(ADD_PREFIX, int(bool(prefix))) + field(4, 0) + field(5, 1)
    )
    pieces = b"".join(map(piece, texts, scores, kinds))
    trainer = trainer_spec(texts, kinds, bos, eos)
    return pieces + field(TRAINER, trainer) + field(NORMALIZER, normalizer)


def columns_of(name: str, metadata: dict[str, Any]) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and kinds of the pieces in a GGUF file's metadata, of equal lengths.

    The values are not checked. Raises ValueError for another kind of vocabulary.
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
            f"{name} lacks tokenizer.ggml.tokens, scores or token_type, one for each: "
            "download it again"
        )
    return texts, scores, kinds


def wrong_pieces(texts: list[str], scores: list[float], kinds: list[int]) -> list[str]:
    """The pieces with values that SentencePiece does not take, as errors name them."""
    wrong = []
    for number, (text, score, kind) in enumerate(zip(texts, scores, kinds, strict=True)):
        finite = isinstance(score, float) and math.isfinite(score)
        if not isinstance(text, str) or not finite or kind not in range(1, 7):
            wrong.append(f"piece {number} {(text, score, kind)!r}")
    return wrong


def special_id(name: str, metadata: dict[str, Any], what: str, usual: int, pieces: int) -> int:
    """The id of the piece that begins or ends a text: `what` is "bos" or "eos"."""
    token = metadata.get(f"tokenizer.ggml.{what}_token_id", usual)
    if type(token) is not int or not 0 <= token < pieces:
        raise ValueError(f"{name} has tokenizer.ggml.{what}_token_id {token!r}: download it again")
    return token


def trainer_spec(texts: list[str], kinds: list[int], bos: int, eos: int) -> bytes:
    """What SentencePiece keeps of a model's training: its kind, and its special ids and pieces."""
    unknown = kinds.index(UNKNOWN)
    falls_back_to_bytes = int(BYTE in kinds)
    spec = field(3, BPE) + field(4, len(texts)) + field(35, falls_back_to_bytes)
    # ids of the unknown piece, of those that begin and end a text, and of padding
    spec += field(40, unknown) + field(41, bos) + field(42, eos) + field(43, -1)
    spec += field(45, texts[unknown]) + field(46, texts[bos]) + field(47, texts[eos])
    return spec
