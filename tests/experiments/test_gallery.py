"""The gallery: what it starts, keeps, continues and reports, and its page."""

import base64
import html.parser
import json
import pathlib
import shlex
import shutil
import sys
import threading
import types
from typing import Any

import pytest
from experiment_scripts import ROOT, load_experiment

gallery = load_experiment("gallery")
PICTURE = base64.b64decode(  # one white pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
)
SCRIPT = """
import json, pathlib, sys
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
out.mkdir(exist_ok=True)
with (out / "starts.txt").open("a") as file:
    print(*flags, file=file)
(out / "config.json").touch()
print("Writing to", out)
print("a <b> & c")
if "--fail" in flags:
    print("first line", file=sys.stderr)
    raise SystemExit("no room")
(out / "summary.json").write_text(json.dumps({"score": 1 / 3, "by": {
    "x": {"p": 1.5, "q": None}, "y": {"p": 2}}}))
(out / "picture.png").write_bytes(bytes.fromhex(flags[1]))
"""


@pytest.fixture
def scripts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Stands for the experiments: a script of a few lines, which needs no library."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "small.py").write_text(SCRIPT)
    monkeypatch.setattr(gallery, "EXPERIMENTS", folder)
    entries = {
        "one": gallery.Entry("small", f"--picture {PICTURE.hex()}", "One", "First.", 1),
        "two": gallery.Entry("small", "--fail now", "Two", "Second.", 2),
    }
    monkeypatch.setattr(gallery, "GALLERY", entries)
    return folder


def make(out: pathlib.Path, *only: str) -> None:
    gallery.main(["--out", str(out), "--only", *only])


def starts(out: pathlib.Path, name: str) -> list[str]:
    return (out / name / "run" / "starts.txt").read_text().splitlines()


class Page(html.parser.HTMLParser):
    """The text, the pictures and the addresses of a page."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += [data.strip()] if data.strip() else []


def test_a_failure_is_named_and_the_others_go_on(
    scripts: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    out = tmp_path / "gallery"
    with pytest.raises(SystemExit) as stop:
        make(out, "one", "two")
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "two: failed: exit status 1, no room" in said and "failed: two;" in said
    assert "one: done in " in said
    page = Page(out / "index.html")
    assert "Failed: exit status 1, no room" in page.text
    # Self-contained: everything is in the file.
    assert page.addresses == [
        "#one",
        "#two",
        "data:image/png;base64," + base64.b64encode(PICTURE).decode(),
    ]
    flags = f"--picture {PICTURE.hex()}"
    assert f"python experiments/small.py {flags} --out runs/one" in page.text
    assert "a <b> & c" in page.text
    assert not any("Writing to" in text for text in page.text)
    # The summary as tables: numbers of one level, and rows that are alike.
    first = page.text.index("score")
    assert page.text[first : first + 2] == ["score", "0.3333"]
    assert page.text[first + 2 : first + 9] == ["by", "p", "q", "x", "1.5", "y", "2"]
    # Started again: what is complete is kept, what failed is continued.
    with pytest.raises(SystemExit):
        make(out, "one", "two")
    assert "one: kept" in capsys.readouterr().out
    assert len(starts(out, "one")) == 1
    begun, continued = starts(out, "two")
    assert continued == f"{begun} --resume"


def test_the_page_is_of_those_that_write_nothing_now(
    scripts: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed is started again while the page of another is written."""
    make(tmp_path, "one")
    args = gallery.parse_args(["--out", str(tmp_path), "--only", "one", "two"])
    assert "First." in gallery.page(args, left=1)
    assert "First." not in gallery.page(args, left=2, running={"one"})
    ended, started = (gallery.result(tmp_path / "one") for _ in range(2))
    del started["exit"]  # what the folder says from the start on
    read = iter([ended, {}, *[started] * 9])
    monkeypatch.setattr(gallery, "result", lambda folder: next(read))
    assert "First." in gallery.page(args, left=1)


