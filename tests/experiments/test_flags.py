"""Flags of all scripts: former names, the folder without --out, data by themselves."""

import pathlib
import re
import shlex
import time
import urllib.error
from typing import Any

import pytest
from experiment_scripts import ROOT, load_experiment

from data_prep import images, network, twentynews

# Script -> flags under the published or a former name, and under the one name.
ALIASES = {
    "data_hyper_cleaning": (
        "--pollution-rate 0.3 --pollution strict --reg 0.1 --method iaptt-gm "
        "--dynamics nesterov-m --momentum 0.5",
        "--noise 0.3 --noise-kind strict --regularisation 0.1 --method iaptt-gm "
        "--dynamics nesterov-m --inner-momentum 0.5",
    ),
    "mnist_reweighting": (
        "--dataset digits --noise-rate 0.3 --hessian-q 2",
        "--dataset digits --noise 0.3 --solver-steps 2",
    ),
    "few_shot": (
        "--method imaml --network shifted --cg-steps 2",
        "--method imaml --net shifted --solver-steps 2",
    ),
    "l2reg_twentynews": (
        "--dataset generated --method hoag --tolerance-ratio 0.5 --final-steps 3",
        "--dataset generated --method hoag --tolerance-decay 0.5 --retrain-steps 3",
    ),
    "clean_label_attack": (
        "--data x.npz --features x.h5 --head-steps 3 --head-lr 0.1",
        "--data-file x.npz --features-file x.h5 --train-steps 3 --train-lr 0.1",
    ),
    "synthetic_penalty": ("--trials 3 --record-every 5", "--starts 3 --eval-every 5"),
    "nonconvex_follower": ("--example sine", "--problem sine"),
    "label_cleaning": (
        "--noise-rate 0.3 --trusted-size 50",
        "--noise 0.3 --validation-size 50",
    ),
}


@pytest.mark.parametrize("script", ALIASES)
def test_former_names_are_the_same_flags(script: str) -> None:
    parse = load_experiment(script).parse_args
    former, now = (
        parse([*shlex.split(flags), "--out", "x"]) for flags in ALIASES[script]
    )
    assert str(vars(former)) == str(vars(now))


def test_one_thing_has_one_name() -> None:
    """No script's own name for a flag is another script's former name of it."""
    former = {
        flag
        for old, new in ALIASES.values()
        for flag in {*re.findall(r"--[\w-]+", old)} - {*re.findall(r"--[\w-]+", new)}
    }
    # Elsewhere they are other things: runs at successive seeds; words or counts.
    former -= {"--trials", "--features"}
    for script in (ROOT / "experiments").glob("**/*.py"):
        first = re.findall(r'add\(\s*"(--[a-z-]+)"', script.read_text())
        assert not former & {*first}, script


def test_a_kind_of_noise_under_its_former_name_is_explained(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        load_experiment("label_cleaning").parse_args(["--noise", "symmetric"])
    assert "their kind is --noise-kind symmetric" in capsys.readouterr().err


# The folder.


@pytest.mark.usefixtures("no_pictures")
def test_the_folder_is_named_after_the_script_and_the_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["experiments/toy_pbgd.py"])
    toy = load_experiment("toy_pbgd")
    before = time.strftime("%Y-%m-%d-%H%M%S")
    flags = ["--starts", "2", "--outer-steps", "2"]
    toy.main(flags)
    after = time.strftime("%Y-%m-%d-%H%M%S")
    (folder,) = pathlib.Path("runs").iterdir()
    name, moment, thousandths = re.fullmatch(
        r"(\w+)-([\d-]{17})-(\d{3})", folder.name
    ).groups()  # type: ignore[union-attr]
    assert name == "toy_pbgd" and before <= moment <= after
    assert capsys.readouterr().out.startswith(f"Writing to {folder}\n")
    assert (folder / "summary.json").exists()
    # It is resumed by its name, and only so.
    toy.main([*flags, "--resume", "--out", str(folder)])
    assert capsys.readouterr().out.startswith(f"Continuing {folder}\n")
    with pytest.raises(SystemExit):
        toy.main([*flags, "--resume"])
    assert "--resume needs --out FOLDER" in capsys.readouterr().err
    assert [*pathlib.Path("runs").iterdir()] == [folder]


