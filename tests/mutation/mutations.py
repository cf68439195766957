"""Lines of the source, each with what breaks it and the tests that should notice; `mutate.py` runs them."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """file: below src/metacontroller. old: text that stands there once. new: what breaks it. tests: below tests."""

    file: str
    old: str
    new: str
    tests: str


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutation]:
    """Mutations of one file, all for the same tests."""
    return [Mutation(file, old, new, tests) for old, new in changes]


LOSSES = "control/test_losses.py control/test_policy_losses.py"
GATE = "kernels/test_gate_scan.py control/test_switching_unit.py"
EXPERT = "domains/gridworld_pinpad/test_expert.py"
GRID = "domains/gridworld_pinpad/test_simulator.py"
RL = "phases/test_internal_rl.py"

MUTATIONS: list[Mutation] = [
    *of(
        "control/losses.py",
        LOSSES,
        ("0.5 * (mean.square() + (2", "0.5 * (mean.square() - (2"),
        (".exp() - 1 - 2 * log_std).sum(-1)", ".exp() - 1 - log_std).sum(-1)"),
        ("inside = p.masked_fill(ends, 0.5)", "inside = p"),
        ("returns - returns.mean()) /", "returns + returns.mean()) /"),
        ("returns.std(correction=0) + delta", "returns.std(correction=1) + delta"),
        ("return (log_prob - old_log_prob).masked", "return (old_log_prob - log_prob).masked"),
        ("return -masked_mean(terms.sum", "return masked_mean(terms.sum"),
        ("torch.minimum(ratio * advantage,", "torch.maximum(ratio * advantage,"),
        ("clipped = ratio.clamp(1 - low, 1 + high)", "clipped = ratio.clamp(1 - high, 1 + low)"),
        ("terms.sum(-1) if per_entry", "terms.mean(-1) if per_entry"),
        ("advantages / eta).softmax(-1)", "advantages * eta).softmax(-1)"),
        (
            "return n / (n - 1) * ((n - 1) * share * soft + (1 - share) * (1 - soft))",
            "return n / (n - 1) * (n * share * soft + (1 - share) * (1 - soft))",
        ),
    ),
    *of(
        "control/codes.py",
        f"control/test_code_distributions.py {LOSSES}",
        ("masked_mean(log_std, mask) + 0.5 * self.dim", "masked_mean(log_std, mask) - 0.5 * self.dim"),
        ("self.dim * math.log(2 * math.pi * math.e)", "self.dim * math.log(2 * math.pi)"),
        ("torch.tensor([0.0, math.log(std)]).repeat", "torch.tensor([math.log(std), 0.0]).repeat"),
    ),
    *of(
        "control/policy_losses.py",
        "control/test_policy.py control/test_policy_losses.py",
        ("switch_betas >= modules.gate_config.threshold", "switch_betas > modules.gate_config.threshold"),
        ("torch.argsort((~switch).long()", "torch.argsort(switch.long()"),
        ("log_prob = log_prob.sum(-1)", "log_prob = log_prob.mean(-1)"),
    ),
    *of(
        "control/switching.py",
        f"{GATE} control/test_core.py",
        ("return (since >= config.period)", "return (since > config.period)"),
        ("(steps % period == 0)", "(steps % period == 1)"),
        ("retained = (1 - beta)[..., None]", "retained = beta[..., None]"),
    ),
    *of(
        "kernels/gate_scan_reference.py",
        GATE,
        ("torch.relu(drive[:, t] + z @ w_code.T)", "torch.relu(drive[:, t])"),
        ("masked_fill(fresh[:, t], 1.0)", "masked_fill(fresh[:, t], 0.0)"),
        ("hard = (beta >= options.threshold)", "hard = (beta > options.threshold)"),
    ),
    *of(
        "control/controller.py",
        "control/test_controller.py",
        ("F.pad(hidden, (0, 1), value=1.0)", "F.pad(hidden, (0, 1), value=0.0)"),
        ('"...k,...ko->...o", hidden, products', '"...k,...ko->...o", hidden.abs() + 1, products'),
    ),
    *of(
        "control/core.py",
        "control/test_core.py control/test_module_calls.py control/test_metacontroller.py",
        (
            "torch.where(switch, 1, state.steps_since_switch + 1)",
            "torch.where(switch, 0, state.steps_since_switch + 1)",
        ),
        ("beta.masked_fill(since == 0, 1.0)", "beta"),
        ("switch = weight >= gate.config.threshold", "switch = weight < gate.config.threshold"),
        ("return (residual + control(", "return (residual - control("),
        ("torch.cat([start[:, None], after[:, :-1]], 1), last[0]", "after, last[0]"),
    ),
    *of(
        "models/readouts.py",
        "models/test_readouts.py",
        ("return -(log_prob.exp() * log_prob).sum(-1)", "return (log_prob.exp() * log_prob).sum(-1)"),
        ("return -F.cross_entropy(params.flatten", "return F.cross_entropy(params.flatten"),
        ("(log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)", "(log_std + 0.5 * math.log(2 * math.pi)).sum(-1)"),
        ("return mean + log_std.exp() * noise", "return mean + log_std * noise"),
        (".square() - log_std - 0.5 * math.log", ".square() + log_std - 0.5 * math.log"),
    ),
    *of(
        "models/attention.py",
        "models/test_attention.py",
        (".triu(keys - queries + 1)", ".triu(keys - queries + 2)"),
        ("cache.length += x.shape[1]", "cache.length += x.shape[1] - 1"),
        ("first = capacity - keys  #", "first = capacity - keys + 1  #"),
    ),
    *of(
        "models/attention.py",
        "models/test_context.py",
        (".tril(keys - queries - window)", ".tril(keys - queries - window + 1)"),
        ("max(0, now + 1 - self.window)", "max(0, now - self.window)"),
    ),
    *of(
        "data/trajectories.py",
        "data/test_trajectories.py",
        ("device=lengths.device) < lengths[:, None]", "device=lengths.device) <= lengths[:, None]"),
        ("self.total / self.count.clamp_min(1)", "self.total / (self.count + 1)"),
        ("values.masked_fill(~mask, 0).sum()", "values.masked_fill(mask, 0).sum()"),
        ('beyond = ~length_mask(lengths + (name == "states")', "beyond = ~length_mask(lengths + (name == 'actions')"),
        ("np.minimum(offsets, lengths[:, None] - 1)]", "np.minimum(offsets, lengths[:, None])]"),
        ('self.starts[episode] + episode * (name == "states")', "self.starts[episode] + 0 * episode"),
    ),
    *of(
        "domains/gridworld_pinpad/expert.py",
        EXPERT,
        (
            "wrong = (objects >= 0) & (objects < num_colors) & (objects != target) & (ahead != here)",
            "wrong = (objects >= 0) & (objects < num_colors) & (objects != target)",
        ),
        (
            "(objects < num_colors) & (objects != target) & (ahead",
            "(objects < num_colors) & (objects == target) & (ahead",
        ),
        ("ahead = torch.where(objects >= num_colors, here, ahead)", "ahead = torch.where(objects < 0, here, ahead)"),
        ("allowed = distance == distance.amin(dim=1", "allowed = distance == distance.amax(dim=1"),
        ("device=ahead.device) < self.epsilon", "device=ahead.device) > self.epsilon"),
    ),
    *of(
        "domains/gridworld_pinpad/simulator.py",
        GRID,
        ("(objects >= self.board.num_colors) | ended", "(objects > self.board.num_colors) | ended"),
    ),
    *of(
        "domains/pinpad/episodes.py",
        GRID,
        ("wrong = (entered ^ correct) & self", "wrong = (entered & correct) & self"),
        ("(self.steps >= self.board.max_steps) & ~self", "(self.steps > self.board.max_steps) & ~self"),
        ("self.steps = self.steps + running", "self.steps = self.steps + 1"),
    ),
    *of(
        "phases/policy_gradient.py",
        RL,
        ("difference.exp() - 1 - difference, mask", "difference.exp() - 1 + difference, mask"),
        ("(difference.exp() - 1).abs() > eps_clip", "(difference.exp() - 1) > eps_clip"),
        ("rollout.decisions[chunk].sum().to(advantage) / total", "1 / len(rollout.decisions)"),
        (".tensor_split(config.minibatches)", ".chunk(config.minibatches)"),
    ),
    *of(
        "training/optimizer.py",
        "training/test_loop.py",
        ("(self.steps - step) / self.decay_steps", "(self.steps - step - 1) / self.decay_steps"),
        ("(step - start) / (end - start)", "(step - start + 1) / (end - start)"),
    ),
    *of(
        "metrics/switch_alignment.py",
        "metrics/test_gate_alignment.py",
        ("width = 2 * tolerance + 1", "width = 2 * tolerance + 3"),
        (
            "changed[:, 1:] = segments[:, 1:] != segments[:, :-1]",
            "changed[:, :-1] = segments[:, 1:] != segments[:, :-1]",
        ),
        ("masked_sums(_near(switch, tolerance)", "masked_sums(_near(change, tolerance + 1)"),
        ("switch = (beta >= threshold) & later", "switch = (beta >= 0.5) & later"),
    ),
    *of(
        "domains/border.py",
        "domains/test_gymnasium_adapter.py recipes/test_collect.py",
        ("given.size != 1 or not np.isfinite(given).all()", "given.size != 1"),
        ("_within(space, cast) & (floats | (cast == given))", "_within(space, cast)"),
        ("(values < space.start + count)", "(values <= space.start + count)"),
        ("(values >= space.low) & (values <= space.high)", "(values <= space.high)"),
    ),
    *of(
        "data/splits.py",
        "domains/test_validation_split.py data/test_splits.py",
        (
            "np.setdiff1d(np.arange(len(self.dataset.episodes)), self.validation)",
            "np.arange(len(self.dataset.episodes))",
        ),
    ),
    *of(
        "data/batching.py",
        "domains/test_validation_split.py",
        ("manual_seed(VALIDATION_BIT | 8 * draw)", "manual_seed(8 * draw)"),
    ),
    *of(
        "data/statistics.py",
        "data/test_datasets.py data/test_spaces.py",
        ("np.maximum(PRECISION * largest, np.finfo(np.float32).tiny)", "1e-6"),
    ),
    *of(
        "phases/diagnostics.py",
        "phases/test_diagnostics.py",
        ("left is not None and left < MIN_LEFT", "left is not None and left < 0"),
    ),
    *of(
        "storage/user_function.py",
        "storage/test_user_function.py",
        ("match = _NAME.fullmatch(text)", "match = _NAME.match(text)"),
    ),
]
