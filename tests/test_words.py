"""The words of the code: the field's terms, in American spelling, and docstrings that say what a thing is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "distill").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])

FIELD_TERMS = {  # words that this code does not use, and the field's terms that it uses instead
    "see": "extract_features",
    "look": "forward_features",
    "readings": "feature_layers",
    "Wrap": "TorchModule",
    "Start": "After",
    "Stop": "Until",
    "decayed": "weight_decay_on",
    "scale_lr": "lr_scaling",
    "lr_batch": "lr_base_size",
    "UNCOUNTED": "IGNORE_INDEX",
    "keyed": "seeded_by",
    "seed_of": "derive_seed",
    "WholeCheckpointIO": "AtomicCheckpointIO",
    "write_whole": "write_atomic",
    "newest_whole": "latest_valid_checkpoint",
    "Curves": "ResumableCSVLogger",
    "FiniteWatch": "NonFiniteGuard",
    "making_lines": "construction_code",
    "loading_lines": "loading_code",
    "choices": "did_you_mean",
    "mistake_in": "find_user_error",
    "take_in": "find_user_error",
    "BenchmarkCC": "RepDistillerCC",
    "Convolution": "CastConv2d",
    "BatchNorm": "GlobalBatchNorm2d",
    "LinearMap": "CastLinear",
    "OnSphere": "L2Normalize",
    "Projection": "NormalizedLinear",
    "at": "attention_transfer",
    "ab": "activation_boundaries",
    "ft": "factor_transfer",
    "hcl": "hierarchical_context_loss",
    "Samples": "ImageDataset",
    "Part": "Subset",
    "Place": "SampleKey",
    "annotate": "extra_fields",
} | dict.fromkeys(
    ("told", "held", "made", "own", "other", "one", "few", "place"), "a name that says what the variable holds"
)
EXCEPTIONS = {
    "distill/errors.py": {"at"},  # error.at(key): no functional's name
    "distill/data/longtail.py": {"few"},  # few-shot classes
    **dict.fromkeys(  # `at=`: the tensors or layers where gradients are compared
        (
            *("distill/callbacks/gradient_meter.py", "distill/callbacks/gradient_shares.py"),
            *("distill/callbacks/weighing.py", "distill/cli/trainer.py", "distill/cli/weigh.py"),
            *("distill/gradients/__init__.py", "distill/gradients/accumulation.py"),
            "experiments/benchmarks/shares.py",
        ),
        frozenset({"at"}),
    ),
}
BRITISH = re.compile(
    r"neighbour|colour|centre|normalis|optimis|initialis|synchronis|summaris|standardis|recognis|minimis|maximis|"
    r"tokenis|behaviour|labelled|grey",
    re.IGNORECASE,
)
DIALECT_OPENINGS = re.compile(r"(What|How|Where|Whom|Whose)\b")


def identifiers(tree):
    """The names that a file defines or passes on, with their lines; not those that it reads off other packages."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, getattr(node, "lineno", 0)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.alias(name=name, asname=asname):
                yield asname or name.rpartition(".")[2], node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_names_are_the_fields_terms_in_american_spelling(file):
    wrong = [
        f"line {line}: {name} -> {FIELD_TERMS.get(name, 'American spelling')}"
        for name, line in identifiers(ast.parse(file.read_text()))
        if BRITISH.search(name)
        or (name in FIELD_TERMS and name not in EXCEPTIONS.get(str(file.relative_to(ROOT)), set()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_begin_with_a_noun_phrase_or_an_imperative_in_american_spelling(file):
    wrong = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            if DIALECT_OPENINGS.match(docstring) or BRITISH.search(docstring):
                wrong.append(docstring.splitlines()[0])
    assert not wrong, "\n".join(wrong)


def test_configurations_and_documents_are_in_american_spelling():
    documents = [path for ending in ("*.md", "*.yaml", "*.yml") for path in ROOT.rglob(ending)]
    tracked = [path for path in documents if not any(part.startswith(".venv") or part == "runs" for part in path.parts)]
    assert len(tracked) > 100
    wrong = {str(path): found[0] for path in tracked if (found := BRITISH.search(path.read_text()))}
    assert not wrong, wrong
