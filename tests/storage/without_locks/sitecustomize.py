"""Any Python with this directory in PYTHONPATH finds no locks on file systems, but in the file WITH_LOCKS."""

import os

from tests.storage.no_locks import take_away

take_away(os.environ["WITH_LOCKS"])
