"""Arguments of another kind than meant, swapped ones, caches of another model: one sentence that names the argument."""

# pyright: reportArgumentType=false
# What is passed is wrong on purpose.

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature, unwrap
from pathlib import Path
from typing import Any

import gymnasium
import jaxtyping
import pytest
import torch

from metacontroller import InternalEnv, InternalVectorEnv, MetaController, Transformer
from metacontroller.analysis.registry import draw_analysis, run_analysis
from metacontroller.analysis.video import write_video
from metacontroller.arguments import checked_hints
from metacontroller.baselines.compile import build_compile, discover_compile
from metacontroller.baselines.raw_action_rl import raw_action_rl
from metacontroller.domains.registry import domain_of
from metacontroller.environments.stable_baselines import StableBaselinesEnv
from metacontroller.errors import UserError
from metacontroller.phases.artefacts import artefact_path, load_artefact
from metacontroller.phases.discover import discover
from metacontroller.phases.evaluate import evaluate
from metacontroller.phases.evolution import EvolutionConfig, evolution
from metacontroller.phases.internal_rl import internal_rl
from metacontroller.phases.pretrain import pretrain, snapshot_path
from metacontroller.phases.rollout import rollout_abstract, rollout_raw
from metacontroller.presets import preset
from metacontroller.ranges import check
from metacontroller.recipes.collect import CollectConfig, collect
from metacontroller.recipes.config import (
    build_meta_controller,
    build_model,
    load_run,
    open_folder,
    read_config,
    to_json,
    with_seed,
)
from metacontroller.recipes.reproduce import reproduce
from metacontroller.recipes.study import study
from metacontroller.recipes.study_runs import StudyConfig
from metacontroller.recipes.sweep import sweep
from metacontroller.report.html import write_report
from metacontroller.storage.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types are not checked for the user as they are in these tests: the messages are our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


CONFIG = preset("debug")
WORLD, BASE, STEERING = domain_of(CONFIG.domain), build_model(CONFIG), build_meta_controller(CONFIG)
RUN, SPEC = RunFolder("nowhere"), domain_of(CONFIG.domain).spec()
SEGMENTATION = build_compile(CONFIG.compile, BASE, SPEC.encoder, CONFIG.meta_controller.dim_latent, 0)


def nothing(*arguments: Any) -> Any:
    """What must never be called."""
    raise AssertionError(arguments)


ENV = gymnasium.make("CartPole-v1")
CALLS: dict[Callable[..., Any], tuple[Any, ...]] = {
    pretrain: (CONFIG.pretrain, BASE, nothing, RUN),
    discover: (CONFIG.discover, BASE, STEERING, nothing, RUN),
    discover_compile: (CONFIG.compile, BASE, SEGMENTATION, STEERING, nothing, RUN),
    internal_rl: (CONFIG.internal_rl, BASE, STEERING, nothing, RUN),
    raw_action_rl: (CONFIG.raw_action_rl, BASE, nothing, RUN),
    evolution: (EvolutionConfig(), BASE, STEERING, nothing, RUN),
    evaluate: (BASE, STEERING, WORLD, "prior", None, 4, 0),
    rollout_abstract: (BASE, STEERING, None, nothing),
    rollout_raw: (BASE, None),
    InternalEnv: (ENV, BASE, STEERING),
    InternalVectorEnv: (WORLD, BASE, STEERING),
    StableBaselinesEnv: (None,),
    snapshot_path: (RUN, 3),
    artefact_path: (RUN, "base_model"),
    load_artefact: (Transformer, RUN, "base_model", "cpu"),
    build_compile: (CONFIG.compile, BASE, SPEC.encoder, 3, 0),
    build_model: (CONFIG,),
    build_meta_controller: (CONFIG,),
    to_json: (CONFIG,),
    with_seed: (CONFIG, 0),
    read_config: (RUN,),
    open_folder: (RUN, CONFIG, "pretrain"),
    load_run: (RUN, "cpu"),
    reproduce: (CONFIG, "nowhere"),
    sweep: (CONFIG, "nowhere"),
    study: (StudyConfig(), "nowhere", [0]),
    collect: (CollectConfig(env="E", policy="p:q", episodes=3), Path("nowhere")),
    write_report: ([Path("nowhere")], Path("nowhere.html")),
    run_analysis: ("gate", None),
    draw_analysis: ("gate", RUN, [RUN]),
    write_video: (None, "prior", Path("x.gif")),
}
NAMED: dict[Callable[..., Any], dict[str, Any]] = {
    open_folder: {"resume": False, "option": "--out"},
    sweep: {"seeds": [0], "alphas": [0.1], "lrs": [0.1]},
    write_video: {"seed": 0},
}
OTHERS = ["text", 3, 0.5, ["text"], Path("run"), BASE, STEERING, RUN, WORLD, CONFIG, None, torch.zeros(1)]


