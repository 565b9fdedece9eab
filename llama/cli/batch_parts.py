"""The files that a batch run writes: one output file, or one part per group of ranks, then merged.

It handles these cases:
- A run is killed or fills the disk. Lines are written whole. The next run cuts off an incomplete
  last line and resumes after the last complete one.
- The output file belongs to another input. Every line is compared with the input before new ones
  are appended.
- Two runs write the same output file. The file is locked.
- The number of groups has changed. Parts of a run with another number are rejected with an error
  that names the file.
- A run ends during the merge. Parts are removed only after the merged file has its final name.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .batch_lines import Line, encode, lines_of

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows
    import fcntl


class Results:
    """A file of results. An earlier run may have written some of them.

    Raises ValueError if the file does not hold results of `lines` or if another run is writing it.
    If writing fails, for example on a full disk, raises OSError with advice on how to resume.
    """

    def __init__(self, path: Path, lines: Iterator[Line]):
        self.path = path
        self.done = 0  # complete lines
        self.file = path.open("a+b")
        try:
            self._lock()
            end = self._check(lines)
            if end < path.stat().st_size:
                self.file.truncate(end)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it, or stop it"
            raise ValueError(f"{self.path} is being written by another run: {advice}") from None

    def _check(self, lines: Iterator[Line]) -> int:
        """Check the lines and count the complete ones. Returns the offset at which these end."""
        end = 0
        self.file.seek(0)
        for data in self.file:
            line = next(lines, None)
            is_whole = data.endswith(b"\n")
            if line is None or not belongs(data, line, is_whole):
                raise ValueError(
                    f"line {self.done + 1} of {self.path} does not answer the same line of the "
                    "input: choose another name, or remove it"
                )
            if is_whole:
                self.done += 1
                end += len(data)
        return end

    def write(self, lines: list[Line]) -> None:
        try:
            self.file.write(b"".join(encode(line.result()) + b"\n" for line in lines))
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has already reported it
            self.file.close()


def belongs(data: bytes, line: Line, is_whole: bool) -> bool:
    """Whether a line of an output file is the result of an input line, or the start of it."""
    return line.is_answered_by(data) if is_whole else line.may_begin(data)


def cannot_write(path: Path, error: OSError) -> OSError:
    advice = "make room, and run it again: it resumes where it stopped"
    return OSError(f"{path} could not be written ({error.strerror}): {advice}")


def part_of(target: Path, number: int, count: int) -> Path:
    """The file that one of several groups of ranks writes until the parts are merged."""
    return target.with_name(f"{target.name}.part-{number + 1}-of-{count}")


def parts_of(target: Path, count: int) -> list[Path]:
    """The file that each group of ranks writes. A single group writes the output itself.

    Raises ValueError if an earlier run with another number of groups has left a part.
    """
    parts = [target]
    if count > 1:
        parts = [part_of(target, number, count) for number in range(count)]
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.part-*-of-*")):
        if path not in parts:
            groups = path.name.rpartition("-")[2]
            advice = "use the same number, or remove it"
            raise ValueError(f"{path} is from a run with {groups} groups of ranks: {advice}")
    return parts


def check_whole(target: Path, source: Path, count: int, parts: list[Path]) -> None:
    """Remove leftover parts. Raises ValueError if the output does not have all lines."""
    results = Results(target, lines_of(source, slice(0, None, 1)))
    results.close()
    if results.done < count:
        raise ValueError(f"{target} was started by one group of ranks: use one group, or remove it")
    for part in parts:
        part.unlink(missing_ok=True)


def merge(parts: list[Path], target: Path) -> None:
    """Merge the parts, one line of each in turn, in the input's order. Then remove the parts."""
    merged = target.with_name(f"{target.name}.part-all")
    try:
        with contextlib.ExitStack() as stack:
            first, *others = [stack.enter_context(part.open("rb")) for part in parts]
            with merged.open("wb") as out:
                for line in first:
                    out.write(line)
                    out.writelines(file.readline() for file in others)
        merged.replace(target)
    except OSError as error:
        merged.unlink(missing_ok=True)
        raise cannot_write(target, error) from error
    for part in parts:
        part.unlink()
