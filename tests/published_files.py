"""Small files in the formats in which data sets are published."""

import pathlib
from unittest import mock

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
