"""Small files in the formats in which data sets are published."""

import pathlib
import pickle
from unittest import mock

import keras
import numpy as np


def prepare_with_tfds(name: str, archive: pathlib.Path, data_dir: pathlib.Path) -> None:
    """What tensorflow-datasets makes of a published archive, unpacked in a folder."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=str(data_dir))
    with mock.patch.object(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, url: str(archive),
    ):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )


# CIFAR-100: super-class -> its classes.
TAXONOMY = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def prepare_cifar100(folder: pathlib.Path) -> list[str]:
    """Three images of each class, every pixel its number, in `folder / "tfds"`.

    Made from the published binary version: a byte of super-class, one of class, then
    the pixels. Returns the names of the classes.
    """
    binary = folder / "archive" / "cifar-100-binary"
    binary.mkdir(parents=True)
    coarse = sorted(TAXONOMY)
    above = {name: group for group, some in TAXONOMY.items() for name in some.split()}
    fine = sorted(above)
    (binary / "coarse_label_names.txt").write_text("\n".join(coarse))
    (binary / "fine_label_names.txt").write_text("\n".join(fine))
    for file, copies in (("train", 2), ("test", 1)):
        rows = np.zeros((100 * copies, 3074), np.uint8)
        for number, row in enumerate(rows):
            row[1] = number % 100
            row[0] = coarse.index(above[fine[number % 100]])
            row[2:] = number % 100
        (binary / f"{file}.bin").write_bytes(rows.tobytes())
    prepare_with_tfds("cifar100", folder / "archive", folder / "tfds")
    return fine


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar10(train: int, test: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> images, [n, 32, 32, 3], dark with three bright rows that depend on the
    class and have its colour, with noise; and their labels."""
    generator = np.random.default_rng(0)
    colours = generator.integers(60, 196, (10, 3))
    rows = 1 + 3 * np.arange(10)[:, None] + np.arange(3)
    patterns = np.full((10, 32, 32, 3), 30)
    for label in range(10):
        patterns[label, rows[label]] = colours[label]
    made = {}
    for split, count in (("train", train), ("test", test)):
        labels = generator.integers(0, 10, count)
        noise = generator.integers(-30, 60, (count, 32, 32, 3), np.int16)
        images = patterns[labels] + noise
        made[split] = images.astype(np.uint8), labels
    return made


def write_cifar10(folder: pathlib.Path, layout: str, data: dict) -> pathlib.Path:
    """The images in one of the published layouts; returns the folder for --data-dir.

    Args:
        folder: a new folder, or one that exists.
        layout: "python", "python 2" (as published: written by Python 2), "binary",
            "folders" (of classes), "numbered" (folders, with the images' numbers in
            their names) or "flat".
        data: what `cifar10` gives.
    """
    if layout in ("folders", "numbered", "flat"):
        for split, (images, labels) in data.items():
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{number}_{CIFAR10[label]}.png"
                if layout == "folders":
                    name = f"{CIFAR10[label]}/image{number:05d}.png"
                elif layout == "numbered":
                    name = f"{CIFAR10[label]}/{name}"
                path = folder / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                keras.utils.save_img(path, image, scale=False)
        return folder
    binary = layout == "binary"
    place = folder / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    place.mkdir(parents=True)
    parts = [*zip(*(np.array_split(x, 5) for x in data["train"]), strict=True)]
    for name, (images, labels) in zip(BATCHES, [*parts, data["test"]], strict=True):
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        if binary:
            rows = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
            (place / f"{name}.bin").write_bytes(rows.tobytes())
            continue
        content = {"data": planes, "labels": labels.tolist(), "batch_label": name}
        if layout == "python 2":
            content = {key.encode(): value for key, value in content.items()}
        (place / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder
