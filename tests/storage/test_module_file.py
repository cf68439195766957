"""Saving: modules come back as they were, with the arguments that made them; files that do not fit are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from metacontroller import MetaController, Transformer
from metacontroller.control.switching import GateConfig
from metacontroller.storage import tensor_file as saving

SIZES: dict[str, Any] = {"lower_body": {"depth": 1}, "upper_body": {"depth": 1, "heads": 2, "mlp_dim": 10}}


def make_model(**options: Any) -> Transformer:
    defaults: dict[str, Any] = {
        "action_embed_readout": {"num_discrete": 4},
        "state_embed_readout": {"num_continuous": 5},
    }
    return Transformer(8, **(defaults | SIZES | options))


def make_steering(**options: Any) -> MetaController:
    return MetaController(8, dim_meta_controller=8, dim_latent=3, rank=2, **options)


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"action_embed_readout": {"num_continuous": 2}, "condition_on_actions": False},
        {"state_embed_readout": {"grid": {"size": 4, "num_colors": 2, "num_walls": 1, "view": "egocentric"}}},
    ],
    ids=["vector", "continuous", "grid"],
)
def test_a_model_comes_back_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**options)
    model.save(tmp_path / "model")
    again = Transformer.init_and_load(tmp_path / "model")
    assert again.arguments == model.arguments
    assert again.condition_on_actions == model.condition_on_actions
    assert_same_weights(again, model)
    other = make_model(**options)
    other.load(str(tmp_path / "model"))
    assert_same_weights(other, model)


@pytest.mark.parametrize("gate", [None, {"mode": "hard", "threshold": 0.3}, GateConfig(mode="forced")])
def test_a_metacontroller_comes_back_as_it_was(gate: Any, tmp_path: Path) -> None:
    steering = make_steering(gate=gate, ratio_loss_weight=0.5, eps_clip=0.1)
    steering.save(tmp_path / "steering")
    again = MetaController.init_and_load(tmp_path / "steering")
    assert again.arguments == steering.arguments
    assert again.gate_config == steering.gate_config
    assert (again.ratio_loss_weight, again.eps_clip) == (0.5, 0.1)
    assert_same_weights(again, steering)


def test_arguments_are_the_constructors_and_no_later_change_reaches_them() -> None:
    body = {"depth": 1}
    model = make_model(lower_body=body)
    body["depth"] = 5
    assert set(model.arguments) == {
        "dim",
        "action_embed_readout",
        "state_embed_readout",
        "lower_body",
        "upper_body",
        "condition_on_actions",
        "precision",
    }
    assert model.arguments["lower_body"] == {"depth": 1}
    assert make_model(**{name: value for name, value in model.arguments.items() if name != "dim"}).dim == 8


def test_an_attached_metacontroller_is_not_part_of_the_model(tmp_path: Path) -> None:
    model = make_model()
    model.meta_controller = make_steering()
    model.save(tmp_path / "model")
    plain = Transformer.init_and_load(tmp_path / "model")
    assert plain.meta_controller is None
    model.meta_controller = None
    assert_same_weights(plain, model)
    other, steering = make_model(), make_steering()
    before = {name: value.clone() for name, value in steering.state_dict().items()}
    other.meta_controller = steering
    other.load(tmp_path / "model")
    torch.testing.assert_close(before, dict(steering.state_dict()), rtol=0, atol=0)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_equal_modules_give_equal_files(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "first")
    Transformer.init_and_load(tmp_path / "first").save(tmp_path / "second")
    make_model().save(tmp_path / "other")
    first, second, other = ((tmp_path / name).read_bytes() for name in ("first", "second", "other"))
    assert first == second != other
    with safe_open(tmp_path / "first", framework="pt") as file:
        assert len(file.metadata()) == 1  # several would come in no order of theirs


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.save(tmp_path / "model")

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        make_model().save(tmp_path / "model")
    assert_same_weights(Transformer.init_and_load(tmp_path / "model"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_processes_that_save_at_once_do_not_share_a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[Path] = []

    def watch(tensors: Any, path: Path, metadata: Any) -> None:
        drafts.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(saving, "save_file", watch)
    for _ in range(2):
        make_model().save(tmp_path / "model")
    assert drafts[0] != drafts[1]
    assert {draft.parent.parent for draft in drafts} == {tmp_path}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refusal(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            make_model().load(tmp_path / name)
        assert "\n" not in str(caught.value)

    refusal("missing", "does not exist")
    (tmp_path / "torn").write_bytes(b"half a file")
    refusal("torn", "not a complete safetensors file")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign")
    refusal("foreign", "was not written by this library")
    make_steering().save(tmp_path / "steering")
    refusal("steering", "holds a 'MetaController'")
    make_model(upper_body={"depth": 2, "heads": 2, "mlp_dim": 10}).save(tmp_path / "deeper")
    refusal("deeper", "names, shapes or types differ, such as 'upper_body.blocks.1")
    make_model(state_embed_readout={"num_continuous": 6}).save(tmp_path / "wider")
    refusal("wider", "names, shapes or types differ, such as 'encoder.linear.weight'")


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    make_model(state_embed_readout={"num_continuous": 6}).save(tmp_path / "wider")
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match="shapes or types differ"):
            model.load(tmp_path / "wider", strict=strict)
    torch.testing.assert_close(before, dict(model.state_dict()), rtol=0, atol=0)


def test_loading_by_name_alone_takes_what_fits(tmp_path: Path) -> None:
    deeper = make_model(upper_body={"depth": 2, "heads": 2, "mlp_dim": 10})
    deeper.save(tmp_path / "deeper")
    model = make_model()
    model.load(tmp_path / "deeper", strict=False)
    kept, loaded = deeper.state_dict(), model.state_dict()
    assert set(kept) - set(loaded) == {name for name in kept if name.startswith("upper_body.blocks.1.")}
    assert all(torch.equal(kept[name], value) for name, value in loaded.items())


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    with safe_open(tmp_path / "model", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "spoilt", metadata=metadata)
    for load in (Transformer.init_and_load, model.load):
        with pytest.raises(ValueError, match=r"spoilt holds NaN or infinite values in 'norm\.weight'"):
            load(tmp_path / "spoilt")
    with torch.no_grad():
        model.norm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"norm\.weight of this Transformer is not finite"):
        model.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()
