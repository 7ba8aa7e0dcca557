"""This package's warnings in a worker's process, kept until the driver takes them."""

import logging
from collections import deque
from collections.abc import Callable

MAX_KEPT = 1000


class Notices(logging.Handler):
    """Collects warnings and errors as text, from any thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._texts: deque[str] = deque(maxlen=MAX_KEPT)
        self._tell: Callable[[], object] | None = None

    def tell(self, tell: Callable[[], object]) -> None:
        """Call `tell` for each new text from now on, and at once if there are some already."""
        self._tell = tell
        if self._texts:
            tell()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's text."""
        self._texts.append(self.format(record))
        if self._tell is not None:
            self._tell()

    def take(self) -> list[str]:
        """Remove and return all texts."""
        return [self._texts.popleft() for _ in range(len(self._texts))]
