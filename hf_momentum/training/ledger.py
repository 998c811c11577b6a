"""The record of a comparison's runs: trials of an Optuna study, in a file or in any database that Optuna speaks with.

Several workers, on one machine or many, work through one record. A run is *claimed* by creating a trial with its name
and its owner in one transaction; of two workers that claim the same run at once the one with the lower trial number has
it. An owner raises a counter in its trial while it works. One whose process is gone, or whose counter has stood still
for `grace` seconds as seen from here (so no two clocks are compared), is dead, and its run is free again.
"""

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_momentum.errors import InputError
from hf_momentum.evaluation.results import RunScores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

GRACE = 120.0  # seconds
BEAT = 10.0  # seconds between two raises of the counter


@dataclass(frozen=True)
class Owner:
    """A process, told apart from any other of any machine.

    Example:
        >>> Owner.here().alive()
        True
    """

    machine: str
    process: int
    started: str

    @staticmethod
    def here() -> "Owner":
        """This process."""
        return Owner(_machine(), os.getpid(), _started(os.getpid()))

    def alive(self) -> bool | None:
        """Whether it still runs; None if it runs on another machine, and cannot be asked."""
        if self.machine != _machine():
            return None
        return _started(self.process) == self.started


def _machine() -> str:
    """The host, and the namespace of its process numbers: containers may share a name, not that."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(namespace) if namespace.exists() else ''}".strip()


def _started(process: int) -> str:
    """When a process began, as the system counts, since numbers are given anew; "" if there is none."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
        state, *rest = status.rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]  # field 22 of the whole line
    except (FileNotFoundError, ProcessLookupError):
        pass
    if Path("/proc").is_dir():
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"


