"""With what codes scripts end, for launchers and batch systems."""

from __future__ import annotations

DONE = 0
USER_ERROR = 2
"""Something the user gave is wrong; the same command will fail again."""
PREEMPTED = 75
"""Stopped by SIGTERM or SIGUSR1 with everything saved: the same command goes on."""
PEER_LOST = 76
"""Another rank died, or is late; the same command goes on from the last checkpoint."""
DIVERGED = 77
"""Losses or gradients stayed non-finite; a diagnosis was printed."""
INTERRUPTED = 130
"""Ctrl-C, or a second signal."""
