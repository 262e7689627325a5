"""An artifact is exported as ONNX files for ONNX Runtime."""

import click

from quantize.export.base import EXPORTERS, Exporter, lazy

HYBRID = "Store W4A8 weights in 8 bits as well: prompts run faster, and the weights take 3 times the memory."
EXPORTERS.register(
    Exporter(
        name="onnx",
        summary="Write files for ONNX Runtime on CPUs, and compare them with torch on two inputs of each shape.",
        options=(
            click.Option(["--qdq"], is_flag=True, help="Use standard ONNX operators only, for other runtimes too."),
            click.Option(["--hybrid"], is_flag=True, help=HYBRID),
        ),
        obstacles=lazy(f"{__name__}.lowering", "obstacles"),
        export=lazy(f"{__name__}.onnx_directory", "export_onnx_directory"),
    )
)
