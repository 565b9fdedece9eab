"""Open a checkpoint in any layout, check it, and read this rank's part of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
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
from .names import Shapes, interleave, part_shape, shard_dim, whole_shape
from .quantized import Quantized
from .release import Source, open_release
from .vocabulary import with_rows

logger = logging.getLogger(__name__)

EMBEDDING = "tok_embeddings.weight"
# Precomputed rotary angles. Some files contain them, but no model needs them.
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")


class Checkpoint:
    """A checkpoint that has been opened, but whose weights have not been read.

    `ckpt_dir` is a folder in the release's or Hugging Face's layout, or a GGUF file. With
    `adapter_dir`, a LoRA adapter in PEFT's layout is merged into the weights as they are read.

    Raises FileNotFoundError if a folder or file is missing, ValueError if a file is invalid or not
    supported, TypeError if an argument is not a path.
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
            raise ValueError(f"{path} lacks tensor {embedding}: is it a Llama 2 checkpoint?")
        self.adapter = None if adapter_dir is None else Adapter(adapter_dir)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the weights in the files."""
        return self.source.tensor(EMBEDDING).dtype

    @property
    def kinds(self) -> list[str]:
        """The types of the matrices, by their names in the layout."""
        shards = self.source.shards.values()
        tensors = chain.from_iterable(shard.values() for shard in shards)
        return sorted({kind_of(tensor) for tensor in tensors if tensor.dim() > 1})

    @property
    def stored_bits(self) -> int | None:
        """Bits of most linear weights if these are fewer than 16, else None.

        Also None with an adapter, because merging it requires 16 bits.
        """
        weight = self.source.first.get(self.source.name_of("layers.0.feed_forward.w1.weight"))
        if self.adapter is not None or not isinstance(weight, Quantized):
            return None
        return weight.bits or 8

    @property
    def head_dim(self) -> int:
        head_dim: int = self.source.params["dim"] // self.source.params["n_heads"]
        return head_dim

    @property
    def tokenizer_path(self) -> Path:
        """The path of tokenizer.model in the folder or, as in the releases, next to it.

        Raises FileNotFoundError if there is none.
        """
        return find_tokenizer(self.path)

    def open_tokenizer(self, path: str | os.PathLike[str] | None = None) -> Tokenizer:
        """Open the checkpoint's tokenizer, or the one at `path`.

        Raises ValueError if its size differs from the number of embedding rows.
        """
        vocabulary = self.source.vocabulary
        rows = len(self.source.tensor(EMBEDDING))
        if path is not None:
            tokenizer = Tokenizer(path)
        elif vocabulary is not None:
            tokenizer = Tokenizer.from_proto(vocabulary, self.name)
        else:
            tokenizer = Tokenizer(self.tokenizer_path)
        if self.source.added_tokens is not None and rows > tokenizer.n_words:
            proto = with_rows(
                tokenizer.sp_model.serialized_model_proto(), self.source.added_tokens(), rows
            )
            tokenizer = Tokenizer.from_proto(proto, self.name)
        tokenizer.chat_template = self.source.chat_template
        if tokenizer.n_words != rows:
            raise ValueError(
                f"tokenizer has {tokenizer.n_words} pieces, "
                f"the checkpoint's embedding {rows} rows: this is not its tokenizer"
            )
        return tokenizer

    def tokenizer_model(self) -> bytes:
        """Return the content of tokenizer.model, including added tokens.

        Raises FileNotFoundError if there is none.
        """
        if self.source.added_tokens is not None:
            proto: bytes = self.open_tokenizer().sp_model.serialized_model_proto()
            return proto
        if self.source.vocabulary is not None:
            return self.source.vocabulary
        return self.tokenizer_path.read_bytes()

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """Return the model's parameters, with a cache of this size.

        Raises ValueError if the parameters do not match the weights.
        """
        rows = len(self.source.tensor(EMBEDDING))
        said = self.source.params.get("vocab_size", rows)
        if said != rows:
            raise ValueError(
                f"{self.source.params_file} has vocab_size {said}, "
                f"the checkpoint's embedding {rows} rows: they are from different models"
            )
        sizes = {"vocab_size": rows, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = ModelArgs(**self.source.params | sizes)
        check_args(self.source, args)
        return args

    def check(self, model: Transformer) -> Shapes:
        """Check the files against the model and return the shapes of its whole tensors.

        Raises ValueError unless the files have exactly the model's tensors. Warns if shards differ
        in a tensor that is not split over them.
        """
        shapes = {
            name: whole_shape(name, part.shape, model.ranks.size)
            for name, part in model.state_dict().items()
        }
        for path in self.source.shards:
            check_names(self.source, path, shapes)
            for name, shape in shapes.items():
                check_tensor(self.source, path, name, shape)
        if self.adapter is not None:
            self.adapter.check(shapes)
        return shapes

    def stored_part(
        self, name: str, rank: int, shape: torch.Size, formats: Formats
    ) -> Tensor | Quantized | None:
        """Return this rank's part of a matrix if it is already stored in the requested format.

        Returns None otherwise, and for a part that spans several shards, which must be copied.
        `shape` is the shape of the part.
        """
        dim = shard_dim(name)
        if self.adapter is not None or dim is None:
            return None
        shards = self.source.parts(name)
        number, first = divmod(rank * shape[dim], shards[0].shape[dim])
        if first + shape[dim] > shards[0].shape[dim]:
            return None
        part = shards[number].narrow(dim, first, shape[dim])
        if isinstance(part, Quantized):
            wanted = formats.of(part, adapted=False) is None
        else:
            wanted = part.dtype == formats.in_place and not self.source.in_halves_of(name)
        return part if wanted else None

    def check_groups(self, names: Iterable[str], args: ModelArgs, ranks: int) -> None:
        """Raise ValueError if splitting over `ranks` ranks would cut a quantization group.

        `names` are the matrices that keep the file's own groups.
        """
        tensors = {name: self.source.tensor(name) for name in names if shard_dim(name) == 1}
        check_ranks_share_groups(self.name, tensors, args, ranks)

    def groups(self, name: str, part: Quantized) -> Groups:
        """Return the file's own groups of a part of a matrix, with rows in the release's order."""
        groups = part.groups()
        if self.source.in_halves_of(name):
            groups = groups.map(partial(interleave, head_dim=self.head_dim))
        return groups

    def copy(self, name: str, rank: int, out: Tensor) -> None:
        """Fill `out`, which has the shape of one rank's part, with that rank's part of a tensor.

        The part may be in one shard or span several.
        """
        tensors = self.source.parts(name)
        dim = shard_dim(name)
        if dim is None:  # every shard has the whole tensor
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
                copy_part(self.source, part, target, self.source.in_halves_of(name), self.head_dim)
        if self.adapter is not None:
            self.adapter.add(name, dim, start, self.head_dim, out)


def find_tokenizer(path: Path) -> Path:
    """Find tokenizer.model in a checkpoint's folder or next to it.

    Raises FileNotFoundError if there is none.
    """
    # A folder that is a symbolic link has two parents: the link's and the target's.
    beside = Path(os.path.abspath(path)).parent
    beside_target = path.resolve().parent
    for folder in (path, beside, beside_target):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    raise FileNotFoundError(f"no tokenizer.model in {path}/ or beside it: pass tokenizer_path")


def kind_of(tensor: Tensor | Quantized) -> str:
    """Return the type of a tensor, by its name in the layout."""
    if isinstance(tensor, Quantized):
        return tensor.kind
    return str(tensor.dtype).removeprefix("torch.")


def check_args(source: Source, args: ModelArgs) -> None:
    """Raise ValueError unless the head counts divide evenly and the last layer has weights."""
    file = source.params_file
    if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
        raise ValueError(
            f"{file} has dim {args.dim}, {args.n_heads} attention heads "
            f"and {args.kv_heads} key/value heads, which do not divide evenly: "
            "this is not a Llama 2 model"
        )
    last = f"layers.{args.n_layers - 1}.attention_norm.weight"
    if not any(source.name_of(last) in shard for shard in source.shards.values()):
        path = next(iter(source.shards))
        raise ValueError(f"{path} lacks tensor {last}: {file} is from another model")


def check_names(source: Source, path: Path, shapes: Shapes) -> None:
    """Raise ValueError unless a shard has exactly the tensors named in `shapes`."""
    present = {name for name in source.shards[path] if not name.endswith(IGNORED)}
    wanted = {source.name_of(name) for name in shapes}
    for what, names in (("holds unknown", present - wanted), ("lacks", wanted - present)):
        if names:
            reason = f"{source.params_file} is from another model, or this is not Llama 2"
            raise ValueError(f"{path} {what} tensor {min(names)}: {reason}")


def check_tensor(source: Source, path: Path, name: str, whole: tuple[int, ...]) -> None:
    """Check one tensor of a shard. `whole` is the shape of the whole tensor in the model.

    Raises ValueError if the shape is different. Warns if the tensor is not split over the shards
    and differs from the first shard's.
    """
    tensor = source.shards[path][source.name_of(name)]
    first = source.tensor(name)
    shards = len(source.shards)
    dim = shard_dim(name)
    shape = part_shape(name, whole, shards)
    if tuple(tensor.shape) != shape or (dim is not None and whole[dim] % shards):
        found = f"{path}: {source.name_of(name)} has shape {tuple(tensor.shape)}"
        asked = f"{source.params_file} requires {shape}"
        if shards > 1:
            asked += f" in each of {shards} shards"
        raise ValueError(f"{found}, and {asked}: a shard is missing or from another model")
    if dim is not None or tensor is first:
        return
    if not torch.equal(as_tensor(tensor), as_tensor(first)):
        logger.warning(
            "%s: %s differs from shard 00: the shards may be from different models", path, name
        )


def as_tensor(tensor: Tensor | Quantized) -> Tensor:
    assert isinstance(tensor, Tensor), (
        "only matrices are quantized, and only in a checkpoint without shards"
    )
    return tensor


def copy_part(
    source: Source, part: Tensor | Quantized, target: Tensor, in_halves: bool, head_dim: int
) -> None:
    """Fill `target` with a part of a tensor, with rows in the release's order.

    Releases the part's pages if they can be read again. `in_halves` is true if the part's rows are
    in Hugging Face's order.
    """
    if isinstance(part, Quantized):
        part.copy_to(target)
        if in_halves:
            target.copy_(interleave(target, head_dim).clone())
        part.let_go()
        return
    target.copy_(interleave(part, head_dim) if in_halves else part)
    if source.gives_back:
        give_back(part)


def check_ranks_share_groups(
    checkpoint: str, tensors: Mapping[str, Tensor | Quantized], args: ModelArgs, ranks: int
) -> None:
    """Raise ValueError unless each rank gets whole groups of inputs of these matrices."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized) and tensor.order is not None and ranks > 1:
            raise ValueError(
                f"{checkpoint} has inputs of {name} whose groups are scattered (desc_act), "
                f"which {ranks} ranks cannot share: use 1, or dtype='bfloat16'"
            )
    inputs = {name: tensor.shape[1] for name, tensor in tensors.items()}
    for name, count in inputs.items():
        if count // ranks % GROUP:
            sizes = [n for n in world_sizes(args) if keeps_groups(inputs.values(), n)]
            raise ValueError(
                f"{checkpoint} has {count} inputs of {name} in groups of {GROUP}, "
                f"which {ranks} ranks would cut: use {either(sizes)}, or dtype='bfloat16'"
            )


