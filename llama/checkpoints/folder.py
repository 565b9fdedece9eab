"""A checkpoint folder as users see it, whatever its layout, and this rank's part of it."""

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
# precomputed angles, which some files carry and no model needs
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")


class Checkpoint:
    """Weights that are opened but not read.

    `ckpt_dir` is a folder in the release's or Hugging Face's layout, or a GGUF file. With
    `adapter_dir`, a LoRA adapter in PEFT's layout is merged into what is read.

    Raises FileNotFoundError for a missing folder or file, ValueError for one that is not what its
    name says, TypeError for what is no path.
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
        """The type of the weights in the files."""
        return self.source.tensor(EMBEDDING).dtype

    @property
    def kinds(self) -> list[str]:
        """The types of the matrices, as their layout calls them."""
        shards = self.source.shards.values()
        tensors = chain.from_iterable(shard.values() for shard in shards)
        return sorted({kind_of(tensor) for tensor in tensors if tensor.dim() > 1})

    @property
    def stored_bits(self) -> int | None:
        """Bits of most of the linear weights, where these are fewer than 16; else None.

        None with an adapter too, because merging it takes 16 bits.
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
        """tokenizer.model in the folder, or beside it where the releases have it.

        Raises FileNotFoundError.
        """
        return find_tokenizer(self.path)

    def open_tokenizer(self, path: str | os.PathLike[str] | None = None) -> Tokenizer:
        """The checkpoint's tokenizer, or the one at `path`.

        Raises ValueError where its size is not that of the embedding.
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
        """The content of tokenizer.model, with the tokens that were added to it.

        Raises FileNotFoundError where there is none.
        """
        if self.source.added_tokens is not None:
            proto: bytes = self.open_tokenizer().sp_model.serialized_model_proto()
            return proto
        if self.source.vocabulary is not None:
            return self.source.vocabulary
        return self.tokenizer_path.read_bytes()

    def model_args(self, max_seq_len: int, max_batch_size: int) -> ModelArgs:
        """The model's shape, with a cache of this size.

        Raises ValueError for a shape that the weights are not of.
        """
        rows = len(self.source.tensor(EMBEDDING))
        said = self.source.params.get("vocab_size", rows)
        if said != rows:
            raise ValueError(
                f"{self.source.params_file} has vocab_size {said}, "
                f"the checkpoint's embedding {rows} rows: not of one model"
            )
        sizes = {"vocab_size": rows, "max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
        args = ModelArgs(**self.source.params | sizes)
        check_args(self.source, args)
        return args

    def check(self, model: Transformer) -> Shapes:
        """The shapes of the whole model's tensors.

        Raises ValueError unless the files have exactly these tensors. Warns where shards differ in
        a tensor that each of them has whole.
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
        """This rank's part of a matrix, where the file has it in the format wanted; else None.

        `shape` is that of the part. A part that lies across several shards has to be copied: None.
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
        """Raise ValueError where so many ranks would cut a group of inputs.

        `names` are the matrices that keep the file's own groups.
        """
        tensors = {name: self.source.tensor(name) for name in names if shard_dim(name) == 1}
        check_ranks_share_groups(self.name, tensors, args, ranks)

    def groups(self, name: str, part: Quantized) -> Groups:
        """The file's own groups of a part of a matrix, its rows in the release's order."""
        groups = part.groups()
        if self.source.in_halves_of(name):
            groups = groups.map(partial(interleave, head_dim=self.head_dim))
        return groups

    def copy(self, name: str, rank: int, out: Tensor) -> None:
        """Fill `out`, which has the shape of one rank's part, with this rank's part of a tensor.

        The part may lie in one shard or across several.
        """
        tensors = self.source.parts(name)
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
                copy_part(self.source, part, target, self.source.in_halves_of(name), self.head_dim)
        if self.adapter is not None:
            self.adapter.add(name, dim, start, self.head_dim, out)


def find_tokenizer(path: Path) -> Path:
    """tokenizer.model in a checkpoint's folder or beside it.

    Raises FileNotFoundError.
    """
    # A folder that is a link has two places beside it.
    beside = Path(os.path.abspath(path)).parent
    beside_target = path.resolve().parent
    for folder in (path, beside, beside_target):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    raise FileNotFoundError(f"no tokenizer.model in {path}/ or beside it: pass tokenizer_path")


def kind_of(tensor: Tensor | Quantized) -> str:
    """The type of a tensor, as its layout calls it."""
    if isinstance(tensor, Quantized):
        return tensor.kind
    return str(tensor.dtype).removeprefix("torch.")


def check_args(source: Source, args: ModelArgs) -> None:
    """Raise ValueError unless heads divide the model evenly and the last layer has weights."""
    file = source.params_file
    if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
        raise ValueError(
            f"{file} has dim {args.dim}, {args.n_heads} attention heads "
            f"and {args.kv_heads} key/value heads, which do not divide: it is of no Llama 2"
        )
    last = f"layers.{args.n_layers - 1}.attention_norm.weight"
    if not any(source.name_of(last) in shard for shard in source.shards.values()):
        path = next(iter(source.shards))
        raise ValueError(f"{path} lacks tensor {last}: {file} is of another model")


def check_names(source: Source, path: Path, shapes: Shapes) -> None:
    """Raise ValueError unless a shard has the tensors of these names and no others."""
    present = {name for name in source.shards[path] if not name.endswith(IGNORED)}
    wanted = {source.name_of(name) for name in shapes}
    for what, names in (("holds unknown", present - wanted), ("lacks", wanted - present)):
        if names:
            reason = f"{source.params_file} is of another model, or this is no Llama 2"
            raise ValueError(f"{path} {what} tensor {min(names)}: {reason}")


def check_tensor(source: Source, path: Path, name: str, whole: tuple[int, ...]) -> None:
    """Check one tensor of a shard, whose `whole` shape the model asks for.

    Raises ValueError for another shape. Warns of a tensor that every shard has whole and that
    differs from the first shard's.
    """
    tensor = source.shards[path][source.name_of(name)]
    first = source.tensor(name)
    shards = len(source.shards)
    dim = shard_dim(name)
    shape = part_shape(name, whole, shards)
    if tuple(tensor.shape) != shape or (dim is not None and whole[dim] % shards):
        found = f"{path}: {source.name_of(name)} has shape {tuple(tensor.shape)}"
        asked = f"{source.params_file} asks for {shape}"
        if shards > 1:
            asked += f" in each of {shards} shards"
        raise ValueError(f"{found}, and {asked}: a shard is missing or of another model")
    if dim is not None or tensor is first:
        return
    if not torch.equal(as_tensor(tensor), as_tensor(first)):
        logger.warning(
            "%s: %s is not that of shard 00: the shards may be of two models", path, name
        )


def as_tensor(tensor: Tensor | Quantized) -> Tensor:
    assert isinstance(tensor, Tensor), (
        "only matrices are quantized, and only where there are no shards"
    )
    return tensor


def copy_part(
    source: Source, part: Tensor | Quantized, target: Tensor, in_halves: bool, head_dim: int
) -> None:
    """Fill `target` with a part of a tensor, its rows in the release's order.

    Gives the part's pages back where they can be read again. `in_halves`: whether its rows are in
    Hugging Face's order.
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
    """Raise ValueError unless each rank gets whole groups of the inputs of these matrices."""
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
    """Whether each rank gets whole groups of all these numbers of inputs."""
    return all(count // ranks % GROUP == 0 for count in inputs)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or has the name of one."""
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
    """The numbers of ranks that can share the model."""
    # What divides the key/value heads divides the other heads too.
    return divisors(math.gcd(args.kv_heads, args.hidden_dim, args.vocab_size))


def check_world_size(name: str, args: ModelArgs, world_size: int) -> None:
    """Raise ValueError unless every split dimension of the model divides over the ranks."""
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
    """A checkpoint, its model's shape, and the shapes of its tensors.

    Raises ValueError unless the files have exactly these tensors.
    """
    checkpoint = Checkpoint(ckpt_dir)
    args = checkpoint.model_args(max_seq_len=length, max_batch_size=rows)
    with torch.device("meta"):
        return checkpoint, args, checkpoint.check(Transformer(args))
