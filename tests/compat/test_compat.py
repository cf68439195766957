"""Another library's names over the house: its keywords and arguments do what they say, at two sizes and kinds."""

from __future__ import annotations

import itertools
import re
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metacontroller
from metacontroller.errors import UserError

theirs = import_module("metacontroller.metacontroller")
Binary = import_module("metacontroller.metacontroller_with_binary_mapper").MetaControllerWithBinaryMapper
BODY = {"depth": 1, "attn_dim_head": 4, "heads": 2}
STATE, ACTIONS = 3, 4
OWN: dict[str, Any] = {
    "dim": 8,
    "state_embed_readout": {"num_continuous": STATE},
    "action_embed_readout": {"num_discrete": ACTIONS},
    "lower_body": {"depth": 1, "heads": 2},
    "upper_body": {"depth": 1, "heads": 2},
}
THEIRS: dict[str, Any] = {"switch_temperature": 0.1}
FIRST_LINE = (
    "from metacontroller import ActionProposerWrapper, MetaController, Transformer, binary_entropy, "
    "MetaControllerWithBinaryMapper, TransformerForSymbolicGrid"
)


def make_model(width: int = 8, *, continuous: bool = False, **options: Any) -> Any:
    action = {"num_continuous": ACTIONS} if continuous else {"num_discrete": ACTIONS}
    settings = {"state_embed_readout": {"num_continuous": STATE}, "lower_body": BODY, "upper_body": BODY, **options}
    return theirs.Transformer(width, action_embed_readout=action, **settings)


def make_steering(width: int = 8, kind: Any = theirs.MetaController, **options: Any) -> Any:
    size = {"dim_code_bits": 3} if kind is Binary else {"dim_latent": 4}
    small = {"internal_sequence_embedder": BODY, "action_proposer": BODY, "hypernetwork_low_rank": 2}
    steering = kind(width, **{"dim_meta_controller": 8, **size, **small, **options})
    nn.init.normal_(steering.policy.readout.weight, std=0.5)  # no longer the prior
    return steering


def batch(steps: int = 6, *, continuous: bool = False, rows: int = 2) -> tuple[Tensor, Tensor]:
    actions = torch.randn(rows, steps, ACTIONS) if continuous else torch.randint(ACTIONS, (rows, steps))
    return torch.randn(rows, steps, STATE), actions


def play(model: Any, steering: Any, states: Tensor, **options: Any) -> tuple[list[Any], list[Tensor]]:
    """Acts one step at a time; the stored data and the logits."""
    cache, past, stored, logits = None, None, [], []
    for t in range(states.shape[1]):
        out, cache = model(
            states[:, t : t + 1], past, meta_controller=steering, cache=cache, return_cache=True, **options
        )
        past = model.action_readout.sample(out)
        stored.append(theirs.extract_grpo_data(steering, cache))
        logits.append(out)
    return stored, logits


@pytest.mark.parametrize(("width", "continuous", "kind"), [(8, False, "MetaController"), (16, True, "binary")])
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 3])])
def test_three_phases(width: int, continuous: bool, kind: str, lengths: Tensor | None, tmp_path: Any) -> None:
    model = make_model(width, continuous=continuous, dim_condition=5, normalize_state_action_losses=True)
    states, actions = batch(continuous=continuous)
    condition = torch.randn(2, 5)
    torch.stack(list(model(states, actions, condition=condition, episode_lens=lengths))).sum().backward()
    assert model.running_bc_action_loss is not None
    model.zero_grad()
    steering = make_steering(width, Binary if kind == "binary" else theirs.MetaController)
    losses = model(
        states, actions, condition=condition, episode_lens=lengths, meta_controller=steering, discovery_phase=True
    )
    (losses.action_recon + losses.kl + losses.ratio).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in steering.encoder.parameters())
    stored, _ = play(model, steering, states, condition=condition)
    state, code, log_prob, beta = (torch.cat(values, 1).detach() for values in zip(*stored, strict=True))
    fields = steering.replay_buffer_field_dict
    assert fields["log_probs"] == ("float", log_prob.shape[-1])
    assert fields["latent_actions"] == ("float", code.shape[-1])
    torch.testing.assert_close(steering.log_prob(steering.get_action_dist_for_internal_rl(state), code), log_prob)
    steering.zero_grad()
    loss = steering.policy_loss(state, log_prob, code, torch.tensor([1.0, -1.0]), beta == 1.0, episode_lens=lengths)
    loss.backward()
    assert float(steering.policy.readout.weight.grad.abs().sum()) > 0
    steering.save(tmp_path / "steering.safetensors")
    again = type(steering).init_and_load(tmp_path / "steering.safetensors")
    torch.testing.assert_close(again.state_dict(), steering.state_dict())
    model.save(tmp_path / "model.safetensors")
    again = theirs.Transformer.init_and_load(tmp_path / "model.safetensors")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("continuous", [False, True])
