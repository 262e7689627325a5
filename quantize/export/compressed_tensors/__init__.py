"""Export to a compressed-tensors checkpoint."""

from pathlib import Path

import click

from quantize.export.base import EXPORTERS, Exporter, lazy

DATA = "Data for ranges of activations, which NVFP4 holds.  [default: bundled prose]"
EXPORTERS.register(
    Exporter(
        name="compressed-tensors",
        summary="A checkpoint for transformers and vLLM, compared in transformers where the package is installed.",
        options=(click.Option(["--calibration"], type=click.Path(path_type=Path), help=DATA),),
        obstacles=lazy(f"{__name__}.obstacles", "obstacles"),
        export=lazy(f"{__name__}.export", "export_compressed_tensors"),
    )
)
