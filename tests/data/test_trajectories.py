"""Behaviour data: the store gives back what was written, batches hold every episode once, bad rows are refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metacontroller.data import Trajectories, TrajectoryStore, length_mask, length_sorted_batches
from metacontroller.data import store as store_module
from metacontroller.data.datasets import load_dataset
from metacontroller.data.trajectories import Episodes, masked_mean, with_finite_padding
from metacontroller.errors import UserError
from metacontroller.storage.manifest import seal
from metacontroller.storage.system_errors import refusal


def make_trajectories(lengths: list[int], padded: int | None = None, labels: bool = True) -> Trajectories:
    """Episodes with random states of width 2; padding as the class says."""
    count, steps = len(lengths), padded or max(lengths)
    lens = torch.tensor(lengths)
    mask = length_mask(lens, steps)
    states = torch.randn(count, steps + 1, 2)
    last = states[torch.arange(count), lens]
    states = torch.where(length_mask(lens + 1, steps + 1)[..., None], states, last[:, None])
    subgoals = torch.randint(0, 5, (count, steps)).masked_fill(~mask, -1)
    return Trajectories(
        states=states,
        actions=torch.randint(0, 4, (count, steps)).masked_fill(~mask, 0),
        lengths=lens,
        subgoals=subgoals if labels else None,
        segments=torch.arange(steps).expand(count, -1).masked_fill(~mask, -1) if labels else None,
    )


def assert_same(first: Trajectories, second: Trajectories) -> None:
    for name in ("states", "actions", "lengths", "subgoals", "segments"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
        assert a is None or a.dtype == b.dtype, name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), extra=st.integers(0, 3), data=st.data())
def test_the_store_gives_back_what_was_written(
    lengths: list[int], extra: int, data: st.DataObject, tmp_path: Path
) -> None:
    written = make_trajectories(lengths, max(lengths) + extra)
    store = TrajectoryStore.write(tmp_path / "store", written)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    assert len(store) == len(lengths)
    assert_same(store.read(rows), written.index(rows))
    assert_same(TrajectoryStore(tmp_path / "store").read(rows.numpy()), written.index(rows))


def test_missing_labels_stay_missing(tmp_path: Path) -> None:
    written = make_trajectories([2, 3], labels=False)
    assert_same(TrajectoryStore.write(tmp_path / "store", written).read(np.arange(2)), written)


def test_states_of_several_axes_and_vector_actions_survive(tmp_path: Path) -> None:
    states, actions = torch.randn(1, 4, 2, 3), torch.randn(1, 3, 5)
    written = Trajectories(states=states, actions=actions, lengths=torch.tensor([3]))
    assert_same(TrajectoryStore.write(tmp_path / "store", written).read(np.array([0])), written)


def test_padding_is_not_stored(tmp_path: Path) -> None:
    TrajectoryStore.write(tmp_path / "store", make_trajectories([1, 4], padded=50))
    assert np.load(tmp_path / "store" / "actions.npy").shape == (5,)
    assert np.load(tmp_path / "store" / "states.npy").shape == (7, 2)


def test_reading_maps_the_files_and_copies_what_it_returns(tmp_path: Path) -> None:
    store = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3]))
    assert all(isinstance(array, np.memmap) for array in store.arrays.values())
    first = store.read(np.array([0]))
    first.states.zero_()
    first.lengths.zero_()
    assert store.read(np.array([0])).states.abs().sum() > 0
    assert store.read(np.array([0])).lengths.tolist() == [2]


def test_writing_again_replaces_the_store_and_leaves_nothing_behind(tmp_path: Path) -> None:
    TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3]))
    second = make_trajectories([4], labels=False)
    assert_same(TrajectoryStore.write(tmp_path / "store", second).read(np.array([0])), second)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_write_that_fails_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_trajectories([2, 3])
    TrajectoryStore.write(tmp_path / "store", first)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match="no space"):
        TrajectoryStore.write(tmp_path / "store", make_trajectories([4]))
    assert_same(TrajectoryStore(tmp_path / "store").read(np.arange(2)), first)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_batches_hold_episodes_of_similar_length_once_each() -> None:
    lengths = torch.randperm(20).add(1).tolist()
    trajectories = make_trajectories(lengths)
    batches = list(length_sorted_batches(trajectories, 5, torch.Generator().manual_seed(0)))
    assert [batch.batch for batch in batches] == [5] * 4
    spans = sorted(batch.lengths.sort().values.tolist() for batch in batches)
    assert spans == [list(range(first, first + 5)) for first in (1, 6, 11, 16)]
    assert [batch.steps for batch in batches] == [int(batch.lengths.max()) for batch in batches]
    for batch in batches:
        for row, length in enumerate(batch.lengths.tolist()):
            original = trajectories.index(torch.tensor([lengths.index(length)]))
            assert_same(batch.index(torch.tensor([row])), original)


def test_batches_come_in_random_order_that_the_seed_repeats() -> None:
    trajectories = make_trajectories(list(range(1, 41)))

    def order(seed: int) -> list[int]:
        batches = length_sorted_batches(trajectories, 4, torch.Generator().manual_seed(seed))
        return [int(batch.lengths.min()) for batch in batches]

    assert order(1) == order(1)
    assert order(1) != sorted(order(1))
    assert order(1) != order(2)


def test_episodes_that_fill_no_batch_are_sampled_at_each_call() -> None:
    trajectories, generator = make_trajectories([1, 2, 3, 4, 5]), torch.Generator().manual_seed(0)
    left_out = set()
    for _ in range(30):
        batches = list(length_sorted_batches(trajectories, 2, generator))
        kept = torch.cat([batch.lengths for batch in batches]).tolist()
        assert len(set(kept)) == 4
        left_out |= {1, 2, 3, 4, 5} - set(kept)
    assert left_out == {1, 2, 3, 4, 5}


def test_rows_are_cut_to_the_longest_of_them() -> None:
    trajectories = make_trajectories([5, 2, 3])
    picked = trajectories.index(torch.tensor([2, 1]))
    assert (picked.batch, picked.steps, picked.states.shape[1]) == (2, 3, 4)
    assert picked.mask().tolist() == [[True, True, True], [True, True, False]]
    assert torch.equal(picked.actions[0], trajectories.actions[2, :3])


def test_moving_keeps_everything() -> None:
    trajectories = make_trajectories([2, 1], labels=False)
    assert_same(trajectories.to("cpu"), trajectories)
    assert trajectories.to("meta").states.device.type == "meta"


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 9e9], [6.0, -9e9, 9e9]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask) == 3
    assert masked_mean(values, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(2, 3, 1)}, r"\(2, 3, 1\).*one state more than actions"),
        ({"lengths": torch.tensor([1, 4])}, "1..4; each must lie in 1..3"),
        ({"lengths": torch.tensor([0, 3])}, "0..3; each must lie in 1..3"),
        ({"lengths": torch.tensor([3])}, r"expected whole numbers \(2,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "float32.*whole numbers"),
        (
            {"states": torch.zeros(0, 4, 1), "actions": torch.zeros(0, 3), "lengths": torch.zeros(0)},
            r"\(0, 3\); expected a non-empty",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    good = {"states": torch.zeros(2, 4, 1), "actions": torch.zeros(2, 3), "lengths": torch.tensor([3, 1])}
    with pytest.raises(ValueError, match=message):
        Trajectories(**(good | change))


@pytest.mark.parametrize("batch_size", [0, -1, 4])
def test_impossible_batch_sizes_are_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size (is )?{batch_size}"):
        next(length_sorted_batches(make_trajectories([1, 2, 3]), batch_size))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([2]), "2..2; each must lie in 0..1"),
        (np.array([-1, 0]), "-1..0"),
        (np.array([], dtype=np.int64), r"shape \(0,\)"),
        (np.array([True, False]), "bool"),
        (np.array([[0]]), r"\(1, 1\)"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows: np.ndarray, message: str, tmp_path: Path) -> None:
    store = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3]))
    with pytest.raises(ValueError, match=message):
        store.read(rows)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store\.json"):
        TrajectoryStore(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99, "arrays": []}')
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        TrajectoryStore(tmp_path)


def test_a_store_holds_no_pickles(tmp_path: Path) -> None:
    store = TrajectoryStore.write(tmp_path / "store", make_trajectories([2]))
    np.save(store.path / "actions.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        TrajectoryStore(store.path)


def test_a_store_replaces_only_a_store(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(folder)
    file.touch()
    for target in (folder, link, file):
        with pytest.raises(UserError, match="is not a trajectory store and is not replaced; choose another folder"):
            TrajectoryStore.write(target, make_trajectories([2]))
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "mine"]


def test_while_a_store_is_replaced_there_always_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, versions = tmp_path / "store", [make_trajectories([2, 3]), make_trajectories([4])]
    TrajectoryStore.write(path, versions[0])
    seen, replace = [], os.replace

    def look_then_replace(source: Any, target: Any) -> None:
        seen.append(len(TrajectoryStore(path)))
        replace(source, target)
        seen.append(len(TrajectoryStore(path)))

    monkeypatch.setattr(os, "replace", look_then_replace)
    for version in (versions[1], versions[0], versions[1]):
        assert_same(TrajectoryStore.write(path, version).read(np.arange(version.batch)), version)
    assert set(seen) == {1, 2}
    files = {file.name for file in path.iterdir()}
    assert len(files) == len(TrajectoryStore(path).arrays) + 1  # no old array is left


REWRITE = """
import sys, time
import numpy as np, torch
from pathlib import Path
from metacontroller.data import Trajectories, TrajectoryStore
path, seconds = Path(sys.argv[1]), float(sys.argv[2])
print("begun", flush=True)
sys.stdin.readline()
until, length = time.monotonic() + seconds, 1
while time.monotonic() < until:
    length = length % 3 + 1
    states = torch.full((1, length + 1, 2), float(length))
    actions = torch.zeros(1, length, dtype=torch.int64)
    TrajectoryStore.write(path, Trajectories(states=states, actions=actions, lengths=torch.tensor([length])))
