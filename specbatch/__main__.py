"""``python -m specbatch``."""

import sys

from specbatch.cli import main

sys.exit(main())
