"""The walls of the pack: who imports whom, what is shipped, what an installation needs. Source is read, not imported."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av_names
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODEL_FILES = sorted((ROOT / "model").rglob("*.py"))
NODE_FILES = sorted((ROOT / "nodes").rglob("*.py"))
PACK_FILES = [ROOT / "__init__.py", *MODEL_FILES, *NODE_FILES]

BASE = {"errors", "options", "shapes", "values", "layers"}
STAGES = {"text", "conditioning", "transformer", "sampler", "latents", "codec"}
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "shapes": {"errors"},
    "values": {"errors", "shapes"},
    "layers": BASE - {"layers"},
    **dict.fromkeys(("text", "transformer", "sampler", "latents"), BASE),
    **dict.fromkeys(("codec", "conditioning"), BASE | {"latents"}),
    "provenance": BASE,
    "paths": {"errors"},
    "media": BASE | {"paths", "provenance"},
    "measure": BASE | {"media"},
    "residency": BASE,
    "checkpoint": BASE | STAGES | {"paths"},
    "embedded": BASE | STAGES | {"checkpoint", "media", "measure"},
    "denoiser": BASE
    | {"conditioning", "latents", "sampler", "transformer"},  # where the sampler's function meets the model
    "forecast": BASE | STAGES | {"checkpoint", "denoiser", "residency"},
    "recipes": BASE | {"sampler"},
    "two_stage": BASE,
    "trajectory": BASE,
    "step_probe": BASE | {"measure", "transformer"},
    # what the engine calls and does not keep: none of them knows it, nor one another beyond this
    "components": BASE | {"checkpoint", "codec", "recipes", "text", "two_stage"},
    "signals": BASE | {"codec", "latents", "media", "residency"},
    "run": BASE
    | {
        "checkpoint",
        "conditioning",
        "denoiser",
        "latents",
        "recipes",
        "sampler",
        "step_probe",
        "transformer",
    },
    "requests": BASE | {"recipes", "run", "sampler", "step_probe", "two_stage"},
    # what the engine keeps in memory; it alone calls it
    "loaded": BASE | {"checkpoint", "codec", "components", "forecast", "residency", "transformer"},
    "engine": BASE
    | STAGES
    | {
        "checkpoint",
        "components",
        "embedded",
        "loaded",
        "measure",
        "recipes",
        "requests",
        "residency",
        "run",
        "signals",
        "step_probe",
        "trajectory",
        "two_stage",
    },
    "cli": BASE
    | {
        "engine",
        "checkpoint",
        "media",
        "measure",
        "paths",
        "provenance",
        "recipes",
        "residency",
        "trajectory",
    },
}
NODES_MAY_IMPORT = {
    "engine",
    "embedded",
    "errors",
    "latents",
    "measure",
    "media",
    "paths",
    "provenance",
    "residency",
    "shapes",
    "trajectory",
    "values",
}
THIRD_PARTY = {"torch", "numpy", "safetensors", "einops", "av", "PIL", "tqdm"}
# torch brings Triton to some machines; nothing imports these files but where it is found
OPTIONAL = {"model/layers/triton_kernels.py": "triton"}


def imports(file: Path) -> Iterator[tuple[str, ...]]:
    """Every module that a file imports: ("torch", "nn"), or from the root as ("", "model", "errors") if relative."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield tuple((node.module or "").split("."))
        elif isinstance(node, ast.ImportFrom):
            start = ("", *package[: len(package) - node.level + 1])
            if node.module:
                yield (*start, *node.module.split("."))
            else:
                yield from ((*start, alias.name) for alias in node.names)


def part_of(file: Path) -> str:
    """The part of model/ that a file belongs to: its stage folder, or its own name at the top."""
    return file.relative_to(ROOT / "model").parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_model_parts_import_only_what_stands_below_them() -> None:
    for file in MODEL_FILES:
        part = part_of(file)
        if part == "__init__":
            continue
        assert part in MAY_IMPORT, f"say in MAY_IMPORT what model/{part} may import"
        for module in imports(file):
            if module[0] != "":
                continue
            assert module[1] == "model", f"{name_of(file)} reaches out of model/ for {'.'.join(module[1:])}"
            allowed = MAY_IMPORT[part] | {part}
            assert module[2] in allowed, (
                f"{name_of(file)} imports model/{module[2]}; it may: {sorted(allowed)}"
            )


# of what no node asks: a clip at once, a plan, a recipe or a device by its name
COMMAND_ALONE = {"cli", "components", "engine", "recipes", "residency"}


