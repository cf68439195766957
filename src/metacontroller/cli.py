"""The command line: ``metacontroller COMMAND ...``.

Only the module of the command asked for is imported, so that help and typing errors need not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from typing import Any, NamedTuple

from metacontroller import __version__
from metacontroller.errors import UserError
from metacontroller.storage.system_errors import BROKEN_PIPE, Refusal, refusal
from metacontroller.storage.user_function import trusting
from metacontroller.training.interruption import Interrupted, listening, say, starting


class Command(NamedTuple):
    """A command's module, in `metacontroller.commands`, its word, and the first line of its docstring."""

    module: str
    word: str
    summary: str

    def load(self) -> Any:
        """The class, a dataclass of the command's options."""
        module = import_module(f"metacontroller.commands.{self.module}")
        return (module.analysis_commands() if self.module == "analyse" else module.COMMANDS)[self.word]


_SUMMARIES = {
    "train": {
        "pretrain": "Phase 1: train an action model on experts' episodes; starts the folder RUN.",
        "discover": "Phase 2: find abstract actions inside the frozen action model of RUN.",
        "internal-rl": "Phase 3: reinforcement learning over the abstract actions of RUN.",
        "evolve": "Phase 3 without gradients: evolve the policy over the abstract actions of RUN.",
    },
    "evaluate": {"evaluate": "Measure a run, or every seed of a reproduction, in held-out episodes."},
    "analyse": {
        "probe": "Linear probes of the subgoal at every layer of the base model and of its snapshots (Fig. 3, A1).",
        "steer": "Supervised controllers with true labels at every layer, chained on the post-training task (Fig. 4).",
        "inject": "Force each subgoal's code in the middle of episodes, and see where they go (Fig. A4).",
        "gate": "The gate against true subgoal changes at three tolerances, and its histograms (Fig. 6, A3).",
        "oracle": "Codes read from experts' episodes: what they reach when played again, and what they say.",
        "episodes": "Held-out episodes of experts with gate, codes and pictures, for the report's player (Fig. 6).",
    },
    "data": {"collect": "Play a policy of yours in a Gymnasium environment and keep the episodes as a dataset."},
    "experiment": {
        "reproduce": "Everything: all phases on every seed, the raw-action baseline, measures, figures and a table.",
        "figures": "The paper's figures: the reproduction, every baseline and analysis on its seeds, and a report.",
        "sweep": "Seeds x alpha x learning rate of internal RL; what is finished is not run again, failures are named.",
        "report": "One HTML file on runs or reproductions, with figures and a trajectory player; it needs no network.",
    },
}
COMMANDS = {
    word: Command(module, word, summary)
    for module, summaries in _SUMMARIES.items()
    for word, summary in summaries.items()
}

RESUMABLE = ("pretrain", "discover", "internal-rl", "evolve", "reproduce", "sweep", "collect")
"""Commands that need --resume to go on; the others do so, or have nothing to go on with."""

LAUNCHABLE = ("pretrain", "discover", "internal-rl")
"""Commands that may run in several processes on one batch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: that of a `UserError`, that of what the system refused (see
    `storage.system_errors`), or 143 or 130 after SIGTERM or SIGINT, which leave one line with the command that resumes.

    Any other exception is a bug and is let through, with its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer letters than a path or a table

    def farewell(number: int) -> None:
        say(f"metacontroller: stopped by {signal.Signals(number).name}; go on with: {resuming(words)}")

    with listening(farewell), trusting(_given(words)), _warnings_as_sentences():
        try:
            with starting():
                command = parse(words)
                from metacontroller.training.distributed import launched, leave  # needs PyTorch, as the command does
            if launched() and words[0] not in LAUNCHABLE:
                raise UserError(
                    "only pretrain, discover and internal-rl run in several processes; start this one without a "
                    "launcher."
                )
            command()
            sys.stdout.flush()
            leave()
        except UserError as error:
            print(f"metacontroller: {error}", file=sys.stderr)
            return error.status
        except KeyboardInterrupt as error:
            stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
            if os.environ.get("RANK", "0") == "0":
                farewell(stopped.number)
            leave(stopped.status)
            return stopped.status
        except UnicodeError as error:
            print(f"metacontroller: a name or a file is not UTF-8 ({error}); rename or mend it.", file=sys.stderr)
            return UserError.status
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                raise
            return _refused(refused)
    return 0


def _refused(refused: Refusal) -> int:
    """Says what the system refused, where anything can still be said; returns the exit status."""
    with suppress(OSError):
        print(f"metacontroller: {refused.sentence}.", file=sys.stderr)
    if refused.status == BROKEN_PIPE and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more when it exits
    return refused.status


def _given(words: Sequence[str]) -> list[str]:
    """What the words name: each of them, and what stands behind the = of an option."""
    return [word.partition("=")[2] if word.startswith("-") else word for word in words]


def _without_trust(words: list[str]) -> list[str]:
    """The words without --trust NAME, which is an option of every command; UserError where the name is missing."""
    kept, left = [], iter(words)
    for word in left:
        if word == "--trust" and next(left, None) is None:
            raise UserError("--trust stands before no name; write --trust package.module:function.")
        if word != "--trust" and not word.startswith("--trust="):
            kept.append(word)
    return kept


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Context in which warnings for users are shown without the place in the source that gave them."""
    usual = warnings.formatwarning

    def sentence(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else usual(message, category, *place, **more)

    warnings.formatwarning = sentence
    try:
        yield
    finally:
        warnings.formatwarning = usual


def resuming(words: Sequence[str]) -> str:
    """The command line that goes on where the one of ``words`` stopped."""
    more = ["--resume"] if words and words[0] in RESUMABLE and "--resume" not in words else []
    return shlex.join(["metacontroller", *words, *more])


def parse(argv: list[str]) -> Any:
    """The command to run. If the first word names none, argparse shows the help asked for or what is wrong, and ends.

    A command with ``defaults`` is asked for those of its options: a preset or a run among the words decides them.
    """
    argv = _without_trust(argv)
    kind = _other_analysis(argv[0]) if argv and argv[0] not in COMMANDS else None
    if kind is None:
        kind = COMMANDS[_overview().parse_args(argv[:1]).command].load()
    import tyro  # within main, so that a signal meanwhile is heard
    from tyro.conf import FlagCreatePairsOff

    default = kind.defaults(argv[1:]) if hasattr(kind, "defaults") else None
    name = f"metacontroller {argv[0]}"
    return tyro.cli(kind, args=argv[1:], prog=name, default=default, config=(FlagCreatePairsOff,))


def _other_analysis(word: str) -> Any:
    """The command of an analysis that another package offers; None if there is none of that name."""
    if word.startswith("-") or not metadata.entry_points(group="metacontroller.analyses"):
        return None
    return import_module("metacontroller.commands.analyse").analysis_commands().get(word)


def _overview() -> argparse.ArgumentParser:
    """Of all commands by name, without their options."""
    parser = argparse.ArgumentParser(
        prog="metacontroller",
        description="Discover abstract actions inside a frozen next-action model and learn over them by reinforcement.",
        epilog="metacontroller COMMAND --help shows the options of a command. Every command takes --trust "
        "package.module:function, a name in a run's config that may be imported.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"metacontroller {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
