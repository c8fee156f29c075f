import sys

from gcfast.cli import main

sys.exit(main())