def keeps_groups(inputs: Iterable[int], ranks: int) -> bool:
    """Whether each rank gets whole groups, for every one of these input counts."""
    return all(count // ranks % GROUP == 0 for count in inputs)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or its first bytes."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
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
            f"{path} has no params.json or config.json, but {', '.join(files)}: "
            "pass the path of one"
        )
    if "config.json" in names and "params.json" not in names:
        return open_huggingface(path)
    return open_release(path)


def world_sizes(args: ModelArgs) -> list[int]:
    """Return the numbers of ranks that can share the model."""
    # A number that divides the key/value heads also divides the attention heads.
    return divisors(math.gcd(args.kv_heads, args.hidden_dim, args.vocab_size))


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every sharded dimension divides evenly over the ranks."""
    others = {"feed-forward channels": args.hidden_dim, "vocabulary pieces": args.vocab_size}
    uneven = {what: n for what, n in others.items() if n % world_size}
    if args.kv_heads % world_size:
        uneven = {"attention heads": args.n_heads, "key/value heads": args.kv_heads}
    if uneven:
        listed = " and ".join(f"{n} {what}" for what, n in uneven.items())
        raise ValueError(
            f"{name} has {listed}, which {world_size} ranks cannot share: "
            f"use {either(world_sizes(args))}"
        )


def open_whole(
    ckpt_dir: str, length: int = 1, rows: int = 1
) -> tuple[Checkpoint, ModelArgs, Shapes]:
    """Open a checkpoint; return it with its model's parameters and the shapes of its tensors.

    Raises ValueError unless the files have exactly the model's tensors.
    """
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(max_seq_len=length, max_batch_size=rows)
    with torch.device("meta"):
        return checkpoint, args, checkpoint.check(Transformer(args))
