"""Run the command line by `python -m recon_cli`."""

import sys

from recon_cli.main import main

sys.exit(main())
