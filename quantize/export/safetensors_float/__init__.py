"""An artifact is exported as an ordinary checkpoint, whose weights are the artifact's in floating point."""

from quantize.export.base import EXPORTERS, Exporter, lazy

EXPORTERS.register(
    Exporter(
        name="safetensors-float",
        summary="Write an ordinary checkpoint of the dequantized weights, which any tool loads, with a model card.",
        options=(),
        obstacles=lazy(f"{__name__}.obstacles", "obstacles"),
        export=lazy(f"{__name__}.export", "export_safetensors_float"),
    )
)
