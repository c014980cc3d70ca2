"""Becomes another program, after binding its life to its parent's: `bound.py SIGNAL PARENT_PID USER PROGRAM ARGS...`

Every process that strop starts is started through it: the supervisor's children (SIGKILL: whatever they are and however deep
in native code they hang) and the parts of the one-machine stack. It drops root for USER (`-`: stays as it is), asks the kernel
for SIGNAL when the parent dies, and execs PROGRAM. Run by its path in an isolated interpreter (`-I -S`), so it uses the standard
library alone. A `preexec_fn` could do the same, but runs Python in a forked copy of a threaded process, which may hang.

The kernel means the *thread* that started the child: start children from a thread that lives as long as they should.
"""

import ctypes
import os
import pwd
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PARENT_GONE = 125


def main() -> None:
    death_signal, parent, user, *command = sys.argv[1:]
    if user != "-":
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    # After setuid: a change of credentials clears the parent-death signal.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.Signals[death_signal]), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it died before the signal was set
        sys.exit(_PARENT_GONE)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