"""


def writers(path: Path, count: int, seconds: float) -> list[subprocess.Popen[str]]:
    """Processes that write stores of one to three steps there, one after the other; they begin at the same time."""
    words = [sys.executable, "-c", REWRITE, str(path), str(seconds)]
    pipe = subprocess.PIPE
    made = [subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    for process in made:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
    for process in made:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return made


@pytest.mark.slow
def test_no_read_fails_beside_writers_in_other_processes(tmp_path: Path) -> None:
    """Both begin with a new folder; a store that is read is one that was written, and whole."""
    path, reads = tmp_path / "store", 0
    made = writers(path, 2, 1.5)
    while any(process.poll() is None for process in made):
        if (path / "store.json").exists():
            store = TrajectoryStore(path)
            length = int(store.lengths[0])
            assert torch.equal(store.read(np.array([0])).states, torch.full((1, length + 1, 2), float(length)))
            reads += 1
    for process in made:
        error = process.communicate()[1]
        assert process.returncode == 0, error
        assert {line.split(" ")[1] for line in error.splitlines()} <= {"waiting"}
    assert reads > 20  # of thousands; fewer where the machine is busy
    assert len(list(path.iterdir())) == 4


def test_beside_a_thread_that_rewrites_it_a_store_is_always_whole(tmp_path: Path) -> None:
    path, versions = tmp_path / "store", [make_trajectories([2, 3]), make_trajectories([4], labels=False)]
    TrajectoryStore.write(path, versions[0])
    stopping = threading.Event()

    def rewrite() -> None:
        for version in itertools.cycle(versions):
            if stopping.is_set():
                return
            TrajectoryStore.write(path, version)

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(rewrite) for _ in range(2)]
        try:
            for _ in range(300):
                store = TrajectoryStore(path)
                assert_same(store.read(np.arange(len(store))), versions[0 if len(store) == 2 else 1])
        finally:
            stopping.set()
        for one in writing:
            one.result()
    assert len(list(path.iterdir())) == 1 + len(TrajectoryStore(path).arrays)


def test_files_of_the_users_beside_a_store_stay(tmp_path: Path) -> None:
    path = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3], labels=False)).path
    own = {"rewards.npy": b"mine", "states-1.npy": b"mine too", "notes.txt": b"dear", ".notes-0a1b2c3d.tmp": b""}
    for name, content in own.items():
        (path / name).write_bytes(content)
    for lengths in ([4], [1, 1]):
        TrajectoryStore.write(path, make_trajectories(lengths))
    assert {name: (path / name).read_bytes() for name in own} == own
    store = TrajectoryStore(path)
    assert len(list(path.iterdir())) == len(own) + 1 + len(store.arrays)


def test_a_folder_of_arrays_that_no_store_has_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "states.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not a trajectory store and is not replaced"):
        TrajectoryStore.write(tmp_path, make_trajectories([2]))
    assert [path.name for path in tmp_path.iterdir()] == ["states.npy"]


@pytest.mark.parametrize("rewritten", [False, True])
def test_what_a_killed_writer_left_is_removed_by_the_next(
    rewritten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed before each of the files that it moves in turn: into a new folder, and into that of a store."""
    first, second, replace = make_trajectories([2, 3]), make_trajectories([4]), os.replace
    for moves in itertools.count():
        path, left = tmp_path / str(moves), iter(range(moves))
        if rewritten:
            TrajectoryStore.write(path, first)

        def killed(source: Any, target: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            try:
                TrajectoryStore.write(path, second)
                break  # there were no more
            except KeyboardInterrupt:
                pass
        if rewritten:
            assert_same(TrajectoryStore(path).read(np.arange(2)), first)
        (path / ".metacontroller-0a1b.tmp").mkdir()  # a copy that a killed process had no time to remove
        (path / ".metacontroller-0a1b.tmp" / "states.npy").touch()
        store = TrajectoryStore.write(path, second)
        assert_same(store.read(np.arange(1)), second)
        assert len(list(path.iterdir())) == 1 + len(store.arrays)
    assert moves == 7  # five arrays, the note of them, the header


def test_a_full_disk_is_found_before_a_store_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3])).path
    before = sorted(path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda *_: SimpleNamespace(free=10))
        with pytest.raises(OSError, match="bytes are needed") as caught:
            TrajectoryStore.write(path, make_trajectories([4]))
    found = refusal(caught.value)
    assert found is not None
    assert found.status == 4
    assert found.sentence.startswith(f"no space is left for {path} (")
    assert sorted(path.iterdir()) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_an_array_is_written_and_not_mapped(tmp_path: Path) -> None:
    """A write to a full disk is an error of the system's; a page that is mapped there ends the process."""
    (tmp_path / "states.npy").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        store_module._save_array(tmp_path / "states.npy", [np.zeros((3, 2))])


