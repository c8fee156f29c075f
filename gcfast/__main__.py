"""Lets ``python -m gcfast`` do what the command ``gcfast`` does."""

import sys

from gcfast.cli import main

sys.exit(main())
