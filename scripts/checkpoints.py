"""Lists the checkpoints of a run with step, size and losses, and verifies their files.

python scripts/checkpoints.py --workdir runs/shakespeare_char

Exits with 1 if a checkpoint is corrupt.
"""

import sys

from absl import flags

from minigpt_jax import cli
from minigpt_jax.errors import DataError
from minigpt_jax.files import local_path
from minigpt_jax.interop.load import read_run_config
from minigpt_jax.runs import checkpoints

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")


def main() -> None:
    workdir = local_path(WORKDIR.value) if WORKDIR.value else cli.newest_run()
    read_run_config(workdir)
    steps = checkpoints.steps(workdir)
    if not steps:
        raise DataError(f"{workdir} has no checkpoint yet")
    infos, errors = {}, {}
    for step in steps:
        try:
            checkpoints.verify(workdir, step)
            infos[step] = checkpoints.read_info(workdir, step)
        except DataError as error:
            errors[step] = error
    best = next((step for step in checkpoints.best_first(workdir) if step in infos), None)
    print("    step       MB  batch loss  val loss  state")
    for step in steps:
        if info := infos.get(step):
            losses = f"{format_loss(info.last_loss):>10}{format_loss(info.val_loss):>10}"
            state = "intact, best" if step == best else "intact"
        else:
            losses, state = " " * 20, f"CORRUPT: {errors[step]}"
        files = (path for path in (checkpoints.checkpoint_dir(workdir, step)).rglob("*") if path.is_file())
        print(f"{step:8d} {sum(path.stat().st_size for path in files) / 1e6:8.2f}  {losses}  {state}")
    if errors:
        sys.exit(DataError.exit_status)


def format_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


if __name__ == "__main__":
    cli.run(main, __doc__)
