"""The loop of pretraining and discovery: streams of episodes, noise apart from them, means, learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller.data import Trajectories
from metacontroller.data.batching import EpisodeStream
from metacontroller.data.trajectories import Ratio
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.loop import _Means, train
from metacontroller.training.optimizer import OptimizerConfig, linear_warmup
from metacontroller.training.seeding import noise_generator


def numbered(n: int, generator: torch.Generator) -> Trajectories:
    """n episodes of lengths 1 .. n in random order, with a random number each as state."""
    lengths = torch.randperm(n, generator=generator) + 1
    states = torch.rand(n, 1, 1, generator=generator).expand(-1, n + 1, -1)
    return Trajectories(states=states, actions=torch.zeros(n, n, dtype=torch.int64), lengths=lengths)


def first_states(stream: EpisodeStream, batches: int) -> list[list[float]]:
    return [stream.next().states[:, 0, 0].tolist() for _ in range(batches)]


def test_a_stream_asks_for_windows_and_never_ends() -> None:
    asked: list[int] = []

    def generate(n: int, generator: torch.Generator) -> Trajectories:
        asked.append(n)
        return numbered(n, generator)

    stream = EpisodeStream(generate, 3, seed=0, window=2)
    assert not asked
    lengths = [stream.next().lengths.tolist() for _ in range(5)]
    assert asked == [6, 6, 6]
    assert sorted(lengths[:2]) == [[1, 2, 3], [4, 5, 6]]
    assert sorted(lengths[2:4]) == [[1, 2, 3], [4, 5, 6]]


def test_a_stream_repeats_with_its_seed_and_is_always_fresh() -> None:
    first, again, other = (first_states(EpisodeStream(numbered, 2, seed, window=2), 6) for seed in (1, 1, 2))
    assert first == again
    assert len({number for batch in first + other for number in batch}) == 24


@pytest.mark.parametrize("used", [1, 2, 3, 4])
def test_a_stream_goes_on_where_it_was(used: int) -> None:
    stream = EpisodeStream(numbered, 2, seed=5, window=3)
    first_states(stream, used)
    kept = stream.tensors()
    expected = first_states(stream, 5)
    again = EpisodeStream(numbered, 2, seed=6, window=3)
    again.restore(kept)
    assert first_states(again, 5) == expected


def test_noise_has_nothing_to_do_with_the_episodes_of_the_same_seed() -> None:
    def sample(generator: torch.Generator) -> list[float]:
        return torch.rand(1000, dtype=torch.float64, generator=generator).tolist()

    device = torch.device("cpu")
    noise = sample(noise_generator(3, device))
    assert noise == sample(noise_generator(3, device))
    assert not set(noise) & set(sample(torch.Generator().manual_seed(3)))
    assert not set(noise) & set(sample(noise_generator(4, device)))


def run_train(folder: Path, steps: int, resume: bool = False, **options: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """Trains a scale; the logged metrics and the scale. Metric "number" of update t, counted from 0, is t."""
    settings = {"steps": steps, "batch_size": 2, "lr": 0.1, "log_every": 4, "checkpoint_every": 2, **options}
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    parameters = list(module.parameters())

    def sample_extras(batch: Trajectories, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"target": torch.rand(batch.batch, generator=generator)}

    def loss_function(batch: Trajectories, step: int, extras: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = module(batch.states).mean() - extras["target"].mean()
        return error.square(), {"number": torch.tensor(float(step))}

    run = RunFolder(folder)
    config = OptimizerConfig(**settings)
    train(
        "phase",
        config,
        module,
        parameters,
        numbered,
        loss_function,
        run,
        seed=0,
        sample_extras=sample_extras,
        resume=resume,
        quiet=True,
    )
    return run.read_metrics("phase"), module.weight.detach()


def test_means_cover_the_log_interval_and_the_last_one_what_is_left(tmp_path: Path) -> None:
    lines, _ = run_train(tmp_path, 10)
    assert [(line["step"], line["number"]) for line in lines] == [(4, 1.5), (8, 5.5), (10, 8.5)]


def test_after_resuming_between_log_points_the_means_cover_the_steps_since(tmp_path: Path) -> None:
    whole, weight = run_train(tmp_path / "whole", 12)
    run_train(tmp_path / "resumed", 6)
    lines, again = run_train(tmp_path / "resumed", 12, resume=True)
    assert torch.equal(again, weight)
    assert [(line["step"], line["number"]) for line in lines] == [(4, 1.5), (6, 4.5), (8, 6.5), (12, 9.5)]
    assert lines[-1] == whole[-1]


def test_metrics_keep_their_order_after_resuming_between_log_points() -> None:
    workers, step = processes("cpu"), {"loss": torch.tensor(1.0), "error": torch.tensor(2.0)}
    means, resumed = _Means(), _Means()
    means.add(step)
    resumed.restore(dict(sorted(means.tensors(workers).items())), workers, torch.device("cpu"))  # as files hold them
    for one in (means, resumed):
        one.add(step)
    assert list(resumed.take(workers).items()) == list(means.take(workers).items()) == [("loss", 1.0), ("error", 2.0)]


def test_ratios_are_divided_after_all_sums_are_added_also_after_resuming() -> None:
    workers, means, resumed = processes("cpu"), _Means(), _Means()
    sums = [(1, 2), (0, 0), (2, 8)]  # recall of three updates, of which the second has nothing to recall
    for found, count in sums:
        means.add({"loss": torch.tensor(3.0), "recall": Ratio(torch.tensor(found), torch.tensor(count))}, share=0.5)
        if count == 0:
            resumed.restore(means.tensors(workers), workers, torch.device("cpu"))
    resumed.add({"loss": torch.tensor(3.0), "recall": Ratio(torch.tensor(2), torch.tensor(8))}, share=0.5)
    assert means.take(workers) == resumed.take(workers) == {"loss": 1.5, "recall": 0.3}
    means.add({"recall": Ratio(torch.tensor(0), torch.tensor(0))})
    assert means.take(workers) == {"recall": 0.0}


def test_other_numbers_of_threads_than_before_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    run_train(tmp_path, 6)
    run_train(tmp_path, 7, resume=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run_train(tmp_path, 7, resume=True)  # nothing is left to do
    assert capsys.readouterr().err == ""
    run_train(tmp_path, 12, resume=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("phase: goes on with 1 process and 1 thread where it had 1 process and 3 threads")
    run_train(tmp_path, 13, resume=True)
    assert capsys.readouterr().err == ""


def test_another_number_of_processes_than_before_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_train(tmp_path, 6)
    tensors, meta = RunFolder(tmp_path).load_checkpoint("phase")
    assert meta["processes"] == 1
    RunFolder(tmp_path).save_checkpoint("phase", tensors, {**meta, "processes": 2})
    run_train(tmp_path, 7, resume=True)
    assert "goes on with 1 process and" in capsys.readouterr().err


def test_a_phase_that_does_not_resume_drops_what_was_logged_before(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_metrics("phase", 3, loss=9.0)
    run.log_metrics("other", 3, loss=9.0)
    lines, _ = run_train(tmp_path, 4, resume=True)
    assert [line["step"] for line in lines] == [4]
    assert len(run.read_metrics("other")) == 1


def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    lines, weight = run_train(tmp_path, 4)
    lines_again, again = run_train(tmp_path, 4, resume=True)
    assert lines_again == lines
    assert torch.equal(again, weight)


def test_the_learning_rate_falls_to_zero_at_the_end() -> None:
    config = OptimizerConfig(steps=10, batch_size=1, lr=0.5, decay_steps=4)
    assert [config.share_of_lr(step) for step in range(10)] == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert OptimizerConfig(steps=10, batch_size=1, lr=0.5).share_of_lr(9) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"log_every": 0}, "log_every is 0; expected at least 1"),
        ({"lr": 0.0}, "lr is 0.0; expected a number above 0"),
        ({"decay_steps": 11}, r"decay_steps is 11; expected 0\.\.10"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**({"steps": 10, "batch_size": 1, "lr": 0.1} | change))


def test_a_warm_up_is_linear_between_its_ends() -> None:
    assert [linear_warmup(step, (10, 20)) for step in (0, 10, 11, 15, 20, 30)] == [0.0, 0.0, 0.1, 0.5, 1.0, 1.0]
    assert linear_warmup(0, (0, 0)) == 1.0
