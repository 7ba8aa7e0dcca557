"""A worker actor that answers when a test says so."""

from types import SimpleNamespace

from ray.exceptions import ActorUnavailableError

DEAD = ActorUnavailableError("its node is gone", None)


class Actor:
    """Notes what it is asked; an answer is there once it stands in `answers`."""

    def __init__(self):
        self.asked = []
        self.answers = {}

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *_, **__: self._ask(method))

    def _ask(self, method):
        self.asked.append(method)
        return (self, len(self.asked) - 1)

    def answer(self, method, value):
        """Answer the newest call of that method."""
        newest = max(n for n, asked in enumerate(self.asked) if asked == method)
        self.answers[newest] = value

    def count(self, method):
        return self.asked.count(method)
