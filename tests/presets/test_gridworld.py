from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.control.config import MetaControllerConfig
from metacontroller.domains.gridworld_pinpad.domain import GridworldPinpadConfig
from metacontroller.domains.gridworld_pinpad.expert import TIE_BREAKS, TieBreak, expert_trajectories
from metacontroller.domains.pinpad.tasks import transitions
from metacontroller.domains.registry import domain_of
from metacontroller.models.transformer import Transformer
from metacontroller.presets.gridworld import PRESETS, debug, laptop
from metacontroller.recipes.config import (
    ExperimentConfig,
    build_meta_controller,
    build_model,
    from_json,
    to_json,
    with_seed,
)
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.seeding import MAX_SEED, STREAMS, stream_seed


def plain(config: ExperimentConfig) -> Any:
    """The config as a run folder's JSON holds it."""
    return json.loads(json.dumps(to_json(config), default=dataclasses.asdict))


def demonstrations(config: ExperimentConfig, split: Any, n: int) -> Any:
    return domain_of(config.domain).demonstrations(split, n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]()
    assert from_json(plain(config)) == config
    assert with_seed(config, 0) == config


def test_a_preset_survives_a_run_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(to_json(debug()))
    content = RunFolder(tmp_path).read_config()
    assert (content["domain"]["name"], content["model"]["name"]) == ("gridworld-pinpad", "transformer")
    assert from_json(content) == debug()


@pytest.mark.parametrize("name", PRESETS)
def test_pretraining_never_shows_a_transition_of_the_post_training_task_between_subgoals(name: str) -> None:
    config = PRESETS[name]()
    domain = config.domain
    unseen = transitions([domain.post_task]) - transitions(domain.tasks)
    assert domain.colors_per_subgoal == (2 if name == "paper" else 1)
    steps = domain.post_task[domain.colors_per_subgoal - 1 :: domain.colors_per_subgoal]
    following = domain.post_task[domain.colors_per_subgoal :: domain.colors_per_subgoal]
    assert unseen == set(zip(steps, following, strict=False))
    assert config.evaluate.walk_steps == 4 * domain.size * domain.colors_per_subgoal


def test_the_paper_preset_has_the_papers_size() -> None:
    config = PRESETS["paper"]()
    model, meta_controller = build_model(config), build_meta_controller(config)
    assert config.domain.grid.observation_size == 7 * 7 * (4 + 8 + 1)
    assert isinstance(model, Transformer)
    assert len(model.lower_body.blocks) == len(model.upper_body.blocks) == 3
    assert meta_controller.controller.rank == 16
    assert config.internal_rl.updates == 100_000


def test_every_stream_of_every_seed_has_a_seed_of_its_own_in_32_bits() -> None:
    drawn = [stream_seed(seed, stream) for seed in (0, 1, 2, MAX_SEED) for stream in STREAMS]
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) < 2**32


def test_with_seed_reseeds_every_phase_and_changes_nothing_else() -> None:
    config = with_seed(debug(), 3)
    phases = ("pretrain", "discover", "internal_rl", "raw_action_rl")
    assert {name: getattr(config, name).seed for name in phases} == {name: stream_seed(3, name) for name in phases}
    assert with_seed(config, 0) == debug()


