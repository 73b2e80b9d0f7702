"""Which system calls an untrusted program may make: a seccomp filter that lists them and knows no other.

What is not listed answers "Function not implemented", as on a kernel that lacks it: new processes, executables,
namespaces, mounts, sockets, io_uring, keyrings, ptrace and the memory of other processes, shared and anonymous files
that no limit counts, eBPF, performance counters, whatever a later kernel adds. `clone` makes threads only; `clone3`,
whose flags a filter cannot read, is unknown, and C libraries then take `clone`. `ioctl` answers that nothing is a
terminal, and Python then takes `fcntl`.
"""

from __future__ import annotations

import errno
import struct
from functools import cache

from hlwq.errors import UnsupportedError

# What is allowed, with the numbers that Linux's asm/unistd_64.h and asm-generic/unistd.h give it.
X86_64 = """
read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 preadv=295 pwritev=296 lseek=8 close=3 close_range=436 open=2
openat=257 creat=85 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293 fcntl=72 poll=7 ppoll=271 select=23 pselect6=270
epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281 sendfile=40 copy_file_range=326 stat=4 fstat=5 lstat=6
newfstatat=262 statx=332 access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267 getdents64=217 getcwd=79
chdir=80 fchdir=81 statfs=137 fstatfs=138 mkdir=83 mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264
renameat2=316 link=86 linkat=265 symlink=88 symlinkat=266 truncate=76 ftruncate=77 fallocate=285 fsync=74 fdatasync=75
chmod=90 fchmod=91 fchmodat=268 umask=95 utimensat=280 mmap=9 munmap=11 mremap=25 mprotect=10 madvise=28 brk=12
rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigtimedwait=128 rt_sigsuspend=130
sigaltstack=131 pause=34 kill=62 tkill=200 tgkill=234 alarm=37 getitimer=36 setitimer=38 nanosleep=35
clock_nanosleep=230 clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 times=100 getrusage=98 futex=202
set_robust_list=273 rseq=334 set_tid_address=218 membarrier=324 sched_yield=24 sched_getaffinity=204 getcpu=309
restart_syscall=219 arch_prctl=158 exit=60 exit_group=231 wait4=61 waitid=247 uname=63 sysinfo=99 getrandom=318
getrlimit=97 prlimit64=302 getpid=39 getppid=110 gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108 getresuid=118
getresgid=120 getgroups=115 getpgid=121 getpgrp=111 getsid=124 msync=26 listxattr=194 llistxattr=195 flistxattr=196
ioctl=16 clone=56
"""
AARCH64 = """
read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 preadv=69 pwritev=70 lseek=62 close=57 close_range=436
openat=56 dup=23 dup3=24 pipe2=59 fcntl=25 ppoll=73 pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22
sendfile=71 copy_file_range=285 fstat=80 newfstatat=79 statx=291 faccessat=48 faccessat2=439 readlinkat=78
getdents64=61 getcwd=17 chdir=49 fchdir=50 statfs=43 fstatfs=44 mkdirat=34 unlinkat=35 renameat=38 renameat2=276
linkat=37 symlinkat=36 truncate=45 ftruncate=46 fallocate=47 fsync=82 fdatasync=83 fchmod=52 fchmodat=53 umask=166
utimensat=88 mmap=222 munmap=215 mremap=216 mprotect=226 madvise=233 brk=214 rt_sigaction=134 rt_sigprocmask=135
rt_sigreturn=139 rt_sigpending=136 rt_sigtimedwait=137 rt_sigsuspend=133 sigaltstack=132 kill=129 tkill=130 tgkill=131
getitimer=102 setitimer=103 nanosleep=101 clock_nanosleep=115 clock_gettime=113 clock_getres=114 gettimeofday=169
times=153 getrusage=165 futex=98 set_robust_list=99 rseq=293 set_tid_address=96 membarrier=283 sched_yield=124
sched_getaffinity=123 getcpu=168 restart_syscall=128 exit=93 exit_group=94 wait4=260 waitid=95 uname=160 sysinfo=179
getrandom=278 getrlimit=163 prlimit64=261 getpid=172 getppid=173 gettid=178 getuid=174 geteuid=175 getgid=176
getegid=177 getresuid=148 getresgid=150 getgroups=158 getpgid=155 getsid=156 msync=227 listxattr=11 llistxattr=12
flistxattr=13 ioctl=29 clone=220
"""
MACHINES = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
"""Of each machine: what the kernel calls it in a filter, and its numbers."""

LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Offsets in the kernel's `struct seccomp_data`; of an argument, the low half."""
KILL, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x00050000
CLONE_THREAD, CLONE_NEW_NAMESPACES = 0x10000, 0x7E020080


@cache
def filter_for(machine: str) -> bytes:
    """The filter as the kernel takes it: instructions of 8 bytes.

    Args:
        machine: as `platform.machine()` has it.

    Raises:
        UnsupportedError: the numbers of this machine's system calls are not known here.
    """
    if machine not in MACHINES:
        known = " and ".join(MACHINES)
        raise UnsupportedError(f"Programs can be isolated on {known} only, and this is {machine}: use another machine.")
    architecture, table = MACHINES[machine]
    numbers = {name: int(number) for name, number in (entry.split("=") for entry in table.split())}
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    clone, ioctl = numbers.pop("clone"), numbers.pop("ioctl")
    for number in numbers.values():
        program += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    program += [
        (JUMP_IF_EQUAL, 0, 1, ioctl),
        (RETURN, 0, 0, ERROR | errno.ENOTTY),
        (JUMP_IF_EQUAL, 1, 0, clone),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (AND, 0, 0, CLONE_THREAD | CLONE_NEW_NAMESPACES),
        (JUMP_IF_EQUAL, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
