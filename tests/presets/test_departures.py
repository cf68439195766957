"""docs/departures.md names every value of a preset that departs from the paper's (§4 and its tables), and no other."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metacontroller.domains.pinpad.tasks import A1_POST, A2_POST, TABLE_A1, TABLE_A2, format_task, transitions
from metacontroller.presets import preset, preset_names, study_config

PAGE = Path(__file__).parents[2] / "docs" / "departures.md"
LOG = PAGE.with_name("log.md")
NAMED = {TABLE_A1: "table A1", TABLE_A2: "table A2", tuple(sorted(transitions(TABLE_A2))): "pairs of table A2"}
SEARCHED = frozenset({0, 0.05, 0.1, 0.17, 0.3, 0.5, 1})
OTHER_WORLDS = ("babyai", "offline")
"""Worlds that the paper has not: only models and phases are compared, with those of its grid."""

BOTH: dict[str, Any] = {
    "meta_controller.dim_latent": 8,
    "meta_controller.code": "gaussian",
    "meta_controller.dim_history": 32,
    "meta_controller.dim_sequence": 32,
    "meta_controller.encoder_hidden": 64,
    "meta_controller.decoder_hidden": 32,
    "meta_controller.embedder_kind": "hawk",
    "meta_controller.policy_hidden": 256,
    "meta_controller.policy_kind": "hawk",
    "meta_controller.policy_std": 1.0,
    "meta_controller.action_temperature": 1.0,
    "meta_controller.gate.mode": "soft",
    "meta_controller.gate.threshold": 0.5,
    "model.dim": 256,
    "model.mlp_dim": 512,
    "model.action_modes": 1,
    "model.min_action_std": None,
    "pretrain.optimizer.lr": 3e-4,
    "pretrain.optimizer.weight_decay": 0.03,
    "pretrain.optimizer.decay_steps": 0,
    "pretrain.choice_weight": 1.0,
    "pretrain.muon_lr": 0.0,
    "pretrain.clips": 0,
    "discover.optimizer.weight_decay": 0.03,
    "discover.optimizer.decay_steps": 0,
    "discover.alpha": SEARCHED,
    "discover.choice_weight": 1.0,
    "discover.muon_lr": 0.0,
    "discover.clips": 0,
    "discover.guided_updates": 0,
    "discover.symmetry_augmentation": False,
    "discover.train_model": False,
    "compile.optimizer.steps": 32_000,
    "compile.optimizer.weight_decay": 0.03,
    "compile.segments": 4,
    "compile.hidden": 32,
    "compile.prior_rate": 10.0,
    "compile.temperature": frozenset({0.5, 1.0}),
    "internal_rl.lr": 3e-5,
    "internal_rl.entropy_weight": 0.0,
    "internal_rl.delta": 1e-3,
    "internal_rl.min_better": 1,
    "internal_rl.target_kl": None,
    "study.steer_steps": 3200,
}
GRID = BOTH | {
    "domain.size": 7,
    "domain.num_colors": 8,
    "domain.num_walls": 4,
    "domain.max_steps": 100,
    "domain.tasks": TABLE_A1,
    "domain.post_task": A1_POST,
    "domain.colors_per_subgoal": 2,
    "domain.tie_break": "random",
    "domain.epsilon": 0.0,
    "domain.discovery_epsilon": 0.0,
    "domain.view": "absolute",
    "model.body": "attention",
    "model.lower_depth": 3,
    "model.upper_depth": 3,
    "model.heads": 4,
    "meta_controller.rank": 16,
    "pretrain.optimizer.steps": 256_000,
    "pretrain.optimizer.batch_size": 1024,
    "pretrain.state_loss_weight": frozenset({0.0, 0.01}),
    "discover.optimizer.steps": 64_000,
    "discover.optimizer.batch_size": 512,
    "discover.optimizer.lr": 1e-3,
    "compile.optimizer.batch_size": 512,
    "compile.optimizer.lr": 1e-3,
    "internal_rl.episodes": 100_000 * 1024,
    "internal_rl.batch_size": 1024,
    "study.probe_steps": 8000,
    "study.probe_batch_size": 512,
    "study.probe_lr": 1e-3,
    "study.steer_batch_size": 512,
    "study.steer_lr": 1e-3,
}
ANT = BOTH | {
    "domain.size": 4,
    "domain.num_colors": 4,
    "domain.num_walls": 1,
    "domain.max_steps": 500,
    "domain.start_yaw": math.pi,
    "domain.tasks": TABLE_A2,
    "domain.post_task": A2_POST,
    "domain.symmetry_augmentation": False,
    "model.body": "hawk",
    "model.lower_depth": 4,
    "model.upper_depth": 4,
    "model.heads": 8,
    "meta_controller.rank": None,
    "pretrain.optimizer.steps": 204_800,
    "pretrain.optimizer.batch_size": 512,
    "pretrain.state_loss_weight": 10.0,
    "discover.optimizer.steps": 32_000,
    "discover.optimizer.batch_size": 128,
    "discover.optimizer.lr": 3e-4,
    "compile.optimizer.batch_size": 128,
    "compile.optimizer.lr": 3e-4,
    "internal_rl.episodes": 51_200 * 256,
    "internal_rl.batch_size": 256,
    "study.steer_batch_size": 256,
    "study.steer_lr": 3e-4,
}
LAMBDA = "discover.state_loss_weight"
"""Of eq. 3: that of the model, whatever it is."""


def fields_of(name: str) -> dict[str, Any]:
    """The paper's values for a preset, by field; a set where it has several."""
    table = ANT if name.startswith("ant-") else GRID
    fields = table | {LAMBDA: preset(name).pretrain.state_loss_weight}
    other = name.startswith(OTHER_WORLDS)
    return {field: value for field, value in fields.items() if not (other and field.startswith("domain."))}