def test_the_seed_decides_the_initial_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_model(with_seed(debug(), seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    table = "encoder.table"
    assert torch.equal(first.get_parameter(table), again.get_parameter(table))
    assert not torch.equal(first.get_parameter(table), other.get_parameter(table))
    one, two = (build_meta_controller(with_seed(debug(), seed)) for seed in (1, 2))
    assert not torch.equal(one.controller.write, two.controller.write)


def test_the_controlled_layer_may_be_the_input_embedding() -> None:
    config = debug()
    model = build_model(dataclasses.replace(config, model=dataclasses.replace(config.model, lower_depth=0)))
    tokens = demonstrations(config, "pretrain", 2).states
    embedded = model.embed(tokens)
    assert torch.equal(model.lower(embedded), embedded)
    assert isinstance(model, Transformer)
    assert len(model.upper_body.blocks) == config.model.upper_depth


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
def test_a_config_may_name_every_tie_break(tie_break: TieBreak) -> None:
    domain = dataclasses.replace(debug().domain, tie_break=tie_break)
    config = from_json(plain(dataclasses.replace(debug(), domain=domain)))
    assert config.domain == domain
    same = expert_trajectories(
        domain.grid, domain.tasks, 16, generator=torch.Generator().manual_seed(0), tie_break=tie_break
    )
    assert torch.equal(demonstrations(config, "pretrain", 16).actions, same.actions)


def test_demonstrations_follow_the_expert_of_their_phase() -> None:
    config = dataclasses.replace(debug(), domain=dataclasses.replace(debug().domain, tie_break="random", epsilon=1.0))
    astray, clean = demonstrations(config, "pretrain", 32), demonstrations(config, "discover", 32)
    assert clean.lengths.max() < config.domain.max_steps
    assert astray.lengths.float().mean() > clean.lengths.float().mean()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(colour=1), r"config has an unknown field 'colour'; known are domain, model"),
        (lambda d: d["domain"].pop("size"), r"config\.domain lacks the field 'size'; add it\."),
        (lambda d: d["pretrain"]["optimizer"].pop("weight_decay"), r"optimizer lacks the field 'weight_decay'"),
        (lambda d: d.pop("discovery"), r"config lacks the field 'discovery'; add it\."),
        (lambda d: d.pop("model"), r"config lacks the field 'model'; add it\."),
        (lambda d: d["model"].update(dim="64"), r"config\.model\.dim is '64'; expected a whole number"),
        (lambda d: d["model"].update(dim=True), r"config\.model\.dim is True; expected a whole number"),
        (
            lambda d: d["domain"].update(tie_break="first"),
            r"config\.domain\.tie_break is 'first'; expected one of 'random', ",
        ),
        (
            lambda d: d["domain"].update(view="oblique"),
            r"config\.domain\.view is 'oblique'; expected one of 'absolute', ",
        ),
        (lambda d: d.update(model=3), r"config\.model is 3; expected an object with a name\."),
        (lambda d: d["model"].update(name="mamba"), r"model 'mamba' is unknown; known are transformer"),
        (lambda d: d["domain"].pop("name"), r"config\.domain is .*; expected an object with a name\."),
        (lambda d: d["domain"].update(name="maze"), r"world 'maze' is unknown; known are .*gridworld-pinpad"),
        (lambda d: d["domain"].update(colour=1), r"config\.domain has an unknown field 'colour'; known are size, "),
        (lambda d: d["domain"].update(post_task="0-1"), r"config\.domain\.post_task is '0-1'; expected a list\."),
        (lambda d: d["domain"]["tasks"][1].append(None), r"config\.domain\.tasks\[1\]\[3\] is None; expected a whole"),
        (
            lambda d: d["discover"].update(alpha_warmup=[1]),
            r"config\.discover\.alpha_warmup is \[1\]; expected 2 entries\.",
        ),
        (lambda d: d["domain"].update(post_task=[0, 9]), r"task 0-9 has unknown color 9"),
        (lambda d: d.update(seed=-1), r"seed is -1; expected 0\.\."),
        (
            lambda d: d["meta_controller"].update(rank=17),
            r"meta_controller\.rank is 17; expected at most model\.dim, 16",
        ),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(change: Any, sentence: str) -> None:
    data = plain(debug())
    change(data)
    with pytest.raises(ValueError, match=sentence):
        from_json(data)


def test_an_integer_is_a_float_and_none_is_a_rank() -> None:
    data = plain(debug())
    data["discover"]["alpha"] = 1
    data["meta_controller"]["rank"] = None
    config = from_json(data)
    assert config.discover.alpha == 1
    assert config.meta_controller.rank is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GridworldPinpadConfig(epsilon=1.5), "epsilon is 1.5; expected a probability"),
        (lambda: dataclasses.replace(laptop().model, heads=5), "dim 128 is not a multiple of heads 5"),
        (lambda: dataclasses.replace(laptop().model, mlp_dim=0), "mlp_dim is 0; expected at least 1"),
        (lambda: dataclasses.replace(laptop().model, lower_depth=-1), "lower_depth is -1; expected at least 0"),
        (lambda: dataclasses.replace(laptop().model, upper_depth=0), "upper_depth is 0; expected at least 1"),
        (lambda: dataclasses.replace(laptop().evaluate, codes=0), "codes is 0; expected at least 1"),
        (lambda: dataclasses.replace(laptop().evaluate, walk_steps=0), "walk_steps is 0; expected at least 1"),
        (lambda: MetaControllerConfig(embedder_dim=6), "embedder_dim is 6; expected a multiple of 4"),
        (lambda: MetaControllerConfig(rank=0), "rank is 0; expected at least 1"),
    ],
)
def test_a_part_refuses_a_bad_value(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
