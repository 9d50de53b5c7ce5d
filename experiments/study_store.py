"""The teacher of a pair, run once for all methods and seeds of a study, and stored.

The folder of a pair then holds the store, `answers/`, beside the runs; `answers.yaml`, the terms of all methods that
read it; `answers.json`, the names of these methods; and the output, `answers.txt`.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import yaml
from runner import CONSOLE, configs, forks

from distill.errors import UserError

STORE = "answers"
"""Name of the store in the folder of a pair."""
_SPLITS = "--splits=[train,val,test]"


def fixed_draws(draws: int | None) -> tuple[str, ...]:
    """Arguments with which all runs see the same versions of each image, whatever their seed; none if not wanted."""
    return () if draws is None else (f"--data.draws={draws}", "--data.seed=0")


def replay(root: Path) -> tuple[str, ...]:
    """Arguments that replace the teacher by its stored answers, given the folder of the pair."""
    return ("--model.teacher=StoredTeacher", f"--model.teacher.path={root / STORE}")


def store(root: Path, base: Sequence[str], methods: Mapping[str, Sequence[str]]) -> list[str]:
    """Store the answers of a pair's teacher for all methods, in a process of its own.

    What is stored already stays. A method whose terms cannot be stored, such as one that compares whole feature maps,
    is left out, and is to run with the teacher itself.

    Args:
        root: folder of the pair.
        base: arguments of `distill store` without any method, for data and teacher.
        methods: arguments of `distill fit` by method.

    Returns:
        The methods that read the store.

    Raises:
        UserError: nothing could be stored.
    """
    file = root / f"{STORE}.json"
    given = {name: [list(each), configs(each)] for name, each in {"": base, **methods}.items()}
    if not (file.exists() and json.loads(file.read_text())["given"] == given):
        root.mkdir(parents=True, exist_ok=True)
        log = root / f"{STORE}.txt"
        with CONSOLE.status(f"storing the teacher's answers in {root / STORE}"):
            process = forks().Process(target=_work, args=(root, base, methods, given, log))
            process.start()
            try:
                process.join()
            finally:
                process.terminate()
        if process.exitcode:
            lines = log.read_text().splitlines() if log.exists() else []
            raise UserError(
                f"the teacher's answers could not be stored (see {log}): {lines[-1] if lines else 'nothing'}"
            )
    stored: list[str] = json.loads(file.read_text())["methods"]
    for method in methods.keys() - stored:
        CONSOLE.print(f"{method}: runs with the teacher itself", markup=False, highlight=False, soft_wrap=True)
    return stored


def _work(
    root: Path, base: Sequence[str], methods: Mapping[str, Sequence[str]], given: Mapping[str, Any], log: Path
) -> None:
    with open(log, "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from distill.files import write_atomic

    try:
        names = store_terms(root, base, methods)
    except UserError as error:
        print(f"distill: {error}", flush=True)
        os._exit(2)
    write_atomic(root / f"{STORE}.json", json.dumps({"methods": names, "given": given}, indent=1).encode())


def store_terms(root: Path, base: Sequence[str], methods: Mapping[str, Sequence[str]]) -> list[str]:
    """Run `distill store` with the terms of all methods at once; return the methods that read the store."""
    terms: dict[str, Any] = {}
    owners: dict[str, str] = {}
    callbacks: list[Any] = []
    for method, arguments in methods.items():
        tree = _configuration(arguments)
        if tree["model"]["teacher"] is None or tree["model"]["teachers"]:
            continue
        if tree["data"].get("init_args", {}).get("train_views"):
            print(f"{method} is not stored: it sees other views of the images", flush=True)
            continue
        added = {f"{method}__{name}": term for name, term in tree["model"]["heads"].items()}
        terms |= added
        owners |= dict.fromkeys(added, method)
        callbacks += [each for each in tree["trainer"]["callbacks"] or () if each not in callbacks]
    first = next((number for number, each in enumerate(base) if not each.startswith("--config=")), len(base))
    while terms:
        config = root / f"{STORE}.yaml"
        config.write_text(yaml.safe_dump({"model": {"heads": terms}, "trainer": {"callbacks": callbacks or None}}))
        try:
            _distill(["store", *base[:first], f"--config={config}", *base[first:], f"--output={root / STORE}", _SPLITS])
        except UserError as error:  # of a term, it begins with the term's key
            refused = re.match(r"model\.heads\.([^.:]+)", str(error))
            if refused is None or refused[1] not in owners:
                raise
            print(f"{owners[refused[1]]} is not stored: {error}", flush=True)
            terms = {name: term for name, term in terms.items() if owners[name] != owners[refused[1]]}
        else:
            break
    return sorted({owners[name] for name in terms})


def _distill(arguments: Sequence[str]) -> None:
    from distill.cli.program import run as distill

    distill(list(arguments))


def _configuration(arguments: Sequence[str]) -> Any:
    """Return the whole configuration that arguments of `distill fit` make."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        _distill(["fit", *arguments, "--print_config"])
    return yaml.safe_load(text.getvalue())
