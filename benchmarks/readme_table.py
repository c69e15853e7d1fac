"""README's table: learned weights beside the same network without them.

python benchmarks/readme_table.py
"""

import argparse
import pathlib
import re

import keras
import numpy as np
from sklearn.linear_model import LogisticRegression

ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTHS = (20, 80, 400)  # steps of full-batch SGD; the example's inner loop makes 20


def example(seed: int) -> dict:
    """What the Python block of README with two losses defines, run from this seed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = [code for code in blocks if "tb.ExampleWeights" in code]
    code, seeds = re.subn(r"(set_random_seed)\(0\)", rf"\1({seed})", block)
    assert seeds == 1, "the example sets no seed"
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def plain(names: dict, seed: int, steps: int) -> float:
    """Test accuracy of the example's network, trained on all labels as given."""
    keras.utils.set_random_seed(seed)
    network = keras.Sequential([keras.Input((784,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(0.5), loss)
    seen = np.concatenate([names["trusted"], names["noisy"]])
    images = names["images"] / 255
    network.fit(
        images[seen], names["given"][seen], len(seen), epochs=steps, verbose="silent"
    )
    read = network.predict(images[names["test"]], verbose="silent").argmax(axis=1)
    return np.mean(read == names["labels"][names["test"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    for seed in range(parser.parse_args().seeds):
        names = example(seed)
        suspects = names["suspects"]
        wrong = np.mean(names["given"][suspects] != names["labels"][suspects])
        lengths = {steps: plain(names, seed, steps) for steps in LENGTHS}
        trusted, test = names["trusted"], names["test"]
        images, labels = names["images"] / 255, names["labels"]
        alone = LogisticRegression(max_iter=1000).fit(images[trusted], labels[trusted])
        print(f"\nseed {seed}")
        for steps, accuracy in lengths.items():
            print(f"{accuracy:6.1%} all labels as given, {steps} steps")
        print(
            f"{alone.score(images[test], labels[test]):6.1%} the trusted images alone"
        )
        print(f"{names['accuracy']:6.1%} learned weights; of the suspects {wrong:.1%}")


if __name__ == "__main__":
    main()
