"""Episodes of the ant's length: acting step by step, in a batch whose rows end and begin anew, against sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metacontroller import MetaController, Transformer
from metacontroller.control import codes as codes_module
from metacontroller.control.switching import GateConfig

SLOTS = (((0, 500),), ((1, 200), (2, 300)), ((3, 120), (4, 380)))
"""Rows of the batch: which episodes each holds, one after the other, and how long they are."""
STATE, ACTION, WIDTH, CODE = 41, 8, 16, 3


def test_500_steps_with_new_episodes_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    body: Any = {"depth": 2, "kind": "hawk", "heads": 2, "mlp_dim": 16}
    readouts: Any = {
        "action_embed_readout": {"num_continuous": ACTION},
        "state_embed_readout": {"num_continuous": STATE},
    }
    model = Transformer(WIDTH, **readouts, lower_body=body, upper_body=body, condition_on_actions=False).double()
    steering = MetaController(
        WIDTH,
        dim_meta_controller=8,
        dim_latent=CODE,
        rank=None,
        gate=GateConfig(mode="hard"),
        embedder_kind="hawk",
        policy_kind="hawk",
    ).double()
    for name, parameter in steering.named_parameters():
        if name.startswith(("switching", "controller")):
            nn.init.normal_(parameter, std=0.5)
    lengths = torch.tensor([length for slot in SLOTS for _, length in slot])
    states = torch.randn(5, 500, STATE, dtype=torch.float64)
    codes = torch.randn(5, 500, CODE, dtype=torch.float64)
    monkeypatch.setattr(codes_module, "sample_gaussian", lambda *_, **__: codes)
    with torch.no_grad():
        output = steering.discover(model.residual(states, torch.zeros(5, 500, ACTION).double()), lengths)
        whole = model.action_readout(model.upper(output.steered))
        stepped, gates = _act(model, steering, states, codes)
    for episode, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(torch.stack(stepped[episode]), whole[episode, :length])
        assert torch.equal(torch.stack(gates[episode]), output.gate[episode, :length] >= 0.5)
    opened = output.gate[0].mean()
    assert 0.01 < float(opened) < 0.99  # it opens and shuts


def _act(model: Transformer, steering: MetaController, states: Tensor, codes: Tensor) -> tuple[Any, Any]:
    """Parameters of the actions and gates, step by step, of each episode."""
    queues = [list(slot) for slot in SLOTS]
    state = steering.initial_state(len(SLOTS))
    store: Any = model.cache_store(len(SLOTS))
    rows, steps = torch.arange(len(SLOTS)), [0] * len(SLOTS)
    parameters: Any = {episode: [] for episode in range(len(states))}
    gates: Any = {episode: [] for episode in range(len(states))}
    while any(queues):
        for slot, queue in enumerate(queues):
            if queue and steps[slot] == queue[0][1]:
                queue.pop(0)
                steps[slot] = 0
                store.restart(torch.tensor([slot]))
                for name, value in vars(steering.initial_state(1)).items():
                    getattr(state, name)[slot] = value[0]
        live = [slot for slot in range(len(SLOTS)) if queues[slot]]
        if not live:
            break
        at = [(queues[slot][0][0], steps[slot]) if queues[slot] else (0, 0) for slot in range(len(SLOTS))]
        seen = torch.stack([states[episode, step] for episode, step in at])[:, None]
        lower, upper = store.lower.take(rows), store.upper.take(rows)
        residual = model.lower(model.embed(seen, None), lower)[:, 0]
        beta, state = steering.observe(residual, state)
        switch = beta >= steering.gate_config.threshold
        state = steering.integrate(state, switch, torch.stack([codes[episode, step] for episode, step in at]))
        shown = model.action_readout(model.upper(steering.steer(residual, state.z)[:, None], upper))
        store.lower.put(rows, lower, rows, 1)
        store.upper.put(rows, upper, rows, 1)
        for slot in live:
            parameters[at[slot][0]].append(shown[slot, 0])
            gates[at[slot][0]].append(switch[slot])
            steps[slot] += 1
    return parameters, gates
