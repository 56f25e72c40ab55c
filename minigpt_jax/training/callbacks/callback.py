"""What a callback can do."""

from minigpt_jax.training.run import Run


class Callback:
    """Its methods do nothing. The loop calls each of them on every callback, in the order of their list."""

    def begin(self, run: Run) -> None:
        """Before the first step of this process."""

    def before_step(self, run: Run) -> None: ...

    def after_step(self, run: Run) -> None: ...

    def finish(self, run: Run) -> None:
        """After the last step of this process, which is saved; not where a signal or an error ends it."""

    def close(self) -> None:
        """Whatever happened."""
