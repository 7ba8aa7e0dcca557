"""A fake worker actor that answers when a test says so."""

from types import SimpleNamespace

from ray.exceptions import ActorUnavailableError, RayActorError

DEAD = ActorUnavailableError("its node is gone", None)
# what Ray reports of a machine without this package
NOT_INSTALLED = RayActorError(
    error_msg="The actor died because of an error raised in its creation task, \x1b[36mray::W.__init__()\n"
    "    ^^^^^^^\nModuleNotFoundError: No module named 'higgs_tune'\n",
    actor_init_failed=True,
)


class Actor:
    """Records its calls; the answer to call number n is there once `answers` has n."""

    def __init__(self):
        self.asked = []
        self.answers = {}

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *_, **__: self._ask(method))

    def _ask(self, method):
        self.asked.append(method)
        return (self, len(self.asked) - 1)

    def answer(self, method, value):
        """Answer the newest call of a method."""
        newest = max(n for n, asked in enumerate(self.asked) if asked == method)
        self.answers[newest] = value

    def count(self, method):
        return self.asked.count(method)
