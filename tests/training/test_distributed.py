"""Several processes on one batch: the losses and weights of one process, started as a user would start them.

In RL each plays its own episodes, so there the update is compared: shares of a batch against the whole of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metacontroller.cli import main
from metacontroller.control.losses import trajectory_advantages
from metacontroller.data.trajectories import length_mask, masked_mean
from metacontroller.domains.registry import domain_of
from metacontroller.phases.discover import discover
from metacontroller.phases.policy_gradient import _surrogate_in_chunks, _waiting_here
from metacontroller.phases.rollout import AbstractRollout
from metacontroller.presets import preset
from metacontroller.recipes.config import build_meta_controller, build_model, read_config
from metacontroller.recipes.run_phase import demonstrations
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import Processes

PHASES = (["pretrain", "--preset", "debug", "--seed", "3"], ["discover"])
QUIET = ["--device", "cpu", "--quiet"]


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True)


def in_two_processes(*words: str) -> subprocess.CompletedProcess[str]:
    return launch("-m", "metacontroller.cli", *words)


def main_that_waits_for(path: Path, *words: str) -> None:
    """Runs a command alone; at its last exchange with the other processes, if it had some, the file is there."""
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "wait", lambda workers: seen.append(path.exists()))
        assert main([*words, *QUIET]) == 0
    assert seen[0] is False
    assert seen[-1] is True


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    files = ("base_model.safetensors", "analyses/diagnostics.json")
    for command, file in zip(PHASES, files, strict=True):
        main_that_waits_for(alone / file, command[0], str(alone), *command[1:])
        done = in_two_processes(command[0], str(together), *command[1:], "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("12/12") == 1  # one process shows progress
    one, two = RunFolder(alone), RunFolder(together)
    for phase in ("pretrain", "discover"):
        expected, lines = one.read_metrics(phase), two.read_metrics(phase)
        assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 9, 12]
        assert {"switches", "codes", "gate_recall", "gate_precision"} < lines[0].keys() or phase == "pretrain"
        for name in expected[0].keys() - {"phase", "step"}:
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4)
        weights, reference = (run.load_checkpoint(phase)[0] for run in (two, one))
        for name, value in reference.items():
            if name.startswith("module."):
                torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compile_in_two_processes_learns_what_one_does(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(["pretrain", str(alone), *PHASES[0][1:], "--config.discovery", "compile", *QUIET]) == 0
    shutil.copytree(alone, together)
    main_that_waits_for(alone / "meta_controller.safetensors", "discover", str(alone))
    done = in_two_processes("discover", str(together), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    one, two = RunFolder(alone), RunFolder(together)
    expected, lines = one.read_metrics("discover"), two.read_metrics("discover")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 6, 9, 12]
    assert {"gate_recall", "gate_precision", "segment_recall", "segment_precision"} < lines[0].keys()
    for name in expected[0].keys() - {"phase", "step"}:
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4)
    weights, reference = (run.load_checkpoint("discover")[0] for run in (two, one))
    for name, value in reference.items():
        # a bias shared by all positions does not change their softmax: its gradient is rounding, which Adam magnifies
        if name.startswith("module.") and name != "module.segmentation.segmenter.boundary.2.bias":
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
def test_two_processes_reinforce_together(tmp_path: Path) -> None:
    for command in PHASES:
        assert main([command[0], str(tmp_path), *command[1:], "--device", "cpu", "--quiet"]) == 0
    run = RunFolder(tmp_path)
    for phase, words, artefact in (
        ("internal_rl", [], "internal_rl_policy"),
        ("raw_action_rl", ["--raw"], "raw_action_model"),
    ):
        done = in_two_processes("internal-rl", str(tmp_path), *words, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        settings = getattr(read_config(run), phase)
        lines = run.read_metrics(phase)
        assert [line["episodes"] for line in lines] == [settings.batch_size * (i + 1) for i in range(settings.updates)]
        assert done.stderr.count(f"{settings.updates}/{settings.updates}") == 1  # one process shows progress
        assert run.load_checkpoint(phase)[1]["step"] == settings.updates
        assert (tmp_path / f"{artefact}.safetensors").exists()


EXCHANGE = """
import torch
from metacontroller.training.distributed import leave, processes

