"""The page of a run fits a telephone and a large screen, as a real browser lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from quantize.artifact.report.page import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WRAPPER = """<!DOCTYPE html><title></title>
<iframe style="border: 0; width: %dpx; height: 800px" srcdoc="%s"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, all = (kind) => [...page.querySelectorAll(kind)]
  const drawn = all("svg").map((x) => x.getBoundingClientRect())
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth,
    cut: all(".scroll").filter((x) => x.scrollWidth > x.clientWidth).map((x) => x.innerText),
    plots: drawn.map((x) => x.width),
    right: Math.max(...drawn.map((x) => x.right)),
    smallest: Math.min(...all("svg text").map((x) => x.getBoundingClientRect().height)),
  })
}
</script>"""


@pytest.fixture(scope="module")
def shown(artifact_rtn):
    """Return the page of a run with all curves and with long names, everything in it unfolded."""
    names = [f"model.language_model.layers.{i}" for i in range(30)]
    error = {"plain_rounding": 0.25, "quantized": 0.125}
    block = error | dict(largest=1e4, median=1.0, transformed_largest=90.0, transformed_median=2.0)
    stages = [{"stage": stage, "kurtosis": k, "largest": 1.0} for stage, k in (("float", 900.0), ("rotate", 3.0))]
    linears = [f"{name}.{part}" for name in names for part in ("self_attn.q_proj", "mlp.experts.7.down_proj")]
    report = artifact_rtn.manifest["report"] | {
        "blocks": {name: block | {"quantized": i / 100} for i, name in enumerate(names)},
        "linears": {name: error | {"quantized": i / 100} for i, name in enumerate(linears)},
        "inputs": {name: {"linears": [name], "stages": stages} for name in linears},
    }
    text = page({**artifact_rtn.manifest, "report": report, "expert_tokens": {f"{linears[1]}": [1, 5, 9]}}, "a = 1")
    return text.replace("<details>", "<details open>")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here, which lays the page out")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_no_letter_too_small(width, shown, tmp_path):
    path = tmp_path / "wrapper.html"
    path.write_text(WRAPPER % (width, html.escape(shown)))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", f"--user-data-dir={tmp_path}/own")
    run = subprocess.run([BROWSER, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=300)
    if run.returncode:
        pytest.skip(f"Chromium does not run here: {run.stderr[-200:]}")
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", run.stdout, re.DOTALL).group(1)))
    assert found["width"] <= width
    assert found["right"] <= width
    assert found["cut"] == []
    assert len(found["plots"]) >= 4
    assert min(found["plots"]) > 300
    assert found["smallest"] >= 10
