"""Safetensors files to modules: header, families, key map, build."""
