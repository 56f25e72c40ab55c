"""The interface of callbacks."""

from minigpt_jax.training.run import Run


class Callback:
    """Base class whose methods do nothing. The loop calls each method on all callbacks, in the order of the list."""

    def begin(self, run: Run) -> None:
        """Called before the first step of this process."""

    def before_step(self, run: Run) -> None: ...

    def after_step(self, run: Run) -> None: ...

    def finish(self, run: Run) -> None:
        """Called after the last step of this process is saved, but not if a signal or an error ended it."""

    def close(self) -> None:
        """Always called at the end, also after an error."""
