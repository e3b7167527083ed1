"""The house stands: nothing imports upward, the top level is what it says, files stay readable, planning stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FLOORS = {
    **dict.fromkeys(
        (
            "backtrack",
            "config",
            "task_config",
            "reward_config",
            "cluster_config",
            "monitor_config",
            "dpo_config",
            "engine_config",
            "evaluate_config",
            "experiment_config",
            "grpo_config",
            "prm_config",
            "step_metrics",
            "search_config",
            "arguments",
            "settings_file",
            "tasks",
            "store",
            "telemetry",
            "rollout_log",
            "statistics",
            "metrics",
            "breakdown",
            "causal",
            "passes",
            "install",
        ),
        0,
    ),
    "verifiers": 1,
    "rewards": 2,
    "actors": 3,
    **dict.fromkeys(("card", "claims", "figures", "headline", "report", "search_page", "stages"), 4),
    "runner": 5,
    **dict.fromkeys(("calibrate", "compare", "view"), 6),
    "study": 7,
    "cli": 8,
    "run": 9,
}
TOP_LEVEL = {
    "pyproject.toml", "pipeline", "actors", "rewards", "verifiers", "tests", "configs", "run.py",
    "README.md", "LICENSE", "Makefile", "docs", "benchmarks",
}  # fmt: skip


def git_files(*arguments: str) -> list[str]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "-z", *arguments]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [name for name in out.split("\0") if name and (REPOSITORY / name).is_file()]


def own_modules() -> list[str]:
    """Files of the program itself."""
    parts = [path for name in ("pipeline", "actors", "rewards", "verifiers") for path in (REPOSITORY / name).rglob("*.py")]
    return [str(path.relative_to(REPOSITORY)) for path in [*parts, REPOSITORY / "run.py"]]


def room(module: str) -> str | None:
    """`pipeline.stages.sft` -> stages, `verifiers.judge` -> verifiers; None for other people's modules and bare packages."""
    parts = module.split(".")
    if parts[0] == "pipeline":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("verifiers", "rewards", "actors", "run") else None


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported(node: ast.AST, package: str) -> list[str]:
    """Full names of all modules that a tree imports, within functions too; those for type checkers alone are left out."""
    if only_for_types(node):
        assert isinstance(node, ast.If)
        return [name for child in node.orelse for name in imported(child, package)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
        first = node.args[0]
        # `import_module(f"pipeline.stages.{name}")`: what is fixed at its beginning says the room.
        text = first.values[0] if isinstance(first, ast.JoinedStr) else first
        named = [text.value] if isinstance(text, ast.Constant) and isinstance(text.value, str) else []
    else:
        named = []
    return named + [name for child in ast.iter_child_nodes(node) for name in imported(child, package)]


@pytest.mark.parametrize("file", own_modules())
def test_nothing_imports_upward(file: str) -> None:
    package = ".".join(Path(file).parent.parts)
    own = room(".".join(Path(file).with_suffix("").parts))
    if own is None or own == "__init__":
        own = "config"  # a bare package is ground floor
    assert own in FLOORS, f"{file} has no floor: give it one here and in the design"
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    for name in imported(tree, package):
        other = room(name)
        assert other is None or FLOORS[other] <= FLOORS[own], f"{file} imports {name} from a floor above"


def test_the_import_reader_reads() -> None:
    code = (
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import seen\n"
        "def f():\n    from . import near\n    from ..up import far\n    importlib.import_module(f'pipeline.stages.{x}')\n"
    )
    wanted = ["a.b", "c.d", "seen", "pipeline.stages.near", "pipeline.up.far", "pipeline.stages."]
    assert imported(ast.parse(code), "pipeline.stages") == wanted
    assert [room(name) for name in wanted] == [None, None, None, "stages", "up", "stages"]


def test_the_top_level_is_what_the_design_says() -> None:
    found = {name.split("/")[0] for name in git_files() if not name.startswith(".")}
    assert found <= TOP_LEVEL
    assert {"pyproject.toml", "pipeline", "actors", "verifiers", "tests", "configs", "run.py", "LICENSE", "Makefile"} <= found


def test_no_file_is_long() -> None:
    long = {}
    for name in git_files("--cached", "--others", "--exclude-standard"):
        if name.split("/")[0] != "tests":
            lines = (REPOSITORY / name).read_bytes().count(b"\n")
            if lines > 500:
                long[name] = lines
    assert not long


@pytest.mark.parametrize("module", ["pipeline.runner", "pipeline.cli", "pipeline.stages.graph"])
def test_planning_needs_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'ray', 'transformers', 'vllm', 'trl'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