workers = processes("cpu")
gathered = workers.gather(torch.tensor([1.0, 2.0]) + 10 * workers.rank)
assert [part.tolist() for part in gathered] == [[1.0, 2.0], [11.0, 12.0]], gathered
counts = torch.tensor([3 + workers.rank])
workers.all_reduce([counts])
parts = workers.gather(torch.arange(1.0 + 2 * workers.rank))
assert [part.tolist() for part in parts] == [[0.0], [0.0, 1.0, 2.0]], parts
assert workers.gather({"rank": workers.rank}) == [{"rank": 0}, {"rank": 1}]
assert counts.tolist() == [7], counts
leave()
assert not torch.distributed.is_initialized()
"""


def test_advantages_can_be_those_of_all_processes(tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    done = launch(str(script))
    assert done.returncode == 0, done.stderr


WAITING = """
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = sys.argv[2:]
from test_distributed import discovered
from test_internal_rl import InternalRLConfig, internal_rl, make_model, make_steering, new_grids, updated_weight

from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import leave, processes

config = InternalRLConfig(episodes=8 * 12, batch_size=8, lr=2e-3, min_better=3, minibatches=4, checkpoint_every=1)
policies = []
for name, parts in (("whole", [12]), ("parts", [1, 2, 5, 6, 9, 12])):
    for done in parts:
        torch.manual_seed(0)
        run, steering = RunFolder(Path(sys.argv[1]) / name), make_steering()
        part = replace(config, episodes=8 * done)
        internal_rl(part, make_model(), steering, new_grids, run, quiet=True, resume=done > parts[0])
    policies.append(torch.cat([value.detach().flatten() for value in steering.policy.parameters()]))
shares = processes("cpu").gather(policies[0])
assert torch.equal(shares[0], shares[1])
assert torch.equal(policies[0], policies[1])
lines = [RunFolder(Path(sys.argv[1]) / name).read_metrics("internal_rl") for name in ("whole", "parts")]
assert lines[0] == lines[1]
waited = [line for line in lines[0] if line["success"] > 0 and "grad_norm" not in line]
assert waited and len(waited) < len(lines[0])

discovered(Path(sys.argv[1]) / "together")

