"""Export to an ordinary checkpoint: weights as the artifact has them, in floating point."""

from quantize.export.base import EXPORTERS, Exporter, lazy

EXPORTERS.register(
    Exporter(
        name="safetensors-float",
        summary="An ordinary checkpoint of the dequantized weights, to evaluate them in any tool, with a model card.",
        options=(),
        obstacles=lazy(f"{__name__}.obstacles", "obstacles"),
        export=lazy(f"{__name__}.export", "export_safetensors_float"),
    )
)
