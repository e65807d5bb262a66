"""`python -m rlvlm` is `rlvlm`."""

from rlvlm.cli import main

raise SystemExit(main())
