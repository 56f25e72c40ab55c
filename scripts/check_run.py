"""Checks here and now that a run which is stopped, killed or damaged loses nothing; prints what was tried and what held.

python scripts/check_run.py                             about a minute and a half on two cores
python scripts/check_run.py --kills 100 --flips 300     a soak test

A short run is trained straight. Then it is trained again with SIGKILL at random moments, a third of them inside a save, and
again with SIGTERM and a full disk; whatever ends has to be the straight run to the bit: parameters, average, optimizer,
metrics (times aside) and a sample. Then bits are flipped in every file of a checkpoints. Exits with 0 only if all held.
"""

import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from minigpt_jax import cli
from minigpt_jax.api import default_sharding
from minigpt_jax.config import load_preset
from minigpt_jax.errors import DataError, UsageError
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.tasks import prepare
from minigpt_jax.training.resume import restore
from minigpt_jax.training.run import new_state

CONFIG = flags.DEFINE_string("config", "debug", "the preset that is trained")
KILLS = flags.DEFINE_integer("kills", 6, "how often a run is killed")
FLIPS = flags.DEFINE_integer("flips", 60, "how many bits are flipped, one at a time")
SEED = flags.DEFINE_integer("seed", 0, "decides when and where")

NUM_STEPS, LAST_SECONDS = 40, 8.0
SETTINGS = {  # all that could go wrong on resuming, and a save every fourth step
    "steps": NUM_STEPS, "batch_size": 32, "grad_accumulation": 2, "dropout": 0.1, "ema": 0.9, "log_every": 4,
    "eval_every": 10, "eval_batches": 2, "checkpoint_every": 4, "sample_every": 0,
}  # fmt: skip
KILLED = {"anywhere": "SIGKILL at any moment", "training": "SIGKILL while training", "saving": "SIGKILL inside a save"}