def test_a_prompt_of_any_length_equals_its_steps(continuous: bool) -> None:
    model, steering = make_model(continuous=continuous).double(), make_steering().double()
    states, actions = batch(continuous=continuous)
    states = states.double()
    actions = actions.double() if continuous else actions
    for options in (
        {"force_behavior_cloning": True},
        {"meta_controller": steering, "meta_controller_temperature": 0.0},
    ):
        whole, _ = model(states, actions[:, :-1], return_action_cache=True, **options)
        first, cache = model(states[:, :3], actions[:, :2], return_action_cache=True, **options)
        parts = [first]
        for t in range(3, 6):
            out, cache = model(states[:, t : t + 1], actions[:, t - 1 : t], cache=cache, return_cache=True, **options)
            parts.append(out)
        assert cache.cache_steps == 6
        torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_what_a_call_returns() -> None:
    model, steering = make_model(), make_steering()
    states, actions = batch()
    losses, logits, residual = model(states, actions, return_action_logits=True, return_residual_stream=True)
    torch.testing.assert_close(model.action_readout(model.upper(residual)), logits)
    cloned = model(states, actions, force_behavior_cloning=True, meta_controller=steering)
    torch.testing.assert_close(cloned, losses)
    embedded = model(states, actions, return_embed=True)
    torch.testing.assert_close(model.lower(embedded), residual)
    torch.testing.assert_close(model(states, actions[:, :-1], return_raw_action_dist=True), logits)
    shifted = {"meta_controller": steering, "control_signal_multiplier": 0.0}
    unsteered, left = model(states, actions[:, :-1], return_action_cache=True, **shifted)
    torch.testing.assert_close(unsteered, logits)
    torch.testing.assert_close(left.residual_stream_latent, residual)
    discovered, output = model(states, actions, discovery_phase=True, return_meta_controller_output=True, **shifted)
    torch.testing.assert_close(discovered.action_recon, losses.action)
    torch.testing.assert_close((discovered.kl, discovered.ratio), (output.kl_loss, output.ratio_loss))
    assert discovered.state_pred.item() == 0
    model.discovery_phase_state_clone_loss = True
    torch.testing.assert_close(model(states, actions, discovery_phase=True, **shifted).state_pred, losses.state)


def test_given_and_regular_switches_reach_the_gate() -> None:
    model, steering = make_model(), make_steering()
    states, actions = batch(8)
    regular = theirs.MetaController.create_regular_switch_beta(2, 8, 4)
    assert regular.tolist() == [[0, 0, 0, 1, 0, 0, 0, 1]] * 2
    for options in ({"ablate_switch_beta": regular}, {"switch_beta_frequency": 4}):
        _, output = model(
            states,
            actions,
            meta_controller=steering,
            discovery_phase=True,
            return_meta_controller_output=True,
            **options,
        )
        torch.testing.assert_close(output.switch_beta, regular)
    stored, _ = play(model, steering, states, switch_beta_frequency=4)
    torch.testing.assert_close(torch.cat([step.switch_beta for step in stored], 1), regular)
    _, soft = model(states, meta_controller=steering, return_cache=True, hard_switch=False)
    assert 0 < soft.prev_hiddens.meta_controller.switch_beta[:, 1:].min().item() < 1