def test_those_that_run_are_named_to_the_page(
    scripts: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of "one" is written while "two" runs."""
    begun, written, named = threading.Event(), threading.Event(), []

    def run(folder: pathlib.Path, entry: Any, threads: int) -> dict[str, Any]:
        if folder.name == "two":
            begun.set()
        assert (written if folder.name == "two" else begun).wait(60)
        return {"flags": entry.flags, "exit": 0, "seconds": 0.0}

    def page(args: Any, left: int, running: set[str]) -> str:
        named.append((left, {*running}))
        written.set()
        return ""

    monkeypatch.setattr(gallery, "run", run)
    monkeypatch.setattr(gallery, "page", page)
    gallery.main(["--out", str(tmp_path / "gallery"), "--jobs", "2"])
    assert named == [(1, {"two"}), (0, set())]


def test_another_command_begins_again(
    scripts: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    make(tmp_path, "one")
    capsys.readouterr()
    one = gallery.GALLERY["one"]
    other = gallery.dataclasses.replace(one, flags=f"{one.flags} --more 1")
    monkeypatch.setitem(gallery.GALLERY, "one", other)
    args = gallery.parse_args(["--out", str(tmp_path)])
    assert "First." not in gallery.page(args, left=1)  # its numbers are of the former
    make(tmp_path, "one")
    assert "First." in gallery.page(args, left=0)
    assert "one: done in" in capsys.readouterr().out
    (line,) = starts(tmp_path, "one")
    assert "--more 1" in line and "--resume" not in line


def test_an_experiment_that_was_killed_is_continued(
    scripts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A kill leaves the command, and no exit status."""
    make(tmp_path, "one")
    flags = json.loads((tmp_path / "one" / "gallery.json").read_text())["flags"]
    (tmp_path / "one" / "gallery.json").write_text(json.dumps({"flags": flags}))
    make(tmp_path, "one")
    assert [line.endswith("--resume") for line in starts(tmp_path, "one")] == [0, 1]
    # One that was killed before its folder was a run begins.
    shutil.rmtree(tmp_path / "one" / "run")
    (tmp_path / "one" / "gallery.json").write_text(json.dumps({"flags": flags}))
    make(tmp_path, "one")
    assert [line.endswith("--resume") for line in starts(tmp_path, "one")] == [0]


def test_a_folder_of_somebody_else_is_left_alone(
    scripts: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    """Such as `runs`, with runs of the same names in it."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "summary.json").touch()
    with pytest.raises(SystemExit) as stop:
        make(tmp_path, "one")
    assert stop.value.code == 2
    assert "made by another program" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["summary.json"]


def test_a_gallery_in_use_is_one_line(
    scripts: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    with gallery.filelock.FileLock(tmp_path / ".lock"):
        with pytest.raises(SystemExit) as stop:
            make(tmp_path, "one")
    assert stop.value.code == 2
    assert "another gallery is made there" in capsys.readouterr().err


def test_the_seconds_are_those_of_the_process(tmp_path: pathlib.Path) -> None:
    work = "import time; end = time.process_time() + 0.1\n"
    work += "while time.process_time() < end: pass"
    process = gallery.subprocess.Popen([sys.executable, "-c", work])
    code, seconds = gallery.wait(process)
    assert code == 0 and 0.1 <= seconds < 3


def test_every_experiment_is_in_it_and_takes_its_flags(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert {e.script for e in gallery.GALLERY.values()} == scripts - {"gallery"}
    for entry in gallery.GALLERY.values():
        flags = [*shlex.split(entry.flags), "--out", "x"]
        args = load_experiment(entry.script).parse_args(flags)
        assert getattr(args, "dataset", None) in {None, "digits", "glyphs", "generated"}


@pytest.mark.slow
def test_a_real_experiment(tmp_path: pathlib.Path) -> None:
    """The fastest one, as `make experiments` runs it."""
    make(tmp_path, "toy")
    run = tmp_path / "toy" / "run"
    pictures = {path.name for path in run.glob("*.png")}
    assert pictures == {"end_points.png"}
    page = Page(tmp_path / "index.html")
    sources = [source for source in page.addresses if source.startswith("data:")]
    found = base64.b64decode(sources[0].partition(",")[2])
    assert found == (run / "end_points.png").read_bytes() and len(sources) == 1
    assert "python experiments/toy_pbgd.py --out runs/toy" in page.text
    ended = types.SimpleNamespace(**gallery.result(tmp_path / "toy"))
    assert ended.exit == 0 and 1 < ended.cpu_seconds < 60