class Ledger:
    """The runs of one comparison.

    Args:
        url: of the storage, as Optuna takes it: `sqlite:///FILE`, `postgresql+psycopg://...`, `mysql+pymysql://...`.
        study: the comparison's name in it.
        lower_is_better: of the score that is told; for those who look at the study with Optuna's own tools.
        grace: seconds without a sign of life until a worker on another machine counts as dead.

    Raises:
        InputError: the storage cannot be opened.

    Example:
        >>> import tempfile
        >>> ledger = Ledger(f"sqlite:///{tempfile.mkdtemp()}/runs.db", "doctest", lower_is_better=True)
        >>> trial = ledger.claim("tam|0.1|0", {"method": "tam", "learning_rate": 0.1})
        >>> ledger.claim("tam|0.1|0", {"method": "tam", "learning_rate": 0.1}) is None  # it is taken
        True
        >>> run = RunScores("tam", "tuning", 0.1, 0, "finished", 0.5, {}, 1.0, 1)
        >>> ledger.tell(trial, run), ledger.records()["tam|0.1|0"] == run
        (True, True)
    """

    def __init__(self, url: str, study: str, lower_is_better: bool, grace: float = GRACE) -> None:
        import optuna
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import DBAPIError, SQLAlchemyError

        self.study, self.grace, self.owner = study, grace, Owner.here()
        self.worst = math.inf if lower_is_better else -math.inf
        self._seen: dict[int, tuple[int, float]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Workers that write at once wait for each other; the default of 5 s is short for a slow disk.
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        for attempt in range(5):
            try:
                self.storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
                direction: Any = "minimize" if lower_is_better else "maximize"
                optuna.create_study(storage=self.storage, study_name=study, direction=direction, load_if_exists=True)
                break
            except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, RuntimeError) as error:
                # Two workers that start at once both make the tables; the later one finds them the next time.
                if attempt == 4 or not isinstance(error, DBAPIError | StorageInternalError):
                    raise InputError(
                        f"storage {url!r} cannot be opened ({' '.join(str(error).split())[:200]}); give a URL as "
                        "Optuna takes it, such as sqlite:///runs.db or postgresql+psycopg://user@host/database"
                    ) from error
                time.sleep(0.3 * (attempt + 1))
        self._id = self.storage.get_study_id_from_name(study)
        # What failed before this worker came is tried again; what fails from now on is told.
        self._old = {trial.number for trial in self._trials() if trial.state.name == "FAIL"}

    def _trials(self) -> "list[FrozenTrial]":
        return self.storage.get_all_trials(self._id, deepcopy=False)

    def look(self) -> tuple[dict[str, RunScores], set[str]]:
        """What is known of each run by its name, and the names of those that somebody works on; one reading.

        Known are runs that finished or diverged, and those that failed since this worker came. A result counts once it
        is written, even if its worker died before it could close the trial.
        """
        known: dict[str, RunScores] = {}
        running = set()
        for trial in self._trials():
            told, name = trial.user_attrs.get("record"), trial.user_attrs["run"]
            if trial.state.name == "RUNNING":
                running.add(name)
            if told is None or (told["status"] == "failed" and trial.number in self._old):
                continue
            if name not in known or known[name].status == "failed":
                known[name] = RunScores(**told)
        return known, running

    def records(self) -> dict[str, RunScores]:
        """The first part of `look`."""
        return self.look()[0]

    def running(self) -> set[str]:
        """The second part of `look`."""
        return self.look()[1]

    def claim(self, name: str, shown: Mapping[str, Any]) -> int | None:
        """Take a run.

        Args:
            name: of the run.
            shown: what the study shows of it.

        Returns:
            The trial to tell of; None if another worker has the run or has finished it.
        """
        from optuna.trial import TrialState, create_trial

        if any(self._holds(trial, name) for trial in self._trials()):
            return None
        attributes = {"run": name, "owner": asdict(self.owner), "beat": 0, **shown}
        template = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        trial: int = self.storage.create_new_trial(self._id, template_trial=template)
        mine = self.storage.get_trial(trial).number
        if any(other.number < mine and self._holds(other, name) for other in self._trials()):
            self.storage.set_trial_state_values(trial, TrialState.FAIL)
            return None
        return trial

    @staticmethod
    def _holds(trial: "FrozenTrial", name: str) -> bool:
        return trial.user_attrs.get("run") == name and trial.state.name in ("RUNNING", "COMPLETE")

    def beat(self, trial: int) -> None:
        """Show that the run is being worked on."""
        from optuna.exceptions import UpdateFinishedTrialError

        # Finished already: given to somebody else, because this process was thought dead. `tell` will find out.
        with contextlib.suppress(UpdateFinishedTrialError):
            count = self.storage.get_trial(trial).user_attrs["beat"]
            self.storage.set_trial_user_attr(trial, "beat", count + 1)

    def tell(self, trial: int, record: RunScores) -> bool:
        """Write down what came of a run; False if it had been given to somebody else in the meantime."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self.storage.set_trial_user_attr(trial, "record", asdict(record))
            if record.status == "failed":
                self.storage.set_trial_state_values(trial, TrialState.FAIL)
            else:
                value = self.worst if record.validation is None else record.validation
                self.storage.set_trial_state_values(trial, TrialState.COMPLETE, [value])
        except UpdateFinishedTrialError:
            return False
        return True

    def free_dead(self) -> list[str]:
        """Free the runs of workers that are gone; returns their names."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        freed = []
        for trial in self._trials():
            if trial.state.name == "RUNNING" and self._dead(trial):
                with contextlib.suppress(UpdateFinishedTrialError):  # somebody else was quicker
                    index = self.storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
                    self.storage.set_trial_state_values(index, TrialState.FAIL)
                    freed.append(trial.user_attrs["run"])
        return freed

    def _dead(self, trial: "FrozenTrial") -> bool:
        owner = Owner(**trial.user_attrs["owner"])
        alive = owner.alive()
        if alive is not None:
            return not alive
        beat, now = trial.user_attrs["beat"], time.monotonic()
        before, since = self._seen.get(trial.number, (-1, now))
        if beat != before:
            since = now
        self._seen[trial.number] = (beat, since)
        return now - since > self.grace

    def withdraw(self, trial: int) -> None:
        """Give a run back that was begun and will not be finished."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial, TrialState.FAIL)