def test_training_one_phase_freezes_the_rest() -> None:
    model, steering = make_model(), make_steering()
    states, actions = batch()
    model.train_discovery(eval_rest=True, meta_controller=steering)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = {id(p) for p in steering.parameters() if p.requires_grad}
    assert trained == {id(p) for p in steering.discovery_parameters()}
    torch.stack(list(model(states, actions, meta_controller=steering, discovery_phase=True))).sum().backward()
    assert all(parameter.grad is None for parameter in [*model.parameters(), *steering.policy.parameters()])
    split = [*steering.discovery_parameters_non_switching(), *steering.discovery_parameters_switching_unit()]
    assert {id(p) for p in split} == trained
    steering.zero_grad()
    model.train_internal_rl(eval_rest=True, meta_controller=steering)
    assert steering.policy.training
    assert not steering.switching.training
    stored, _ = play(model, steering, states)
    state, code, log_prob, _ = (torch.cat(values, 1).detach() for values in zip(*stored, strict=True))
    steering.policy_loss(state, log_prob, code, torch.tensor([1.0, -1.0])).backward()  # every step counts
    assert {id(p) for p in steering.parameters() if p.grad is not None} <= {
        id(p) for p in steering.internal_rl_parameters()
    }


def test_training_mode_undoes_what_a_phase_froze() -> None:
    model, steering = make_model(), make_steering()
    states, actions = batch()
    model.meta_controller, (kept, *_) = steering, model.encoder.parameters()
    kept.requires_grad_(False)  # the user's own wish
    for freeze in (model.train_discovery, model.train_internal_rl):
        freeze(eval_rest=True)
        freeze()
        assert not any(parameter.requires_grad for parameter in model.upper_body.parameters())
        model.train()
        assert [name for name, value in model.named_parameters() if not value.requires_grad] == [
            "encoder.linear.weight"
        ]
        model.zero_grad()
        torch.stack(list(model(states, actions, force_behavior_cloning=True))).sum().backward()
        assert all(parameter.grad is not None for parameter in model.lower_body.parameters())
    steering.train_internal_rl()
    assert not steering.eval().controller.read.requires_grad  # modes of evaluation leave it
    assert steering.train().controller.read.requires_grad


def test_the_entropy_of_a_gate_that_is_open_at_first_has_a_gradient() -> None:
    model, steering = make_model(), make_steering()
    _, output = model(*batch(), meta_controller=steering, discovery_phase=True, return_meta_controller_output=True)
    assert output.switch_beta[:, 0].tolist() == [1, 1]
    theirs.binary_entropy(output.switch_beta).mean().backward()
    found = [value.grad for value in steering.switching.parameters()]
    assert all(bool(value.isfinite().all()) for value in found)
    assert any(bool(value.any()) for value in found)


@pytest.mark.parametrize("steered", [False, True])
def test_a_cache_serves_once(steered: bool) -> None:
    model, (states, _) = make_model(), batch()
    options = {"return_cache": True, **({"meta_controller": make_steering()} if steered else {})}
    _, cache = model(states[:, :1], **options)
    _, following = model(states[:, 1:2], cache=cache, **options)
    with pytest.raises(UserError, match="cache of step 1 was continued before, up to step 2"):
        model(states[:, 2:3], cache=cache, **options)
    model(states[:, 2:3], cache=following, **options)


def test_the_output_of_a_metacontroller_serves_once() -> None:
    steering, residual = make_steering(), torch.randn(2, 3, 8)
    _, output = steering(residual[:, :1])
    steering(residual[:, 1:2], cache=output)
    with pytest.raises(UserError, match="continued before"):
        steering(residual[:, 2:], cache=output)


