"""A checkpoint folder as users see it, whatever its layout, and this rank's part of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..distributed import divisors, either
from ..model import ModelArgs, Transformer
from ..ops import GROUP
from ..quantization.formats import Formats
from ..quantization.groups import Groups
from ..tokenizer import Tokenizer
from .files import folder_of, give_back, path_of
from .gguf import open_gguf
from .huggingface import open_huggingface
from .lora import Adapter
from .names import Shapes, interleave, part_shape, shard_dim
from .quantized import Quantized
from .release import Source, open_release
from .vocabulary import with_rows

logger = logging.getLogger(__name__)

EMBEDDING = "tok_embeddings.weight"
# precomputed angles, which some files carry and no model needs
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")


class Checkpoint:
    """Weights, opened but not read: a folder of the release's layout or of Hugging Face's, or a
    GGUF file.

    With `adapter_dir`, a LoRA adapter in PEFT's layout is merged into what is read. Raises
    FileNotFoundError for a missing folder or file, ValueError for one that is not what its name
    says, TypeError for what is no path.
    """

    def __init__(
        self, ckpt_dir: str | os.PathLike[str], adapter_dir: str | os.PathLike[str] | None = None
    ):
        self.path = path_of("ckpt_dir", ckpt_dir)
        self.source = open_gguf(self.path) if is_gguf(self.path) else open_folder(ckpt_dir)
        path = next(iter(self.source.shards))
        first = self.source.first
        embedding = self.source.name_of(EMBEDDING)
        if embedding not in first or first[embedding].dim() != 2:
            raise ValueError(f"{path} lacks tensor {embedding}: is it a checkpoint of Llama 2?")
        self.adapter = None if adapter_dir is None else Adapter(adapter_dir)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""
        return self.source.tensor(EMBEDDING).dtype

    def open_tokenizer(self, path: str | os.PathLike[str] | None = None) -> Tokenizer:
        """The checkpoint's tokenizer, or the one at `path`.

        Raises ValueError where it is not the embedding's.
        """
        vocabulary = self.source.vocabulary
        rows = len(self.source.tensor(EMBEDDING))
        if path is None and vocabulary is not None:
            tokenizer = Tokenizer.from_proto(vocabulary, self.name)
        else:
            tokenizer = Tokenizer(self.tokenizer_path if path is None else path)
        if self.source.added_tokens is not None and rows > tokenizer.n_words:
            proto = with_rows(
                tokenizer.sp_model.serialized_model_proto(), self.source.added_tokens(), rows
            )
            tokenizer = Tokenizer.from_proto(proto, self.name)
        tokenizer.chat_template = self.source.chat_template
        if tokenizer.n_words != rows:
            raise ValueError(
                f"tokenizer has {tokenizer.n_words} pieces, the checkpoint's embedding {rows} rows: "
                "this is not its tokenizer"
            )
        return tokenizer

    def tokenizer_model(self) -> bytes:
        """The content of tokenizer.model, and what was added to it.

        Raises FileNotFoundError where there is none.
        """
        if self.source.added_tokens is not None:
            proto: bytes = self.open_tokenizer().sp_model.serialized_model_proto()
            return proto
        return (
            self.tokenizer_path.read_bytes()
            if self.source.vocabulary is None
            else self.source.vocabulary
        )

    @property
    def kinds(self) -> list[str]:
        """The types of the matrices, as their layout calls them."""
        tensors = [
            tensor
            for shard in self.source.shards.values()
            for tensor in shard.values()
            if tensor.dim() > 1
        ]
        return sorted({getattr(t, "kind", str(t.dtype).removeprefix("torch.")) for t in tensors})

    @property
    def stored_bits(self) -> int | None:
        """Bits of most of the linear weights, where a file has them in fewer than 16 and no adapter
        makes them wide.
        """
        weight = self.source.first.get(self.source.name_of("layers.0.feed_forward.w1.weight"))
        return weight.bits or 8 if isinstance(weight, Quantized) and self.adapter is None else None

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.model in the folder, or beside it where the releases have it.

        Raises FileNotFoundError.
        """
        # A folder that is a link has two places beside it.
        for folder in (
            self.path,
            Path(os.path.abspath(self.path)).parent,
            self.path.resolve().parent,
        ):
            if (folder / "tokenizer.model").is_file():
                return folder / "tokenizer.model"
        raise FileNotFoundError(
            f"no tokenizer.model in {self.path}/ or beside it: pass tokenizer_path"
        )

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """The model's shape, with a cache of this size.

        Raises ValueError for a shape that the weights are not of.
        """
        file = self.source.params_file
        rows = len(self.source.tensor(EMBEDDING))
        if (said := self.source.params.get("vocab_size", rows)) != rows:
            raise ValueError(
                f"{file} has vocab_size {said}, the checkpoint's embedding {rows} rows: not of one model"
            )
        sizes = {"vocab_size": rows, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = ModelArgs(**self.source.params | sizes)
        if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
            raise ValueError(
                f"{file} has dim {args.dim}, {args.n_heads} attention heads and {args.kv_heads} key/value heads, "
                "which do not divide: it is of no Llama 2"
            )
        last = f"layers.{args.n_layers - 1}.attention_norm.weight"
        if not any(self.source.name_of(last) in shard for shard in self.source.shards.values()):
            raise ValueError(
                f"{next(iter(self.source.shards))} lacks tensor {last}: {file} is of another model"
            )
        return args

    def check(self, model: Transformer) -> Shapes:
        """The shapes of the whole model's tensors.

        Raises ValueError unless the files hold these and nothing else.
        """
        ranks, source, shards = model.ranks.size, self.source, len(self.source.shards)
        shapes = {
            name: tuple(n * ranks if d == shard_dim(name) else n for d, n in enumerate(part.shape))
            for name, part in model.state_dict().items()
        }
        wanted = {source.name_of(name) for name in shapes}
        for path, shard in source.shards.items():
            held = {name for name in shard if not name.endswith(IGNORED)}
            for what, names in (("holds unknown", held - wanted), ("lacks", wanted - held)):
                if names:
                    reason = f"{source.params_file} is of another model, or this is no Llama 2"
                    raise ValueError(f"{path} {what} tensor {min(names)}: {reason}")
            for name, whole in shapes.items():
                tensor, first = shard[source.name_of(name)], source.tensor(name)
                dim = shard_dim(name)
                shape = part_shape(name, whole, shards)
                if tuple(tensor.shape) != shape or (dim is not None and whole[dim] % shards):
                    found = f"{path}: {source.name_of(name)} has shape {tuple(tensor.shape)}"
                    asked = (
                        f"{source.params_file} asks for {shape}"
                        + f" in each of {shards} shards" * (shards > 1)
                    )
                    raise ValueError(
                        f"{found}, and {asked}: a shard is missing or of another model"
                    )
                if (
                    dim is None
                    and tensor is not first
                    and not torch.equal(as_tensor(tensor), as_tensor(first))
                ):
                    logger.warning(
                        "%s: %s is not that of shard 00: the shards may be of two models",
                        path,
                        name,
                    )
        if self.adapter is not None:
            self.adapter.check(shapes)
        return shapes

    def stored_part(
        self, name: str, rank: int, shape: torch.Size, formats: Formats
    ) -> Tensor | Quantized | None:
        """This rank's part of a matrix, of `shape`, where the file has it in the format wanted;
        else None.
        """
        source = self.source
        dim = shard_dim(name)
        shards = [shard[source.name_of(name)] for shard in source.shards.values()]
        if self.adapter is not None or dim is None:
            return None
        number, first = divmod(rank * shape[dim], shards[0].shape[dim])
        if first + shape[dim] > shards[0].shape[dim]:
            return None
        part = shards[number].narrow(dim, first, shape[dim])
        if isinstance(part, Quantized):
            return part if formats.of(part, adapted=False) is None else None
        in_place = part.dtype == formats.in_place and not source.in_halves_of(name)
        return part if in_place else None

    def check_groups(self, names: Iterable[str], args: ModelArgs, ranks: int) -> None:
        """Raise ValueError where so many ranks would cut a group of inputs of one of these
        matrices, which are held in the file's own bits.
        """
        tensors = {name: self.source.tensor(name) for name in names if shard_dim(name) == 1}
        for name, tensor in tensors.items():
            if isinstance(tensor, Quantized) and tensor.order is not None and ranks > 1:
                raise ValueError(
                    f"{self.name} has inputs of {name} whose groups are scattered (desc_act), which {ranks} ranks "
                    "cannot share: use 1, or dtype='bfloat16'"
                )
        inputs = {name: tensor.shape[1] for name, tensor in tensors.items()}
        for name, count in inputs.items():
            if count // ranks % GROUP:
                whole = [
                    n
                    for n in world_sizes(args)
                    if not any(other // n % GROUP for other in inputs.values())
                ]
                raise ValueError(
                    f"{self.name} has {count} inputs of {name} in groups of {GROUP}, which {ranks} ranks would cut: "
                    f"use {either(whole)}, or dtype='bfloat16'"
                )

    def groups(self, name: str, part: Quantized) -> Groups:
        """A part of a matrix in the file's own bits, its rows in the release's order."""
        groups = part.groups()
        if self.source.in_halves_of(name):
            groups = groups.map(partial(interleave, head_dim=self.head_dim))
        return groups

    @property
    def head_dim(self) -> int:
        head_dim: int = self.source.params["dim"] // self.source.params["n_heads"]
        return head_dim

    def copy(self, name: str, rank: int, out: Tensor) -> None:
        """Fill `out`, of the shape of one rank's part, with this rank's part of a tensor, of one
        shard or several.
        """
        source = self.source
        tensors = [shard[source.name_of(name)] for shard in source.shards.values()]
        dim = shard_dim(name)
        if dim is None:  # each shard has the whole of it
            tensors = tensors[:1]
            dim = 0
            rank = 0
        size = tensors[0].shape[dim]
        start = rank * out.shape[dim]
        end = (rank + 1) * out.shape[dim]
        for number, tensor in enumerate(tensors):
            first = max(start, number * size)
            last = min(end, (number + 1) * size)
            if first < last:
                part = tensor.narrow(dim, first - number * size, last - first)
                target = out.narrow(dim, first - start, last - first)
                in_halves = source.in_halves_of(name)
                if isinstance(part, Quantized):
                    part.copy_to(target)
                    if in_halves:
                        target.copy_(interleave(target, self.head_dim).clone())
                    part.let_go()
                    continue
                target.copy_(interleave(part, self.head_dim) if in_halves else part)
                if source.gives_back:
                    give_back(part)
        if self.adapter is not None:
            self.adapter.add(name, dim, start, self.head_dim, out)


def as_tensor(tensor: Tensor | Quantized) -> Tensor:
    assert isinstance(tensor, Tensor), (
        "only matrices are quantized, and only where there are no shards"
    )
    return tensor


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or is called one."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.suffix == ".gguf" and not path.is_dir()
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"GGUF"
    return False


def open_folder(ckpt_dir: str | os.PathLike[str]) -> Source:
    path = folder_of("ckpt_dir", ckpt_dir, "params.json or config.json")
    try:
        names = {file.name for file in path.iterdir()}
    except OSError as error:
        raise type(error)(
            f"{ckpt_dir} cannot be read ({error.strerror}): check its permissions"
        ) from error
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files and not names & {"config.json", "params.json"}:
        raise ValueError(
            f"{path} has no params.json or config.json, but {', '.join(files)}: pass the path of one"
        )
    in_hf_layout = "config.json" in names and "params.json" not in names
    return open_huggingface(path) if in_hf_layout else open_release(path)


def world_sizes(args: ModelArgs) -> list[int]:
    """The numbers of ranks that can share the model: what divides its key/value heads divides its
    other heads too.
    """
    return divisors(math.gcd(args.kv_heads, args.hidden_dim, args.vocab_size))


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every split dimension of the model divides over the ranks."""
    heads = {"attention heads": args.n_heads, "key/value heads": args.kv_heads}
    others = {"feed-forward channels": args.hidden_dim, "vocabulary pieces": args.vocab_size}
    uneven = (
        heads
        if args.kv_heads % world_size
        else {what: n for what, n in others.items() if n % world_size}
    )
    if uneven:
        listed = " and ".join(f"{n} {what}" for what, n in uneven.items())
        raise ValueError(
            f"{name} has {listed}, which {world_size} ranks cannot share: use {either(world_sizes(args))}"
        )


def open_whole(
    ckpt_dir: str, length: int = 1, rows: int = 1
) -> tuple[Checkpoint, ModelArgs, Shapes]:
    """A checkpoint, its model's shape, and the shapes of its tensors, which the files are checked
    to hold.
    """
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(max_seq_len=length, max_batch_size=rows)
    with torch.device("meta"):
        return checkpoint, args, checkpoint.check(Transformer(args))
