"""Reading large JSON files piece by piece, so that memory holds one block of entries and not the whole file."""

import gc
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from util.errors import FileError, UserError

CHUNK = 1 << 22  # characters read at a time
AFTER_NUMBER = tuple(',]} \t\r\n')
# A text that ends here may still go on in the next chunk: longer than any literal or escape.
MARGIN = 64


def list_blocks(file: str | os.PathLike[str]) -> Iterator[tuple[str, list]]:
    """Yield the lists of a JSON object in blocks, with their names, in the file's order.

    A list without entries gives one empty block. Values that are not lists are left out.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        UserError: it is not a JSON object, or a list occurs twice.
    """
    file = Path(file)
    if not file.exists():
        raise FileError(f'annotation file {file} does not exist: check the path')
    if not file.is_file():
        raise FileError(f'annotation file {file} is no file: give the JSON file itself')
    try:
        with file.open('rb') as start:
            encoding = json.detect_encoding(start.read(4))
        with file.open(encoding=encoding) as stream:
            yield from _Reader(stream).lists()
    except RecursionError:
        raise UserError(f'{file} is nested too deep for annotations: write it again') from None
    except (ValueError, EOFError) as error:
        raise UserError(f'{file} is not JSON ({error}): write it again, or fetch it again') from error


class _Reader:
    """Position in a JSON text of which one part is in memory."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text, self.at, self.passed = stream, '', 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on, as much as there is already at least; False at the end."""
        rest = self.text[self.at :]
        new = self.stream.read(max(CHUNK, len(rest)))
        if new:
            self.passed += self.at
            self.text, self.at = rest + new, 0
        return bool(new)

    def next(self) -> str:
        """Return the next character that is not white space, '' at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in ' \t\r\n':
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ''

    def take(self, expected: str) -> str:
        """Go past the next character, which must be one of these."""
        found = self.next()
        if not found or found not in expected:
            what = repr(found) if found else 'its end'
            raise UserError(f'{what} at character {self.passed + self.at} instead of {" or ".join(expected)}')
        self.at += 1
        return found

    def value(self) -> Any:
        """Go past the next value, and return it."""
        self.next()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.pos + MARGIN > len(self.text) or error.msg.startswith('Unterminated')
                if cut_off and self.more():
                    continue
                raise UserError(f'{error.msg} at character {self.passed + error.pos}') from None
            # A number may go on behind the end of the text, or where only its first part was a number.
            complete = self.text[end : end + 1] in AFTER_NUMBER if isinstance(value, int | float) else True
            if (complete and end < len(self.text)) or not self.more():
                self.at = end
                return value

    def lists(self) -> Iterator[tuple[str, list]]:
        seen: set[str] = set()
        if self.next() == '[':  # JSON, but without names for its lists
            return
        self.take('{')
        while self.next() != '}':
            if self.next() != '"':
                self.take('"')
            key = self.value()
            self.take(':')
            if self.next() == '[':
                if key in seen:
                    raise UserError(f'its list "{key}" occurs twice')
                seen.add(key)
                for block in self.blocks():
                    yield key, block
            else:
                self.value()
            if self.next() == '}':
                break
            self.take(',')
            if self.next() == '}':
                self.take('"')
        self.take('}')
        if self.next():
            raise UserError(f'more text after its end, at character {self.passed + self.at}')

    def blocks(self) -> Iterator[list]:
        self.take('[')
        if self.next() == ']':
            self.at += 1
            yield []
            return
        while True:
            if entries := self.several():
                yield entries
            rest = [self.value()]  # the entry that the chunk cuts; all of the chunk if there were none
            while (end := self.take(',]')) == ',' and not entries and self.at + MARGIN < len(self.text):
                rest.append(self.value())
            yield rest
            if end == ']':
                return

    def several(self) -> list:
        """Go past all entries that are in memory as a whole and are objects, and return them; [] if that is not easy.

        One call of the decoder for all of them takes half the time of one for each. The text is cut before a brace
        that follows the end of another object. Where that is not between two entries, the decoder fails.
        """
        if len(self.text) - self.at < CHUNK // 2:
            self.more()
        cut = len(self.text)
        for _ in range(8):
            cut = self.text.rfind('{', self.at + 1, cut)
            entries = self.text[self.at : max(cut, self.at)].rstrip()
            if cut < 0 or not entries:
                break
            if entries.endswith(',') and entries[:-1].rstrip().endswith('}'):
                try:
                    with no_collection():
                        found = json.loads(f'[{entries[:-1]}]')
                except json.JSONDecodeError:
                    continue
                self.at = cut
                return found
        return []


@contextmanager
def no_collection() -> Iterator[None]:
    """Do not look for unused cycles of objects meanwhile: JSON has none, and looking takes as long as decoding."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def has_lists(file: str | os.PathLike[str], found: Collection[str], names: Collection[str]) -> None:
    """Raise ValueError if a list is missing."""
    for name in names:
        if name not in found:
            raise UserError(f'{file} has no list "{name}": COCO-form annotations need {", ".join(names)}')
