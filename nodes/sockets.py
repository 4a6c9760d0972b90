"""The one socket type of our own: a loaded model, in Python an Engine. Its colour is in web/lockstep.js."""

from comfy_api.latest import io

LockstepModel = io.Custom("LOCKSTEP_MODEL")
CATEGORY = "Lockstep"
