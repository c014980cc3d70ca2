"""Becomes the child's program after binding its life to its supervisor's: `launch.py PARENT_PID PROGRAM ARGS...`

Started by its path, in an isolated interpreter, so it uses the standard library alone. The kernel then kills the child when
the thread that started it ends, however it ends; whatever PROGRAM is and however deep in native code it hangs. A
`preexec_fn` could do the same, but runs Python in a forked copy of a threaded process, which may hang.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it died before the signal was set
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
