"""What happens around the training steps. Each callback does one thing; it reads and updates the Run that it is given."""

from minigpt_jax.system import notebook
from minigpt_jax.training.callbacks.callback import Callback
from minigpt_jax.training.callbacks.curve import Curve
from minigpt_jax.training.callbacks.evaluate import Evaluate
from minigpt_jax.training.callbacks.expect import Expect
from minigpt_jax.training.callbacks.log import Log
from minigpt_jax.training.callbacks.patience import Patience
from minigpt_jax.training.callbacks.preview import Preview
from minigpt_jax.training.callbacks.profile import Profile
from minigpt_jax.training.callbacks.progress import Progress
from minigpt_jax.training.callbacks.save import Save
from minigpt_jax.training.callbacks.summary import Summary
from minigpt_jax.training.callbacks.time_limit import TimeLimit


def standard(max_minutes: float | None = None, profile: bool = False) -> list[Callback]:
    """The callbacks of every run, in order: a step is logged and evaluated before it is saved."""
    limit = [] if max_minutes is None else [TimeLimit(max_minutes)]
    curve, profiler = [Curve()] if notebook.is_active() else [], [Profile()] if profile else []
    return [Progress(), Log(), Evaluate(), Expect(), Patience(), *curve, Save(), Preview(), *limit, *profiler, Summary()]