def test_nothing_is_made_by_parsing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (
        load_experiment("toy_pbgd").parse_args([]).out for _ in range(2) if _wait()
    )
    assert first != second and [*tmp_path.iterdir()] == []


def _wait() -> bool:
    time.sleep(0.002)  # two scripts do not start within a millisecond
    return True


# Data that need no files, and those that are downloaded.


@pytest.mark.parametrize("script", ["mnist_reweighting", "poisoning_mnist"])
def test_mnist_where_it_is_and_digits_elsewhere(
    script: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    parse = load_experiment(script).parse_args
    assert parse(["--out", "x"]).dataset == "digits"
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: mnist is not on this machine: --dataset digits is used" in line
    assert parse(["--out", "x", "--dataset", "digits"]).dataset == "digits"
    assert parse(["--out", "x", "--download"]).dataset == "mnist"
    assert parse(["--out", "x", "--data-dir", "somewhere"]).dataset == "mnist"
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").touch()
    assert parse(["--out", "x"]).dataset == "mnist"
    assert capsys.readouterr().err == ""


def test_every_script_starts_without_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No argument is required, and the data of none are in a file."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    without = {None, "digits", "glyphs", "generated"}
    for path in (ROOT / "experiments").glob("*.py"):
        args = load_experiment(path.stem).parse_args([])
        assert getattr(args, "dataset", None) in without, path


def test_what_a_download_asks_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorflow-datasets is asked for the data set, in the folder that was named."""
    import tensorflow_datasets as tfds

    asked = []

    class Builder:
        data_path = tmp_path / "mnist"

        def download_and_prepare(self) -> None:
            asked.append("prepared")

        def as_dataset(self, **keywords: Any) -> None:
            assert asked[-1] == "prepared"
            raise tfds.core.DatasetNotFoundError("as far as this test goes")

    def builder(name: str, data_dir: str) -> Builder:
        asked.append((name, data_dir))
        return Builder()

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setattr(network, "require", lambda: asked.append("network"))
    with pytest.raises(FileNotFoundError):
        images.load_file("mnist", "train", tmp_path, download=True)
    there = ("mnist", str(tmp_path))
    assert asked == [there, "network", "prepared", there]
    # What is there needs no network.
    Builder.data_path.mkdir()
    asked.clear()
    with pytest.raises(FileNotFoundError):
        images.load_file("mnist", "train", tmp_path, download=True)
    assert asked == [there, "prepared", there]


def no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: Any) -> None:
        raise OSError("Temporary failure in name resolution")

    monkeypatch.setattr(network.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)


@pytest.mark.parametrize(
    ("script", "flags", "remedy"),
    [
        ("data_hyper_cleaning", ["--dataset", "cifar10"], "tfds.load('cifar10')"),
        ("few_shot", ["--dataset", "omniglot"], "tfds.load('omniglot')"),
        ("l2reg_twentynews", [], "fetch_20newsgroups_vectorized()"),
    ],
)
def test_no_network_is_one_line(
    script: str,
    flags: list[str],
    remedy: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    no_name_server(monkeypatch)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sk"))
    with pytest.raises(SystemExit) as stop:
        load_experiment(script).main(
            [*flags, "--download", "--out", str(tmp_path / "run")]
        )
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be downloaded (there is no network" in line and remedy in line
    assert [*tmp_path.iterdir()] == []


def test_a_proxy_is_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    no_name_server(monkeypatch)
    with pytest.raises(OSError, match="there is no network"):
        network.require()
    proxies = {"https": "http://proxy:3128"}
    monkeypatch.setattr(network.urllib.request, "getproxies", lambda: proxies)
    network.require()


def test_newsgroups_are_fetched_by_scikit_learn(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(**keywords: Any) -> None:
        asked.append(keywords["download_if_missing"])
        raise urllib.error.URLError("the server is away")

    sets = twentynews.sklearn.datasets
    monkeypatch.setattr(sets, "fetch_20newsgroups_vectorized", fetch)
    monkeypatch.setattr(network, "require", lambda: None)
    message = "could not be downloaded .*the server is away"
    with pytest.raises(FileNotFoundError, match=message):
        twentynews.fetch(tmp_path / "new", "counts", download=True)
    with pytest.raises(FileNotFoundError, match="or fetch it with --download"):
        twentynews.fetch(tmp_path, "counts")
    assert asked == [True, False]
