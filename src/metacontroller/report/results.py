"""What the report and its figures read of runs, checked: files of a stranger, or of another release, are refused with
the name of the file, the value and what was expected.

A shape is a range of `ranges`, a type, a list [entry] or [axis, entry], an object {name: shape}, or (shape,) where
there may be nothing. All lists of one axis, such as "layers", are equally long, in all runs of a reproduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metacontroller.errors import UserError
from metacontroller.metrics.switch_alignment import HISTOGRAM_BINS
from metacontroller.ranges import Number, Whole, shown
from metacontroller.report.figures import MOST
from metacontroller.report.tables import POLICIES, RESULTS, evaluation_name
from metacontroller.storage.run_folder import RunFolder

VALUE, COUNTED = Number(-MOST, MOST), Whole(0)
MAYBE = (VALUE,)


class Picture(str):
    """The shape of a picture as text; one that a page would fetch from elsewhere is none."""

    START = "data:image/png;base64,"


def _all(shape: Any, names: str) -> dict[str, Any]:
    """An object whose parts have one shape."""
    return dict.fromkeys(names.split(), shape)


SUMMARY: dict[str, Any] = {"seeds": [COUNTED], "episodes": COUNTED, "seconds": [VALUE], "peak_rss_mb": VALUE}
SUMMARY |= {"task": (str,), "versions": (dict,), "hardware": (dict,), **dict.fromkeys(RESULTS, ([MAYBE],))}
MEANING = {
    "code_subgoal_share": ["codes", ["subgoals and none", VALUE]],
    "code_subgoal_bits": VALUE,
    "subgoals": [str],
}
JOB = {"name": str, "status": str, "group": (str,), "aligned": (bool,)}
JOB |= _all(MAYBE, "value rate distortion internal_rl_success gate_recall gate_precision")
STUDY = {"jobs": [JOB], "seconds": VALUE}
EVALUATION = {"task": str, "episodes": COUNTED, "lost": (COUNTED,)}
EVALUATION |= _all(MAYBE, "success success_se mean_return return_se steps decisions")
EPISODE = {"task": str, "subgoals": ([COUNTED],), "changes": ([COUNTED],), "gate": [MAYBE], "code": [["axes", MAYBE]]}
EPISODE |= {"belief": ([[MAYBE]],), "frames": ([Picture],)}
ANALYSES: dict[str, Any] = {
    "probes": {
        "accuracy": ["layers", MAYBE],
        "over_training": ({"steps": ["snapshots", VALUE], "accuracy": ["snapshots", ["layers", MAYBE]]},),
    },
    "steering": {"success": ["layers", MAYBE]},
    "gate": {
        **_all(["bins", MAYBE], "elsewhere at_change"),
        "tolerance": ["tolerances", VALUE],
        **_all(["tolerances", MAYBE], "recall precision f1"),
    },
    "injection": _all(MAYBE, "free forced free_unseen forced_unseen"),
    "episodes": {"names": [str], "every": Whole(), "episodes": [EPISODE]},
    **{evaluation_name(policy): EVALUATION for policy in POLICIES},
}
"""The shapes of analyses of this package, by name; those of other packages draw their own figures."""


def read_results(runs: Sequence[RunFolder], name: str) -> list[dict[str, Any]]:
    """What the runs have of an analysis; UserError for a file of another shape."""
    sizes, measured = {"bins": HISTOGRAM_BINS, "axes": 2}, []
    for run in runs:
        if results := run.read_analysis(name):
            check(results, ANALYSES.get(name, dict), run.path / "analyses" / f"{name}.json", sizes)
            measured.append(results)
    return measured


def read_episodes(run: RunFolder) -> dict[str, Any]:
    """The analysis ``episodes`` of a run; empty if there is none."""
    return next(iter(read_results([run], "episodes")), {})


def read_reproduction(folder: RunFolder) -> dict[str, Any]:
    """The summary of a reproduction; empty for a folder that is none. UserError for one of another shape."""
    summary = folder.read_summary()
    if not summary.get("seeds"):
        return {}
    check(summary, SUMMARY, folder.path / "summary.json", {})
    return summary


def read_meaning(run: RunFolder) -> dict[str, Any]:
    """What a run's summary says of its codes; empty where nothing was measured. UserError for another shape."""
    summary = run.read_summary()
    if summary.get("code_subgoal_share") is None:
        return {}
    names = summary.get("subgoals")
    sizes = {"subgoals and none": len(names) + 1} if isinstance(names, list) else {}
    check(summary, MEANING, run.path / "summary.json", sizes)
    return summary


def read_study(folder: RunFolder) -> dict[str, Any]:
    """The summary of a reproduction's study; empty if it has not begun. UserError for one of another shape."""
    study = folder.child("study")
    summary = study.read_summary()
    if summary:
        check(summary, STUDY, study.path / "summary.json", {})
    return summary


def check(value: Any, shape: Any, path: Path, sizes: dict[str, int], where: str = "") -> None:
    """UserError that names the file and the value unless this has the shape. sizes: of axes, as far as they are known;
    new ones are added."""
    if type(shape) is tuple:  # a range is a named one
        if value is not None:
            check(value, shape[0], path, sizes, where)
        return
    expected = _expected(value, shape, sizes)
    if expected is not None:
        said = f"says {where} is {shown(value)}" if where else f"holds {shown(value)}"
        raise UserError(f"{path} {said}; expected {expected}: measure it again, or delete the file.")
    if isinstance(shape, dict):
        for name, part in shape.items():
            check(value.get(name), part, path, sizes, f"{where}.{name}".lstrip("."))
    elif isinstance(shape, list):
        for index, entry in enumerate(value):
            check(entry, shape[-1], path, sizes, f"{where}[{index}]")


def _expected(value: Any, shape: Any, sizes: dict[str, int]) -> str | None:
    """What was expected in place of a value, whatever is in it; None if that is what it is."""
    if isinstance(shape, Whole | Number):
        return shape.expected(value)
    if shape is Picture:
        safe = isinstance(value, str) and value.startswith(Picture.START)
        return None if safe else f"text that begins with {Picture.START}"
    if isinstance(shape, dict):
        return None if isinstance(value, dict) else "an object"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return "a list"
        if len(shape) > 1 and len(value) != sizes.setdefault(shape[0], max(len(value), 1)):
            return f"a list of {sizes[shape[0]]} entries"
        return None
    return None if isinstance(value, shape) else {str: "text", bool: "true or false", dict: "an object"}[shape]