def value_of(name: str, field: str) -> Any:
    first, *rest = field.split(".")
    value = study_config(name) if first == "study" else getattr(preset(name), first)
    for part in rest:
        value = getattr(value, part)
    return value


def shown(value: Any) -> str:
    """A value as the page shows it."""
    if isinstance(value, tuple):
        return NAMED.get(value) or format_task(value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def rows() -> list[tuple[list[str], list[str], str, str, str]]:
    """Presets, fields with their values, the paper's, why and log, of each row of the first table."""
    lines = [line for line in PAGE.read_text().split("\n## ")[1].splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(names.split(", "), here.split(", `"), paper, why, log) for names, here, paper, why, log in cells]


def documented(name: str) -> dict[str, str]:
    """Field to value, as the page says."""
    pairs = [pair.replace("`", "").split(" ", 1) for names, here, *_ in rows() if name in names for pair in here]
    assert len(dict(pairs)) == len(pairs), "a field stands in two rows"
    return dict(pairs)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.endswith("-debug")])
def test_the_page_names_what_departs_and_nothing_else(name: str) -> None:
    departs = {}
    for field, paper in fields_of(name).items():
        value = value_of(name, field)
        if value not in (paper if isinstance(paper, frozenset) else {paper}):
            departs[field] = shown(value)
    assert documented(name) == departs


def test_the_page_says_what_the_paper_has_and_where_the_log_tells_why() -> None:
    entries = set(re.findall(r"^\*\*(\d+)\. ", LOG.read_text(), re.MULTILINE))
    for names, here, paper, why, log in rows():
        for field in [pair.replace("`", "").split(" ", 1)[0] for pair in here]:
            said = fields_of(names[0])[field]
            if field != LAMBDA and not isinstance(said, frozenset):
                assert shown(said) in paper, (field, paper)
        assert why
        assert set(re.findall(r"\d+", log)) <= entries, log


@pytest.mark.parametrize("name", ["gridworld-paper", "ant-paper"])
def test_the_presets_of_the_paper_have_its_values(name: str) -> None:
    assert documented(name) == {}
    config = preset(name)
    assert config.discover.state_loss_weight == config.pretrain.state_loss_weight > 0
    assert replace(config.raw_action_rl, seed=0) == replace(config.internal_rl, seed=0)
