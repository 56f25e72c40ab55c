"""The trials of a study, in a database that several processes share (Optuna, extra tune)."""

import contextlib
import dataclasses
import datetime
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt_jax.commands import install_command
from minigpt_jax.config import NAME_THE_TEXT, Config, differences
from minigpt_jax.errors import DataError, UsageError, one_line
from minigpt_jax.experiments.ranges import Space
from minigpt_jax.experiments.sweep import WITHOUT_EFFECT
from minigpt_jax.files import make_folder

DATABASE = "study.db"
SETTINGS = "minigpt_jax"  # name of the attribute with a study's config, ranges and data
HEARTBEAT, GRACE = 10, 120  # seconds between signs of life of a trial, and without one until it is given up
POLL = 1.0  # seconds between two looks at what other processes do
LOCK_TIMEOUT = 60  # seconds to wait for another process that writes to an SQLite file


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError(f"tuning needs the package optuna: {install_command('tune')}") from error
    return optuna


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Hides Optuna's log lines in here, and its warning that signs of life are experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study of `num_trials` trials. Pruned ones count, also those that failed; interrupted ones do not."""

    optuna: Any
    study: Any  # Optuna's
    space: Space
    num_trials: int

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, workdir: Path, url: str | None, space: Space, sources: Mapping[str, str], num_trials: int
    ) -> "Iterator[Study]":  # fmt: skip
        """The study with the folder's name in this database, by default an SQLite file in the folder. Creates what is
        missing. `sources` are checksums of the data by name.

        Raises UsageError for a URL that is not valid or whose driver is missing, and DataError if the database has a study
        with another config, ranges or data.
        """
        optuna = import_optuna()
        if url is None:
            try:
                make_folder(workdir)
            except OSError as error:
                raise DataError(f"cannot write to {workdir}: {error.strerror or error}") from error
        storage = open_database(optuna, url or sqlite_url(workdir / DATABASE))
        try:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=space.config.training.warmup_steps)
            study = optuna.create_study(
                storage=storage, study_name=workdir.resolve().name, pruner=pruner, load_if_exists=True
            )  # fmt: skip
            require_same(study, workdir, space, sources)
            yield cls(optuna, study, space, num_trials)
        finally:
            storage.remove_session()
            storage.engine.dispose()

    @property
    def name(self) -> str:
        return self.study.study_name

    def progress(self) -> str:
        """`12 of 30 trials are finished`, for the log."""
        return f"{len(self.finished())} of {self.num_trials} trials are finished"

    def trials(self) -> list[Any]:
        """All trials in the order of their numbers, which count from 0. Must not be changed."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[Any]:
        """The trials that are complete or pruned."""
        states = self.optuna.trial.TrialState
        return [trial for trial in self.trials() if trial.state in (states.COMPLETE, states.PRUNED)]

    def num_running(self) -> int:
        """How many trials are running. Gives up those whose process no longer gives signs of life."""
        self.optuna.storages.fail_stale_trials(self.study)
        return sum(map(self.is_running, self.trials()))

    def is_running(self, trial: Any) -> bool:
        """Whether a process is running this trial. Optuna does not give up trials whose process was killed before its first
        sign of life: those have no settings yet."""
        is_new = datetime.datetime.now() - trial.datetime_start < datetime.timedelta(seconds=GRACE)
        return trial.state == self.optuna.trial.TrialState.RUNNING and (bool(trial.params) or is_new)

    def is_surplus(self, number: int) -> bool:
        """Whether enough trials before the one with this number are finished or running. That happens if two processes start
        one at the same time."""
        earlier = self.trials()[:number]
        num_finished = sum(trial.number < number for trial in self.finished())
        return num_finished + sum(map(self.is_running, earlier)) >= self.num_trials

    def with_settings(self, settings: Mapping[str, Any]) -> Any:
        """A finished trial with these settings, or None."""
        return next((trial for trial in self.finished() if self.space.settings_of(trial.params) == settings), None)

    def results(self) -> list[dict[str, Any]]:
        """A result for each setting with a complete trial, with the lowest loss first: `settings`, `loss`, the `measures`
        on the whole validation split, the number of the `trial`, the `machine` that ran it, and the `date`."""
        complete = [trial for trial in self.finished() if trial.state == self.optuna.trial.TrialState.COMPLETE]
        results = {}
        for trial in complete:
            settings = self.space.settings_of(trial.params)
            about = {"date": trial.datetime_complete.date().isoformat(), **trial.user_attrs}
            results.setdefault(str(settings), {"trial": trial.number, "settings": settings, "loss": trial.value, **about})
        return sorted(results.values(), key=lambda result: result["loss"])


def require_same(study: Any, workdir: Path, space: Space, sources: Mapping[str, str]) -> None:
    """Records the config, ranges and data of a new study of Optuna. Raises DataError, naming the differences, if another one
    was made with others."""
    ours = {"config": space.config.to_json(), "ranges": space.described, "sources": dict(sources)}
    if SETTINGS not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(SETTINGS, ours)
    if SETTINGS not in study.user_attrs:
        raise DataError(f"{study.study_name} is a study of another program: choose another --workdir")
    if changed := changes(study.user_attrs[SETTINGS], ours):
        raise DataError(f"{workdir} holds a study with {', '.join(changed)}: choose another --workdir")


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs between the config, ranges and data of two studies. The text may be at another path."""
    before, now = Config.from_json(theirs["config"]), Config.from_json(ours["config"])
    ignored = WITHOUT_EFFECT | NAME_THE_TEXT | ours["ranges"].keys()
    changed = [f"{name}={a} (now {b})" for name, (a, b) in differences(before, now).items() if name not in ignored]
    for name in dict.fromkeys([*theirs["ranges"], *ours["ranges"]]):
        old, new = theirs["ranges"].get(name), ours["ranges"].get(name)
        changed += [f"range {name}={old} (now {new})"] if old != new else []
    return changed + (["other data"] if theirs["sources"] != ours["sources"] else [])


