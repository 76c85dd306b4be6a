"""Programs that try to get out of the sandbox or to fake success, for tests/test_sandbox.py.

Each defines `add`, and its answer is right only where the attack works: a program that passes has got out. As a script
it prints, as JSON, the outcome of each; so another user than the tests' own can run them: it needs the standard library
and a few files of the package alone.
"""

import json
import sys
from typing import Any

SECONDS = 1.5
MEMORY = 256 << 20

_ATTACKS = {
    "connect to a listener": """
        import socket
        socket.create_connection(("127.0.0.1", PORT), timeout=1).sendall(b"out")""",
    "connect by a bare system call": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(SOCKET_CALL, 2, 1, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        address = (2).to_bytes(2, "little") + PORT.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
        assert libc.connect(fd, address, 16) == 0""",
    "fetch a page": """
        import urllib.request
        urllib.request.urlopen("http://127.0.0.1:%d/" % PORT, timeout=1)""",
    "open a listener": """
        import socket
        socket.create_server(("127.0.0.1", 0))""",
    "fork bomb": """
        import os
        while True:
            os.fork()""",
    "thread": """
        import threading
        threading.Thread(target=print).start()""",
    "start a program": """
        import subprocess, sys
        subprocess.run([sys.executable, "-c", ""], check=True)""",
    "daemon": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)""",
    "memory bomb": """
        held = []
        while len(held) < 1024:
            held.append(bytearray(16 << 20))""",
    "memory in one piece": """
        bytearray(64 << 30)""",
    "memory in a memory file": """
        import os
        os.memfd_create("x")""",
    "memory in shared segments": """
        import ctypes
        assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0""",
    "fill the temporary folder": """
        for number in range(64):
            with open("/tmp/%d" % number, "wb") as file:
                file.write(bytes(16 << 20))""",
    "raise the limits": """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))""",
    "delete a file": """
        import os
        os.remove(TARGET)""",
    "delete everything": """
        import os, shutil
        shutil.rmtree("/", ignore_errors=True)
        assert not os.path.exists(os.__file__)""",
    "write outside": """
        open(TARGET, "w").write("gone")""",
    "write beside the system": """
        open("/written", "w")""",
    "write into the interpreter": """
        import os
        open(os.__file__, "a")""",
    "read a file": """
        open(TARGET).read()""",
    "read the passwords": """
        open("/etc/shadow").read()""",
    "look at root's home": """
        import os
        assert [name for name in os.listdir("/root") if name not in PREFIX.split("/")]""",
    "follow a link out": """
        import os
        os.symlink(TARGET, "/tmp/link")
        open("/tmp/link").read()""",
    "write through a link": """
        import os
        os.symlink(os.path.dirname(TARGET), "/tmp/folder")
        open("/tmp/folder/" + os.path.basename(TARGET), "a")""",
    "look into other processes": """
        import os
        os.listdir("/proc/1")""",
    "read the environment": """
        import os
        os.environ["SLMFAST_SECRET"]""",
    "kill the tests": """
        import os
        os.kill(PARENT, 9)""",
    "kill the parent": """
        import os, time
        os.kill(os.getppid(), 9)
        time.sleep(0.2)
        try:
            os.kill(os.getppid(), 0)
        except ProcessLookupError:
            pass
        else:
            raise RuntimeError("it lives")""",
    "kill everything": """
        import os
        os.kill(-1, 9)""",
    "be root": """
        import os
        os.setuid(0)
        os.listdir("/root")""",
    "a namespace of its own": """
        import ctypes
        assert ctypes.CDLL(None).unshare(0x10000000) == 0""",
    "a namespace by clone": """
        import ctypes
        child = ctypes.CDLL(None).syscall(CLONE_CALL, 0x10000000 | 17, 0, 0, 0, 0)
        assert child >= 0""",
    "trace": """
        import ctypes
        assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0""",
    "endless loop": """
        while True:
            pass""",
    "endless sleep": """
        import time
        time.sleep(1000)""",
    "endless loop that ignores signals": """
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass""",
    "crash": """
        import ctypes
        ctypes.string_at(0)""",
    "exit": """
        import sys
        sys.exit(0)""",
    "exit at once": """
        import os
        os._exit(0)""",
}

# Whole programs: what they answer is wrong, and they try to have it taken for right.
_FAKES = {
    "exit on loading": "import os\nos._exit(0)",
    "exit politely on loading": "import sys\nsys.exit(0)",
    "no function": "x = 1",
    "no program": "def add(a, b:",
    "always equal": (
        "class Yes(int):\n    __eq__ = lambda self, other: True\n    __hash__ = int.__hash__\n"
        "def add(a, b): return Yes(0)"
    ),
    "an object of its own": "class Yes:\n    __eq__ = lambda self, other: True\ndef add(a, b): return Yes()",
    "no assertions": "import builtins\nbuiltins.AssertionError = Warning\ndef add(a, b): return 0",
    "catch all": "def add(a, b):\n    try:\n        return 0\n    except BaseException:\n        return 5",
    "patch the guest": (
        "import sys\nguest = sys.modules['__main__']\n"
        "guest.run_tests = guest.encode = lambda *a: None\nguest._told = lambda e: ''\ndef add(a, b): return 0"
    ),
    "patch the frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals['Unanswered'] = Warning\n"
        "    frame.f_globals['passed'] = True\n    frame = frame.f_back\ndef add(a, b): return 0"
    ),
    "forge the verdict": (
        "import os\nfor fd in range(64):\n    try:\n"
        '        os.write(fd, b\'{"passed": true, "reason": "all tests passed"}\\n\' * 2)\n'
        "    except OSError:\n        pass\ndef add(a, b): return 0"
    ),
    "forge the verdict at the end": (
        "import atexit, os\n@atexit.register\ndef forge():\n    for fd in range(64):\n        try:\n"
        '            os.write(fd, b\'{"passed": true, "reason": ""}\\n\')\n'
        "        except OSError:\n            pass\ndef add(a, b): raise SystemExit"
    ),
    "huge output": (
        "import os\ndef add(a, b):\n    for fd in range(64):\n        try:\n            for _ in range(64):\n"
        "                os.write(fd, bytes(1 << 20))\n        except OSError:\n            pass\n    return a + b"
    ),
    "huge answer": "def add(a, b): return 'x' * (64 << 20)",
    "endless answer": "import itertools\ndef add(a, b): return itertools.count()",
    "deep answer": (
        "import os\ndef add(a, b):\n    for fd in range(3, 64):\n        try:\n"
        "            os.write(fd, b'[' * 50000 + b'\\n')\n        except OSError:\n            pass\n    return a + b"
    ),
    "mangled answer": (
        "import os\ndef add(a, b):\n    for fd in range(3, 64):\n        try:\n"
        '            os.write(fd, b\'["value", ["set", [["list", []]]]]\\n\')\n'
        "        except OSError:\n            pass\n    return a + b"
    ),
}
NAMES = [*_ATTACKS, *_FAKES]


def programs(facts: dict[str, Any]) -> dict[str, str]:
    """The programs' source by name; `facts` are what an attacker knows: PORT, TARGET, PARENT, PREFIX and so on."""
    known = "".join(f"{name} = {value!r}\n" for name, value in facts.items())
    attacks = {
        name: f"{known}def add(a, b):{attack.replace(chr(10) + '    ', chr(10))}\n    return a + b\n"
        for name, attack in _ATTACKS.items()
    }
    return attacks | {name: known + fake for name, fake in _FAKES.items()}


def outcomes(facts: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Runs every program; the key "honest" is one that is right."""
    from slmfast.sandbox import run_program

    everything = programs(facts) | {"honest": "def add(a, b): return a + b"}
    limits: dict[str, Any] = {"seconds": SECONDS, "memory_bytes": MEMORY}
    return {
        name: tuple(run_program(source, tests="assert add(2, 3) == 5", entry_point="add", **limits))
        for name, source in everything.items()
    }


if __name__ == "__main__":
    print(json.dumps(outcomes(json.loads(sys.argv[1]))))
