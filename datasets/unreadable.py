"""Training images that cannot be read: another one takes the place of each, and a file lists them."""

import os
import time
from pathlib import Path

from util.errors import FileError, UserError

SHOWN = 10  # names in the message that ends a run


class UnreadableImages:
    """The list of training images that cannot be read: a text file that all loader workers and ranks share.

    A line has the name of an image, a tab, and the reason. A line without a tab is a start of the run: only
    images behind the last one count.

    limit: more images than these end the run.
    """

    def __init__(self, file: Path, limit: int) -> None:
        self.file, self.limit = file, limit

    def begin(self) -> None:
        """Count from 0 again. The entries of earlier starts stay in the file."""
        if self.file.is_file():
            self._append(f'start of {time.strftime("%Y-%m-%d %H:%M:%S")}')

    def names(self) -> list[str]:
        """Return the names of the images that count, each once."""
        names: dict[str, None] = {}
        lines = self.file.read_text('utf-8', 'surrogateescape').splitlines() if self.file.is_file() else []
        for line in lines:
            name, tab, _ = line.partition('\t')
            if tab:
                names[name] = None
            else:
                names.clear()
        return list(names)

    def add(self, name: str, error: Exception) -> bool:
        """Add an image with its error, and return whether it is new."""
        name, reason = (' '.join(text.split()) for text in (name, str(error).removeprefix(name)))
        is_new = name not in self.names()
        if is_new:
            self._append(f'{name}\t{reason}')
        return is_new

    def check(self) -> None:
        """Raise a UserError if these are more than `limit` images."""
        names = self.names()
        if len(names) > self.limit:
            more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
            raise UserError(
                f'{len(names)} training images cannot be read, more than --skip_unreadable {self.limit}: '
                f'{", ".join(names[:SHOWN])}{more} ({self.file} has the reasons); fetch them again, remove '
                'them from the annotations, or raise --skip_unreadable'
            )

    def _append(self, line: str) -> None:
        """Append a line at once, so that those of other processes stay whole."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(number, f'{line}\n'.encode(errors='surrogateescape'))
            finally:
                os.close(number)
        except OSError as error:
            raise FileError(
                f'{self.file}, the list of unreadable images, cannot be written ({error.strerror})'
            ) from error
