"""``python -m marlin_cy``: the same as the command ``marlin-cy``."""

import sys

from marlin_cy.cli import main

if __name__ == "__main__":
    sys.exit(main())