# ---- The database ---------------------------------------------------------------------------------------------------------


def sqlite_url(path: Path) -> str:
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path.absolute())).render_as_string()


def open_database(optuna: Any, url: str) -> Any:
    """Optuna's storage. Creates its tables, which fails for all but one of the processes that do so at the same time.

    Raises UsageError for a URL that is none or whose driver is missing, DataError for tables of another version of Optuna.
    """
    from sqlalchemy import exc

    arguments = {"connect_args": {"timeout": LOCK_TIMEOUT}} if url.startswith("sqlite") else {}
    attempts = 5
    while True:
        try:
            return optuna.storages.RDBStorage(url, arguments, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
        except exc.ArgumentError as error:
            forms = "sqlite:///study.db or postgresql+psycopg://USER@HOST/DATABASE"
            raise UsageError(f"storage must be the URL of a database, such as {forms}: {one_line(str(error))}") from error
        except ImportError as error:
            raise UsageError(f"storage={shown(url)} needs a driver: {error.__cause__ or error}") from error
        except exc.DBAPIError as error:
            attempts -= 1
            if not attempts or not (isinstance(error, exc.IntegrityError) or "already exists" in str(error)):
                raise
            time.sleep(POLL)
        except RuntimeError as error:
            raise DataError(f"{shown(url)}: {one_line(str(error))}") from error


@contextlib.contextmanager
def database_errors(where: str) -> Iterator[None]:
    """Turns the errors of a database in here into DataError. `where` is its URL or folder."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    hook, kinds = threading.excepthook, (StorageInternalError, SQLAlchemyError)
    # Optuna gives signs of life in a thread of its own, whose traceback would say the same.
    threading.excepthook = lambda thread: None if isinstance(thread.exc_value, kinds) else hook(thread)
    try:
        yield
    except (*kinds, UnboundLocalError) as error:
        # Optuna raises UnboundLocalError if the database fails again while it records the end of a trial.
        cause = error.__context__ if isinstance(error, UnboundLocalError) else error
        if not isinstance(cause, kinds):
            raise
        cause = cause.__cause__ if isinstance(cause, StorageInternalError) else cause
        reason = one_line(str(getattr(cause, "orig", None) or cause))
        raise DataError(f"the study's database in {shown(where)} cannot be used: {reason}") from error
    finally:
        threading.excepthook = hook


def shown(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy import exc, make_url

    with contextlib.suppress(exc.ArgumentError):
        return make_url(url).render_as_string(hide_password=True)
    return url
