"""`BilevelModel` under a tf.distribute strategy."""
