"""The report in a real browser: headless Chromium, where it is installed.

`make test-slow` tries to install it on Debian, `apt-get install chromium`.
"""

import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from fitted_cleaner import FittedCleaner

from tfbilevel._jobs.report.label_cleaning import write_cleaning_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: install it, on Debian with `apt-get install chromium`",
    ),
]
OPTIONS = (
    "--headless",
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)
# Runs in the page, after its own script, and leaves what it saw in the page.
PROBE = """
<script>
const rows = () => Array.from(document.querySelectorAll("[data-row]"))
  .filter((each) => !each.hidden).map((each) => Number(each.dataset.row));
const set = (id, value) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event("change"));
};
function blank(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(data).size < 3;
}
addEventListener("load", () => {
  const seen = {start: rows()};
  const header = document.querySelector('th[data-key="row"] button');
  if (header) {
    header.click();
    seen.sorted = rows();
    header.click();
    seen.reversed = rows();
    seen.aria = header.parentElement.getAttribute("aria-sort");
  } else {
    set("order", "row ascending");
    seen.sorted = rows();
    set("order", "row descending");
    seen.reversed = rows();
  }
  set("given", "b");
  seen.filtered = rows();
  seen.count = document.getElementById("count").textContent;
  set("given", "");
  document.getElementById("more").click();
  seen.all = rows().length;
  const images = Array.from(document.images);
  seen.images = images.length;
  seen.blank = images.filter((i) => !i.complete || !i.naturalWidth || blank(i)).length;
  seen.width = [document.documentElement.scrollWidth, innerWidth];
  const cell = document.querySelector(".confusion .same");
  seen.colour = getComputedStyle(cell).backgroundColor;
  seen.requests = performance.getEntriesByType("resource").map((each) => each.name)
    .filter((name) => !name.startsWith("data:"));
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>
"""
CLASSES = ["a", "b", "<script>document.title = 'broken'</script>"]
N = 60  # suspicious examples, more than are shown at first


def chromium(folder: pathlib.Path, *arguments: str) -> tuple[str, str]:
    """What Chromium prints, and what its console and its log say."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


def written(folder: pathlib.Path, x) -> pathlib.Path:
    suggested = np.arange(N) % 3
    given = (suggested + 1) % 3
    weights = np.random.default_rng(0).permutation(N) / (2 * N)
    accuracy = {"before": 0.6, "after": 0.9, "n": 50}
    cleaner = FittedCleaner(given, suggested, weights, CLASSES, accuracy)
    path = folder / "report.html"
    write_cleaning_report(path, cleaner, x, facts={"seconds": 12})
    return path


def pictures() -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (N, 12, 12))
    return noise.astype(np.uint8)


def texts() -> np.ndarray:
    return np.array(
        [f"text {i} <img src='http://example.org/{i}.png'>" for i in range(N)]
    )


@pytest.mark.parametrize("width", [1100, 500])
@pytest.mark.parametrize("x", [pictures(), texts()], ids=["images", "texts"])
def test_the_page_works(tmp_path, x, width):
    page = written(tmp_path, x)
    order = np.random.default_rng(0).permutation(N).argsort().tolist()
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    size = f"--window-size={width},900"
    dom, log = chromium(tmp_path, size, "--dump-dom", page.as_uri())
    assert "CONSOLE" not in log  # no error, no warning, nothing refused
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom)
    assert found, "the script did not run"
    seen = json.loads(found[1])
    assert seen["start"] == order[:30]
    assert seen["sorted"] == list(range(30))
    assert seen["reversed"] == list(range(N - 1, N - 31, -1))
    assert seen["filtered"] == list(range(N - 3, -1, -3))  # given b: suggested a
    assert seen["count"] == "20 of 60 shown"
    assert seen["all"] == N
    assert seen["images"] == (N if x.ndim == 3 else 0) and seen["blank"] == 0
    assert seen["requests"] == []
    assert seen["width"][0] <= seen["width"][1], "the page is wider than the window"
    assert seen["colour"] not in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
    if x.ndim == 1:
        assert seen["aria"] == "descending"
    assert "<title>Label cleaning</title>" in dom


def test_the_order_in_the_address(tmp_path):
    page = written(tmp_path, texts())
    dom, _ = chromium(tmp_path, "--dump-dom", f"{page.as_uri()}#row+descending")
    rows = re.findall(r'data-row="(\d+)"', dom)
    assert [int(row) for row in rows] == list(range(N - 1, -1, -1))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn(tmp_path, scheme):
    image = pytest.importorskip("PIL.Image")
    page, picture = written(tmp_path, pictures()), tmp_path / "page.png"
    dark = ["--force-dark-mode"] if scheme == "dark" else []
    arguments = f"--screenshot={picture}", "--window-size=1000,1600", page.as_uri()
    chromium(tmp_path, *dark, *arguments)
    pixels = np.asarray(image.open(picture).convert("RGB"), float)
    assert pixels.shape == (1600, 1000, 3)
    assert (pixels[2, 2].mean() > 128) == (scheme == "light")  # the background
    # Every fifth of the page has something in it that is not its background.
    for part in np.array_split(pixels, 5):
        assert part.std() > 5
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()
    assert blue > 0.005  # the bar of the accuracy, and the cells of right labels
