"""Tools that turn a published dataset's files into what the experiments read."""
