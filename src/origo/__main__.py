"""``python -m origo`` is the command ``origo``."""

import sys

from origo.cli.main import main

sys.exit(main())
