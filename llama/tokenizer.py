"""SentencePiece: text <-> token ids. Independent of prompts, chat and models."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex, cast

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A SentencePiece tokenizer with the original's attributes.

    `n_words` is the size of the vocabulary; `n_used` does not count the unused pieces that pad its
    end. `bos_id`, `eos_id` and `pad_id` are special ids. Code Llama adds `prefix_id`, `suffix_id`,
    `middle_id` and `eot_id`, and its 70B chat model `step_id`. An id is -1 if the vocabulary does
    not have it. `chat_template` is the Jinja template that came with the vocabulary, or None. It is
    never run, only searched for the tags of Llama 2's chat layout.

    Raises FileNotFoundError if `model_path` is not a file, ValueError if it is not a SentencePiece
    model.
    """

    def __init__(self, model_path: str | os.PathLike[str]):
        model_path = os.path.expanduser(str(model_path))
        if not os.path.isfile(model_path):
            raise FileNotFoundError(
                f"no tokenizer at {model_path}: pass the path of tokenizer.model"
            )
        self._use(Path(model_path).read_bytes(), model_path)

    @classmethod
    def from_proto(cls, proto: bytes, name: str) -> Tokenizer:
        """Make a tokenizer from the bytes of a SentencePiece model. Errors call it `name`."""
        tokenizer = cls.__new__(cls)
        tokenizer._use(proto, name)
        return tokenizer

    def _use(self, proto: bytes, name: str) -> None:
        try:
            self.sp_model = SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(
                f"{name} is not a SentencePiece model: pass an undamaged tokenizer.model"
            ) from error
        self.chat_template: str | None = None
        self.n_words: int = self.sp_model.vocab_size()
        self.n_used = self.n_words
        while self.n_used and self.sp_model.is_unused(self.n_used - 1):
            self.n_used -= 1
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        self.prefix_id = self._piece_id("▁<PRE>")
        self.suffix_id = self._piece_id("▁<SUF>")
        self.middle_id = self._piece_id("▁<MID>")
        self.eot_id = self._piece_id("▁<EOT>")
        self.step_id = self._piece_id("<step>")

    def _piece_id(self, piece: str) -> int:
        token: int = self.sp_model.piece_to_id(piece)
        if token == self.sp_model.unk_id():  # SentencePiece's result for a missing piece
            return -1
        return token

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, with the begin- and end-of-sequence ids if requested.

        Raises TypeError if `s` is not a str.
        """
        if not isinstance(s, str):
            raise TypeError(f"only a str can be encoded, got {type(s).__name__}: {s!r}")
        # A lone surrogate is not valid Unicode text and raises a ValueError here.
        ids: list[int] = self.sp_model.encode(s.encode())
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int] | SupportsIndex) -> str:
        """The text of several ids or a single one. Bytes that are not UTF-8 become U+FFFD.

        Takes lists, arrays and tensors of any integer type. Raises ValueError if an id is not in
        the vocabulary.
        """
        # A zero-dimensional array is a single id.
        one = not isinstance(t, Iterable) or getattr(t, "ndim", 1) == 0
        tokens = cast("Iterable[SupportsIndex]", [t] if one else t)
        ids = [operator.index(token) for token in tokens]
        for token in ids:
            if not 0 <= token < self.n_words:
                raise ValueError(
                    f"token id {token} is not in the vocabulary of {self.n_words} pieces"
                )
        text: str = self.sp_model.decode(ids)
        return text

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of an id, independent of context: a piece with its space, or a single byte.

        For a special id, these are the bytes of its name.
        """
        if self.sp_model.is_byte(token):
            return bytes([int(self.sp_model.id_to_piece(token)[1:-1], 16)])
        piece: str = self.sp_model.id_to_piece(token)
        return piece.replace("\u2581", " ").encode()

    def piece(self, token: int) -> str:
        return self.piece_bytes(token).decode(errors="replace")

    def decode_pieces(self, t: Sequence[int]) -> list[str]:
        """Return one string per id. Together they equal `decode(t)`; see Detokenizer."""
        detokenizer = Detokenizer(self)
        pieces = []
        for token in t:
            piece, detokenizer = detokenizer.push(token)
            pieces.append(piece)
        if pieces:
            pieces[-1] += detokenizer.flush()
        return pieces


@dataclass(frozen=True)
class Detokenizer:
    """Decodes ids one at a time, in whole characters.

    The results of `push` and `flush` join to the text of `decode`. A character of several byte
    pieces is returned with the last of them. Bytes that are not valid UTF-8 are returned as U+FFFD
    as soon as the next piece or `flush` shows that they are invalid. The object is frozen, and
    `push` returns the next detokenizer, so that an interrupted step changes nothing.
    """

    tokenizer: Tokenizer
    # At the start of a text, SentencePiece drops the space that it put before the first word.
    at_start: bool = True
    bytes: tuple[int, ...] = ()  # byte pieces of an incomplete character

    def push(self, token: int) -> tuple[str, Detokenizer]:
        model = self.tokenizer.sp_model
        if model.is_byte(token):
            pending = Detokenizer(self.tokenizer, False, (*self.bytes, token))
            text = pending.flush()
            if text.endswith("\ufffd"):
                return "", pending
            return text, Detokenizer(self.tokenizer, False)
        text = self.flush()
        if model.is_control(token):
            return text, Detokenizer(self.tokenizer, self.at_start)
        if self.at_start or model.is_unknown(token):
            text += self.tokenizer.decode([token])
        else:
            text += model.id_to_piece(token).replace("\u2581", " ")
        return text, Detokenizer(self.tokenizer, False)

    def flush(self) -> str:
        if not self.bytes:
            return ""
        return self.tokenizer.decode(self.bytes)
