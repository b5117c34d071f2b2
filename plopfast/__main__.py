"""`python -m plopfast`"""

import sys

from .cli import main

sys.exit(main())
