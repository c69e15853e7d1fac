"""The page about cleaned labels, read as text. A browser looks at it in
`test_report_in_browser.py`."""

import html.parser
import io
import pathlib
import re

import numpy as np
import pytest
from fitted_cleaner import FittedCleaner

import tfbilevel._jobs.report.page
from tfbilevel._jobs.intervals import wilson_interval
from tfbilevel._jobs.optional_packages import MissingPackageError
from tfbilevel._jobs.report.examples import shown_examples
from tfbilevel._jobs.report.label_cleaning import write_cleaning_report
from tfbilevel._jobs.report.pictures import confusion, histogram
from tfbilevel._jobs.report.png import LARGEST, png, thumbnail

GIVEN = [0, 1, 2, 1, 0, 2, 2]
SUGGESTED = [0, 1, 2, 0, 2, 2, 0]
WEIGHTS = [0.95, 0.97, 0.99, 0.2, 0.05, 0.6, 0.1]
CLASSES = ["cat", "dog", "<script>alert('x')</script>"]


def cleaner(**changed) -> FittedCleaner:
    values = dict(given=GIVEN, suggested=SUGGESTED, weights=WEIGHTS, classes=CLASSES)
    accuracy = {"before": 0.5, "after": 0.9, "n": 100}
    return FittedCleaner(**{**values, "accuracy": accuracy, **changed})


