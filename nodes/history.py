"""What runs of nodes cost, remembered by the latents that they made or decoded, for the clip report."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from ..model.engine import Engine, latent_sha256
from ..model.measure.energy import EnergyMeter, tell_joules
from ..model.measure.stages import StageMeter
from ..model.values import AVLatents, StageCost

_MOST = 200
_known: dict[str, dict[str, Any]] = {}
_lock = threading.Lock()


@contextmanager
def measured(model: Engine, stage: str) -> Iterator[StageMeter]:
    """Seconds, peak memory and joules of the body; its meter's costs hold them afterwards."""
    energy = EnergyMeter(device=model.device)
    meter = StageMeter(model.device, energy if energy.sources else None)
    try:
        with meter.stage(stage):
            yield meter
    finally:
        energy.close()


def note(latents: AVLatents, meter: StageMeter, **facts: Any) -> None:
    """Remembers what these latents cost, and facts about them; a stream that is not there is empty."""
    key = latent_sha256(latents)
    with _lock:
        entry = _known.pop(key, {"costs": {}})
        _known[key] = entry | facts | {"costs": entry["costs"] | meter.costs}  # the last to be forgotten
        while len(_known) > _MOST:
            _known.pop(next(iter(_known)))


def tell(latents: AVLatents) -> dict[str, Any]:
    """All that is known of a clip's latents, as the report takes it: hash, facts, and the costs of its stages."""
    nothing, whole = torch.empty(0), latent_sha256(latents)
    keys = (
        whole,
        latent_sha256(replace(latents, audio=nothing)),
        latent_sha256(replace(latents, video=nothing)),
    )
    with _lock:
        entries = [_known[key] for key in keys if key in _known]
    facts = {name: fact for entry in entries for name, fact in entry.items() if name != "costs"}
    costs: dict[str, StageCost] = {name: cost for entry in entries for name, cost in entry["costs"].items()}
    return {
        **facts,
        "latent_sha256": whole,
        "stages": {name: round(cost.seconds, 3) for name, cost in costs.items()},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "energy": tell_joules(costs.values(), latents.shape.seconds),
    }
