from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metacontroller.errors import UserError
from metacontroller.storage import run_folder
from metacontroller.storage.run_folder import RunFolder, peak_rss_mb
from metacontroller.storage.training_state import (
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_meta,
    optimizer_tensors,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@dataclasses.dataclass(frozen=True)
class Inner:
    adam_betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int = 3
    inner: Inner = Inner()
    store: Path = Path("store")


# -- configuration and summary ----------------------------------------------------------------------------------------


def test_config_of_nested_dataclasses(run: RunFolder):
    run.write_config(Outer())
    assert run.read_config() == {"steps": 3, "inner": {"adam_betas": [0.9, 0.999]}, "store": "store"}


def test_config_of_a_dictionary_replaces_the_old_one(run: RunFolder):
    run.write_config({"seed": 1, "old": True})
    run.write_config({"seed": 2})
    assert run.read_config() == {"seed": 2}


def test_config_missing_or_broken(run: RunFolder):
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json; name the folder .*\.write_config\(to_json\(config\)\)\."
    ):
        run.read_config()
    run.write_config({})
    (run.path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        run.read_config()
    (run.path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a JSON list where an object was expected"):
        run.read_config()


def test_value_that_json_does_not_know(run: RunFolder):
    with pytest.raises(TypeError, match="A object cannot be written as JSON"):
        run.write_config({"model": object()})


def test_summary_is_replaced_as_a_whole(run: RunFolder):
    assert run.read_summary() == {}
    run.write_summary({"seconds": 1.5, "gate_recall": [0.9]})
    run.write_summary({"gate_recall": np.array([0.9, 0.95]), "episodes": torch.tensor(7)})
    assert run.read_summary() == {"gate_recall": [0.9, 0.95], "episodes": 7}


def test_summary_is_strict_json(run: RunFolder):
    run.write_summary({"gate_recall": [float("nan"), float("inf"), 1.0]})
    assert run.read_summary() == {"gate_recall": [None, None, 1.0]}


# -- atomic replacement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_in", ["replace", "fsync"])
def test_crash_before_replacement_leaves_the_old_file_whole(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, crash_in: str
):
    run.write_summary({"seconds": 1})
    run.save_checkpoint("pretrain", {"w": torch.zeros(2)}, {"step": 1})

    def crash(*_: Any) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patched:
        patched.setattr(os, crash_in, crash)
        with pytest.raises(OSError, match="disk gone"):
            run.write_summary({"seconds": 2})
        with pytest.raises(OSError, match="disk gone"):
            run.save_checkpoint("pretrain", {"w": torch.ones(2)}, {"step": 2})

    assert run.read_summary() == {"seconds": 1}
    tensors, meta = run.load_checkpoint("pretrain")
    assert torch.equal(tensors["w"], torch.zeros(2))
    assert meta["step"] == 1
    assert sorted(file.name for file in run.path.iterdir()) == ["manifest.json", "pretrain.safetensors", "summary.json"]


def test_new_content_is_complete_before_it_takes_the_name(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    seen = []
    replace = os.replace

    def look_then_replace(source: Path, target: Path) -> None:
        seen.append((source.parent.parent == target.parent, json.loads(source.read_text())))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    run.write_summary({"seconds": 2})
    assert seen[-1] == (True, {"seconds": 2})
    assert all(beside for beside, _ in seen)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_phase(run: RunFolder):
    assert run.read_metrics() == []
    run.log_metrics("pretrain", 1, loss=torch.tensor(0.5))
    run.log_metrics("discover", 1, loss=float("nan"))
    assert run.read_metrics() == [
        {"phase": "pretrain", "step": 1, "loss": 0.5},
        {"phase": "discover", "step": 1, "loss": None},
    ]
    assert run.read_metrics("discover") == [{"phase": "discover", "step": 1, "loss": None}]


def append_torn_line(run: RunFolder) -> None:
    with run.metrics_path.open("a") as file:
        file.write('{"phase": "pretrain", "st')


def test_torn_last_line_is_not_read(run: RunFolder):
    run.log_metrics("pretrain", 1, loss=0.5)
    append_torn_line(run)
    assert [line["step"] for line in run.read_metrics()] == [1]


def test_only_a_torn_line(run: RunFolder):
    run.path.mkdir()
    append_torn_line(run)
    assert run.read_metrics() == []


def test_logging_goes_on_after_a_torn_line(run: RunFolder):
    run.log_metrics("pretrain", 1, loss=0.5)
    append_torn_line(run)
    RunFolder(run.path).log_metrics("pretrain", 2, loss=0.4)
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_rewinding_voids_later_lines_of_the_phase_and_drops_a_torn_one(run: RunFolder):
    run.rewind_metrics("pretrain", 0)  # nothing logged yet: nothing to do
    assert not run.metrics_path.exists()
    for step in (1, 2, 3):
        run.log_metrics("pretrain", step, loss=0.1)
        run.log_metrics("discover", step, loss=0.2)
    append_torn_line(run)
    resumed = RunFolder(run.path)
    resumed.rewind_metrics("pretrain", 2)
    resumed.rewind_metrics("discover", 3)  # nothing lies beyond
    assert [line["step"] for line in run.read_metrics("pretrain")] == [1, 2]
    assert [line["step"] for line in run.read_metrics("discover")] == [1, 2, 3]
    assert run.metrics_path.read_bytes().count(b"\n") == 7
    resumed.log_metrics("pretrain", 3, loss=0.4)
    resumed.log_metrics("pretrain", 4, loss=0.3)
    assert [(line["step"], line["loss"]) for line in run.read_metrics("pretrain")][2:] == [(3, 0.4), (4, 0.3)]


def test_rewinding_loses_no_line_of_another_process(run: RunFolder):
    run.log_metrics("internal_rl", 5, success=0.1)
    other = RunFolder(run.path)
    for step in range(20):
        other.log_metrics("raw_action_rl", step, success=0.0)
        run.rewind_metrics("internal_rl", 4)
        run.log_metrics("internal_rl", 5, success=0.2)
    assert [line["step"] for line in run.read_metrics("raw_action_rl")] == list(range(20))
    assert len(run.read_metrics("internal_rl")) == 1


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 1}'])
def test_broken_line_in_the_middle_is_named(run: RunFolder, line: str):
    run.path.mkdir()
    run.metrics_path.write_text(f'{{"phase": "pretrain", "step": 1}}\n{line}\n{{"phase": "pretrain", "step": 2}}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl is not"):
        run.read_metrics()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoint_round_trip(run: RunFolder):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "tied": shared,
        "transposed": shared.T,
        "bf16": shared.bfloat16(),
        "mask": shared > 2,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "parameter": nn.Parameter(shared + 1),
    }
    meta = {"step": 3, "config": Outer(), "best": float("inf"), "lr": 0.1 + 0.2}
    assert not run.has_checkpoint("pretrain")
    run.save_checkpoint("pretrain", tensors, meta)
    assert run.has_checkpoint("pretrain")

    loaded, loaded_meta = run.load_checkpoint("pretrain")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())
    assert loaded_meta["best"] == float("inf")
    assert loaded_meta["lr"] == 0.1 + 0.2
    assert loaded_meta["config"]["inner"] == {"adam_betas": [0.9, 0.999]}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: one number, to be set."""
    now = [1000.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    return now


def saved_seconds(run: RunFolder, name: str) -> float:
    return RunFolder(run.path).load_checkpoint(name)[1]["seconds"]


def test_every_checkpoint_says_what_it_took(run: RunFolder, clock: list[float]):
    run.begin("pretrain", resume=False)
    clock[0] += 3.0
    run.save_checkpoint("pretrain", {}, {"step": 1})
    run.begin("discover", resume=False)
    clock[0] += 5.0
    run.save_checkpoint("discover", {}, {"step": 1})
    clock[0] += 2.0
    run.save_checkpoint("discover", {}, {"step": 2})
    assert saved_seconds(run, "pretrain") == 3.0
    assert saved_seconds(run, "discover") == 7.0
    assert run.load_checkpoint("pretrain")[1]["peak_rss_mb"] > 0


def test_seconds_and_peak_add_up_over_sessions(run: RunFolder, clock: list[float], monkeypatch: pytest.MonkeyPatch):
    for session, (seconds, peak) in enumerate([(100.0, 70.0), (10.0, 50.0)]):
        monkeypatch.setattr(run_folder, "peak_rss_mb", lambda peak=peak: peak)
        again = RunFolder(run.path)
        clock[0] += 1e6  # between sessions
        again.begin("phase", resume=True)
        if session:
            again.load_checkpoint("phase")
        clock[0] += seconds
        again.save_checkpoint("phase", {}, {})
    assert saved_seconds(run, "phase") == 110.0
    assert run.load_checkpoint("phase")[1]["peak_rss_mb"] == 70.0


def test_work_that_does_not_resume_counts_from_zero(run: RunFolder, clock: list[float]):
    run.begin("phase", resume=False)
    clock[0] += 100.0
    run.save_checkpoint("phase", {}, {})
    run.load_checkpoint("phase")
    run.checkpoint_path("phase").unlink()
    run.begin("phase", resume=False)
    clock[0] += 1.0
    run.save_checkpoint("phase", {}, {})
    assert saved_seconds(run, "phase") == 1.0


def test_a_checkpoint_from_before_there_were_seconds_can_be_resumed(run: RunFolder, clock: list[float]):
    path = run.save_checkpoint("phase", {}, {})
    save_file({}, path, metadata={"metacontroller": json.dumps({"format": 1, "meta": {"step": 4}})})
    (run.path / "manifest.json").unlink()
    assert run.load_checkpoint("phase")[1] == {"step": 4, "seconds": 0.0, "peak_rss_mb": 0.0}
    clock[0] += 2.0
    run.save_checkpoint("phase", {}, {})
    assert saved_seconds(run, "phase") == 2.0


@pytest.mark.parametrize("meta", [{"versions": ["a"]}, {"versions": {"a": 1}}, {"seconds": "1"}])
def test_a_header_of_other_types_is_damaged(run: RunFolder, meta: dict[str, Any]):
    path = run.save_checkpoint("phase", {}, {})
    save_file({}, path, metadata={"metacontroller": json.dumps({"format": 1, "meta": meta})})
    (run.path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"phase\.safetensors has a damaged header"):
        run.load_checkpoint("phase")


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(UserError, match="is not UTF-8"):
        RunFolder(tmp_path / "\udcff")


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.save_checkpoint("phase", {}, {})

    def refuse(path: Any, *_: Any) -> int:  # as for others than root, whom nothing is refused
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"phase\.safetensors"):
        run.load_checkpoint("phase")


def test_begun_work_is_not_begun_again(run: RunFolder):
    run.begin("discover", resume=False)
    run.save_checkpoint("discover", {}, {})
    sentence = r"run holds discover\.safetensors, a checkpoint of this phase; resume it \(resume=True, --resume\) or"
    with pytest.raises(ValueError, match=sentence):
        run.begin("discover", resume=False)
    run.begin("discover", resume=True)
    run.begin("pretrain", resume=False)


def test_peak_memory_counts_what_was_held():
    before = peak_rss_mb()
    torch.ones(64 * 2**20 // 4).sum()
    assert peak_rss_mb() >= before > 0


def test_checkpoint_that_is_not_there(run: RunFolder):
    run.save_checkpoint("pretrain", {}, {})
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'discover'; present: pretrain"):
        run.load_checkpoint("discover")


@pytest.mark.parametrize("name", ["", "../pretrain", "a/b", ".hidden"])
def test_checkpoint_name_is_plain(run: RunFolder, name: str):
    with pytest.raises(ValueError, match="must be letters, digits"):
        run.has_checkpoint(name)


def test_checkpoint_cut_short(run: RunFolder):
    path = run.save_checkpoint("pretrain", {"w": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a complete safetensors file; take another copy, or delete it"):
        run.load_checkpoint("pretrain")


class Malicious:
    """Leaves a file behind when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("write", [pickle.dumps, "torch"])
def test_pickle_is_refused_and_not_run(run: RunFolder, tmp_path: Path, write: Any):
    trace, path = tmp_path / "trace", run.checkpoint_path("pretrain")
    run.path.mkdir()
    if write == "torch":
        torch.save(Malicious(trace), path)
    else:
        path.write_bytes(write(Malicious(trace)))
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        run.load_checkpoint("pretrain")
    assert not trace.exists()


def test_safetensors_of_another_origin(run: RunFolder):
    run.path.mkdir()
    save_file({"w": torch.zeros(1)}, run.checkpoint_path("other"))
    with pytest.raises(ValueError, match="was not written by this library; name a file that a run"):
        run.load_checkpoint("other")


def test_checkpoint_of_another_format(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    run.save_checkpoint("pretrain", {}, {})
    monkeypatch.setattr(run_folder, "CHECKPOINT_FORMAT", 2)
    with pytest.raises(ValueError, match="has checkpoint format 1 where 2 was expected"):
        run.load_checkpoint("pretrain")


# -- modules, optimizers, generators ----------------------------------------------------------------------------------


def test_module_round_trip():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_module(target, {"other.weight": torch.zeros(1), **module_tensors("model", source)}, "model")
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (nn.Linear(3, 2, bias=False), r"The checkpoint has no tensor model\.bias"),
        (nn.Linear(4, 2), r"model\.weight of the checkpoint has shape \(2, 4\) where \(2, 3\) was expected"),
        (nn.PReLU(), r"The checkpoint has no tensor model\.bias"),
    ],
)
def test_module_that_does_not_fit(saved: nn.Module, message: str):
    with pytest.raises(ValueError, match=message):
        load_module(nn.Linear(3, 2), module_tensors("model", saved), "model")


