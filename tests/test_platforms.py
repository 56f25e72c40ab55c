"""Systems that are not Linux: a run trains, resumes and generates without the modules and calls that they lack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Absent on Windows. They are removed before anything is imported, as it would be there.
WITHOUT = """
import ctypes, mmap, os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for module, name in [(mmap, "MADV_RANDOM"), (os, "posix_fallocate"), (os, "sched_getaffinity"), (signal, "SIGHUP")]:
    if hasattr(module, name): delattr(module, name)
os.process_cpu_count = os.cpu_count  # Python 3.13 computes it with sched_getaffinity

class Library(ctypes.CDLL):
    def __init__(self, name, *arguments, **keywords):
        if name is not None:
            super().__init__(name, *arguments, **keywords)
    def __getattr__(self, name):
        if "_handle" not in vars(self): raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
path = __import__("pathlib").Path
read_text = path.read_text
def without_proc(self, *arguments, **keywords):
    if str(self).startswith("/proc"): raise FileNotFoundError(2, "no such file", str(self))
    return read_text(self, *arguments, **keywords)
path.read_text = without_proc
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
import runpy, warnings
warnings.simplefilter("ignore")
runpy.run_path(script, run_name="__main__")
"""


def test_a_run_trains_resumes_and_generates_without_what_other_systems_lack(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)

    def run(script, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", WITHOUT, str(ROOT / "scripts" / script), "--workdir=run", *arguments]
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process

    train = ["--config=debug", "--dataset=text.txt", "--sample_every=0"]
    run("train.py", *train, "--steps=3")
    run("train.py", *train, "--steps=5")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # the second run continued the first
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "5"]
    assert run("generate.py", "--prompt=To be", "--length=5").stdout.startswith("To be")