def sentences(file: Path) -> list[str]:
    """Every text of a file but the docstrings, the values in it left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    left_out = parts | {id(node.value) for node in plain}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            found.append(node.value)
    return found


def test_what_nodes_tell_too_names_no_option_as_if_it_were_theirs() -> None:
    told = {
        (name_of(file), sentence)
        for file in MODEL_FILES
        if part_of(file) not in COMMAND_ALONE | {"embedded"}
        for sentence in sentences(file)
        if re.search(r"(^|\s)--[a-z]", sentence)
    }
    assert {name for name, _ in told} == {
        "model/checkpoint/resolver.py",
        "model/checkpoint/tokenizer_source.py",
        "model/provenance.py",
    }
    assert [sentence for _, sentence in told if "give the command" not in sentence] == []
    assert [file.name for file in NODE_FILES if any("--" in sentence for sentence in sentences(file))] == []
    for file in NODE_FILES:
        for call in (
            n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)
        ):
            asked = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            assert asked not in ("generate", "plan"), f"{file.name}: its sentences name the command's options"
            assert asked != "choose_recipe" or not call.args, f"{file.name}: a recipe by name"


def test_the_packages_themselves_load_nothing() -> None:
    roots = [file for file in MODEL_FILES if file.name == "__init__.py"]
    loading = [f for f in roots if any(m[0] not in sys.stdlib_module_names for m in imports(f))]
    assert [name_of(file) for file in loading] == []


def test_model_needs_only_what_comfyui_installs_and_knows_no_comfyui() -> None:
    known = THIRD_PARTY | set(sys.stdlib_module_names)
    found = {
        name_of(f): {module[0] for module in imports(f) if module[0]} - known - {OPTIONAL.get(name_of(f))}
        for f in MODEL_FILES
    }
    assert not [
        name_of(f) for f in PACK_FILES for module in imports(f) if "/".join(module[1:]) + ".py" in OPTIONAL
    ]
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_tests_of_a_gpu_know_all_that_is_imported_of_pyav() -> None:
    found = {".".join(module) for f in MODEL_FILES for module in imports(f) if module[0] == "av"}
    parents = {name.rpartition(".")[0] for name in found} - {""}
    assert set(av_names.MODULES) == found | parents


def test_the_pack_never_imports_itself_by_an_absolute_name() -> None:
    # `nodes` would be ComfyUI's own module, `lockstep` a second copy of every class and of the weights.
    forbidden = {"lockstep", "nodes", "model"}
    assert [name_of(f) for f in PACK_FILES if forbidden & {module[0] for module in imports(f)}] == []


def test_only_the_host_file_knows_the_inside_of_comfyui() -> None:
    inside = {"comfy", "comfy_execution", "comfy_extras", "folder_paths", "server"}
    knowing = [f.name for f in PACK_FILES if inside & {module[0] for module in imports(f)}]
    assert set(knowing) <= {"host.py"}


def test_nodes_see_of_the_model_its_engine_and_values() -> None:
    for file in NODE_FILES:
        seen = {module[2] for module in imports(file) if module[:2] == ("", "model")}
        assert seen <= NODES_MAY_IMPORT, f"{name_of(file)} reaches past the engine: {sorted(seen)}"


def test_conversions_work_without_comfyui() -> None:
    assert not {module[0] for module in imports(ROOT / "nodes" / "types.py")} & {"comfy_api", "comfy"}


def test_every_file_says_what_it_does() -> None:
    silent = [f for f in PACK_FILES if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))]
    assert [name_of(file) for file in silent] == []


def test_import_rules_are_read_from_the_source_as_meant(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model" / "text" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch.nn\nfrom . import y\nfrom .. import errors\nfrom ..codec.mel import Mel\nfrom ...nodes import z\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [".".join(module) for module in imports(file)] == [
        "torch.nn",
        ".model.text.y",
        ".model.errors",
        ".model.codec.mel",
        ".nodes",
    ]


def test_shipped_packages_are_exactly_the_folders_of_model() -> None:
    folders = {
        "lockstep." + ".".join(f.relative_to(ROOT).parts[:-1]) for f in MODEL_FILES if f.name == "__init__.py"
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {"lockstep", *folders}


def test_every_folder_with_code_is_a_package() -> None:
    assert [name_of(f) for f in MODEL_FILES if not (f.parent / "__init__.py").exists()] == []


def git_files(*which: str) -> set[str]:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", *which]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no git repository here: {done.stderr.strip()}")
    return set(done.stdout.splitlines())


def shipped() -> set[str]:
    """What a release holds, as comfy-cli packs it: what git knows, without what .comfyignore names."""
    return git_files() - git_files("--cached", "--ignored", "--exclude-from", str(ROOT / ".comfyignore"))


def test_a_release_holds_the_pack_and_nothing_beside_it() -> None:
    release = shipped()
    left_out = git_files() - release
    assert {name.split("/")[0] for name in left_out} == {".ci", ".comfyignore", ".gitignore", "tests"}
    assert {name.split("/")[0] for name in release} == {
        *("__init__.py", "model", "nodes", "locales", "web", "workflows"),
        *("LICENSE", "README.md", "pyproject.toml", "requirements.txt"),
    }
    assert [name for name in release if (ROOT / name).is_symlink()] == []
    assert [name for name in release if "__pycache__" in name or re.search(r"\.py[cod]$", name)] == []


def test_all_that_the_pack_imports_of_itself_is_in_a_release() -> None:
    release = shipped()
    needed = {
        source_of(module): name_of(file)
        for file in PACK_FILES
        if name_of(file) in release
        for module in imports(file)
        if module[0] == ""
    }
    assert {name: by for name, by in needed.items() if name not in release} == {}
    assert "model/embedded/weights/lockstep-embedded.safetensors" in release


def source_of(module: tuple[str, ...]) -> str:
    """The file of a module of ours, or of a name within one."""
    path = ROOT.joinpath(*module)
    if path.is_dir():
        return name_of(path / "__init__.py")
    file = path.with_suffix(".py")
    return name_of(file if file.exists() else path.parent / "__init__.py")


def test_requirements_are_the_package_s_dependencies_and_leave_torch_to_the_host() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert lines == PROJECT["project"]["dependencies"]
    assert not [line for line in lines if line.startswith("torch")]


def test_readme_commands_install_the_extras_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"standalone", "test"} <= set(extras)
    assert 'pip install ".[standalone]"' in readme
    assert 'pip install -e ".[standalone,test]"' in readme
    assert "python -m pytest" in readme


def test_the_table_of_complaints_names_tests_that_exist() -> None:
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 26))
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", table):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