def test_parts_of_several_types_are_joined_as_one_that_holds_them_all(tmp_path: Path) -> None:
    parts = [Episodes({"states": np.zeros((2, 1)), "actions": np.array([action]), "lengths": np.array([1])})
             for action in (3, 0.5)]  # fmt: skip
    joined = TrajectoryStore.join(tmp_path / "store", parts)
    assert joined.arrays["actions"].tolist() == [3.0, 0.5]
    parts[1].arrays["states"] = np.zeros((2, 2))
    with pytest.raises(UserError, match=r"the parts have states of the shapes \[\(1,\), \(2,\)\]"):
        TrajectoryStore.join(tmp_path / "store", parts)


def test_what_another_process_has_made_meanwhile_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for: demonstrations take minutes."""

    @contextmanager
    def locked(path: Path, *, wait: bool) -> Iterator[None]:
        assert wait
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "locked", lock)
            TrajectoryStore.write(path, make_trajectories([2, 3]))
        yield

    lock = store_module.locked
    monkeypatch.setattr(store_module, "locked", locked)
    assert len(TrajectoryStore.once(tmp_path / "store", lambda: pytest.fail("it is made again"))) == 2


def test_a_link_to_a_folder_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    written = make_trajectories([2, 3])
    assert_same(TrajectoryStore.write(tmp_path / "link", written).read(np.arange(2)), written)
    assert (tmp_path / "link").is_symlink()
    assert len(TrajectoryStore(tmp_path / "large")) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("store.json", b"[]", "an object was expected"),
        ("store.json", b'{"format": 1, "arrays": ["../secret"]}', "expected those of Trajectories"),
        ("store.json", b'{"format": 1, "arrays": 3}', "expected those of Trajectories"),
        ("states.npy", b"", "is no whole array"),
        ("states.npy", None, "is no whole array"),
        ("lengths.npy", "actions.npy", "were expected|whole numbers from 1"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3])).path
    whole = (path / name).read_bytes()
    damaged = (path / content).read_bytes() if isinstance(content, str) else whole[:-1] if content is None else content
    (path / name).write_bytes(damaged)
    with pytest.raises(UserError, match=message):
        TrajectoryStore(path)


@pytest.mark.parametrize("large", [False, True])
def test_a_changed_byte_of_an_array_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Of a small store when it is opened; of a large one by `verify`, and when it is loaded as a dataset."""
    path = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3])).path
    monkeypatch.setattr(store_module, "HASHED_ON_OPEN", 0 if large else 2**20)
    for name in ("states.npy", "actions.npy"):
        sound = (path / name).read_bytes()
        (path / name).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is not what was written"):
            load_dataset(str(path))
        with pytest.raises(UserError, match=f"{name} is not what was written"):
            TrajectoryStore(path).verify() if large else TrajectoryStore(path)
        (path / name).write_bytes(sound)
    (path / "actions.npy").write_bytes(sound + b"\0")
    with pytest.raises(UserError, match=r"actions\.npy has \d+ bytes where \d+ were written"):
        TrajectoryStore(path)


