"""``python -m ztserve.cli`` is ``ztserve``."""

import sys

from ztserve.cli import main

sys.exit(main())