def test_a_condition_for_a_model_that_reads_none_is_refused() -> None:
    states, actions = batch()
    for body in (BODY, {"kind": "hawk", "depth": 1, "heads": 2}):
        with pytest.raises(UserError, match=r"condition of shape \(2, 5\) is given, but .* without dim_condition"):
            make_model(lower_body=body, upper_body=body)(states, actions, condition=torch.randn(2, 5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: metacontroller.Transformer(**{**OWN, "embed_past_actions": False}),
        lambda: metacontroller.Transformer(**{**OWN, "lower_body": BODY}),
        lambda: metacontroller.Transformer(**OWN)(*batch(), force_behavior_cloning=True),
        lambda: metacontroller.MetaController(8, **THEIRS),
    ],
)
def test_their_keywords_to_our_classes_are_told_where_theirs_are(call: Any) -> None:
    with pytest.raises(UserError, match=r"metacontroller\.metacontroller here; .*sed -i") as refused:
        call()
    command = str(refused.value).split("sed -i ")[1].split("'")[1]
    changed = re.sub(command.split("/")[1], command.split("/")[2], FIRST_LINE)
    names: dict[str, Any] = {}
    exec(changed, names)
    assert names["Transformer"] is theirs.Transformer
    assert names["MetaControllerWithBinaryMapper"] is Binary


def test_unknown_keywords_are_still_pythons() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        metacontroller.Transformer(**{**OWN, "nonsense": 1})


def test_lengths_beyond_the_padding_are_clamped_with_a_warning() -> None:
    model, (states, actions) = make_model(), batch()
    with pytest.warns(UserWarning, match="64, beyond the 6 steps"):
        clamped = model(states, actions, episode_lens=torch.tensor([64, 64]))
    torch.testing.assert_close(clamped, model(states, actions))


def test_weights_of_losses_change_with_updates() -> None:
    weights = {"kl_loss_weight": 0.2, "kl_loss_warmup_steps": 10}
    steering = make_steering(**weights, ratio_loss_final_weight=0.0, ratio_loss_warmdown_steps=5)
    model, (states, actions) = make_model(meta_controller=steering), batch()
    seen = []
    for _ in range(3):
        _, output = model(states, actions, discovery_phase=True, return_meta_controller_output=True)
        seen.append((output.kl_loss_weight, model.meta_controller_current_kl_loss_weight))
        for _ in range(5):
            model.meta_controller_maybe_increment_kl_loss_step()
    assert seen == [(0.0, 0.0), (0.1, 0.1), (0.2, 0.2)]
    assert output.ratio_loss.item() == 0
    model.meta_controller_reset_kl_loss_warmup()
    assert model.meta_controller_current_kl_loss_weight == 0
    assert model.meta_controller_kl_loss_weight == 0.2
    plain = make_steering(**weights, apply_kl_loss_weight=False)
    assert plain(torch.randn(1, 3, 8), discovery_phase=True)[1].kl_loss_weight == 1.0


def test_parts_can_be_replaced_and_discovery_goes_on_from_a_cache() -> None:
    steering = make_steering().eval()

    class Same(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x

    steering.internal_sequence_embedder = Same()
    steering.emitter = nn.Linear(8 + 8 + 32, 16)
    residual, parts, cache = torch.randn(1, 5, 8), [], None
    torch.manual_seed(1)
    _, whole = steering(residual, discovery_phase=True, temperature=0.0)
    for t in range(5):
        _, cache = steering(residual[:, t : t + 1], cache=cache, discovery_phase=True, temperature=0.0)
        parts.append(cache.switch_beta)
    torch.testing.assert_close(torch.cat(parts, 1), whole.switch_beta)


def test_modules_are_taken_as_bodies_and_proposers() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 8, batch_first=True)

        def forward(self, x: Tensor, cache: Any = None, return_hiddens: bool = False) -> tuple[Tensor, Any]:
            return self.gru(x, cache)

    proposer = theirs.ActionProposerWrapper(Wrapped())
    attention = import_module("metacontroller.models.attention").AttentionBody(8, depth=1, heads=2)
    model, steering = make_model(lower_body=attention, upper_body=BODY), make_steering(action_proposer=proposer)
    stored, _ = play(model, steering, batch()[0])
    state, code, log_prob, _ = (torch.cat(values, 1) for values in zip(*stored, strict=True))
    torch.testing.assert_close(steering.log_prob(steering.get_action_dist_for_internal_rl(state), code), log_prob)
    for module in (model, steering):
        with pytest.raises(UserError, match="handed modules"):
            module.save("unused")