def page(folder: pathlib.Path, *arguments, **options) -> str:
    path = folder / "new" / "report.html"
    write_cleaning_report(path, *arguments, **options)
    return path.read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """All tags with their attributes, and the texts of the cells of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_what_was_found(tmp_path):
    text = page(tmp_path, cleaner(), np.array(["one", "two"] * 3 + ["three"]))
    assert "3 of 7 labels (42.9\u00a0%) look wrong." in text
    assert "right in 90.0\u00a0% of cases after cleaning" in text
    assert "right in 50.0\u00a0%" in text
    assert "can be chance" not in text  # 0.40 to 0.60 and 0.83 to 0.94
    rows = [t for t in Tags(text).of("tr") if "data-row" in t]
    assert [row["data-row"] for row in rows] == ["4", "6", "3"]
    assert [row["data-given"] for row in rows] == ["cat", CLASSES[2], "dog"]
    assert [row["data-suggested"] for row in rows] == [CLASSES[2], "cat", "cat"]
    assert [float(row["data-probability"]) for row in rows] == [0.05, 0.1, 0.2]
    for score in "0.5000", "0.7500", "1.2500":
        assert score in text


@pytest.mark.parametrize(
    "accuracy, sentence",
    [
        ({"before": 0.8, "after": 0.82, "n": 100}, "such a difference can be chance"),
        ({"before": 0.8, "after": 0.8, "n": 100}, "did not change the accuracy"),
        ({"before": 0.8, "after": 0.3, "n": 100}, "did not help the network"),
        # Of three classes a third is guessed right; 0.3 to 0.5 is the interval.
        ({"before": 0.1, "after": 0.4, "n": 100}, "not clearly better than guessing"),
        (None, "Not measured: there were no trusted examples"),
    ],
)
def test_a_gain_that_is_none_is_called_none(tmp_path, accuracy, sentence):
    assert sentence in page(tmp_path, cleaner(accuracy=accuracy))


def test_a_good_network_is_not_called_a_guess(tmp_path):
    assert "guessing" not in page(tmp_path, cleaner())


def test_seconds_of_a_stage_are_no_curve(tmp_path):
    fitted = cleaner()
    fitted.history_ = {"first": {"loss": [2.0, 1.5, 1.0], "seconds": [12.34]}}
    text = page(tmp_path, fitted)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text.split("<h3>Training</h3>")[1])
    assert cells[:4] == ["first", "3", "12.3", "loss 2 to 1"]


def test_a_table_of_pandas_serves_for_the_issues(tmp_path):
    pandas = pytest.importorskip("pandas")
    fitted = cleaner()
    arrays = page(tmp_path, fitted)
    fitted.label_issues_ = pandas.DataFrame(fitted.label_issues_)
    assert page(tmp_path, fitted) == arrays


def test_no_issue(tmp_path):
    text = page(tmp_path, cleaner(suggested=GIVEN))
    assert "None of the 7 labels looks wrong." in text and "There are none." in text


def test_what_the_user_wrote_has_no_meaning_in_html(tmp_path):
    evil = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({evil: [evil] * 7, "b": range(7)})
    fitted = cleaner(classes=["a", "b", evil])
    fitted.choice_.reason = fitted.choice_.name = evil
    fitted.history_ = {evil: {evil: [1.0, 2.0]}}
    options = dict(commands=[evil], facts={evil: evil}, title=evil, names=[evil] * 7)
    for x in table, np.array([evil] * 7), np.zeros((7, 2, 2)):
        tags = Tags(page(tmp_path, fitted, x, **options))
        assert len(tags.of("script")) == 1
        assert all("onerror" not in attributes for _, attributes in tags.tags)
        sources = [image["src"] for image in tags.of("img")]
        assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_file_is_self_contained(tmp_path):
    text = page(tmp_path, cleaner(), np.zeros((7, 4, 4)))
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in text
    for _, attributes in Tags(text).tags:
        for name in "src", "href":
            assert (attributes.get(name) or "#").startswith(("#", "data:"))


def test_only_the_most_suspicious_are_on_the_page(tmp_path):
    text = page(tmp_path, cleaner(), np.zeros((7, 4, 4)), most=2)
    assert "The 2 most suspicious of 3 are on this page." in text
    assert [t["data-rank"] for t in Tags(text).of("li")] == ["1", "2"]


def test_a_failure_leaves_the_old_page(tmp_path):
    page(tmp_path, cleaner())
    before = (tmp_path / "new" / "report.html").read_text()
    fitted = cleaner()
    fitted.transition_ = "broken"
    with pytest.raises(ValueError):
        page(tmp_path, fitted)
    with pytest.raises(ValueError, match="`x` must be the examples .* 7 of .*: 3"):
        page(tmp_path, cleaner(), np.zeros(3))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]
    assert (tmp_path / "new" / "report.html").read_text() == before


def test_without_jinja2(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match="pip install jinja2"):
        page(tmp_path, cleaner())
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_no_part(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tfbilevel._jobs.report.page.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        page(tmp_path, cleaner())
    assert list((tmp_path / "new").iterdir()) == []


def test_the_interval_solves_its_equation():
    """|share - p| = z sqrt(p (1 - p) / n) at both ends, with 1.96 of a table."""
    for share, n in ((0.9, 100), (0.5, 7), (0.01, 50), (0.0, 20), (1.0, 20)):
        low, high = wilson_interval(share, n)
        assert 0 <= low < high <= 1
        for p in {low, high} - {0.0, 1.0}:
            deviation = 1.959964 * np.sqrt(p * (1 - p) / n)
            assert abs(share - p) == pytest.approx(deviation, rel=1e-5)
    assert wilson_interval(0.0, 20)[0] == 0 and wilson_interval(1.0, 20)[1] == 1


@pytest.mark.parametrize(
    "channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")]
)
def test_png_is_read_by_another_program(channels, mode):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    read = image.open(io.BytesIO(png(pixels)))
    assert read.mode == mode and read.size == (7, 5)
    np.testing.assert_array_equal(np.array(read).reshape(pixels.shape), pixels)


def pixels_of(shown) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    import base64

    content = base64.b64decode(shown.uri.partition(",")[2])
    return np.array(image.open(io.BytesIO(content)))


def test_thumbnails_keep_the_picture():
    ramp = np.linspace(0, 1, 300)[None, :, None] * np.ones((200, 1, 3))
    small = thumbnail(ramp, 0.0, 1.0)
    assert (small.width, small.height) == (100, 66) and not small.small
    pixels = pixels_of(small)
    # Each column is the mean of three.
    means = ramp[0, :, 0].reshape(100, 3).mean(axis=1)
    np.testing.assert_allclose(pixels[10, :, 1], 255 * means, atol=0.51)
    assert thumbnail(np.zeros((28, 28, 1)), 0, 1).small
    thin = thumbnail(np.ones((1, 5000, 1)), 0, 1)
    assert thin.height == 1 and LARGEST - 3 <= thin.width <= LARGEST


@pytest.mark.parametrize(
    "images, brightest",
    [
        (np.array([0, 128, 255], np.uint8), 255),
        (np.array([0.0, 0.5, 1.0]), 255),
        (np.array([0.0, 0.5, 0.5]), 128),  # 0 to 1, the brightest at a half
        (np.array([0.0, 64.0, 128.0]), 128),
        (np.array([-3.0, 0.0, 5.0]), 255),  # standardised: from the least to the most
    ],
)
def test_the_range_of_pixels_is_seen(images, brightest):
    shown = shown_examples(images.reshape(1, 1, 3), np.array([0]))
    assert shown.kind == "image"
    assert pixels_of(shown.shown[0]).max() == brightest


def test_kinds_of_examples():
    rows = np.array([2, 0])
    texts = shown_examples(np.array(["a", "b", "c " * 400], object), rows)
    assert texts.kind == "text" and texts.shown[1] == "a"
    assert len(texts.shown[0]) < 310 and texts.shown[0].endswith("…")
    table = shown_examples(np.arange(60.0).reshape(3, 20), rows)
    assert table.kind == "row" and table.columns[-2:] == ["x[11]", "and 8 more"]
    assert table.shown[0][:2] == ["40", "41"]
    first = np.zeros((3, 1, 8, 9))  # channels first
    assert shown_examples(first, rows).shown[0].width == 9
    assert shown_examples(np.zeros((3, 8, 9, 3)), rows).shown[0].height == 8
    none = shown_examples(None, rows)
    assert none.kind == "none" and len(none.shown) == 2


def test_confusion_has_the_true_class_in_rows():
    transition = np.array([[0.75, 0.25, 0], [0, 1, 0], [0.004, 0, 0.996]])
    made = confusion(transition, ["a", "b", "c"])
    assert made["strongest"][0] == {"true": "a", "given": "b", "share": 0.25}
    assert "truly a, about 25\u00a0% were labelled b" in made["sentence"]
    texts = [[cell["text"] for cell in row] for row in made["rows"]]
    assert texts == [["75", "25", "·"], ["·", "100", "·"], ["·", "·", "100"]]
    assert made["rows"][0][1]["title"] == "true a, given b: 25.0\u00a0%"
    assert confusion(np.eye(30), [str(i) for i in range(30)])["rows"] is None
    assert "No class" in confusion(np.eye(2), ["a", "b"])["sentence"]


def test_histogram_counts():
    weights = np.array([0.01, 0.02, 0.5, 0.97, 0.98, 0.99, 1.0])
    made = histogram(weights, weights < 0.015)
    assert "0 to 5\u00a0%: 2 examples, 1 of them suspicious" == made["bins"][0]["title"]
    assert "4 examples" in made["bins"][19]["title"] and made["most"] == 4
    assert made["bins"][19]["right_height"] == made["height"]
    first = made["bins"][0]  # two of at most four: the square root of a half
    assert first["wrong_height"] + first["right_height"] == pytest.approx(
        made["height"] * 0.5**0.5, abs=0.2
    )
    assert first["wrong_height"] == pytest.approx(first["right_height"], abs=0.2)
    assert made["sentence"].startswith("Of 7 given labels, 4 are right")
    assert "and 2 with one below" in made["sentence"]


def test_the_lines_that_repeat_it_have_the_arguments_given(tmp_path):
    def network():
        raise AssertionError("not called")

    fitted = cleaner()
    fitted.model, fitted.seed, fitted.rate = network, 7, 0.1
    text = page(tmp_path, _with_arguments(fitted))
    assert "cleaner = tb.Cleaner(model=network, seed=7)" in text


def _with_arguments(fitted: FittedCleaner) -> FittedCleaner:
    class Cleaner(FittedCleaner):
        def __init__(self, model, *, seed=0, rate=0.1):
            self.__dict__.update(fitted.__dict__, model=model, seed=seed, rate=rate)

    return Cleaner(fitted.model, seed=fitted.seed, rate=fitted.rate)
