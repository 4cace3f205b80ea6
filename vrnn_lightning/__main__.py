"""``python -m vrnn_lightning`` is the same as ``lightning``."""

import sys

from vrnn_lightning.cli import main

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # as a script has it: the working directory hides no installed package
    sys.exit(main())