torch.randperm = lambda count, **options: torch.arange(count)
workers = processes("cpu")
alone = copy.copy(workers)
alone.rank, alone.count = 0, 1
lengths = torch.tensor([3, 1, 4, 2, 6, 5, 7, 3, 0])  # of the second process, one minibatch has no decision
own = [torch.arange(5), torch.arange(5, 9)]
whole = torch.tensor([0, 1, 5, 2, 6, 3, 7, 4, 8])  # each minibatch is that of the two processes together
weights, metrics = zip(
    updated_weight(lengths, own[workers.rank], workers, 4), updated_weight(lengths, whole, alone, 4), strict=True
)
torch.testing.assert_close(*weights, rtol=1e-12, atol=0.0)
torch.testing.assert_close(*metrics, rtol=1e-12, atol=0.0)
leave()
"""


def test_episodes_of_two_processes_wait_together_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    folders = (str(tmp_path), str(Path(__file__).parents[1] / "phases"), str(Path(__file__).parent))
    done = launch(str(script), *folders)
    assert done.returncode == 0, done.stderr
    discovered(tmp_path / "alone")
    (one, first), (two, other) = (
        (run.read_metrics("discover"), run.load_checkpoint("discover")[0])
        for run in (RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "together"))
    )
    assert len(one) == len(two) == 2
    for line, expected in zip(two, one, strict=True):
        assert line.pop("phase") == expected.pop("phase")
        assert line == pytest.approx(expected, rel=1e-4)
    for name, value in first.items():
        if name.startswith("module."):
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def discovered(path: Path) -> None:
    """Two updates of discovery towards a target of switches, F G of which is no mean over episodes."""
    config = preset("debug")
    steering, domain = build_meta_controller(config), domain_of(config.domain)
    steering.ratio_loss_weight = 0.5
    settings = replace(config.discover, optimizer=replace(config.discover.optimizer, steps=2, log_every=1))
    generate = demonstrations(domain, "discover")
    discover(settings, build_model(config), steering, generate, RunFolder(path), quiet=True)


def test_what_more_processes_kept_is_shared_out_to_fewer() -> None:
    tensors = {"module.weight": torch.zeros(1)}
    for rank, steps in enumerate((2, 1, 3)):
        tensors[f"kept.{rank}.returns"] = torch.full((rank + 1,), float(rank))
        tensors[f"kept.{rank}.code"] = torch.full((rank + 1, steps, 2), float(rank))
    first, second = (_waiting_here(tensors, Share(rank, torch.tensor(0)), torch.device("cpu")) for rank in range(2))
    assert first["returns"].tolist() == [0, 2, 2, 2]
    assert first["code"][..., 0].tolist() == [[0, 0, 0], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert second["returns"].tolist() == [1, 1]
    everything = _waiting_here(tensors, Processes("cpu"), torch.device("cpu"))
    assert everything["returns"].tolist() == [0, 1, 1, 2, 2, 2]
    last = [Share(rank, torch.tensor(0)) for rank in range(4)]
    for worker in last:
        worker.count = 4
    assert _waiting_here(tensors, last[3], torch.device("cpu")) == {}


class Share(Processes):
    """One of two processes, of which both together made so many decisions."""

    def __init__(self, rank: int, decisions: Tensor) -> None:
        self.rank, self.count, self.decisions = rank, 2, decisions

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """The other process is missed by none but the number of decisions."""
        if tensors[0].dtype == torch.int64:
            tensors[0].copy_(self.decisions)


def test_shares_of_an_update_add_up_to_the_whole() -> None:
    lengths, steps = torch.tensor([1, 7, 3, 2, 7, 4]), 7
    rollout = AbstractRollout(
        returns=torch.rand(6).double(),
        success=torch.ones(6, dtype=torch.bool),
        steps=lengths,
        subgoals_done=lengths,
        lost=None,
        residual=torch.randn(6, steps, 3).double(),
        code=torch.randn(6, steps, 2).double(),
        log_prob=torch.randn(6, steps).double(),
        lengths=lengths,
    )
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    advantage = trajectory_advantages(rollout.returns, 1e-3)

    def surrogate(chunk: AbstractRollout, own: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        score = (chunk.residual @ weight * chunk.code).sum(-1) * own[:, None]
        mean = masked_mean(score, length_mask(chunk.lengths, chunk.code.shape[1]))
        return mean, {"score": mean.detach()}

    expected = _surrogate_in_chunks(rollout, advantage, torch.arange(6), surrogate, Processes("cpu"))[1]["score"]
    assert weight.grad is not None
    gradient, weight.grad, result = weight.grad.clone(), None, torch.zeros(())
    for rank, rows in enumerate(([0, 1, 2], [3, 4, 5])):
        own, workers = torch.tensor(rows), Share(rank, lengths.sum())
        share = rollout.index(own)
        result = result + _surrogate_in_chunks(share, advantage[own], torch.arange(3), surrogate, workers)[1]["score"]
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(weight.grad, gradient)


def test_each_process_has_random_numbers_of_its_own() -> None:
    shared = [torch.Generator().manual_seed(1) for _ in range(2)]
    workers = [Share(rank, torch.tensor(0)) for rank in range(2)]
    own = [worker.own_generator(generator) for worker, generator in zip(workers, shared, strict=True)]
    first, second = (torch.rand(8, generator=generator) for generator in own)
    assert not torch.equal(first, second)
    assert torch.equal(shared[0].get_state(), shared[1].get_state())  # so that a checkpoint is that of both
    alone = Processes("cpu")
    assert alone.own_generator(shared[0]) is shared[0]


def test_other_commands_run_in_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["reproduce", "--preset", "debug"]) == 2
    assert "only pretrain, discover and internal-rl run in several processes" in capsys.readouterr().err


def test_a_batch_too_small_to_share_is_refused() -> None:
    workers = Processes("cpu")
    assert workers.rows(1) is None
    workers.count, workers.rank = 3, 1
    rows = workers.rows(8)
    assert rows is not None
    assert rows.tolist() == [1, 4, 7]
    with pytest.raises(ValueError, match="batch_size is 2; expected at least 3"):
        workers.rows(2)
    assert workers.share(24, 4) == 8
    with pytest.raises(ValueError, match="batch_size is 16; expected a multiple of 12, processes times minibatches"):
        workers.share(16, 4)
