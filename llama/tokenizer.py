"""SentencePiece: text <-> token ids. Knows nothing about prompts, chat or models."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A SentencePiece model with the original's attributes.

    `n_words` is the vocabulary's size; `bos_id`, `eos_id` and `pad_id` are special ids (-1 where the model has none).

    Raises FileNotFoundError if `model_path` is not a file, ValueError if it is not a SentencePiece model.
    """

    def __init__(self, model_path: str | os.PathLike[str]):
        if not os.path.isfile(model_path):
            raise FileNotFoundError(f"no tokenizer at {model_path}: pass the path of tokenizer.model")
        try:
            self.sp_model = SentencePieceProcessor(model_file=os.fspath(model_path))
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: download tokenizer.model again") from error
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, with the begin- and end-of-sequence ids where asked for. Raises TypeError if not a str."""
        if not isinstance(s, str):
            raise TypeError(f"only a str can be encoded, got {type(s).__name__}: {s!r}")
        ids: list[int] = self.sp_model.encode(s)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range."""
        ids = list(t)
        for token in ids:
            if not 0 <= token < self.n_words:
                raise ValueError(f"token id {token} is not in the vocabulary of {self.n_words} pieces")
        text: str = self.sp_model.decode(ids)
        return text

    def decode_pieces(self, t: Sequence[int]) -> list[str]:
        """One string per id, whose concatenation is `decode(t)`.

        A character that spans several byte pieces stands at its last one; the others are empty.
        """
        ids = list(t)
        pieces: list[str] = []
        at_start = True  # SentencePiece drops the space it put before the text's first word
        while len(pieces) < len(ids):
            token = ids[len(pieces)]
            if self.sp_model.is_byte(token):
                run = []
                for other in ids[len(pieces) :]:
                    if not self.sp_model.is_byte(other):
                        break
                    run.append(other)
                pieces += self._decode_byte_run(run)
                at_start = False
            elif self.sp_model.is_control(token):
                pieces.append("")
            else:
                text = self.decode([self.bos_id, token]) if at_start else self._inner_text(token)
                pieces.append(text)
                at_start = False
        return pieces

    def _inner_text(self, token: int) -> str:
        """The text of a piece that does not begin the text, so that its leading space counts."""
        if self.sp_model.is_unknown(token):
            return self.decode([token])
        piece: str = self.sp_model.id_to_piece(token)
        return piece.replace("\u2581", " ")

    def _decode_byte_run(self, run: list[int]) -> list[str]:
        raw = bytes(int(self.sp_model.id_to_piece(token)[3:5], 16) for token in run)  # "<0xE4>"
        pieces: list[str] = []
        for char in self.decode(run):
            width = len(char.encode())
            if char == "\ufffd" and not raw.startswith(b"\xef\xbf\xbd", len(pieces)):
                width = 1  # SentencePiece replaces each bad byte by itself
            pieces += [""] * (width - 1) + [char]
        return pieces
