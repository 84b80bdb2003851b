"""Training images that cannot be read: another one takes the place of each, and a file lists them."""

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
            self._append([f'start of {time.strftime("%Y-%m-%d %H:%M:%S")}'])

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

    def add(self, *images: tuple[str, Exception]) -> bool:
        """Add images, the name and the error of each, and return whether one of them is new."""
        known = set(self.names())
        lines = []
        for image, error in images:
            name, reason = (' '.join(text.split()) for text in (image, str(error).removeprefix(image)))
            if name not in known:
                lines.append(f'{name}\t{reason}')
        if lines:
            self._append(lines)
        return bool(lines)

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

    def _append(self, lines: list[str]) -> None:
        """Append lines at once, so that those of other processes stay whole."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open('ab', buffering=0) as file:
                file.write(''.join(f'{line}\n' for line in lines).encode(errors='surrogateescape'))
        except OSError as error:
            raise FileError(
                f'{self.file}, the list of unreadable images, cannot be written ({error.strerror})'
            ) from error
