"""Distil a Qwen3 teacher into a converted HydraHead model: three stages, resumable."""