@pytest.mark.parametrize("sizes", [5, [5, 3]])
def test_states_may_be_choices(sizes: Any) -> None:
    model = make_model(state_embed_readout={"num_discrete": sizes})
    states = torch.randint(3, (2, 6) if isinstance(sizes, int) else (2, 6, 2))
    state_loss, action_loss = model(states, batch()[1])
    (state_loss + action_loss).backward()
    assert model.state_readout.linear.weight.grad is not None


def test_symbolic_grids_and_the_top_level_names() -> None:
    for name in ("TransformerForSymbolicGrid", "ActionProposerWrapper", "MetaControllerWithBinaryMapper"):
        assert getattr(metacontroller, name).__name__ == name
    model = metacontroller.TransformerForSymbolicGrid(
        8,
        num_discrete=(4, 3),
        grid_size=3,
        spatial_processor_depth=1,
        action_embed_readout={"num_discrete": ACTIONS},
        lower_body=BODY,
        upper_body=BODY,
        meta_controller=metacontroller.MetaController(8, dim_meta_controller=8, dim_latent=2, rank=2),
    )
    states, actions = torch.randint(3, (2, 5, 3, 3, 2)), torch.randint(ACTIONS, (2, 5))
    losses = model(states, actions, discovery_phase=True)
    (losses.state_pred + losses.action_recon).backward()
    torch.stack(list(model(states, actions, force_behavior_cloning=True))).sum().backward()


def test_wrong_calls_are_named() -> None:
    model, (states, actions) = make_model(), batch()
    for options, message in (
        ({"discovery_phase": True}, "meta_controller is missing"),
        ({"discovery_phase": True, "force_behavior_cloning": True}, "choose one"),
    ):
        with pytest.raises(UserError, match=message):
            model(states, actions, **options)
    with pytest.raises(UserError, match="one step"):
        model(states[:, :1])
    with pytest.raises(UserError, match="actions are missing"):
        model(states)
    with pytest.raises(UserError, match="'rotary'"):
        make_model(lower_body={**BODY, "rotary": True})


def test_the_gru_unit_equals_torchs_gru_step_by_step() -> None:
    module = import_module("metacontroller.sequential_action_selection")
    gru, to_beta = nn.GRU(3 + 2 + 4, 5, batch_first=True).double(), nn.Linear(5, 1, bias=False).double()
    shapes = (2, 7, 3), (2, 7, 2), (2, 7, 4), (1, 2, 5), (2, 1, 4)
    residual, embedded, proposed, hidden, latent = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    proposed.requires_grad_()
    for hard, passes in itertools.product((False, True), repeat=2):
        out = module.perform_sequential_action_selection(
            gru, to_beta, residual, embedded, proposed, hidden, latent, 0.5, hard, passes
        )
        h, z, codes, gates = hidden, latent[:, 0], [], []
        for t in range(7):
            _, h = gru(torch.cat([residual[:, t], embedded[:, t], z], -1)[:, None], h)
            beta = torch.sigmoid(to_beta(h[0])[:, 0] / 0.5) if t else torch.ones(2, dtype=torch.float64)
            switch = (beta > 0.5).double()
            beta = switch + (beta - beta.detach() if passes else 0) if hard else beta
            z = beta[:, None] * proposed[:, t] + (1 - beta[:, None]) * z
            codes.append(z)
            gates.append(beta)
        expected = torch.stack(gates, 1), torch.stack(codes, 1), h
        torch.testing.assert_close(tuple(out), expected)
        weights = [proposed, *gru.parameters()]
        fast, slow = (torch.autograd.grad(v.square().sum(), weights, allow_unused=True) for v in (out[1], expected[1]))
        torch.testing.assert_close([g for g in fast if g is not None], [g for g in slow if g is not None])
