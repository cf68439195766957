"""Files of a run: JSON, safetensors, atomic writes."""
