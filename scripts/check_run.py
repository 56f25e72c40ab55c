"""Checks on this machine that a run survives interruptions and corrupt files, and prints a table of the results.

python scripts/check_run.py                             about a minute and a half on two cores
python scripts/check_run.py --kills 100 --flips 300     a soak test

Trains a short run without interruption, as the reference. Then trains it again with SIGKILL at random moments, a third of
them during a save, and again with SIGTERM and a full disk. Each result must equal the reference bit for bit: parameters,
moving average, optimizer state, metrics (except times) and a sample. Finally flips bits in every file of a checkpoint, which
must be detected. Exits with 0 only if all checks passed.
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
from minigpt_jax.interop.load import settings_from
from minigpt_jax.runs import checkpoints
from minigpt_jax.runs.metrics import read_metrics
from minigpt_jax.tasks import prepare
from minigpt_jax.training.resume import restore
from minigpt_jax.training.run import new_state

CONFIG = flags.DEFINE_string("config", "debug", "preset to train")
KILLS = flags.DEFINE_integer("kills", 6, "number of kills")
FLIPS = flags.DEFINE_integer("flips", 60, "number of bits to flip, one at a time")
SEED = flags.DEFINE_integer("seed", 0, "random seed for the kills and the flipped bits")

NUM_STEPS, MAX_SECONDS = 40, 8.0  # the latest kill "anywhere"
SETTINGS = {  # all that could break resuming, and a checkpoint every fourth step
    "steps": NUM_STEPS, "batch_size": 32, "grad_accumulation": 2, "dropout": 0.1, "ema": 0.9, "log_every": 4,
    "eval_every": 10, "eval_batches": 2, "checkpoint_every": 4, "sample_every": 0,
}  # fmt: skip
KILLED = {"anywhere": "SIGKILL at any moment", "training": "SIGKILL while training", "saving": "SIGKILL during a save"}


class Checks:
    """The working folder, the reference run in it, and the number of checks done and passed."""

    def __init__(self, folder: Path):
        self.folder, self.random = folder, random.Random(SEED.value)
        self.done, self.passed = Counter(), Counter()
        preset = load_preset(CONFIG.value)
        if preset.training.init_from:
            preset = preset.override(settings_from(preset.training.init_from))
        self.config = preset.override(SETTINGS)
        self.task = prepare(self.config, sharding=default_sharding())
        self.abstract_state = jax.eval_shape(lambda: new_state(self.task))
        self.command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", CONFIG.value]
        self.command += [f"--{name}={value}" for name, value in SETTINGS.items()]

    def count(self, check: str, passed: bool) -> None:
        self.done[check] += 1
        self.passed[check] += passed

    def start(self, workdir: Path) -> subprocess.Popen:
        """Starts a process that trains in this folder."""
        command = [*self.command, f"--workdir={workdir}"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(self, workdir: Path) -> None:
        process = self.start(workdir)
        _, errors = process.communicate()
        self.require_status(process, errors, 0)

    @staticmethod
    def require_status(process: subprocess.Popen, errors: str, *allowed: int) -> None:
        if process.returncode not in allowed:
            last_line = (errors.strip() or "no output").splitlines()[-1]
            raise DataError(f"training exited with status {process.returncode}: {last_line}")

    def outcome(self, workdir: Path) -> tuple:
        """Everything that a finished run produced, except times."""
        state = restore(workdir, NUM_STEPS, self.abstract_state, default_sharding())
        leaves = [(str(path), np.asarray(leaf).tobytes()) for path, leaf in jax.tree.leaves_with_path(state)]
        times = {"seconds", f"{self.task.unit}_per_second"}
        rows = [{name: row[name] for name in row.keys() - times} for row in read_metrics(workdir / "metrics.jsonl")]
        info = dataclasses.replace(checkpoints.read_info(workdir, NUM_STEPS), seconds=0.0)
        return leaves, rows, info, self.task.preview(state.eval_params)

    def equals_reference(self, workdir: Path) -> bool:
        return self.outcome(workdir) == self.reference

    def train_reference(self) -> None:
        self.finish(self.folder / "reference")
        self.reference = self.outcome(self.folder / "reference")

    def kill_repeatedly(self) -> None:
        """Kills runs until there were enough kills of each kind. Starts a new run whenever one finishes first."""
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
                self.check_killed(workdir, killed)
                killed, number = [], number + 1
                workdir = self.folder / f"killed_{number}"
        self.finish(workdir)
        self.check_killed(workdir, killed)

    def check_killed(self, workdir: Path, killed: list[str]) -> None:
        passed = self.equals_reference(workdir)
        for kind in killed:
            self.count(KILLED[kind], passed)
        if not killed:
            self.count("no interruption", passed)
        shutil.rmtree(workdir)

    def kill(self, workdir: Path, kind: str) -> str | None:
        """Trains and kills. Returns the actual kind of kill, or None if training finished first."""
        process = self.start(workdir)
        folder = checkpoints.checkpoints_dir(workdir)
        newest = max(checkpoints.steps(workdir), default=0)
        if kind == "anywhere":
            self.wait(process, lambda: False, self.random.uniform(0, MAX_SECONDS))
        elif kind == "training":
            self.wait(process, lambda: max(checkpoints.steps(workdir), default=0) > newest)
            self.wait(process, lambda: False, self.random.uniform(0, 1))
        else:
            for _ in range(self.random.randrange(1, 4)):
                self.wait(process, lambda: not any(folder.glob("*.tmp")))
                self.wait(process, lambda: any(folder.glob("*.tmp")))
            self.wait(process, lambda: False, self.random.uniform(0, 0.03))
        process.kill()
        _, errors = process.communicate()
        self.require_status(process, errors, 0, -signal.SIGKILL)
        if not process.returncode:
            return None
        if kind == "saving" and not any(folder.glob("*.tmp")):
            return "training"
        return kind

    @staticmethod
    def wait(process: subprocess.Popen, is_ready, seconds: float = 120) -> None:
        """Waits until `is_ready()`, the end of the process or the time limit."""
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not is_ready():
            time.sleep(0.0005)

    def stop_and_fill_the_disk(self) -> None:
        workdir = self.folder / "stopped"
        process = self.start(workdir)
        self.wait(process, lambda: max(checkpoints.steps(workdir), default=0) >= 8)
        process.terminate()
        _, errors = process.communicate()
        stopped = process.returncode == 128 + signal.SIGTERM and f"--workdir {workdir}" in errors  # the command to resume
        before = checkpoints.steps(workdir)
        survived = self.survives_full_disk(workdir, before) if sys.platform == "linux" else None
        self.finish(workdir)
        is_equal = self.equals_reference(workdir)
        self.count("SIGTERM", stopped and is_equal)
        if survived is not None:
            self.count("files that cannot grow (as on a full disk)", survived and is_equal)

    def survives_full_disk(self, workdir: Path, before: list[int]) -> bool:
        """Whether a run whose files cannot grow ends with one line and leaves its checkpoints untouched."""
        import resource

        process = self.start(workdir)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
        _, errors = process.communicate()
        last_line = errors.strip().splitlines()[-1]
        is_data_error = process.returncode == DataError.exit_status and last_line.startswith("error: ")
        failed_cleanly = is_data_error and "Traceback" not in errors
        untouched = checkpoints.steps(workdir) == before and all(self.is_intact(workdir, step) for step in before)
        return failed_cleanly and untouched

    def corrupt_newest(self) -> None:
        """A run whose newest checkpoint is corrupt must resume from the previous one and equal the reference."""
        workdir = shutil.copytree(self.folder / "reference", self.folder / "corrupt_newest")
        self.flip_bit(self.files(workdir, NUM_STEPS)[-1])
        self.finish(workdir)
        self.count("resume with a corrupt newest checkpoint", self.equals_reference(workdir))

    def corrupt_files(self) -> None:
        """Corrupts the files of a checkpoint one at a time. Each corruption must be detected."""
        workdir = shutil.copytree(self.folder / "reference", self.folder / "corrupt_files")
        files = self.files(workdir, NUM_STEPS)
        for number in range(FLIPS.value):
            self.corrupt("flipped bit detected", workdir, files[number % len(files)], self.flip_bit)
        for path in files:
            self.corrupt("truncated file detected", workdir, path, lambda path: path.write_bytes(path.read_bytes()[:-1]))
            self.corrupt("missing file detected", workdir, path, Path.unlink)
        extra = files[0].with_name("extra")
        extra.touch()
        self.count("extra file detected", not self.is_intact(workdir, NUM_STEPS))
        extra.unlink()
        self.count("intact checkpoint accepted", self.is_intact(workdir, NUM_STEPS))

    def corrupt(self, check: str, workdir: Path, path: Path, action) -> None:
        before = path.read_bytes()
        action(path)
        self.count(check, not self.is_intact(workdir, NUM_STEPS))
        path.write_bytes(before)

    def flip_bit(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        path.write_bytes(data)

    @staticmethod
    def files(workdir: Path, step: int) -> list[Path]:
        folder = checkpoints.checkpoint_dir(workdir, step)
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)

    @staticmethod
    def is_intact(workdir: Path, step: int) -> bool:
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
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder))
        checks.train_reference()
        checks.kill_repeatedly()
        checks.stop_and_fill_the_disk()
        checks.corrupt_newest()
        checks.corrupt_files()
    print(f"{'check':<44}{'done':>8}{'passed':>8}")
    for check, done in checks.done.items():
        print(f"{check:<44}{done:>8}{checks.passed[check]:>8}")
    all_passed = checks.done == checks.passed
    print(f"{'all checks passed' if all_passed else 'NOT all checks passed'}, in {time.monotonic() - start:.0f} s")
    if not all_passed:
        sys.exit(DataError.exit_status)


if __name__ == "__main__":
    cli.run(main, __doc__)
