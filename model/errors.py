"""Everything that a user, a file or a workflow can cause: one family, each message with the nearest thing that works."""

_MOST = 2000  # characters: what was given is repeated in messages, and may be anything


class LockstepError(ValueError):
    """Root of all failures caused from outside; a bug is an AssertionError instead."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


class ShapeError(LockstepError):
    """A size, length or count that the model cannot take."""


class CheckpointError(LockstepError):
    """A weights file that is missing, damaged or does not fit its own structure."""


class UnsupportedModelError(LockstepError):
    """A well-formed checkpoint or option that this code does not implement."""


class PromptError(LockstepError):
    """A prompt from which the model can take nothing."""


class MediaError(LockstepError):
    """A picture, sound or clip file that cannot be read or written."""


class WorkflowError(LockstepError):
    """Values that do not belong together: a latent of another model, a guide outside the clip."""


class TrainingError(LockstepError):
    """A run of training that stands elsewhere than asked for, or whose data are missing or another codec's."""


class ProvenanceError(LockstepError):
    """A certificate that is missing or cannot sign, an unknown kind of origin."""


class NotFiniteError(LockstepError):
    """Values that are no numbers any more, whatever brought them about."""


class MemoryShortError(LockstepError):
    """A stage that does not fit into the device's memory even in its smallest form."""
