"""ComfyUI's view of the pack: each node a thin skin over one method of the engine."""
