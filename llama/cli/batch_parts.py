"""The files that a batch run writes: one of results, or one of each group of ranks that are merged.

It defends against
- a run that ends at any moment, killed or on a full disk: each line is written whole, and the
  next run cuts off what was begun of one and resumes behind it;
- an output that answers another input: every line of it is compared with the input's before one
  is added;
- two runs that write one output: the file is locked;
- a number of groups that has changed since: parts of another number are refused by name;
- an end during the merge: parts are removed after the merged file has its name.
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
    """A file of results, of which an earlier run may have written some.

    Raises ValueError where the file does not answer `lines`, or another run is writing it;
    OSError, of a full disk, that says how to resume.
    """

    def __init__(self, path: Path, lines: Iterator[Line]):
        self.path = path
        self.done = 0  # lines that are whole
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
            advice = "let it end, or end it"
            raise ValueError(f"{self.path} is being written by another run: {advice}") from None

    def _check(self, lines: Iterator[Line]) -> int:
        """Count the lines that are whole; returns where they end."""
        end = 0
        self.file.seek(0)
        for data in self.file:
            line = next(lines, None)
            is_whole = data.endswith(b"\n")
            if line is None or not belongs(data, line, is_whole):
                raise ValueError(
                    f"line {self.done + 1} of {self.path} does not answer that of the input: "
                    "choose another name, or remove it"
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
        with contextlib.suppress(OSError):  # which `write` has reported
            self.file.close()


def belongs(data: bytes, line: Line, is_whole: bool) -> bool:
    """Whether a line of an output is the result of a line of the input, or its beginning."""
    return line.is_answered_by(data) if is_whole else line.may_begin(data)


def cannot_write(path: Path, error: OSError) -> OSError:
    advice = "make room, and run it again: it resumes where it was"
    return OSError(f"{path} could not be written ({error.strerror}): {advice}")


def part_of(target: Path, number: int, count: int) -> Path:
    """What one of several groups of ranks writes, until all are done."""
    return target.with_name(f"{target.name}.part-{number + 1}-of-{count}")


def parts_of(target: Path, count: int) -> list[Path]:
    """The file that each group of ranks writes; of one group, the output itself.

    Raises ValueError where an earlier run with another number of groups has left something.
    """
    parts = [target]
    if count > 1:
        parts = [part_of(target, number, count) for number in range(count)]
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}.part-*-of-*")):
        if path not in parts:
            groups = path.name.rpartition("-")[2]
            advice = "run as many, or remove it"
            raise ValueError(f"{path} is of a run with {groups} groups of ranks: {advice}")
    return parts


def check_whole(target: Path, source: Path, count: int, parts: list[Path]) -> None:
    """Raise ValueError unless the output has all lines, and only the parts are left to remove."""
    results = Results(target, lines_of(source, slice(0, None, 1)))
    results.close()
    if results.done < count:
        raise ValueError(f"{target} was begun by one group of ranks: run one, or remove it")
    for part in parts:
        part.unlink(missing_ok=True)


def merge(parts: list[Path], target: Path) -> None:
    """Write one line of each part in turn, as the input has them, then remove the parts."""
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
