"""The files of one run: configuration, summary, metrics and checkpoints.

    config.json         the full configuration of the run
    history.jsonl       what changed in it after the run had begun, and when: a JSON object per line
    summary.json        the run's results
    analyses/NAME.json  results of analyses
    metrics.jsonl       one JSON object per line: phase, step and the metrics logged there; only appended to
    manifest.json       sizes and SHA-256 of all, see `storage.manifest`
    NAME.safetensors    a checkpoint: tensors, and in the file's metadata JSON values such as the seconds of work and
                        the peak memory so far

Files other than metrics.jsonl are replaced atomically: a crash leaves the old or the new one. Loading reads JSON and
safetensors only: it runs no code from a file, and follows no link out of the folder.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metacontroller.errors import MissingFileError, UserError
from metacontroller.ranges import Whole, check, shown
from metacontroller.storage import manifest
from metacontroller.storage.files import inside, plain, strict_json
from metacontroller.storage.lock import locked
from metacontroller.storage.manifest import read_object, replacing, write_text
from metacontroller.storage.metrics_file import drop_torn_line, read_lines
from metacontroller.storage.tensor_file import read_tensors, write_tensors
from metacontroller.storage.user_function import remember_code
from metacontroller.storage.versions import check_versions

CHECKPOINT_FORMAT = 1


class RunFolder:
    """The files of one run under `path`; the first write creates the folder.

    versions: the record of the run's world and data, see `storage.versions`; checkpoints keep it and are compared.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise UserError(f"the path {str(path)!r} is not UTF-8, as its files need it; choose another.") from None
        self.versions: dict[str, str] = {}
        self._torn_line_dropped = False
        self._opened = time.monotonic()
        self._started: dict[str, float] = {}  # by checkpoint name: start of its work, minus the time before a resume
        self._peak: dict[str, float] = {}
        self.unkept: list[str] | None = None  # see `keeping`
        self.listeners: list[Callable[[str, int, dict[str, float]], None]] = []  # called with every line of metrics

    def within(self, name: str) -> Path:
        """The path of a file or a folder of this run; UserError where a link leads out."""
        return inside(self.path, self.path / name)

    def child(self, name: str) -> RunFolder:
        """The run in a folder below, such as that of a seed; UserError as `within`."""
        return RunFolder(self.within(name))

    @contextmanager
    def keeping(self, name: str) -> Iterator[None]:
        """Context of writing a file. Where ``unkept`` is a list, a folder that may only be read ends nothing: the name
        is put there."""
        try:
            yield
        except OSError as error:
            if self.unkept is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self.unkept.append(name)

    def locked(self) -> AbstractContextManager[None]:
        """Context in which no other process may write here, see `storage.lock`."""
        return locked(self.path)

    def write_config(self, config: Any, *, keeps_weights: bool = False) -> None:
        """Write config.json from a dictionary or a dataclass; one that says the same stays as it is.

        What was made with another config is refused from then on. keeps_weights: not so, because the config changes
        nothing that it depends on, as where a run is given an environment.
        """
        text = json.dumps(config, default=plain, indent=2) + "\n"
        content, path = json.loads(text), self._listed("config.json")
        remember_code(content, self.path)
        with suppress(UserError):  # none, or one that was changed
            if self.read_config() == content:
                return
        if keeps_weights:
            manifest.amend(self.path, text.encode())
        write_text(path, text)

    def read_config(self) -> dict[str, Any]:
        """Return config.json; MissingFileError if the folder has none."""
        path = self.within("config.json")
        if not path.exists():
            raise MissingFileError(
                f"{self.path} has no config.json; name the folder of a run that has been started, or write the config "
                f"of a run made from Python by RunFolder({str(self.path)!r}).write_config(to_json(config))."
            )
        return read_object(path)

    def note_change(self, facts: Mapping[str, Any]) -> None:
        """Add a line to history.jsonl: the time, and what changed in the config of a run that had begun."""
        path = self.within("history.jsonl")
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_text(path, before + json.dumps({"time": now, **facts}, default=plain) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json; NaN and infinities, which JSON does not have, are written as null."""
        self._write_json("summary.json", summary)

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json; empty if nothing has been written yet."""
        return self._read_json("summary.json")

    def write_analysis(self, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Replace analyses/NAME.json, in strict JSON like the summary; returns what it then holds."""
        with self.keeping(f"analyses/{name}.json"):
            self._write_json(f"analyses/{name}.json", result)
        return strict_json(dict(result))

    def read_analysis(self, name: str) -> dict[str, Any]:
        """Return analyses/NAME.json; empty if nothing has been written yet."""
        return self._read_json(f"analyses/{name}.json")

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self._listed(name), json.dumps(strict_json(dict(content)), indent=2) + "\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.within(name)
        return read_object(path) if path.exists() else {}

    def _listed(self, name: str) -> Path:
        """The path of a file about to be written, which the folder's manifest will list."""
        path = self.within(name)
        manifest.begin(self.path)
        return path

    @property
    def metrics_path(self) -> Path:
        """The path of metrics.jsonl."""
        return self.within("metrics.jsonl")

    def log_metrics(self, phase: str, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl. Values are numbers or one-element tensors, UserError for others; NaN and
        infinities, which JSON does not have, are written as null."""
        if not isinstance(phase, str):
            raise UserError(f"phase is {shown(phase)}; expected its name.")
        check("step", step, Whole(0))
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        self._append_metrics({"phase": phase, "step": step, **scalars})
        for listener in self.listeners:
            listener(phase, step, scalars)

    def read_metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines of one phase or of all, without rewound ones and without an incomplete last line.

        UserError for a line that is not valid or stands there twice, and for a file that is not what was written up to
        the last checkpoint.
        """
        lines = read_lines(self.metrics_path, manifest.listed_metrics(self.path))
        return [line for line in lines if phase is None or line["phase"] == phase]

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Discard the lines of `phase` after `step`, a checkpoint's, by a line that says so: another process may be
        logging, too."""
        if any(line["step"] > step for line in self.read_metrics(phase)):
            self._append_metrics({"phase": phase, "step": step, "rewound": True})

    def _append_metrics(self, line: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._torn_line_dropped and self.metrics_path.exists():
            drop_torn_line(self.metrics_path)
        self._torn_line_dropped = True
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict_json(line)) + "\n")

    def checkpoint_path(self, name: str) -> Path:
        """Return the path of checkpoint `name`; UserError unless it is a plain name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise UserError(f"Checkpoint name {name!r} must be letters, digits, '_', '-' and '.', without a folder.")
        return self.within(f"{name}.safetensors")

    def has_checkpoint(self, name: str) -> bool:
        """Whether checkpoint `name` exists."""
        return self.checkpoint_path(name).exists()

    def begin(self, name: str, *, resume: bool) -> None:
        """Start the work that checkpoint `name` will hold: its seconds count from here. UserError as `refuse_begun`."""
        self.refuse_begun(name, resume=resume)
        self._started[name] = time.monotonic()
        self._peak.pop(name, None)

    def refuse_begun(self, name: str, *, resume: bool) -> None:
        """UserError if checkpoint `name` exists and `resume` is false, so that no finished work is lost."""
        if self.has_checkpoint(name) and not resume:
            raise UserError(
                f"{self.path} holds {name}.safetensors, a checkpoint of this phase; resume it (resume=True, --resume) "
                "or choose another folder."
            )

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write tensors and the JSON values `meta` to one file, replacing an older checkpoint of that name.

        Added to `meta` are `seconds` of work, since `begin` (or since this object was created) and before the loaded
        checkpoint, and `peak_rss_mb`, the peak resident memory during that work.
        """
        path = self.checkpoint_path(name)
        seconds = time.monotonic() - self._started.get(name, self._opened)
        meta = {**meta, "seconds": seconds, "peak_rss_mb": max(self._peak.get(name, 0.0), peak_rss_mb())}
        if self.versions:
            meta["versions"] = self.versions
        with self.keeping(path.name):
            manifest.begin(self.path)
            with replacing(path) as draft:
                write_tensors(draft, tensors, {"format": CHECKPOINT_FORMAT, "meta": meta})
        return path

    def load_checkpoint(
        self, name: str, device: str | torch.device = "cpu"
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, meta) of a checkpoint; later saves under its name add to its seconds.

        MissingFileError if there is none; UserError for a file that is no checkpoint, or not what the run wrote.
        """
        path = self.checkpoint_path(name)
        if not path.exists():
            present = ", ".join(sorted(file.stem for file in self.path.glob("*.safetensors"))) or "none"
            raise MissingFileError(f"{self.path} has no checkpoint {name!r}; present: {present}.")
        tensors, header = read_tensors(path, device)
        meta = _checked_meta(path, header)
        check_versions(path, meta.get("versions", {}), self.versions)
        self._started[name] = time.monotonic() - meta["seconds"]
        self._peak[name] = meta["peak_rss_mb"]
        return tensors, meta


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this value is not inherited from the parent process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _scalar(name: str, value: Any) -> float:
    """A metric as a number; UserError if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the metric {name} is {shown(value)}; expected a number, or a tensor of one.") from error


def _checked_meta(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    if header.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} has checkpoint format {shown(header.get('format'))} where {CHECKPOINT_FORMAT} was expected; load "
            "it with the release that wrote it."
        )
    meta = header.get("meta")
    if isinstance(meta, dict):
        meta = {"seconds": 0.0, "peak_rss_mb": 0.0, **meta}  # older files lack them
        numbers, versions = (meta["seconds"], meta["peak_rss_mb"]), meta.get("versions", {})
        texts = isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())
        if texts and all(type(number) in (int, float) for number in numbers):
            return meta
    raise UserError(f"{path} has a damaged header; take another copy, or delete it and make it again.")
