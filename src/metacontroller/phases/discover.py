"""Phase 2, discovery: a metacontroller learns to steer the frozen model with codes.

What is minimised, and what is logged of it, is an objective's: eq. 3 (`objectives.steering`), perhaps after a guided
start (`objectives.guided`), or one that is registered by name (`objectives.registry`). In co-training, a baseline
(Fig. 7, 8), the same loss trains the model too. ``val_action_loss``, if episodes for
validation are given: `training.validation`.
"""

from __future__ import annotations

from torch import nn

from metacontroller.arguments import checked_kinds
from metacontroller.control.metacontroller import MetaController
from metacontroller.control.parameter_groups import matrices
from metacontroller.data.batching import Augment, Generate, apart
from metacontroller.models.protocol import SteerableModel
from metacontroller.models.readouts import emphasized_choices
from metacontroller.objectives.base import Positions, Setup
from metacontroller.objectives.clips import Decisions
from metacontroller.objectives.config import DiscoverConfig
from metacontroller.objectives.registry import make_objective
from metacontroller.phases.artefacts import COTRAINED_MODEL, META_CONTROLLER, save_artefacts
from metacontroller.phases.diagnostics import write_diagnostics
from metacontroller.storage.run_folder import RunFolder
from metacontroller.training.distributed import processes
from metacontroller.training.evaluation_mode import evaluation_mode
from metacontroller.training.loop import train
from metacontroller.training.progress import announce


@checked_kinds
def discover(
    config: DiscoverConfig,
    model: SteerableModel,
    meta_controller: MetaController,
    generate: Generate,
    run: RunFolder,
    *,
    objective: str = "metacontroller",
    augment: Augment | None = None,
    positions: Positions | None = None,
    decisions: Decisions | None = None,
    validation: Generate | None = None,
    gate_tolerance: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> MetaController:
    """Trains ``meta_controller`` in place on a frozen ``model``; writes ``meta_controller.safetensors`` to the run.

    With ``config.train_model`` the model is trained in place too, and written to ``cotrained_model.safetensors``.
    objective: a name, see `objectives.registry`. augment: symmetry augmentation of the states that the sequence
    embedder reads, random for each batch. It must leave subgoals unchanged; codes can then carry only what is invariant
    under it. None (the paper): no augmentation. positions, decisions, gate_tolerance: see `objectives.base.Setup`; for
    guided updates and clips, and for metrics. validation: as of `training.loop.train`.
    At the end gate and codes are checked (`phases.diagnostics`), on one batch of ``validation``, or without it on one
    of ``generate`` from a stream apart; warnings go to standard error unless ``quiet``.
    UserError if the run holds a checkpoint of this phase and ``resume`` is false.
    """
    evaluation_mode(model)
    workers = processes(next(model.parameters()).device.type)
    setup = Setup(model, meta_controller, generate, augment, positions, decisions, gate_tolerance)
    minimised = make_objective(objective, config, setup)
    module, parameters, artefacts = minimised.module, minimised.parameters, {META_CONTROLLER: meta_controller}
    if config.train_model:
        module = nn.ModuleDict({"model": model, "meta_controller": module})
        parameters, artefacts = [*model.parameters(), *parameters], {COTRAINED_MODEL: model, **artefacts}
    with emphasized_choices(model.action_readout, config.choice_weight):
        train(
            "discover",
            config.optimizer,
            module,
            parameters,
            generate,
            minimised.loss,
            run,
            seed=config.seed,
            matrices=matrices(meta_controller),
            muon_lr=config.muon_lr,
            sample_extras=minimised.prepare,
            validation=validation,
            resume=resume,
            quiet=quiet,
        )
    save_artefacts(run, workers, artefacts)
    if workers.is_main:
        unseen = (lambda n, generator: generate(n, apart(generator))) if validation is None else validation
        for warning in write_diagnostics(config, model, meta_controller, unseen, run):
            announce(f"discover: warning: {warning}", quiet)
    workers.wait()
    return meta_controller
