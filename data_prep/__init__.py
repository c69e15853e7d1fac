"""Tools that convert published data files to the format that the experiments read."""
