"""Many jobs below one folder: each leaves a run folder of its own and may start from that of another job.

What has finished is not run again, what was interrupted resumes from its last checkpoint, what fails leaves
``error.txt``, and the others run all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from metacontroller.errors import UserError
from metacontroller.ranges import Whole
from metacontroller.recipes.jobs import Job, failure_read, failure_written, run_jobs, write_failure
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.progress import track
from metacontroller.training.seeding import MAX_SEED

RunSeed = Annotated[int, Whole(0, MAX_SEED)]


class FolderJob:
    """One job; its subclasses are dataclasses, which are sent to other processes and machines."""

    @property
    def folder(self) -> str:
        """Where it leaves its files, below the folder of all."""
        raise NotImplementedError

    @property
    def parent(self) -> FolderJob | None:
        """The job that has to finish before."""
        raise NotImplementedError

    def work(self, out: Path, *settings: Any) -> None:
        """Does what is left of it. out: the folder of all."""
        raise NotImplementedError

    def run(self, out: Path) -> RunFolder:
        """Its run; UserError where a link leads out of the folder of all."""
        return RunFolder(out).child(self.folder)

    def finished(self, out: Path) -> bool:
        """Whether nothing of it is left to do."""
        return bool(self.run(out).read_summary())

    def can_start(self, out: Path) -> bool:
        """Whether what it starts from is there."""
        return self.parent is None or self.parent.finished(out)

    def status(self, out: Path) -> str:
        """ "finished", or why not."""
        if self.finished(out):
            return "finished"
        if self.parent is not None and not self.parent.finished(out):
            return f"not run: {self.parent.status(out)}".removesuffix(": not run")
        failure = failure_read(self.run(out).path)
        return "not run" if failure is None else f"failed in {self.folder}: {failure}"


def number_name(value: float) -> str:
    """A number as no other is written, for the names of folders: 0.1, 3e-05, 1."""
    return repr(float(value)).removesuffix(".0")


def check_distinct(**lists: Sequence[float]) -> None:
    """UserError unless each list, by name, has at least one value and none twice."""
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} are {list(values)}; give at least one, each once.")


def attempt(out: str, job: FolderJob, *settings: Any) -> None:
    """Runs a job, or resumes it; what went wrong is written to its ``error.txt``."""
    with failure_written(job.run(Path(out)).path):
        job.work(Path(out), *settings)


def run_all(
    out: Path,
    jobs: Sequence[FolderJob],
    settings: tuple[Any, ...],
    *,
    title: str,
    quiet: bool,
    after_each: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Runs those jobs that have not finished, in their order, as soon as their parents have.

    settings: what `FolderJob.work` is given. title: of the progress shown. options: of `run_jobs`.
    """
    left = [job for job in jobs if not job.finished(out)]
    done = count(len(jobs) - len(left) + 1)

    def next_job() -> Job | None:
        for job in left:
            if job.can_start(out):
                left.remove(job)
                return str(out), job, *settings
        return None

    with track(len(jobs), title, start=len(jobs) - len(left), quiet=quiet) as progress:

        def advance() -> None:
            after_each()
            progress.update(next(done))

        failed = run_jobs(attempt, next_job, advance, **options)
    for (_, job, *_), error in failed:  # those that could not write of it themselves
        write_failure(job.run(out).path, error)