def parameters() -> list[tuple[Callable[..., Any], int, str, Any]]:
    """Each positional argument of each call whose kind is checked, with its annotation."""
    found = []
    for call, given in CALLS.items():
        hints = checked_hints(unwrap(call.__init__ if isinstance(call, type) else call))
        names = list(signature(call).parameters)[: len(given)]
        found += [(call, place, name, hints[name]) for place, name in enumerate(names) if name in hints]
    return found


def fits(value: Any, kind: Any) -> bool:
    try:
        check("value", value, kind)
    except UserError:
        return False
    return True


def answered(call: Callable[[], Any], start: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(start), text
    assert re.search(r"; expected .*\.$", text), text
    assert len(re.findall(r"[.!?](?=\s|$)", text)) == 1, text


@pytest.mark.parametrize(
    ("call", "place", "name", "kind"), parameters(), ids=lambda part: getattr(part, "__name__", "")
)
def test_another_kind(
    call: Callable[..., Any],
    place: int,
    name: str,
    kind: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tried = 0
    for other in OTHERS:
        if fits(other, kind):
            continue
        given = [*CALLS[call][:place], other, *CALLS[call][place + 1 :]]
        first = next((at for at in range(place) if given[at] is None), place)  # what stands for nothing fails before
        if first == place:
            answered(lambda given=given: call(*given, **NAMED.get(call, {})), name.removesuffix("s"))
            tried += 1
    assert tried > 8 or None in CALLS[call][:place]
    assert list(tmp_path.iterdir()) == []


def test_what_is_decorated_is_called_here() -> None:
    assert len(CALLS) > 30
    assert len(parameters()) > 50


def test_swapped_arguments() -> None:
    answered(lambda: pretrain(CONFIG.pretrain, nothing, BASE, RUN), "model is a function; expected SteerableModel.")
    answered(lambda: evaluate(STEERING, BASE, WORLD, "prior", None, 4, 0), "model is a MetaController")
    answered(lambda: InternalVectorEnv("gridworld-pinpad", BASE, STEERING), "domain is 'gridworld-pinpad'")
    answered(lambda: load_run("runs/mine", "cpu"), "folder is 'runs/mine'; expected RunFolder.")
    answered(lambda: draw_analysis("gate", RUN, [RUN, "x"]), "runs[1] is 'x'; expected RunFolder.")
    answered(lambda: write_report("runs/mine", Path("x")), "paths is 'runs/mine'; expected a list.")
    with pytest.raises(TypeError, match="missing"):
        pretrain(CONFIG.pretrain, BASE)  # pyright: ignore[reportCallIssue]


# -- caches of another model ------------------------------------------------------------------------------------------


def model(body: dict[str, Any], upper: dict[str, Any] | None = None) -> Transformer:
    options: dict[str, Any] = {
        "action_embed_readout": {"num_discrete": 4},
        "state_embed_readout": {"num_continuous": 3},
    }
    return Transformer(8, **options, lower_body=body, upper_body=upper or body, condition_on_actions=False)


ATTENTION = {"depth": 1, "heads": 2, "mlp_dim": 8}
MODELS = {
    "attention": model(ATTENTION),
    "deeper": model({**ATTENTION, "depth": 2}),
    "deeper above": model(ATTENTION, {**ATTENTION, "depth": 2}),
    "nothing below": model({**ATTENTION, "depth": 0}, ATTENTION),
    "more heads": model({**ATTENTION, "heads": 4}),
    "hawk": model({"kind": "hawk", "depth": 1, "heads": 2, "mlp_dim": 8}),
    "wider hawk": model({"kind": "hawk", "depth": 1, "heads": 2, "mlp_dim": 8, "width": 16}),
}


@pytest.mark.parametrize("other", MODELS)
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_another_model(name: str, other: str) -> None:
    states = torch.zeros(2, 1, 3)
    _, cache = MODELS[name].step(states)
    if name == other:
        MODELS[other].step(states, cache=cache)
    else:
        answered(lambda: MODELS[other].step(states, cache=cache), "cache is of another model: its ")


def test_a_metacontroller_that_is_none_and_states_of_another() -> None:
    states, residual = torch.zeros(2, 1, 3), torch.zeros(2, 1, 8)
    steering = [MetaController(8, dim_meta_controller=8, dim_latent=codes, rank=2) for codes in (2, 3)]
    answered(lambda: MODELS["hawk"].step(states, meta_controller="mine"), "meta_controller is 'mine'; expected a")
    answered(lambda: steering[0].act(residual, "mine"), "the state is 'mine'; expected the one that")
    answered(lambda: steering[0](residual, "mine"), "cache is 'mine'; expected the output of")
    _, output = steering[0].act(residual)
    answered(lambda: steering[1].act(residual, output.state), "the state is of another metacontroller: its")
    _, called = steering[0](residual)
    answered(lambda: steering[1](residual, called), "the state is of another metacontroller: its")
    answered(lambda: steering[0](residual[:1], called), "the state has 2 episodes; expected 1")
    steering[0].act(residual, called.state)  # acting goes on from a call
