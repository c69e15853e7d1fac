"""An error at import, unless Keras runs on TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "tfbilevel needs Keras on TensorFlow. Set KERAS_BACKEND=tensorflow before "
        "Keras is imported, or the backend in ~/.keras/keras.json. "
        f"Received: backend {keras.backend.backend()!r}"
    )
