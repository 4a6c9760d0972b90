"""A model with LoRAs on it, as the model socket carries it: the same engine and weights as without them."""

from dataclasses import dataclass, replace
from typing import Any

from ..model.engine import Engine, Recipe, SampleSettings
from ..model.values import AVLatents, Conditioning, Lora


@dataclass(frozen=True)
class WithLoras:
    """An engine that encodes and samples with these LoRAs; all else is the engine's own.

    A full checkpoint with a distilled LoRA has the distilled recipe.
    """

    engine: Engine
    loras: tuple[Lora, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def recipe(self) -> Recipe:
        return self.engine.choose_recipe(loras=self.loras)

    def sigmas(self, steps: int | None, shape: Any) -> tuple[float, ...]:
        return self.engine.sigmas(steps, shape, self.recipe)

    def encode_text(self, *given: Any, **named: Any) -> Conditioning:
        return self.engine.encode_text(*given, loras=self.loras, **named)

    def steps(self, settings: SampleSettings, shape: Any) -> int:
        return self.engine.steps(self._on(settings), shape)

    def sample(
        self, conditioning: Any, shape: Any, guides: Any, settings: SampleSettings, *given: Any, **named: Any
    ) -> AVLatents:
        return self.engine.sample(conditioning, shape, guides, self._on(settings), *given, **named)

    def add_frames(
        self, conditioning: Any, start: Any, guides: Any, settings: SampleSettings, *given: Any, **named: Any
    ) -> AVLatents:
        return self.engine.add_frames(conditioning, start, guides, self._on(settings), *given, **named)

    def _on(self, settings: SampleSettings) -> SampleSettings:
        return replace(settings, loras=self.loras)


def add_lora(model: Any, lora: Lora) -> tuple[WithLoras, tuple[str, ...]]:
    """The model with one LoRA more, and a sentence about keys that fit nothing; what came in stays as it is.

    model: an Engine or a WithLoras. Raises as Engine.read_loras does.
    """
    engine, before = (model.engine, model.loras) if isinstance(model, WithLoras) else (model, ())
    return WithLoras(engine, (*before, lora)), engine.read_loras((lora,))
