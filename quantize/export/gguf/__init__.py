"""An artifact is exported as a GGUF file."""

from quantize.export.base import EXPORTERS, Exporter, lazy

EXPORTERS.register(
    Exporter(
        name="gguf",
        summary="Write a file for llama.cpp with the artifact's integers, and compare it in transformers.",
        options=(),
        obstacles=lazy(f"{__name__}.obstacles", "obstacles"),
        export=lazy(f"{__name__}.export", "export_gguf"),
    )
)
