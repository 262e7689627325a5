"""vLLM serves artifacts as they are: it calls `register`, the entry point `vllm.general_plugins`, by itself."""

from __future__ import annotations


def register() -> None:
    """Make the artifact's config known to vLLM; a second time changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from quantize.artifact.vllm.config import ArtifactConfig
    from quantize.scheme.names import METHOD

    register_quantization_config(METHOD)(ArtifactConfig)
