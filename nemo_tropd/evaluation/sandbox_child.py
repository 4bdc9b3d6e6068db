"""The process behind sandbox.py: sets up what a program may see and use, runs it, and reports how it ended.

Three processes: this one, which owns the control group and sweeps up; the supervisor, process 1 of the program's own
process namespace if one can be made, whose end ends all others in it; and the program. Nothing but the standard
library, and not even its site: it starts for every program.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_BIND, _REC, _PRIVATE, _NOSUID, _NODEV, _NOEXEC = 0x1000, 0x4000, 0x40000, 2, 4, 8
_MOUNT_SETATTR, _LANDLOCK = 442, 444  # the same on all processors
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_POLL_S = 0.02


def _call(name, *arguments):
    values = [a.encode() if isinstance(a, str) else a for a in arguments]
    found = getattr(_LIBC, name)(*values)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")
    return found


def _prctl(option, value):
    _call("prctl", option, value, 0, 0, 0)


def _line(**report):
    return json.dumps(report).encode() + b"\n"


def isolate():
    """Namespaces of its own for the next child of this process: processes, network, shared memory; and the right to
    one for mounts."""
    user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0
    _call("unshare", _NEWPID | _NEWNET | _NEWIPC | (0 if root else _NEWUSER))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def change_root(root, readable, file_bytes):
    """A root folder with the system's libraries, the interpreter and a small /tmp, and nothing else of this machine."""
    _call("unshare", _NEWNS)
    _call("mount", None, "/", None, _REC | _PRIVATE, None)
    _call("mount", "tmpfs", root, "tmpfs", _NOSUID, b"size=1m,mode=755")
    for name in ("proc", "tmp"):
        Path(root, name).mkdir()
    # Before what is readable, which may be in /tmp itself: the interpreter of a clone there.
    _call("mount", "tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={4 * file_bytes},mode=1777")
    for path in (*_SYSTEM, *readable, *_DEVICES):
        source, target = Path(path), Path(root + path)
        if target.exists() or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() and path in _SYSTEM[:6]:
            target.symlink_to(os.readlink(source))
            continue
        target.mkdir() if source.is_dir() else target.touch()
        _call("mount", path, str(target), None, _BIND | _REC, None)
    # 1: read-only; with all that is mounted below, but then not /tmp
    for path, recursive, on, off in ((root, 0x8000, 1 | _NOSUID, 0), (f"{root}/tmp", 0, 0, 1)):
        attributes = struct.pack("4Q", on, off, 0, 0)
        if _LIBC.syscall(_MOUNT_SETATTR, -100, path.encode(), recursive, attributes, ctypes.c_size_t(32)) < 0:
            raise OSError(ctypes.get_errno(), f"mount_setattr of {path}")
    _call("mount", "proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC, None)
    os.chdir(root)
    _call("pivot_root", ".", ".")
    _call("umount2", ".", 2)  # detach
    os.chdir("/tmp")


def landlock(readable, folder):
    """Without namespaces: files can be read in ``readable`` alone and changed in ``folder`` alone; no TCP, and no
    signal to other processes."""
    version = _LIBC.syscall(_LANDLOCK, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError(ctypes.get_errno(), "landlock")
    every = (1 << {1: 13, 2: 14}.get(version, 15 if version < 5 else 16)) - 1
    handled = struct.pack("3Q", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _LIBC.syscall(_LANDLOCK, handled, ctypes.c_size_t(size), 0)
    for path in (*_SYSTEM, *readable, "/proc", *_DEVICES, folder):
        if rules < 0 or not os.path.exists(path):
            continue
        access = every if path == folder else 0b1101 if os.path.isdir(path) else 0b111 if path in _DEVICES else 0b101
        rule = struct.pack("=Qi", access & every, os.open(path, os.O_PATH | os.O_CLOEXEC))
        if _LIBC.syscall(_LANDLOCK + 1, rules, 1, rule, 0) < 0:
            raise OSError(ctypes.get_errno(), f"landlock for {path}")
    _prctl(38, 1)  # no new privileges
    if _LIBC.syscall(_LANDLOCK + 2, rules, 0) < 0:
        raise OSError(ctypes.get_errno(), "landlock")


def control_groups(memory, processes):
    """Folders of new control groups with these limits, as far as this process may make them."""
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        wanted = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": processes}}.get(names)
        if names == "":
            wanted = {"memory.max": memory, "memory.swap.max": 0, "pids.max": processes}
        folder = Path(f"/sys/fs/cgroup/{names}{path.rstrip('/')}", f"tropd-sandbox-{os.getpid()}")
        if not wanted or not (folder.parent / "cgroup.procs").exists():
            continue
        try:
            for old in folder.parent.glob("tropd-sandbox-*"):  # of one that was killed
                if not Path("/proc", old.name.rpartition("-")[2]).exists():
                    with contextlib.suppress(OSError):  # another removes it, too
                        old.rmdir()
            folder.mkdir()
        except OSError:
            continue
        try:
            for name, value in wanted.items():
                (folder / name).write_text(str(value))
            made.append(folder)
        except OSError:
            folder.rmdir()
    return made


def descendants():
    """(process, parent's) pages of anonymous memory, of all that descend from this process."""
    parents, pages = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
                resident, shared = Path(f"/proc/{entry}/statm").read_text().split()[1:3]
                pages[int(entry)] = int(resident) - int(shared)
    found, last = {os.getpid()}, 0
    while len(found) > last:
        last = len(found)
        found |= {process for process, parent in parents.items() if parent in found}
    found.remove(os.getpid())
    return {process: pages.get(process, 0) for process in found}


def sweep():
    """Ends all descendants: stopped first, so that none makes new ones meanwhile."""
    while found := descendants():
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with contextlib.suppress(OSError):
                    os.kill(process, how)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def confine(task, user, isolated):
    """The last steps of the program's process, before it becomes the program."""
    os.setsid()
    memory, files = task["memory_bytes"], task["file_bytes"]
    for what, limit in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, task["cpu_seconds"]), (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NPROC, task["processes"]), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        ceiling = resource.getrlimit(what)[1]
        limit = limit if ceiling == resource.RLIM_INFINITY else min(limit, ceiling)
        # over the lower limit a program gets SIGXCPU, which says why it ends; over the upper one it is killed
        resource.setrlimit(what, (limit, limit + int(what == resource.RLIMIT_CPU and limit != ceiling)))
    if user is not None:
        with contextlib.suppress(PermissionError):  # there may be none to give up
            os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if isolated or "Landlock" in task["missing"]:
        _prctl(38, 1)
    else:
        landlock(task["readable"], task["folder"])


def mapped(user):
    """Whether this process's user namespace has ``user``."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return any(first <= user < first + count for first, _, count in (map(int, line.split()) for line in lines))


def supervise(task, report, isolated, groups):
    """Runs the program until it ends or is over a limit; writes the report."""
    _prctl(1, signal.SIGKILL)  # ends with its parent
    for folder in groups:
        (folder / "cgroup.procs").write_text("0")
    folder, user = task["folder"], None
    if os.geteuid() == 0 and (isolated or task["reachable"]):
        # one to itself, so that its processes are counted alone; if there is none, the one called nobody
        user = next(filter(mapped, (200_000 + task["id"], 65534)), None)
    if isolated:
        change_root(folder, task["readable"], task["file_bytes"])
        folder = "/tmp"
    os.chdir(folder)
    Path("program.py").write_text(task["program"])
    text = os.memfd_create("input")
    if task["input"]:
        os.write(text, task["input"].encode(errors="replace"))
    os.lseek(text, 0, os.SEEK_SET)
    if user is not None:
        os.chown(".", user, user)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    program = os.fork()
    if program == 0:
        try:
            os.dup2(text, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            confine(task, user, isolated)
            home = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
            threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
            os.execve(task["python"], [task["python"], "-B", "-s", "-P", "program.py"], home | threads)
        except BaseException as error:
            os.write(report, _line(error=str(error)))
        os._exit(1)
    status, code = watch(program, task, None if isolated else folder)
    os.write(report, _line(status=status, code=code, missing=task["missing"]))


def watch(program, task, folder):
    """How it ended: "ended" with a code, or the limit it went over; ``folder`` is one that nothing else bounds."""
    end = time.monotonic() + task["seconds"]
    limit = task["memory_bytes"] // resource.getpagesize()
    while True:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == program:
                    code = os.waitstatus_to_exitcode(found[1])
                    ignored = code == -signal.SIGKILL and cpu_used() > task["cpu_seconds"] / 2
                    return "time" if code == -signal.SIGXCPU or ignored else "ended", code
        if time.monotonic() > end:
            return "time", None
        used = descendants()
        if sum(used.values()) > limit:
            return "memory", None
        if len(used) > 2 * task["processes"]:
            return "processes", None
        if folder is not None and written(folder) > 4 * task["file_bytes"]:
            return "disk", None
        signal.sigtimedwait([signal.SIGCHLD], _POLL_S)


def written(folder):
    """Bytes on the disk, of all files that a folder names."""
    blocks = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                blocks += os.lstat(os.path.join(path, name)).st_blocks
    return 512 * blocks


def cpu_used():
    """Seconds, of what has ended; the kernel counts coarsely, and for its limit otherwise."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main():
    """See above; arguments: the descriptor for the report, the process that asks; the task comes on standard input."""
    report, owner = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(report, False)
    _prctl(1, signal.SIGKILL)
    if os.getppid() != owner:
        return
    task = json.load(sys.stdin)
    task["id"], task["missing"], isolated = os.getpid(), [], False
    _prctl(36, 1)  # orphans come to this process
    groups = control_groups(task["memory_bytes"] + 8 * task["file_bytes"], task["processes"] + 8)
    try:
        if task["namespaces"]:
            isolate()
            isolated = True
    except OSError as error:
        task["missing"].append(f"namespaces ({error})")
    if not isolated and _LIBC.syscall(_LANDLOCK, None, ctypes.c_size_t(0), 1) < 1:
        task["missing"].append("Landlock")
    if not groups:
        task["missing"].append("control groups")
    supervisor = os.fork()
    if supervisor == 0:
        try:
            supervise(task, report, isolated, groups)
        except BaseException as error:
            os.write(report, _line(error=f"{type(error).__name__}: {error}"))
        os._exit(0)
    os.waitpid(supervisor, 0)
    if not isolated:
        sweep()
    for folder in groups:
        for _ in range(100):  # a process that has ended leaves its group a moment later
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.01)


if __name__ == "__main__":
    main()
