"""Records that name images become what the model's own processor makes of them; no path leads out of their folder."""

from __future__ import annotations

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from quantize.calibration.arguments import look_into, match_inputs, processed
from quantize.errors import QuantizeError, UsageError

SIDE, PATCH, PLACES = 16, 8, 4  # pixels, and the tokens of an image
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VISION = SIZES | {"image_size": SIDE, "patch_size": PATCH}
SMOOTH = {"passes": [{"name": "smoothquant"}], "quantizer": {"name": "rtn"}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if 'image' in c or c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
TEXTS = ["Once upon a time there was a dog.", "The sun was warm.", "Tom and Sue went to the big park to play."]


@pytest.fixture(scope="module")
def llava(stories, tmp_path_factory):
    """A directory with a model of images and text, its tokenizer and its processor."""
    directory = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = SIZES | {"model_type": "llama", "vocab_size": image_id + 1, "num_key_value_heads": 2}
    vision = VISION | {"num_hidden_layers": 2, "model_type": "clip_vision_model"}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_id)
    ).save_pretrained(directory)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images, tokenizer, PATCH, "default", num_additional_image_tokens=1, chat_template=TEMPLATE
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def records(tmp_path):
    """A function that writes records, beside three images of different sizes, and returns their file."""
    for number in range(3):
        Image.new("RGB", (20 + number, 24), (60 * number, 99, 7)).save(tmp_path / f"{number}.png")

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def talk(text, **image):
    content = [{"type": "image", **image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def rows_of(data, model, text_column=None):
    """Return the samples that a run would take of some data."""
    module = LlavaForConditionalGeneration.from_pretrained(model)
    given = processed(module, data, model, 8, text_column)
    return match_inputs(module, given, 8)[1]


def test_records_in_every_form_are_the_same_samples(llava, records, tmp_path):
    """A text beside an image, the same with its place, a conversation, bytes in a table, and images of Pillow."""
    paths = [f"{number}.png" for number in range(3)]
    forms = [
        [{"text": text, "image": path} for text, path in zip(TEXTS, paths, strict=True)],
        [{"text": f"user: <image>{text}", "images": [path]} for text, path in zip(TEXTS, paths, strict=True)],
        [{"messages": talk(text, path=path)} for text, path in zip(TEXTS, paths, strict=True)],
        [{"messages": talk(text), "image": path} for text, path in zip(TEXTS, paths, strict=True)],
    ]
    held = [
        {"text": text, "image": {"bytes": (tmp_path / p).read_bytes()}} for text, p in zip(TEXTS, paths, strict=True)
    ]
    pillow = [{"text": text, "image": Image.open(tmp_path / p)} for text, p in zip(TEXTS, paths, strict=True)]
    talks = [{"messages": talk(text, image=path)} for text, path in zip(TEXTS, paths, strict=True)]
    files = [records(form, f"{n}.jsonl") for n, form in enumerate(forms)]
    files += [records(held, "held.parquet"), records(talks, "talks.parquet")]
    data = [*files, pillow]
    first, *others = (rows_of(given, llava) for given in data)
    assert len(others) == 6
    assert [row["pixel_values"].shape for row in first] == [(3, SIDE, SIDE)] * 3
    for number, row in enumerate(first):
        assert int((row["input_ids"] == row["input_ids"].max()).sum()) == PLACES
        assert AutoTokenizer.from_pretrained(llava).decode(row["input_ids"]).endswith(TEXTS[number])
        for other in others:
            assert all(torch.equal(row[name], other[number][name]) for name in row)


def test_a_column_is_named(llava, records):
    path = records([{"story": TEXTS[0], "text": "no", "image": "0.png"}])
    (row,) = rows_of(path, llava, "story")
    assert "Once upon" in AutoTokenizer.from_pretrained(llava).decode(row["input_ids"])


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (
            [{"text": "x", "image": "../0.png"}],
            UsageError,
            "lies outside of the directory of the records; put it there",
        ),
        ([{"text": "x", "image": "/etc/hostname"}], UsageError, "lies outside of the directory of the records"),
        ([{"text": "x", "image": "link.png"}], UsageError, "lies outside of the directory of the records"),
        (
            [{"text": "x", "image": "9.png"}],
            UsageError,
            "no file in the directory of the records, and nothing is fetched",
        ),
        ([{"text": "x", "image": "http://a.b/c.png"}], UsageError, "no file in the directory of the records"),
        (
            [{"text": "x", "image": "rows.jsonl"}],
            QuantizeError,
            "is damaged, or none of BMP, GIF, JPEG, PNG, TIFF, WEBP",
        ),
        ([{"text": "x", "image": 7}], UsageError, "has 7 where an image is expected; give its path"),
        (
            [{"text": "x", "image": "0.png"}, {"text": "y"}],
            UsageError,
            "no image in record 2; give one to every record",
        ),
        ([{"text": "<image><image>", "image": "0.png"}], UsageError, "processor refuses record 1 of .*rows.jsonl: "),
        ([{"messages": [7], "image": "0.png"}], UsageError, r"the chat template refuses \[7\]"),
        ([{"text": "x", "images": ["0.png", "1.png"]}], UsageError, "makes 2 pictures of record 1 .*; give one"),
    ],
)
def test_records_that_cannot_be_taken(rows, error, words, llava, records, tmp_path):
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    with pytest.raises(error, match=words):
        rows_of(records(rows), llava)