def test_a_changed_header_is_found_and_an_older_one_is_read_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = TrajectoryStore.write(tmp_path / "store", make_trajectories([2, 3]), {"env": "A-v0", "arrays": 1}).path
    header = json.loads((path / "store.json").read_text())
    for change in ({"env": "B-v0"}, {"format": 1}, {"sealed": ""}, {"listed": {}}):
        (path / "store.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=r"store\.json is not what was written"):
            TrajectoryStore(path)
    (path / "store.json").write_text(json.dumps(seal({**header, "listed": {"states": 3}})))
    with pytest.raises(UserError, match=r"store\.json lists .* expected the size and SHA-256 of every array"):
        TrajectoryStore(path)
    old = {name: value for name, value in header.items() if name not in ("listed", "sealed")}
    (path / "store.json").write_text(json.dumps({**old, "format": 1}))
    for _ in range(2):
        assert len(TrajectoryStore(path)) == 2
    assert capsys.readouterr().err == f"metacontroller: {path} has format 1: it is read unchecked.\n"


def test_only_what_lies_beyond_an_episode_is_made_finite() -> None:
    nan = float("nan")
    states = torch.tensor([1.0, 2.0, nan, nan])[None, :, None]  # after two actions the third state is the last
    actions = torch.tensor([3.0, nan, nan])[None, :, None]
    fixed = with_finite_padding(Trajectories(states=states, actions=actions, lengths=torch.tensor([2])))
    assert [str(value) for value in fixed.states.flatten().tolist()] == ["1.0", "2.0", "nan", "0.0"]
    assert [str(value) for value in fixed.actions.flatten().tolist()] == ["3.0", "nan", "0.0"]
