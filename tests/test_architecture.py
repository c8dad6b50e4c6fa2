"""Imports point one way: no circle, method and cache apart, stages apart, inference light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "ood_heatmap": "ood_heatmap",
    "ood_heatmap/adapters": "ood_heatmap.adapters",
    "pipeline": "ood_heatmap.pipeline",
    "cache": "ood_heatmap.cache",
}
# the command line, and what belongs to it
FRONT = {
    f"ood_heatmap.{name}"
    for name in ("cli", "cli_stages", "cli_tools", "config_file", "options", "output", "__main__")
}
STAGES = {"index", "targets", "train", "evaluate", "localize", "predict", "export", "verify"}


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {node.module, *names} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Return module to the modules of the package that it imports."""
    files = {
        f"{package}.{path.stem}": path
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).glob("*.py")
        if path.stem != "__init__"
    }
    return {name: imports_of(path, set(files)) - {name} for name, path in files.items()}


def test_no_module_imports_itself_through_others(graph):
    # the one exception: a run is opened by a function of the pipeline, inside HeatmapDetector.load
    graph = {name: set(imported) for name, imported in graph.items()}
    graph["ood_heatmap.detector"].discard("ood_heatmap.pipeline.load")
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_cache_knows_only_errors_and_cores(graph):
    for name, imported in graph.items():
        if name.startswith("ood_heatmap.cache."):
            assert {item for item in imported if not item.startswith("ood_heatmap.cache.")} <= {
                "ood_heatmap.errors",
                "ood_heatmap.cores",
            }


def test_the_method_knows_neither_cache_nor_pipeline(graph):
    for name, imported in graph.items():
        if name.count(".") == 1 and name not in FRONT:
            above = {item for item in imported if item.count(".") == 2}
            assert above <= ({"ood_heatmap.pipeline.load"} if name.endswith(".detector") else set())


def test_adapters_know_neither_each_other_nor_stages(graph):
    adapters = {name for name in graph if name.startswith("ood_heatmap.adapters.")}
    for name in adapters:
        assert not graph[name] & adapters, name
        pipeline = {item for item in graph[name] if item.startswith("ood_heatmap.pipeline.")}
        # the model card has figures of the run
        assert pipeline <= ({"ood_heatmap.pipeline.run"} if name.endswith(".hub") else set()), name
    # training calls the callbacks
    used = {name for name in graph if graph[name] & adapters}
    assert used <= {"ood_heatmap.pipeline.train"}


def test_no_stage_imports_another(graph):
    names = {f"ood_heatmap.pipeline.{stage}" for stage in STAGES}
    for name in names:
        assert not graph[name] & names, name


def test_inference_loads_no_training_code():
    code = "import sys, ood_heatmap.detector; print(*sorted(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "ood_heatmap.detector" in output
    assert not [name for name in output if name.startswith(("ood_heatmap.pipeline.", "faiss"))]


def test_opening_a_run_loads_no_training_code():
    code = "import sys, ood_heatmap.pipeline.load; print(*sorted(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    makers = {f"ood_heatmap.pipeline.{name}" for name in (*STAGES, "feed", "step", "stage")}
    assert not makers & set(output)


def test_libraries_that_take_seconds_are_loaded_where_they_are_used():
    """Several stages import these modules for a constant; torchvision alone takes a second."""
    stages = ", ".join(f"ood_heatmap.pipeline.{name}" for name in sorted(STAGES))
    code = f"import sys, {stages}; print(*sorted(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "ood_heatmap.baselines" in output
    slow = {"pandas", "pytorch_ood", "scipy.optimize", "scipy.stats", "sklearn", "torchvision"}
    assert not slow & set(output)


def test_only_the_command_line_configures_the_allocator_of_the_process():
    """By no module that a library's user imports, directly or through the stages' device."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if module in {*FRONT, "ood_heatmap.devices"}:
                continue
            named = {
                getattr(node, "id", getattr(node, "attr", getattr(node, "name", "")))
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
            }
            assert not named & {"keep_freed_memory", "stage_device", "mallopt"}, path
