"""Speed and memory of a variant: one step of what it learns, ours beside metacontroller-pytorch 0.3.3 if asked.

Every variant is written once, in names that both libraries take, so both run the same lines of this file. A step is
forward, backward and AdamW over a batch of episodes. A measurement is a process of its own, ours and the peer's in
turn: medians over steps. Memory is the highest resident memory during the steps, less what was resident before the
first one.
Prints JSON, with ratios ours / peer's of both where there is a peer.

    python benchmarks/variants.py VARIANT ... [--peer PYTHON] [--width 256] [--batch 64] [--length 32] [--steps 5]

PYTHON: an interpreter that has metacontroller-pytorch. VARIANT: all of them if none is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The peer's interpreter runs this file too, with the peer as `metacontroller`: no import of ours up here.

STATE, ACTIONS, SIDE, WARM_UPS = 16, 4, 7, 2
PIXELS = 24  # the peer's decoder fits images of 32 k - 8 pixels alone
SOURCE = Path(__file__).parents[1] / "src"


class Size(NamedTuple):
    """Of what is measured: width n_e, episodes of a batch, steps of an episode."""

    width: int
    batch: int
    length: int


class Case(NamedTuple):
    """What learns, and its loss of a batch."""

    learner: nn.Module
    loss: Callable[[], Tensor]


def module(name: str) -> Any:
    """A module of whichever library is installed."""
    return importlib.import_module(f"metacontroller.{name}")


def body(size: Size) -> dict[str, Any]:
    return {"depth": 2, "heads": 4, "attn_dim_head": size.width // 4}


def base(size: Size, **options: Any) -> Any:
    """An action model over vectors."""
    settings = {"state_embed_readout": {"num_continuous": STATE}, "next_latent_loss_weight": 0.0, **options}
    bodies = {"lower_body": body(size), "upper_body": body(size)}
    return module("metacontroller").Transformer(
        size.width, action_embed_readout={"num_discrete": ACTIONS}, **bodies, **settings
    )


def steering(size: Size, kind: Any = None, **options: Any) -> Any:
    """A metacontroller; codes of 8 numbers or bits."""
    small = {"depth": 1, "heads": 4, "attn_dim_head": size.width // 4}
    codes = {"dim_latent": 8} if kind is None else {"dim_code_bits": 8}
    parts = {"internal_sequence_embedder": small, "action_proposer": dict(small), "hypernetwork_low_rank": 7}
    return (kind or module("metacontroller").MetaController)(
        size.width, **{"dim_meta_controller": 32, **codes, **parts, **options}
    )


def batch(size: Size) -> tuple[Tensor, Tensor]:
    return torch.randn(size.batch, size.length, STATE), torch.randint(ACTIONS, (size.batch, size.length))


def cloning(size: Size, *, condition: bool = False, **options: Any) -> Case:
    """Behavior cloning."""
    model, (states, actions) = base(size, **options), batch(size)
    given = {"condition": torch.randn(size.batch, 32)} if condition else {}
    return Case(model, lambda: sum_of(model(states, actions, force_behavior_cloning=True, **given)))


def discovery(size: Size, kind: Any = None, **options: Any) -> Case:
    """Discovery over a frozen model."""
    model, meta_controller, (states, actions) = base(size), steering(size, kind, **options), batch(size)
    model.requires_grad_(False)

    def loss() -> Tensor:
        given = {"meta_controller": meta_controller, "episode_lens": torch.full((size.batch,), size.length)}
        found = model(states, actions, discovery_phase=True, **given)
        return found.action_recon + 0.1 * found.kl + found.ratio

    return Case(meta_controller, loss)


def binary(size: Size) -> Case:
    """Discovery with binary codes."""
    return discovery(size, module("metacontroller_with_binary_mapper").MetaControllerWithBinaryMapper)


def policy(size: Size, **options: Any) -> Case:
    """An update of the policy on stored episodes."""
    meta_controller = steering(size)
    residual, codes = torch.randn(size.batch, size.length, size.width), torch.randn(size.batch, size.length, 8)
    mask, advantages = torch.rand(size.batch, size.length) < 0.25, torch.randn(size.batch, 1, 1)
    mask[:, 0] = True
    with torch.no_grad():
        old = meta_controller.log_prob(meta_controller.get_action_dist_for_internal_rl(residual), codes)
    return Case(
        meta_controller,
        lambda: meta_controller.policy_loss(residual, old, codes, advantages, mask.float(), **options),
    )


def symbolic_grid(size: Size, *, held: bool = False) -> Case:
    """Behavior cloning on grids of cells with type, color and state. held: state encoder and lower body learn nothing,
    as is the case in the peer with either."""
    model = module("transformer_for_symbolic_grid").TransformerForSymbolicGrid(
        size.width,
        num_discrete=(11, 6, 3),
        grid_size=SIDE,
        action_embed_readout={"num_discrete": ACTIONS},
        lower_body=body(size),
        upper_body=body(size),
    )
    for part in (model.state_embed, model.lower_body) if held else ():
        part.requires_grad_(False)
    states, (_, actions) = torch.randint(3, (size.batch, size.length, SIDE, SIDE, 3)), batch(size)
    return Case(model, lambda: sum_of(model(states, actions)))


def resnet(size: Size) -> Case:
    """Behavior cloning on images, with the pixel loss."""
    model = module("transformer_with_resnet").TransformerWithResnet(
        size.width,
        state_embed_readout={"num_continuous": 64},
        action_embed_readout={"num_discrete": ACTIONS},
        lower_body=body(size),
        upper_body=body(size),
        next_latent_loss_weight=0.0,
    )
    states, (_, actions) = torch.rand(size.batch, size.length, PIXELS, PIXELS, 3), batch(size)

    def loss() -> Tensor:
        losses, pixels = model(states, actions, return_visual_autoencoder_loss=True)
        return sum_of(losses) + pixels

    return Case(model, loss)


def single_phase(size: Size, **options: Any) -> Case:
    """The single-phase model."""
    model = module("simple_metacontroller").TransformerWithMetacontroller(
        size.width,
        state_embed_readout={"num_continuous": STATE},
        action_embed_readout={"num_discrete": ACTIONS},
        lower_body=body(size),
        upper_body=body(size),
        emitter_decoder=body(size),
        dim_code_bits=8,
        **options,
    )
    states, actions = batch(size)

    def loss() -> Tensor:
        losses, _ = model(states, actions)
        named = ("bc_state_loss", "bc_action_loss", "ratio_loss", "latent_loss", "kl_loss", "control_penalty_loss")
        return sum_of(getattr(losses, name) for name in named)

    return Case(model, loss)


def sum_of(losses: Any) -> Tensor:
    return torch.stack(list(losses)).sum()


VARIANTS: dict[str, Callable[[Size], Case]] = {
    "cloning": cloning,
    "condition": lambda size: cloning(size, condition=True, dim_condition=32),
    "normalized-losses": lambda size: cloning(size, normalize_state_action_losses=True),
    "next-latent": lambda size: cloning(size, next_latent_loss_weight=1.0),
    "post-norm": lambda size: cloning(size, lower_transformer_post_norm=True),
    "discovery": discovery,
    "hard-switch": lambda size: discovery(size, hard_switch=True, hard_switch_straight_through=True),
    "causal-embedder": lambda size: discovery(size, bidirectional=False),
    "embedding-a-step": lambda size: discovery(size, pool_embedded_sequence=False),
    "gru-embedder": lambda size: discovery(size, compact_sequence_embedding=True),
    "ratio-in-chunks": lambda size: discovery(size, ratio_loss_chunk_size=8),
    "deeper-decoder": lambda size: discovery(size, decoder_depth=3),
    "bounded-codes": lambda size: discovery(size, latent_action_barrier_scale=2.0),
    "binary-codes": binary,
    "policy": policy,
    "asymmetric-clip": lambda size: policy(size, eps_clip=(0.2, 0.3)),
    "target-policy": lambda size: policy(size, use_tpo=True),
    "symbolic-grid": symbolic_grid,
    "symbolic-grid-held": lambda size: symbolic_grid(size, held=True),
    "resnet": resnet,
    "single-phase": single_phase,
    "entropy-switch": lambda size: single_phase(size, switch_entropy_quantiles=(0.5, 0.9)),
    "switch-summary": lambda size: single_phase(size, temporal_sequence_embedder=body(size)),
}


def resident() -> int:
    """Bytes of this process that are resident now. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, size: Size, steps: int, threads: int) -> dict[str, Any]:
    """Median seconds of a step and the memory of steps, in bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = VARIANTS[name](size)
    optimizer = torch.optim.AdamW([value for value in case.learner.parameters() if value.requires_grad], lr=1e-4)
    before, times = resident(), []
    for _ in range(WARM_UPS + steps):
        start = time.perf_counter()
        case.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(times[WARM_UPS:]), "bytes": max(0, peak - before), "torch": torch.__version__}


def apart(python: Path, ours: bool, *case: Any) -> dict[str, Any]:
    """A measurement in a process of its own; the library is this checkout's, or what the interpreter has."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if ours:
        environment["PYTHONPATH"] = str(SOURCE)
    words = [str(python), __file__, "--case", json.dumps(case)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--peer", type=Path, help="interpreter that has metacontroller-pytorch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help=f"measured, after {WARM_UPS} to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # one measurement, for our own child
    arguments = parser.parse_args()
    if arguments.case:
        name, size, *rest = arguments.case
        print(json.dumps(measure(name, Size(*size), *rest)))
        return
    unknown = sorted(set(arguments.variants) - VARIANTS.keys())
    if unknown:
        parser.error(f"no variant {unknown[0]!r}; known are {', '.join(VARIANTS)}")
    size = Size(arguments.width, arguments.batch, arguments.length)
    found = []
    for name in arguments.variants or VARIANTS:
        case = name, size, arguments.steps, arguments.threads
        row = {"variant": name, **size._asdict(), "ours": apart(Path(sys.executable), True, *case)}
        if arguments.peer is not None:
            row["peer"] = apart(arguments.peer, False, *case)
            row |= {f"{key}_ratio": row["ours"][key] / max(1e-12, row["peer"][key]) for key in ("seconds", "bytes")}
        found.append(row)
        print(json.dumps(row), file=sys.stderr)  # a variant takes from seconds to minutes
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
