"""The study: each variant changes what its name says, everything leaves its numbers, failures do not stop the rest."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metacontroller.cli import main
from metacontroller.models.transformer import Transformer
from metacontroller.presets import ant
from metacontroller.presets.gridworld import STUDIES, debug, laptop, paper
from metacontroller.recipes.config import to_json
from metacontroller.recipes.study import StudyJob, analysis_config, possible_analyses, study
from metacontroller.recipes.study_runs import StudyConfig, study_runs
from metacontroller.storage.run_folder import RunFolder

COMMAND = ["figures", "--preset", "debug", "--seeds", "0", "--workers", "1", "--quiet", "--device", "cpu"]
COMMAND += ["--config.discover.symmetry-augmentation"]  # so that there are controls
CONFIG = dataclasses.replace(debug(), discover=dataclasses.replace(debug().discover, symmetry_augmentation=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of one seed of `CONFIG`, in this process."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert main([*COMMAND, "--out", str(out)]) == 0
    return out


def differences(left: Any, right: Any, where: str = "") -> set[str]:
    """The fields in which two configs differ."""
    if not dataclasses.is_dataclass(left):
        return set() if left == right else {where}
    names = [field.name for field in dataclasses.fields(left)]
    return set().union(*(differences(getattr(left, n), getattr(right, n), f"{where}.{n}".strip(".")) for n in names))


def test_a_variant_changes_what_its_name_says() -> None:
    config, named = laptop(), study_runs(laptop(), StudyConfig())
    found = {name: differences(config, variant.config) for name, variant in named.items()}
    assert found["compile"] == {"discovery"}
    assert found["forced-switching"] == {"meta_controller.gate.mode"}
    along = {"discover.train_model", "discover.optimizer.lr"}
    assert found["cotrained-from-pretrained"] == along
    assert found["cotrained-from-scratch"] == along  # discovery is the longer of the two phases
    short = {"discover.optimizer.steps", "discover.optimizer.decay_steps"}
    assert found["rate-frozen-0.1"] == short | {"discover.alpha", "meta_controller.gate.mode"}
    assert found["rate-cotrained-0.1"] == found["rate-frozen-0.1"] | along
    short |= {"discover.alpha_warmup"}
    assert found["pretraining-steps-500"] == short | {"internal_rl.episodes"}
    own = short | {"internal_rl.episodes", "pretrain.snapshots", "pretrain.optimizer.steps"}
    assert found["weight-decay-0"] == own | {"pretrain.optimizer.weight_decay"}
    assert found["state-loss-0.01"] == own | {"pretrain.state_loss_weight"}
    assert found["epsilon-0.1"] == own | {"domain.epsilon"}
    assert found["unaugmented-frozen"] == {"discover.symmetry_augmentation"}
    for name in ("cotrained-from-pretrained", "cotrained-from-scratch"):
        assert found[f"unaugmented-{name}"] == found[name] | {"discover.symmetry_augmentation"}
    starts = {name: variant.start for name, variant in named.items()}
    assert starts["cotrained-from-scratch"] == "new"
    assert starts["pretraining-steps-500"] == 500
    assert starts["epsilon-0.1"] == "pretrain"
    assert starts["unaugmented-cotrained-from-scratch"] == "new"
    assert starts["compile"] == starts["forced-switching"] == starts["rate-cotrained-0.1"] == "base"


def test_where_eq_3_has_a_lambda_it_is_that_of_each_variants_model() -> None:
    named = study_runs(paper(), STUDIES["paper"])
    for weight in (0.0, 0.1):
        config = named[f"state-loss-{weight:g}"].config
        assert config.pretrain.state_loss_weight == config.discover.state_loss_weight == weight
    assert named["weight-decay-0.1"].config.discover.state_loss_weight == 0.01
    assert named["rate-frozen-0.1"].config.discover.state_loss_weight == 0.01


def test_baselines_have_the_alphas_that_were_searched_for_them() -> None:
    config, plain = laptop(), study_runs(laptop(), StudyConfig())
    own = study_runs(config, StudyConfig(forced_alpha=0.5, cotrained_alpha=0.25))
    found = {name: differences(plain[name].config, variant.config) for name, variant in own.items()}
    changed = {name for name, fields in found.items() if fields == {"discover.alpha"}}
    assert changed == {name for name in own if "cotrained-from" in name} | {"forced-switching"}
    assert not any(found[name] for name in own if name not in changed)
    assert own["forced-switching"].config.discover.alpha == 0.5
    assert own["cotrained-from-scratch"].config.discover.alpha == 0.25


def test_the_variants_of_every_preset_can_be_made() -> None:
    for preset, config in (("debug", debug()), ("laptop", laptop())):
        settings = STUDIES[preset]
        assert set(settings.snapshots) <= set(config.pretrain.snapshots)
        assert settings.pretraining_steps in settings.snapshots  # else there is nothing to compare with
        pretraining = (settings.snapshots, settings.weight_decays, settings.state_loss_weights, settings.epsilons)
        controls = 3 if config.discover.symmetry_augmentation else 0
        expected = 4 + 2 * len(settings.alphas) + sum(map(len, pretraining)) + controls
        assert len(study_runs(config, settings)) == expected


def test_a_guided_start_keeps_its_share_and_compile_has_gaussian_codes() -> None:
    config = ant.laptop()
    named = study_runs(config, StudyConfig(discovery_steps=500, rate_steps=1000))
    assert config.discover.guided_updates == 0.8 * config.discover.optimizer.steps
    assert {variant.config.discover.guided_updates for variant in named.values()} == {400, 800, 1200}
    codes = named["compile"].config.meta_controller
    assert (config.meta_controller.code, config.meta_controller.dim_latent) == ("binary", 2)
    assert (codes.code, codes.dim_latent) == ("gaussian", 4)


def test_a_world_without_randomness_of_its_experts_has_no_variants_of_it() -> None:
    @dataclasses.dataclass(frozen=True)
    class Calm:
        pass

    named = study_runs(dataclasses.replace(laptop(), domain=Calm()), StudyConfig())
    assert set(study_runs(laptop(), StudyConfig())) - set(named) == {"epsilon-0.1"}


def test_there_are_no_variants_of_snapshots_that_are_not_kept() -> None:
    forgetful = dataclasses.replace(laptop(), pretrain=dataclasses.replace(laptop().pretrain, snapshots=(500,)))
    assert set(study_runs(laptop(), StudyConfig())) - set(study_runs(forgetful, StudyConfig())) == {
        "pretraining-steps-1000"
    }


def test_an_analysis_takes_from_the_study_what_begins_with_its_command() -> None:
    study_config = dataclasses.replace(StudyConfig(), probe_steps=7, gate_episodes=9, oracle_episodes=5)
    assert analysis_config("probes", study_config).steps == 7
    assert analysis_config("gate", study_config).episodes == 9
    assert analysis_config("oracle", study_config).episodes == 5
    assert analysis_config("episodes", study_config).episodes == 8


def test_all_analyses_are_done_in_a_world_with_labels() -> None:
    assert set(possible_analyses(debug())) >= {"episodes", "gate", "injection", "probes", "steering"}


@pytest.mark.slow
def test_everything_leaves_its_numbers(whole: Path) -> None:
    rows = RunFolder(whole / "study").read_summary()["jobs"]
    assert {row["status"] for row in rows} == {"finished"}
    named = study_runs(CONFIG, STUDIES["debug"])
    assert [row["name"] for row in rows] == ["run", *list(named)[:4], "analyses", *list(named)[4:]]
    for row in [row for row in rows if row["name"] in named]:
        assert row["rate"] >= 0
        assert row["distortion"] > 0
        assert 0 <= row["gate_recall"] <= 1
        assert ("internal_rl_success" in row) == named[row["name"]].reinforces
    gate = RunFolder(whole / "seed-0").read_analysis("gate")
    assert gate["tolerance"] == [0, 1, 2]
    assert gate["recall"] == sorted(gate["recall"])
    assert sum(gate["elsewhere"]) == pytest.approx(1)
    drawn = {path.stem for path in (whole / "figures").iterdir()}
    assert drawn >= {"success", "baselines", "rate_distortion", "pretraining", "gate_histogram", "injection"}
    assert drawn >= {"probes", "steering"}
    page = html.unescape((whole / "report.html").read_text())
    assert "<td>not measured</td>" not in page
    assert page.count("embedder as the paper's: internal RL on it") == 3
    assert page.count("<figure><svg") == 10 + 4


@pytest.mark.slow
def test_each_variant_starts_where_it_should(whole: Path) -> None:
    base = (whole / "seed-0" / "base_model.safetensors").read_bytes()
    snapshot = (whole / "seed-0" / "snapshots" / "base_model-4.safetensors").read_bytes()

    def started(name: str) -> bytes:
        return (StudyJob(name, 0).run(whole).path / "base_model.safetensors").read_bytes()

    assert started("compile") == started("forced-switching") == started("cotrained-from-pretrained") == base
    assert started("pretraining-steps-4") == snapshot != base
    assert not (StudyJob("cotrained-from-scratch", 0).run(whole).path / "base_model.safetensors").exists()
    own = Transformer.init_and_load(StudyJob("weight-decay-0.1", 0).run(whole).path / "base_model.safetensors")
    kept = Transformer.init_and_load(whole / "seed-0" / "snapshots" / "base_model-4.safetensors")
    table, decayed = kept.state_dict()["encoder.table"], own.state_dict()["encoder.table"]
    assert not torch.equal(table, decayed)
    torch.testing.assert_close(table, decayed, rtol=0.01, atol=1e-3)  # the same start, data and number of updates


@pytest.mark.slow
def test_a_second_call_changes_nothing(whole: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    before = RunFolder(whole / "study").read_summary()
    assert main([*COMMAND, "--out", str(whole)]) == 0
    assert RunFolder(whole / "study").read_summary() == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == files


@pytest.mark.slow
def test_other_settings_are_refused(whole: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*COMMAND, "--out", str(whole), "--study.inject-walks", "5"]) == 2
    assert "was started with other settings" in capsys.readouterr().err
    assert json.loads((whole / "study" / "config.json").read_text())["inject_walks"] == STUDIES["debug"].inject_walks


@pytest.mark.slow
def test_a_failed_job_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    config = dataclasses.replace(debug(), evaluate=dataclasses.replace(debug().evaluate, episodes=16))
    RunFolder(tmp_path).write_config(to_json(config))
    broken = StudyJob("compile", 0).run(tmp_path).path
    broken.mkdir(parents=True)
    (broken / "discover.safetensors").write_bytes(b"torn")
    settings = dataclasses.replace(STUDIES["debug"], alphas=(), snapshots=(), weight_decays=(), state_loss_weights=())
    found = study(settings, tmp_path, [0], quiet=True)
    status = {row["name"]: row["status"] for row in found["jobs"]}
    failed = "failed in study/compile/seed-0: metacontroller.errors.UserError: "
    assert status.pop("compile").startswith(failed)
    assert set(status.values()) == {"finished"}
    (broken / "discover.safetensors").unlink()
    rows = study(settings, tmp_path, [0], quiet=True)["jobs"]
    assert {row["status"] for row in rows} == {"finished"}
    assert not (broken / "error.txt").exists()


@pytest.mark.slow
def test_a_study_cut_short_has_the_numbers_of_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path).write_config(to_json(debug()))
    work = StudyJob.work

    def work_until(job: StudyJob, *rest: Any) -> None:
        if job.what == "forced-switching":
            raise KeyboardInterrupt
        work(job, *rest)

    monkeypatch.setattr(StudyJob, "work", work_until)
    with pytest.raises(KeyboardInterrupt):
        study(STUDIES["debug"], tmp_path, [0], quiet=True)
    rows = RunFolder(tmp_path / "study").read_summary()["jobs"]
    assert [row["status"] for row in rows] == ["finished", "finished", *["not run"] * (len(rows) - 2)]
    assert rows[1]["name"] == "compile"
    assert rows[1]["rate"] >= 0


def test_without_a_base_model_nothing_is_built_on_it(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(to_json(debug()))
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "pretrain.safetensors").write_bytes(b"torn")
    settings = dataclasses.replace(STUDIES["debug"], alphas=(), snapshots=(), weight_decays=(), state_loss_weights=())
    rows = study(settings, tmp_path, [0], quiet=True)["jobs"]
    failed = rows[0]["status"]
    assert failed.startswith("failed in seed-0: metacontroller.errors.UserError: ")
    assert {row["status"] for row in rows[1:]} == {f"not run: {failed}"}
    assert StudyJob("compile", 0).run(tmp_path).path == tmp_path / "study" / "compile" / "seed-0"