class Checks:
    """The folder in which all happens, the straight run there, and the tally."""

    def __init__(self, folder: Path):
        self.folder, self.chance = folder, random.Random(SEED.value)
        self.tried, self.held = Counter(), Counter()
        self.config = load_preset(CONFIG.value).override(SETTINGS)
        self.task = prepare(self.config)
        self.like = jax.eval_shape(lambda: new_state(self.task))
        self.command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", CONFIG.value]
        self.command += [f"--{name}={value}" for name, value in SETTINGS.items()]

    def count(self, what: str, held: bool) -> None:
        self.tried[what] += 1
        self.held[what] += held

    def start(self, workdir: Path) -> subprocess.Popen:
        """A process that trains in this folder."""
        command = [*self.command, f"--workdir={workdir}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, workdir: Path) -> None:
        process = self.start(workdir)
        _, errors = process.communicate()
        self.require_status(process, errors, 0)

    @staticmethod
    def require_status(process: subprocess.Popen, errors: str, *allowed: int) -> None:
        if process.returncode not in allowed:
            last = (errors.strip() or "no output").splitlines()[-1]
            raise DataError(f"training ended with {process.returncode}: {last}")

    def outcome(self, workdir: Path) -> tuple:
        """All that a finished run leaves, but its times."""
        state = restore(workdir, NUM_STEPS, self.like, default_sharding())
        leaves = [(str(path), np.asarray(leaf).tobytes()) for path, leaf in jax.tree.leaves_with_path(state)]
        clock = {"seconds", f"{self.task.unit}_per_second"}
        rows = [{name: row[name] for name in row.keys() - clock} for row in read_metrics(workdir / "metrics.jsonl")]
        info = dataclasses.replace(checkpoints.read_info(workdir, NUM_STEPS), seconds=0.0)
        return leaves, rows, info, self.task.preview(state.eval_params)

    def is_straight(self, workdir: Path) -> bool:
        return self.outcome(workdir) == self.straight

    def train_straight(self) -> None:
        self.finish(self.folder / "straight")
        self.straight = self.outcome(self.folder / "straight")

    def kill_often(self) -> None:
        """Kills until that has been done often enough; each time that a run gets to its end anyway, a new one begins."""
        kinds = [list(KILLED)[number % len(KILLED)] for number in range(KILLS.value)]
        killed, number, workdir = [], 0, self.folder / "killed_0"
        with tqdm(total=len(kinds), unit="kill", disable=not sys.stderr.isatty(), leave=False) as progress:
            while kinds:
                kind = self.kill(workdir, kinds[0])
                if kind is not None:
                    killed.append(kind)
                    if kind == kinds[0]:
                        kinds.pop(0)
                        progress.update()
                    continue
                self.judge(workdir, killed)
                killed, number = [], number + 1
                workdir = self.folder / f"killed_{number}"
        self.finish(workdir)
        self.judge(workdir, killed)

    def judge(self, workdir: Path, killed: list[str]) -> None:
        held = self.is_straight(workdir)
        for kind in killed:
            self.count(KILLED[kind], held)
        if not killed:
            self.count("nothing interrupted", held)
        shutil.rmtree(workdir)

    def kill(self, workdir: Path, kind: str) -> str | None:
        """Trains and kills. Returns the kind of kill that it became, None where the process came to its end before."""
        process = self.start(workdir)
        saves = checkpoints.checkpoints_dir(workdir)
        newest = max(checkpoints.steps(workdir), default=0)
        if kind == "anywhere":
            self.wait(process, lambda: False, self.chance.uniform(0, LAST_SECONDS))
        elif kind == "training":
            self.wait(process, lambda: max(checkpoints.steps(workdir), default=0) > newest)
            self.wait(process, lambda: False, self.chance.uniform(0, 1))
        else:
            for _ in range(self.chance.randrange(1, 4)):
                self.wait(process, lambda: not any(saves.glob("*.tmp")))
                self.wait(process, lambda: any(saves.glob("*.tmp")))
            self.wait(process, lambda: False, self.chance.uniform(0, 0.03))
        process.kill()
        _, errors = process.communicate()
        self.require_status(process, errors, 0, -signal.SIGKILL)
        if not process.returncode:
            return None
        if kind == "saving" and not any(saves.glob("*.tmp")):
            return "training"
        return kind

    @staticmethod
    def wait(process: subprocess.Popen, until, seconds: float = 120) -> None:
        """Until something is so, the process has ended or the time is over."""
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not until():
            time.sleep(0.0005)

    def stop_and_fill_the_disk(self) -> None:
        workdir = self.folder / "stopped"
        process = self.start(workdir)
        self.wait(process, lambda: max(checkpoints.steps(workdir), default=0) >= 8)
        process.terminate()
        _, errors = process.communicate()
        polite = process.returncode == 128 + signal.SIGTERM and "Stopped and saved at step" in errors
        before = checkpoints.steps(workdir)
        held = self.fill_the_disk(workdir, before) if sys.platform == "linux" else None
        self.finish(workdir)
        exact = self.is_straight(workdir)
        self.count("SIGTERM", polite and exact)
        if held is not None:
            self.count("files that cannot grow (as on a full disk)", held and exact)

    def fill_the_disk(self, workdir: Path, before: list[int]) -> bool:
        """Whether a run whose files cannot grow ends in one line, with its checkpoints as they were."""
        import resource

        process = self.start(workdir)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
        _, errors = process.communicate()
        last = errors.strip().splitlines()[-1]
        one_line = process.returncode == DataError.exit_status and last.startswith("error: ") and "Traceback" not in errors
        return one_line and checkpoints.steps(workdir) == before and all(self.is_whole(workdir, step) for step in before)

    def damage_the_newest(self) -> None:
        """A run whose newest checkpoint is damaged goes on from the one before, and ends as the straight one."""
        workdir = shutil.copytree(self.folder / "straight", self.folder / "damaged")
        self.flip_a_bit(self.files(workdir, NUM_STEPS)[-1])
        self.finish(workdir)
        self.count("resume with a damaged newest checkpoint", self.is_straight(workdir))

    def damage_files(self) -> None:
        """One damage at a time, over all files of a checkpoint in turn; each has to be found."""
        workdir = shutil.copytree(self.folder / "straight", self.folder / "flipped")
        files = self.files(workdir, NUM_STEPS)
        for number in range(FLIPS.value):
            self.damage("flipped bit", workdir, files[number % len(files)], self.flip_a_bit)
        for path in files:
            self.damage("truncated file", workdir, path, lambda path: path.write_bytes(path.read_bytes()[:-1]))
            self.damage("missing file", workdir, path, Path.unlink)
        extra = files[0].with_name("extra")
        extra.touch()
        self.count("file too many", not self.is_whole(workdir, NUM_STEPS))
        extra.unlink()
        self.count("nothing damaged: nothing found", self.is_whole(workdir, NUM_STEPS))

    def damage(self, what: str, workdir: Path, path: Path, action) -> None:
        before = path.read_bytes()
        action(path)
        self.count(what, not self.is_whole(workdir, NUM_STEPS))
        path.write_bytes(before)

    def flip_a_bit(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)

    @staticmethod
    def files(workdir: Path, step: int) -> list[Path]:
        folder = checkpoints.folder_of(workdir, step)
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)

    @staticmethod
    def is_whole(workdir: Path, step: int) -> bool:
        try:
            checkpoints.verify(workdir, step)
        except DataError:
            return False
        return True


def main() -> None:
    if sys.platform == "win32":
        raise UsageError("this sends signals that Windows does not have: run it on Linux or macOS")
    for flag in (KILLS, FLIPS):
        if flag.value < 1:
            raise UsageError(f"{flag.name}={flag.value} must be at least 1")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder))
        checks.train_straight()
        checks.kill_often()
        checks.stop_and_fill_the_disk()
        checks.damage_the_newest()
        checks.damage_files()
    print(f"{'what was tried':<44}{'tried':>6}{'held':>6}")
    for what, tried in checks.tried.items():
        print(f"{what:<44}{tried:>6}{checks.held[what]:>6}")
    all_held = checks.tried == checks.held
    print(f"{'all held' if all_held else 'NOT all held'}, in {time.monotonic() - began:.0f} s")
    if not all_held:
        sys.exit(DataError.exit_status)


if __name__ == "__main__":
    cli.run(main, __doc__)
