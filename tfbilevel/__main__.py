"""`python -m tfbilevel`, the same as the command `tfbilevel`."""

import sys

from tfbilevel._jobs.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