def test_an_image_too_large_is_not_decoded(llava, records, monkeypatch):
    monkeypatch.setattr("quantize.calibration.image_files.LARGEST", 300)
    with pytest.raises(QuantizeError, match="has more than 300 pixels; give a smaller one"):
        rows_of(records([{"text": "x", "image": "0.png"}]), llava)


def test_a_path_in_memory_is_refused(llava):
    with pytest.raises(UsageError, match="is a path, and there is no file that it could start from"):
        rows_of([{"text": "x", "image": "0.png"}], llava)


def test_a_model_without_its_processor_is_told_so(stories, records):
    module = LlavaForConditionalGeneration
    with pytest.raises(
        UsageError, match=r"no processor_config\.json or preprocessor_config\.json lies beside the model's"
    ):
        processed(object.__new__(module), records([{"text": "x", "image": "0.png"}]), stories, 8, None)


@pytest.mark.slow
def test_a_model_of_images_and_text_is_quantized_on_records(llava, records, small_run):
    rows = [{"text": text, "image": f"{number}.png"} for number, text in enumerate(TEXTS)]
    artifact = small_run(llava, "W4A8", recipe=SMOOTH, calibration=records(rows))
    assert artifact.manifest["calibration"]["rows"] == 2  # `nsamples`
    assert (artifact.directory / "processor_config.json").is_file()


def test_a_model_of_images_alone_is_quantized_on_records(records, small_run, tmp_path):
    ViTForImageClassification(ViTConfig(**VISION)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "vit")
    rows = [{"image": f"{number}.png", "label": number} for number in range(3)]
    artifact = small_run(tmp_path / "vit", "W8A8", recipe=SMOOTH, calibration=records(rows))
    assert artifact.manifest["calibration"]["rows"] == 2


def test_bytes_that_are_no_image_are_named_without_an_address(llava, records):
    data = records([{"text": "x", "image": {"bytes": b"nothing"}}], "rows.parquet")
    with pytest.raises(QuantizeError, match=r"^an image in .*rows\.parquet is damaged, or none of BMP"):
        rows_of(data, llava)


def test_an_image_in_memory_may_be_a_file_of_bytes(llava):
    buffer = io.BytesIO()
    Image.new("L", (9, 9)).save(buffer, "PNG")
    (row,) = rows_of([{"text": "x", "image": {"bytes": buffer.getvalue()}}], llava)
    assert row["pixel_values"].shape == (3, SIDE, SIDE)


@pytest.fixture
def patched():
    """A small Qwen-VL, and what its processor gives: [patches, channels] and a grid beside the ids of one text."""
    vision = {"embed_dim": 32, "hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = SIZES | {"vocab_size": 64, "num_key_value_heads": 2, "rope_parameters": rope}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    images = Qwen2VLImageProcessorPil(min_pixels=256, max_pixels=256, patch_size=4)
    made = images(images=[Image.new("RGB", (16, 16), (9, 60, 90))], return_tensors="pt")
    patches = made["pixel_values"]
    assert patches.dim() == 2
    places = [60] * (len(patches) // 4)
    beside = {
        "attention_mask": torch.ones(1, 9),
        "mm_token_type_ids": torch.tensor([[0, *[1] * len(places), 0, 0, 0, 0]]),
    }
    rows = [{"input_ids": torch.tensor([[62, *places, 63, 5, n, 9]]), **made, **beside} for n in range(4)]
    return model, rows


def test_patches_that_a_processor_gives_without_an_axis_for_samples_are_of_one_sample(patched):
    model, rows = patched
    first, *others = match_inputs(model, look_into(rows), 4)[1]
    assert len(others) == 3
    assert torch.equal(first["pixel_values"][None], rows[0]["pixel_values"][None])
    assert torch.equal(first["image_grid_thw"][None], rows[0]["image_grid_thw"])


@pytest.mark.slow
def test_rows_of_patches_and_a_tensor_of_all_of_them_are_the_same_samples(patched, small_run):
    model, rows = patched
    found = match_inputs(model, look_into(rows), 4)[1]
    apart = {name: torch.stack([row[name] for row in found]) for name in found[0]}
    files = [small_run(model, "W8A8", recipe=SMOOTH, calibration=x, output=str(n)) for n, x in enumerate((rows, apart))]
    assert files[0].manifest["files"] == files[1].manifest["files"]
    with pytest.raises(QuantizeError, match="; give every argument that its processor returns, and --verbose shows"):
        small_run(model, "W8A8", calibration=[{**row, "mm_token_type_ids": None} for row in rows], output="less")