def test_module_without_a_saved_tensor():
    with pytest.raises(ValueError, match=r"The model has no tensor model\.bias"):
        load_module(nn.Linear(3, 2, bias=False), module_tensors("model", nn.Linear(3, 2)), "model")


class Training:
    """A toy run whose every step samples its data with a generator; one parameter never gets a gradient."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Parameter(torch.ones(3))
        decayed, plain = [self.model[0].weight, self.unused], [self.model[0].bias, *self.model[2].parameters()]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
        )
        self.generator = torch.Generator().manual_seed(5)

    def step(self) -> None:
        x = torch.randn(16, 4, generator=self.generator)
        loss = (self.model(x) - x.sum(-1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def save(self, run: RunFolder) -> None:
        tensors = {
            **module_tensors("model", self.model),
            **optimizer_tensors("adam", self.optimizer),
            "generator": self.generator.get_state(),
        }
        run.save_checkpoint("toy", tensors, {"adam": optimizer_meta(self.optimizer)})

    def load(self, run: RunFolder) -> None:
        tensors, meta = run.load_checkpoint("toy")
        load_module(self.model, tensors, "model")
        load_optimizer(self.optimizer, tensors, meta["adam"], "adam")
        self.generator.set_state(tensors["generator"])

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def test_resumed_training_is_bit_identical(run: RunFolder):
    whole = Training()
    for step in range(10):
        if step == 4:
            whole.save(run)
            at_checkpoint = whole.parameters()
        whole.step()

    resumed = Training()
    resumed.optimizer.param_groups[0]["lr"] = 1.0  # the checkpoint's value must win
    resumed.load(run)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), at_checkpoint, strict=True))
    for _ in range(6):
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert resumed.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_checkpoint_does_not_follow_later_training(run: RunFolder):
    training = Training()
    training.step()
    before = training.parameters()
    training.save(run)
    training.step()
    training.load(run)
    assert all(torch.equal(a, b) for a, b in zip(training.parameters(), before, strict=True))


def test_optimizer_before_its_first_step(run: RunFolder):
    training = Training()
    training.save(run)
    training.load(run)
    assert training.optimizer.state_dict()["state"] == {}


def test_optimizer_under_another_prefix():
    training = Training()
    training.step()
    tensors, meta = optimizer_tensors("adam", training.optimizer), optimizer_meta(training.optimizer)
    with pytest.raises(ValueError, match="state of 0 parameters under 'sgd' where 4 were expected"):
        load_optimizer(training.optimizer, tensors, meta, "sgd")


def test_optimizer_of_another_model():
    training = Training()
    training.step()
    tensors, meta = optimizer_tensors("adam", training.optimizer), optimizer_meta(training.optimizer)
    fewer = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    with pytest.raises(ValueError, match=r"has \[2, 3\] parameters a group where this one has \[2\]"):
        load_optimizer(fewer, tensors, meta, "adam")

    wider = nn.Linear(5, 8)
    misshapen = torch.optim.AdamW(
        [
            {"params": [wider.weight, nn.Parameter(torch.ones(3))]},
            {"params": [*nn.Linear(8, 1).parameters(), wider.bias]},
        ]
    )
    with pytest.raises(ValueError, match=r"adam\.0\.exp_avg of the checkpoint has shape \(8, 4\) where \(8, 5\)"):
        load_optimizer(misshapen, tensors, meta, "adam")
