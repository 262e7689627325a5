"""An artifact is exported as a compressed-tensors checkpoint."""

from pathlib import Path

import click

from quantize.export.base import EXPORTERS, Exporter, lazy

DATA = "The data from which NVFP4 takes the ranges of activations.  [default: bundled prose]"
EXPORTERS.register(
    Exporter(
        name="compressed-tensors",
        summary="Write a checkpoint for transformers and vLLM, and compare it if the format's package is installed.",
        options=(click.Option(["--calibration"], type=click.Path(path_type=Path), help=DATA),),
        obstacles=lazy(f"{__name__}.obstacles", "obstacles"),
        export=lazy(f"{__name__}.export", "export_compressed_tensors"),
        not_executed=lazy(f"{__name__}.obstacles", "not_executed"),
    )
)
