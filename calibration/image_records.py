"""Calibration records that name images become what the model's own processor makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.calibration.data import spread
from quantize.calibration.data_sets import records_of
from quantize.calibration.image_files import read_image
from quantize.calibration.records import IDS, MESSAGES, TEXT, of_column, text_of
from quantize.calibration.table_files import READERS, bounded_reading, read_records
from quantize.checkpoint.processor import has_processor, load_processor
from quantize.checkpoint.size_limits import limit_time
from quantize.checkpoint.tokenizer import TEMPLATE_SECONDS
from quantize.errors import QuantizeError, UsageError, reason, shown

IMAGE, IMAGES, CONTENT, TYPE = "image", "images", "content", "type"
PIXELS, PATCHES = "pixel_values", 2  # the axes of images that a processor has cut into patches
SECONDS = 20.0  # of a core, that a processor may take for a record
PLACES = ("boi_token", "image_token")  # the attributes of a processor that say what stands for an image in a text


def has_images(data: Any) -> bool:
    """Return whether calibration data are records with images: a file of them, or a list with images of Pillow."""
    if isinstance(data, str | Path):
        path = Path(data)
        return path.is_file() and path.suffix in READERS and names_images(first_record(path))
    return isinstance(data, Sequence) and len(data) > 0 and names_images(data[0])


def first_record(path: Path) -> Any:
    """Return the first record of a file; None if it cannot be read, which is said later."""
    with contextlib.suppress(QuantizeError), bounded_reading(path):
        return next(iter(read_records(path)), None)
    return None


def names_images(record: Any) -> bool:
    """Return whether a record has images."""
    if not isinstance(record, Mapping):
        return False
    return bool(record.get(IMAGE) or record.get(IMAGES) or any(map(is_image, parts_of(record.get(MESSAGES)))))


def parts_of(messages: Any) -> Iterator[Any]:
    """Yield the parts of the contents of messages, as far as these are lists."""
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get(CONTENT) if isinstance(message, Mapping) else None
        yield from content if isinstance(content, list | tuple) else ()


def is_image(part: Any) -> bool:
    """Return whether a part of a message is an image."""
    return isinstance(part, Mapping) and part.get(TYPE) == IMAGE


def process_records(
    data: Any, source: str, directory: Path | None, limit: int, text_column: str | None = None
) -> list[dict[str, Tensor]]:
    """Return what the model's processor makes of each record that has images, a batch of one sample.

    A record has a text or `messages`, and an `image`, a list of `images`, or parts of its messages of the type `image`.

    Args:
        data: a file, from whose directory the paths of images start, or records in memory.
        source: where they come from, for messages.
        directory: the model's, where its processor lies.
        limit: the largest number of records, which are spread evenly.
        text_column: the name of a text or a conversation; None finds it.

    Raises:
        UsageError: there is no processor, or it does not take a record.
        QuantizeError: a file cannot be read.
    """
    file = Path(data) if isinstance(data, str | Path) else None
    if directory is None or not has_processor(directory):
        raise UsageError(
            f"{source} has records with images, and no processor_config.json or preprocessor_config.json lies beside "
            "the model's weights; put its processor there, or give the tensors that the processor makes"
        )
    known = ImageProcessor(load_processor(directory), file and file.parent, source)
    with bounded_reading(file) if file else contextlib.nullcontext():
        records = records_of(file, limit) if file else spread(data, limit)
    return [known.process(record, n, text_column) for n, record in enumerate(records, 1)]


@dataclass(frozen=True)
class ImageProcessor:
    """A model's processor, applied to records.

    Attributes:
        processor: a processor or an image processor of transformers.
        root: the directory of the records; None takes no paths.
        source: where the records come from, for messages.
    """

    processor: Any
    root: Path | None
    source: str

    def process(self, record: Any, number: int, text_column: str | None) -> dict[str, Tensor]:
        """Return the inputs that a record is, a batch of one sample; `number` counts it, for messages."""
        if not names_images(record):
            raise UsageError(f"{self.source} has no image in record {number}; give one to every record, or to none")
        column = record if text_column is None else of_column(record, text_column, self.source)
        messages = column.get(MESSAGES) if isinstance(column, Mapping) else None
        held = record.get(IMAGE) or record.get(IMAGES) or []
        given = list(held) if isinstance(held, list | tuple) else [held]
        given += [
            image for part in parts_of(messages) if is_image(part) and (image := part.get(IMAGE) or part.get("path"))
        ]
        asked: dict[str, Any] = {"images": [read_image(x, self.root, self.source) for x in given]}
        if hasattr(self.processor, "image_processor"):
            if messages is not None:
                text = self.conversation(messages)
            else:
                text = column if isinstance(column, str) else text_of({**record, IMAGE: None}, self.source)
                text = self.with_places(text, len(given))
            begins = getattr(self.processor.tokenizer, "bos_token", None)
            asked |= {TEXT: text, "add_special_tokens": not (begins and text.startswith(begins))}
        try:
            with limit_time(SECONDS, "images"):
                found = self.processor(**asked, return_tensors="pt")
        except Exception as error:  # a processor may raise anything
            raise UsageError(
                f"the model's processor refuses record {number} of {self.source}: {reason(error)}"
            ) from error
        tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
        ids, pixels = tensors.get(IDS), tensors.get(PIXELS)
        if ids is not None and pixels is not None and pixels.dim() > PATCHES and len(pixels) != len(ids):
            raise UsageError(
                f"the model's processor makes {len(pixels)} pictures of record {number} of {self.source}, and a model "
                "is calibrated on one with each text; give one image, or a smaller one, to each record"
            )
        return tensors

    def conversation(self, messages: Sequence[Any]) -> str:
        """Return messages as the processor's chat template writes them, each image as its place."""
        if not getattr(self.processor, "chat_template", None):
            raise UsageError(
                f"the model's processor has no chat template for the messages of {self.source}; give texts"
            )
        try:
            with limit_time(TEMPLATE_SECONDS, "conversations"):
                return self.processor.apply_chat_template([*map(without_image, messages)], tokenize=False)  # type: ignore[no-any-return]
        except Exception as error:  # a template may raise anything
            raise UsageError(f"the chat template refuses {shown(messages)}: {reason(error)}") from None

    def with_places(self, text: str, count: int) -> str:
        """Return a text with the places of its images, in front if it has none and the processor wants some."""
        places = [x for name in PLACES if isinstance(x := getattr(self.processor, name, None), str)]
        if not places or any(place in text for place in places):
            return text
        if getattr(self.processor, "chat_template", None):
            content = [{TYPE: IMAGE}] * count + [{TYPE: TEXT, TEXT: text}]
            return self.conversation([{"role": "user", CONTENT: content}])
        return places[0] * count + text


def without_image(message: Any) -> Any:
    """Return a message with the places of its images alone, which is what a chat template takes."""
    content = message.get(CONTENT) if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    return {**message, CONTENT: [{TYPE: IMAGE} if is_image(part) else without_empty(part) for part in content]}


def without_empty(part: Any) -> Any:
    """Return a part of a message without what a table has in its place for parts of other types."""
    return {name: x for name, x in part.items() if x is not None} if isinstance(part, Mapping) else part
