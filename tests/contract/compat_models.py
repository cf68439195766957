"""Small models under the names of `metacontroller-pytorch`, for the tests beside this."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

theirs = import_module("metacontroller.metacontroller")
Binary = import_module("metacontroller.metacontroller_with_binary_mapper").MetaControllerWithBinaryMapper

BODY = {"depth": 1, "attn_dim_head": 4, "heads": 2}
STEPS, STATE, ACTIONS, CONDITION = 6, 3, 4, 5


def make_model(width: int, continuous: bool, device: str, **options: Any) -> Any:
    torch.manual_seed(0)
    action = {"num_continuous": ACTIONS} if continuous else {"num_discrete": ACTIONS}
    settings = {"state_embed_readout": {"num_continuous": STATE}, "lower_body": BODY, "upper_body": BODY, **options}
    return theirs.Transformer(width, action_embed_readout=action, **settings).to(device)


def make_steering(width: int, device: str, kind: Any = theirs.MetaController, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"dim_code_bits": 3} if kind is Binary else {"dim_latent": 4}
    parts = {"internal_sequence_embedder": BODY, "action_proposer": BODY, "hypernetwork_low_rank": 2}
    steering = kind(width, **{"dim_meta_controller": 8, **size, **parts, **options}).to(device)
    nn.init.normal_(steering.policy.readout.weight, std=0.5)  # no longer the prior
    return steering
