"""`python -m plopfast`"""

import sys

from .cli.main import main

sys.exit(main())
