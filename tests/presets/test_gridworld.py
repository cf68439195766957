from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from metacontroller.envs.expert import TIE_BREAKS, TieBreak, expert_trajectories
from metacontroller.envs.tasks import transitions
from metacontroller.presets import PRESETS
from metacontroller.presets.gridworld import (
    MAX_SEED,
    STREAMS,
    ExpertConfig,
    MetaControllerConfig,
    ModelConfig,
    build_meta_controller,
    build_model,
    debug,
    from_json,
    generate,
    laptop,
    stream_seed,
    with_seed,
)


def plain(config: Any) -> Any:
    """The config as a run folder's JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = PRESETS[name]()
    assert from_json(plain(config)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_pretraining_never_shows_a_transition_of_the_post_training_task_between_subgoals(name: str) -> None:
    config = PRESETS[name]()
    unseen = transitions([config.post_task]) - transitions(config.tasks)
    assert config.colors_per_subgoal == (2 if name == "paper" else 1)
    steps = config.post_task[config.colors_per_subgoal - 1 :: config.colors_per_subgoal]
    following = config.post_task[config.colors_per_subgoal :: config.colors_per_subgoal]
    assert unseen == set(zip(steps, following, strict=False))


def test_the_paper_preset_has_the_papers_size() -> None:
    config = PRESETS["paper"]()
    model, meta_controller = build_model(config), build_meta_controller(config)
    assert config.environment.observation_size == 7 * 7 * (4 + 8 + 1)
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
    tokens = generate(config, "pretrain")(2, torch.Generator().manual_seed(0)).states
    embedded = model.embed(tokens)
    assert torch.equal(model.lower(embedded), embedded)
    assert len(model.upper_body.blocks) == config.model.upper_depth


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
def test_a_config_may_name_every_tie_break(tie_break: TieBreak) -> None:
    expert = ExpertConfig(tie_break=tie_break)
    config = from_json(plain(dataclasses.replace(debug(), expert=expert)))
    assert config.expert == expert
    drawn = generate(config, "pretrain")(16, torch.Generator().manual_seed(0))
    same = expert_trajectories(
        config.environment, config.tasks, 16, generator=torch.Generator().manual_seed(0), tie_break=tie_break
    )
    assert torch.equal(drawn.actions, same.actions)


def test_generate_follows_the_expert_of_its_phase() -> None:
    config = dataclasses.replace(debug(), expert=ExpertConfig(epsilon=1.0), discovery_expert=ExpertConfig())
    astray = generate(config, "pretrain")(32, torch.Generator().manual_seed(0))
    clean = generate(config, "discover")(32, torch.Generator().manual_seed(0))
    assert clean.lengths.max() < config.environment.max_steps
    assert astray.lengths.float().mean() > clean.lengths.float().mean()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(colour=1), r"config has an unknown field 'colour'; known are environment, tasks"),
        (lambda d: d.pop("model"), r"config lacks the field 'model'; add it\."),
        (lambda d: d["model"].update(dim="64"), r"config\.model\.dim is '64'; expected int\."),
        (lambda d: d["model"].update(dim=True), r"config\.model\.dim is True; expected int\."),
        (
            lambda d: d["model"].update(view="oblique"),
            r"config\.model\.view is 'oblique'; expected one of 'absolute', ",
        ),
        (lambda d: d.update(model=3), r"config\.model is 3; expected an object with the fields of ModelConfig\."),
        (lambda d: d.update(post_task="0-1"), r"config\.post_task is '0-1'; expected a list\."),
        (lambda d: d["tasks"][1].append(None), r"config\.tasks\[1\]\[3\] is None; expected int\."),
        (
            lambda d: d["discover"].update(alpha_warmup=[1]),
            r"config\.discover\.alpha_warmup has 1 entries; expected 2\.",
        ),
        (lambda d: d.update(post_task=[0, 9]), r"task 0-9 has unknown color 9"),
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
        (lambda: ExpertConfig(tie_break="first"), "tie_break is 'first'; expected one of 'random'"),  # type: ignore[arg-type]
        (lambda: ExpertConfig(epsilon=1.5), "epsilon is 1.5; expected a probability"),
        (lambda: dataclasses.replace(laptop().model, heads=5), "dim 128 is not a multiple of heads 5"),
        (lambda: dataclasses.replace(laptop().model, mlp_dim=0), "mlp_dim is 0; expected at least 1"),
        (lambda: dataclasses.replace(laptop().model, lower_depth=-1), "lower_depth is -1; expected at least 0"),
        (lambda: dataclasses.replace(laptop().model, upper_depth=0), "upper_depth is 0; expected at least 1"),
        (lambda: dataclasses.replace(laptop().evaluate, codes=0), "codes is 0; expected at least 1"),
        (lambda: MetaControllerConfig(embedder_dim=6), "embedder_dim is 6; expected a multiple of 4"),
        (lambda: MetaControllerConfig(rank=0), "rank is 0; expected at least 1"),
    ],
)
def test_a_part_refuses_a_bad_value(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_model_config_names_its_views() -> None:
    with pytest.raises(ValueError, match="view is 'top'; expected 'absolute' or 'egocentric'"):
        ModelConfig(dim=8, lower_depth=1, upper_depth=1, heads=2, mlp_dim=8, view="top")  # type: ignore[arg-type]
